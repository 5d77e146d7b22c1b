"""Trackers: what a run writes down of its steps, told to tensorboard, Weights & Biases or trackio as it comes.

They read metrics.jsonl like anyone else, so training knows nothing of them, whichever process runs a node.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

from headwater.errors import UserError
from headwater.runs.node_context import NodeProgress, ProgressDisplay
from headwater.storage.files import rows_from
from headwater.storage.run_dir import NodeDir, RunDir, read_json, write_json
from headwater.training.update import Metrics

EVERY_SECONDS = 2.0


class Sink(Protocol):
    """One tracker."""

    def log(self, node: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tensorboard:
    writer: Any

    @classmethod
    def opened(cls, out: RunDir) -> Tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(out.trackers / "tensorboard")))

    def log(self, node: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{node}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Hosted:
    """wandb or trackio, which are called alike: a run a node's name stands in front of, since steps of nodes overlap."""

    run: Any
    finish: Callable[[], Any]

    def log(self, node: str, step: int, values: Mapping[str, float]) -> None:
        self.run.log({f"{node}/step": step, **{f"{node}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        self.finish()


def _wandb(out: RunDir) -> Hosted:
    import wandb

    # Offline unless the user has said otherwise: a run is uploaded later with `wandb sync`. Its files hold links, which a run
    # directory must not, so they go beside it. What is done after a resume is a run of its own there, in the same group.
    run = wandb.init(
        project="headwater",
        name=out.path.name,
        group=out.path.name,
        dir=str(out.path.absolute().parent),
        mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),
        config=read_json(out.recipe),
        settings=wandb.Settings(console="off"),
    )
    return Hosted(run, run.finish)


def _trackio(out: RunDir) -> Hosted:
    import trackio

    def finish() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()

    with contextlib.redirect_stdout(sys.stderr):  # it tells of itself where the program's own answers go
        run = trackio.init(
            project="headwater",
            name=out.path.name,
            config=read_json(out.recipe),
            resume="allow" if out.tracked.exists() else "never",
        )
    return Hosted(run, finish)


TRACKERS: dict[str, Callable[[RunDir], Sink]] = {
    "tensorboard": Tensorboard.opened,
    "wandb": _wandb,
    "trackio": _trackio,
}


def refuse_missing(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not known or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: no such tracker; there are {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name}: needs {name}, which is not installed; pip install 'headwater[{name}]'")


@dataclass
class Follower:
    """Tells sinks every row of a run once, also over resumes: a step that is done again comes out the same."""

    out: RunDir
    opening: Mapping[str, Callable[[RunDir], Sink]]
    sinks: dict[str, Sink] = field(default_factory=dict)
    told: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    looked: float = 0.0

    def catch_up(self) -> None:
        for node in self.out.nodes():
            for row in self._fresh(node):
                step = int(row["step"])
                values = {
                    key: float(one) for key, one in row.items() if key != "step" and isinstance(one, (int, float))
                }
                for name in self.opening:
                    if step > self._steps(name).get(node.name, 0):
                        self._sink(name).log(node.name, step, values)
                        self._steps(name)[node.name] = step
        if self.sinks:
            write_json(self.out.tracked, self.told)

    def now_and_then(self) -> None:
        if time.monotonic() - self.looked >= EVERY_SECONDS:
            self.looked = time.monotonic()
            self.catch_up()

    def close(self) -> None:
        self.catch_up()
        for sink in self.sinks.values():
            sink.close()

    def _fresh(self, node: NodeDir) -> list[dict[str, Any]]:
        if not node.metrics.exists():
            return []
        before = self.sizes.get(node.name, 0)
        if node.metrics.stat().st_size < before:
            before = 0  # cut back to a checkpoint: what comes again is known by its step
        rows, self.sizes[node.name] = rows_from(node.metrics, before)
        return list(rows)

    def _sink(self, name: str) -> Sink:
        if name not in self.sinks:
            self.sinks[name] = self.opening[name](self.out)
        return self.sinks[name]

    def _steps(self, name: str) -> dict[str, int]:
        if not self.told and self.out.tracked.exists():
            held = read_json(self.out.tracked)
            self.told = {key: dict(one) for key, one in held.items()} if isinstance(held, dict) else {}
        return self.told.setdefault(name, {})


@contextlib.contextmanager
def tracked(progress_display: ProgressDisplay, out: Path, names: Sequence[str]) -> Iterator[ProgressDisplay]:
    """The narrator, which also keeps these trackers up to date. Raises UserError for one that is not installed."""
    refuse_missing(names)
    if not names:
        yield progress_display
        return
    follower = Follower(RunDir(out), {name: TRACKERS[name] for name in names})
    try:
        yield following(progress_display, follower)
    finally:
        follower.close()


def following(progress_display: ProgressDisplay, follower: Follower) -> ProgressDisplay:
    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[NodeProgress]:
        with progress_display.node(title, number, total) as watch:

            def advance(count: int, metrics: Metrics) -> None:
                watch.advance(count, metrics)
                follower.now_and_then()

            yield replace(watch, advance=advance)

    return replace(progress_display, node=node)
