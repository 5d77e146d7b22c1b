"""A worker process of `processes`: it lays out the plan from the recipe, then runs the nodes that it is handed by name."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from headwater.config.recipe import Recipe
from headwater.errors import UserError
from headwater.runs.executors.base import Failure, run_marked
from headwater.runs.node_context import NodeContext, NodeProgress
from headwater.runs.setup import prepared
from headwater.storage.run_dir import RunDir
from headwater.training.update import Metrics

TELL_SECONDS = 0.1  # progress is passed on at most so often

Tell = Callable[[dict[str, Any]], None]


def serve(setup: dict[str, Any]) -> NoReturn:
    """The worker's life: run what it is told to, until its parent is gone."""
    sink = os.dup(1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the messages
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, inbox, stop), daemon=True).start()

    def tell(message: dict[str, Any]) -> None:
        os.write(sink, json.dumps(message).encode() + b"\n")

    try:
        _work(setup, inbox, stop, tell)
    except Exception as error:
        tell({"broken": Failure.of(error).written()})
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # an ordinary end would wait for the thread that reads


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[str], stop: threading.Event) -> None:
    for line in source:
        message = json.loads(line)
        if "run" in message:
            inbox.put(message["run"])
        else:
            stop.set()
    os._exit(0)  # the parent is gone, so this process must not write to the folder any more


def _work(setup: dict[str, Any], inbox: queue.SimpleQueue[str], stop: threading.Event, tell: Tell) -> NoReturn:
    recipe = Recipe.model_validate(setup["recipe"])
    with prepared(recipe, setup["arms"], setup["seeds"]) as (plan, inputs):
        nodes = {plan.names[node]: node for node in plan.order()}
        while True:
            name = inbox.get()
            if name not in nodes:
                raise UserError(f"{name}: data, models or code changed while the study ran; run it again")
            watch, flush = telling(tell, stop.is_set)
            try:
                if stop.is_set():
                    raise KeyboardInterrupt
                tell({"begun": name})
                run_marked(nodes[name], NodeContext(plan, inputs, RunDir(Path(setup["out"])), watch))
            except KeyboardInterrupt:
                if not stop.is_set():
                    raise
                tell({"stopped": name})
            except Exception as error:
                tell({"ended": name, "failure": Failure.of(error).written()})
            else:
                flush()
                tell({"ended": name, "failure": None})


def telling(tell: Tell, stopped: Callable[[], bool]) -> tuple[NodeProgress, Callable[[], None]]:
    """A watch whose progress goes to whoever handed out the node in few messages, and a function that passes on what is left."""
    count, facts, last = 0, {}, 0.0  # type: int, Metrics, float

    def start(done: int, total: int, unit: str) -> None:
        flush()
        tell({"start": [done, total, unit]})

    def advance(more: int, metrics: Metrics) -> None:
        nonlocal count, facts
        count, facts = count + more, metrics or facts
        if time.monotonic() - last > TELL_SECONDS:
            flush()

    def flush() -> None:
        nonlocal count, facts, last
        if count:
            tell({"advance": count, "metrics": facts})
        count, facts, last = 0, {}, time.monotonic()

    watch = NodeProgress(start, advance, stopped, lambda said: tell({"warn": said}), lambda line: tell({"say": line}))
    return watch, flush
