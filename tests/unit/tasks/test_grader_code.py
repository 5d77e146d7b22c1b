"""Fingerprint of a user's grader: its code, so that a change reruns what it graded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headwater.tasks.registry import TASKS, grader_code

MAIN = "from helpers import equal\nimport json\n\ndef grade(gold, completion):\n    return equal(gold, completion)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("mine", "helpers", "pack", "pack.inner", "pack.inner.grade", "pack.other"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "mine.py").write_text(MAIN)
    (tmp_path / "helpers.py").write_text("def equal(a, b):\n    return a == b\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    inner = tmp_path / "pack" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "pack" / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("limit = 1\n")
    (inner / "grade.py").write_text(
        "from ..other import equal\nfrom . import limit\n\ndef grade(gold, said):\n    return equal(gold, said)\n"
    )
    (tmp_path / "pack" / "other.py").write_text("def equal(a, b):\n    return a == b\n")
    return tmp_path


@pytest.mark.parametrize(
    ("task", "file", "counts"),
    [
        ("mine:grade", "mine.py", True),
        ("mine:grade", "helpers.py", True),
        ("mine:grade", "unrelated.py", False),
        ("mine:grade", "pack/other.py", False),
        ("pack.inner.grade:grade", "pack/inner/grade.py", True),
        ("pack.inner.grade:grade", "pack/other.py", True),
        ("pack.inner.grade:grade", "pack/inner/__init__.py", True),
        ("pack.inner.grade:grade", "pack/__init__.py", True),
        ("pack.inner.grade:grade", "helpers.py", False),
    ],
)
def test_grader_fingerprint_covers_its_own_code_only(folder: Path, task: str, file: str, counts: bool) -> None:
    before = grader_code(task)
    assert before == grader_code(task) is not None
    path = folder / file
    path.write_text(path.read_text() + "# changed\n")
    assert (grader_code(task) != before) == counts


def test_registered_task_has_no_user_code_fingerprint() -> None:
    assert {grader_code(name) for name in TASKS} == {None}
