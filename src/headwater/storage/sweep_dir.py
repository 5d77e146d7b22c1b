"""The file names of a sweep's folder, as `rundir` knows those of a run.

A sweep's folder holds a run directory for every value, and sweep.json sweep.csv sweep.svg sweep.png sweep.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headwater.storage.run_dir import RunDir


@dataclass(frozen=True)
class SweepDir:
    """The files of a sweep: a run directory for every value, and what is said and drawn of all of them."""

    path: Path

    def point(self, name: str) -> RunDir:
        return RunDir(self.path / name)

    @property
    def json(self) -> Path:
        return self.path / "sweep.json"

    @property
    def csv(self) -> Path:
        return self.path / "sweep.csv"

    @property
    def svg(self) -> Path:
        return self.path / "sweep.svg"

    @property
    def png(self) -> Path:
        return self.path / "sweep.png"

    @property
    def html(self) -> Path:
        return self.path / "sweep.html"
