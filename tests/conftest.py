"""Shared fixtures. Tests use one thread: bit-reproducible sums need a fixed number, and CI has few cores.

Fixtures import what they need on first use: the xdist controller, which runs no test, then loads none of the libraries.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from headwater.models.policy import Policy

SLOWEST = (
    "test_faults.py",
    "models/test_architectures.py",
    "test_commands.py",
    "test_torchrun_models.py",
    "test_browser.py",
    "test_cli.py",
    "test_resume.py",
    "test_html.py",
    "test_torchrun.py",
    "test_python_api.py",
    "integration/runs/test_executors.py",
    "integration/runs/test_run_node.py",
    "test_fuzz.py",
    "integration/models/test_oom.py",
)
"""Slow files that start first, so that none runs alone at the end (with --no-loadscope-reorder)."""


def pytest_configure(config: pytest.Config) -> None:
    """Make a folder that all xdist workers share; they inherit the environment variables.

    Compiled modules are kept also where the machine switches that off: otherwise each process that a test starts compiles the
    package again, and each xdist worker all test files. Files are not synced to disk, in forks neither: that takes a third of a
    run's time, and only a failure of the machine could show it. Programs that a test starts as new processes do sync.
    """
    if not hasattr(config, "workerinput"):
        os.environ["HEADWATER_TESTS_SHARED"] = tempfile.mkdtemp(prefix="headwater-tests-")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    os.fsync = lambda descriptor: None


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop("HEADWATER_TESTS_SHARED"), ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((place for place, end in enumerate(SLOWEST) if path.endswith(end)), len(SLOWEST))

    items.sort(key=rank)  # stable: the rest keeps its order


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the parent of `ForkedRuns` if tests use it: it must be a fork from before the first backward pass."""
    gc.freeze()  # full collections then skip the objects of the libraries, some 200 ms each
    if "forked_runs" in sys.modules and not session.config.option.collectonly:
        sys.modules["forked_runs"].warm_runs()


@pytest.fixture(autouse=True)
def fixed_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed torch before each test, so that its random tensors do not depend on other tests, nor tables on a terminal's width."""
    import torch

    monkeypatch.delenv("COLUMNS", raising=False)
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fake_study() -> Path:
    """A fake run of ARMS over three seeds, with its report. It is made once for all test workers: tests must not change it."""
    from fake_runs import shared_run

    return shared_run()


@pytest.fixture(scope="session")
def fake_report(fake_study: Path) -> dict[str, Any]:
    """The values of `fake_study`'s report.json."""
    values: dict[str, Any] = json.loads((fake_study / "report.json").read_text(encoding="utf-8"))
    return values


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of a report's page empty: drawing them takes nearly all of its time."""
    monkeypatch.setattr("headwater.report.figures.as_file", lambda figure, name: "<svg><g></g></svg>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    from tools.pretrain.pocket import make_tokenizer

    return make_tokenizer()


@pytest.fixture(params=["qwen3", "llama"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def policy() -> Policy:
    """A tiny Qwen3, new for each test, which may train it."""
    from tiny import tiny_policy

    return tiny_policy("qwen3", seed=0)


@pytest.fixture
def teacher() -> Policy:
    """Another tiny Qwen3 with the same tokenizer and other weights, frozen."""
    from tiny import tiny_policy

    policy = tiny_policy("qwen3", seed=1)
    policy.model.requires_grad_(False)
    return policy


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def pocket_folder() -> Path:
    """Folder of the shipped pocket models, such as pocket_folder / "qwen3-student"."""
    return Path(str(files("headwater"))) / "pocket"
