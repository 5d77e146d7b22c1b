"""Main function of a local worker process: make the plan once, then run the nodes that the driver names."""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any, BinaryIO, NoReturn

from headwater.runs.executors.base import Failure
from headwater.runs.executors.remote import Message, Worker


def serve(setup: dict[str, Any]) -> NoReturn:
    """Run the nodes that the driver sends until it closes the pipe."""
    sink = os.dup(1)
    os.dup2(2, 1)  # output of libraries must not mix with the messages
    inbox: queue.SimpleQueue[str] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, inbox, stop), daemon=True).start()

    def send(message: Message) -> None:
        os.write(sink, json.dumps(message).encode() + b"\n")

    name = ""
    try:
        with Worker.prepare(setup) as worker:
            while True:
                name = inbox.get()
                send(worker.run(name, send, stop.is_set))
    except Exception as error:
        send({"broken": name, "failure": Failure.of(error).to_json()})
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # a normal exit would wait for the thread that reads


def _listen(source: BinaryIO, inbox: queue.SimpleQueue[str], stop: threading.Event) -> None:
    for line in source:
        message = json.loads(line)
        if "run" in message:
            inbox.put(message["run"])
        else:
            stop.set()
    os._exit(0)  # the driver is gone, so this process must not write to the folder any more
