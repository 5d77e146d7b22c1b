"""The first cases of `make fuzz`, in a process with bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz
from forked_runs import Place, warm_runs
from headwater.errors import RefusedError, TrainingStoppedError, UserError


def test_fuzzed_inputs_are_accepted_or_refused_in_one_sentence() -> None:
    result = warm_runs().run("--count", "200", whole=True, place=Place(script=Path(fuzz.__file__)))
    assert result.code == 0, result.out[-4000:] + result.err[-2000:]
    assert "200 cases from 0, 0 not as they must be" in result.out
    for reached in ("planned", "validated", "graded", "refused 2", "reported", "read whole", "loaded", "examined"):
        assert reached in result.out
    for kind, (share, _) in fuzz.KINDS.items():
        assert share == 0 or f"{kind} " in result.out


def test_fuzzed_programs_change_nothing_outside_sandbox() -> None:
    results = [fuzz.run_case(number, "sandbox") for number in range(6)]
    assert [result for result in results if result[1].startswith("!")] == []


@pytest.mark.parametrize(
    ("raised", "outcome"),
    [
        (ValueError("x"), "!ValueError"),
        (RecursionError(), "!RecursionError"),
        (SystemExit(0), "!SystemExit"),
        (UserError(""), "!unprintable"),
        (UserError("a row"), "refused 2"),
        (RefusedError("two\nlines"), "refused 3"),
        (TrainingStoppedError("nothing was trained"), "!exit 4"),
    ],
)
def test_run_case_classifies_outcomes(raised: BaseException, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(draw: object, folder: Path) -> str:
        assert folder.is_dir() and not list(folder.iterdir())
        raise raised

    monkeypatch.setitem(fuzz.KINDS, "made", (1, case))
    assert fuzz.run_case(7, "made")[:2] == ("made", outcome)


def test_run_case_ends_hanging_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def case(draw: object, folder: Path) -> str:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.KINDS, "made", (1, case))
    assert fuzz.run_case(7, "made")[1] == "!HangError"


def test_fuzz_case_is_deterministic(tmp_path: Path) -> None:
    first = [fuzz.run_case(number)[:2] for number in (2, 7, 9, 12)]
    assert first == [fuzz.run_case(number)[:2] for number in (2, 7, 9, 12)]
    assert {kind for kind, _ in first} == {"recipe", "recipe_text", "jsonl"}
