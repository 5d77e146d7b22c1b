"""Forward a run's step metrics to TensorBoard, Weights & Biases, Trackio or a user's function while it runs.

Trackers read metrics.jsonl, so the training loop does not know about them, in any process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from headwater import plugins
from headwater.errors import UserError, require_package
from headwater.runs.display import NodeProgress, ProgressDisplay
from headwater.storage.files import read_json, read_rows_from, write_json
from headwater.storage.run_dir import RunDir
from headwater.training.update import Metrics

EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Tracker:
    """An open tracker: `log(node, step, values)` and `close()`."""

    log: Callable[[str, int, Mapping[str, float]], None]
    close: Callable[[], None]


def _tensorboard(out: RunDir) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(out.trackers / "tensorboard"))

    def log(node: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{node}/{name}", value, step)

    return Tracker(log, writer.close)


def _hosted(run: Any, close: Callable[[], None]) -> Tracker:
    """A wandb or trackio run, which have the same interface. Metrics have the node's name as prefix, since steps overlap."""

    def log(node: str, step: int, values: Mapping[str, float]) -> None:
        run.log({f"{node}/step": step, **{f"{node}/{name}": value for name, value in values.items()}})

    return Tracker(log, close)


def _wandb(out: RunDir) -> Tracker:
    import wandb

    # Offline by default: a run is uploaded later with `wandb sync`. Its files contain symbolic links, which a run directory must
    # not, so they go into the parent folder. A resumed run is a new wandb run in the same group.
    run = wandb.init(
        project="headwater",
        name=out.path.name,
        group=out.path.name,
        dir=str(out.path.absolute().parent),
        mode=cast(Any, os.environ.get("WANDB_MODE", "offline")),
        config=read_json(out.recipe),
        settings=wandb.Settings(console="off"),
    )
    return _hosted(run, run.finish)


def _trackio(out: RunDir) -> Tracker:
    import trackio

    def close() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()

    resume = "allow" if out.tracked.exists() else "never"
    with contextlib.redirect_stdout(sys.stderr):  # trackio prints to stdout, which is for the report
        run = trackio.init(project="headwater", name=out.path.name, config=read_json(out.recipe), resume=resume)
    return _hosted(run, close)


Opener = Callable[[RunDir], Tracker]
Callback = Callable[[str, int, Mapping[str, float]], None]
"""Called with (node, step, metrics of the step)."""

TRACKERS: dict[str, Opener] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def openers(trackers: Sequence[str | Opener], callbacks: Sequence[Callback] = ()) -> dict[str, Opener]:
    """The functions that open these trackers, by name. Raises UserError for an unknown tracker or one that is not installed."""
    functions: dict[str, Opener] = {}
    for tracker in trackers:
        if not isinstance(tracker, str):
            functions[f"{tracker.__module__}:{tracker.__qualname__}"] = tracker
        elif tracker in TRACKERS:
            require_package(f"--track {tracker}", tracker, tracker)
            functions[tracker] = TRACKERS[tracker]
        else:
            function = plugins.find("tracker", tracker)
            if function is None:
                known = ", ".join([*TRACKERS, *plugins.names("tracker")])
                raise UserError(f"--track {tracker}: no such tracker; there are {known}, or package.module:function")
            functions[tracker] = function
    for place, callback in enumerate(callbacks):
        functions[f"callback {place}"] = _as_opener(callback)
    return functions


def _as_opener(callback: Callback) -> Opener:
    return lambda out: Tracker(callback, lambda: None)


@dataclass
class MetricsForwarder:
    """Logs every row of a run's metrics.jsonl once to each tracker, also over resumes: a repeated step is the same.

    openers    open the trackers, by name
    trackers   opened with their first row
    last_step  tracker -> node -> last logged step; kept in `out.tracked`
    sizes      node -> bytes of its metrics.jsonl that were read
    """

    out: RunDir
    openers: Mapping[str, Opener]
    trackers: dict[str, Tracker] = field(default_factory=dict)
    last_step: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    updated: float = 0.0

    def update(self) -> None:
        """Log all new rows."""
        if not self.last_step and self.out.tracked.exists():
            earlier = read_json(self.out.tracked)
            self.last_step = {key: dict(steps) for key, steps in earlier.items()} if isinstance(earlier, dict) else {}
        for node in self.out.nodes():
            rows, self.sizes[node.name] = read_rows_from(node.metrics, self.sizes.get(node.name, 0))
            for row in rows:  # those repeated after a resume are recognized by their step
                step = int(row["step"])
                values = {
                    key: float(value) for key, value in row.items() if key != "step" and isinstance(value, (int, float))
                }
                for name, opener in self.openers.items():
                    steps = self.last_step.setdefault(name, {})
                    if step > steps.get(node.name, 0):
                        if name not in self.trackers:
                            self.trackers[name] = opener(self.out)
                        self.trackers[name].log(node.name, step, values)
                        steps[node.name] = step
        if self.trackers:
            write_json(self.out.tracked, self.last_step)

    def update_if_due(self) -> None:
        if time.monotonic() - self.updated >= EVERY_SECONDS:
            self.updated = time.monotonic()
            self.update()

    def close(self) -> None:
        try:
            self.update()
        finally:
            with contextlib.ExitStack() as closing:  # closes every tracker, also where one fails
                for tracker in self.trackers.values():
                    closing.callback(tracker.close)


@contextlib.contextmanager
def tracked(
    progress_display: ProgressDisplay, out: Path, trackers: Sequence[str | Opener], callbacks: Sequence[Callback] = ()
) -> Iterator[ProgressDisplay]:
    """The progress display, extended to update these trackers. Raises UserError for one that is not installed."""
    opened = openers(trackers, callbacks)
    if not opened:
        yield progress_display
        return
    forwarder = MetricsForwarder(RunDir(out), opened)

    @contextlib.contextmanager
    def node(title: str, number: int, total: int) -> Iterator[NodeProgress]:
        with progress_display.node(title, number, total) as progress:

            def advance(count: int, metrics: Metrics) -> None:
                progress.advance(count, metrics)
                forwarder.update_if_due()

            yield replace(progress, advance=advance)

    try:
        yield replace(progress_display, node=node)
    finally:
        forwarder.close()
