"""Trackers, pushing to the hub, the Python API, and imports of single modules."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import headwater
from headwater.cli import push
from headwater.errors import UserError
from headwater.runs import trackers
from headwater.storage.run_dir import RunDir
from runs import TINY, call, load_json, node, rows, sets, temporary, tiny

CHANGES = ("stages.teacher_rl.steps=1", "conditions.problems=0")


@cache
def finished() -> Path:
    """A small study of two arms, which tests leave as it is."""
    out = temporary() / "study"
    result = tiny("study", out, "--arms", "direct_grpo,bridge", changes=CHANGES)
    assert result.code == 0, result.err
    return out


# Trackers -------------------------------------------------------------------------------------------------------------


class Kept:
    """A tracker that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed = False

    def log(self, node: str, step: int, values: Any) -> None:
        self.rows.append((node, step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_tracker_receives_every_step_of_every_node_once_across_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Kept] = []

    def opened(out: RunDir) -> Kept:
        made.append(Kept())
        return made[-1]

    monkeypatch.setitem(trackers.TRACKERS, "json", opened)  # a package that is installed, so that it is not refused
    out = tmp_path / "run"
    first = tiny("run", out, "--arm", "direct_grpo", "--track", "json", changes=("stages.student_rl.steps=3",))
    assert first.code == 0, first.err
    written = rows(node(out, "direct_grpo", "student_rl") / "metrics.jsonl")
    name = node(out, "direct_grpo", "student_rl").name
    assert [(node_name, step) for node_name, step, _ in made[0].rows] == [(name, 1), (name, 2), (name, 3)]
    for (_, _, values), row in zip(made[0].rows, written, strict=True):
        assert values == {key: float(value) for key, value in row.items() if key != "step"}
    assert made[0].closed
    again = tiny(
        "study", out, "--arms", "direct_grpo,opd_only", "--track", "json", changes=("stages.student_rl.steps=3",)
    )
    assert again.code == 0, again.err
    assert {node_name.split(".")[0] for node_name, _, _ in made[1].rows} == {"teacher_rl", "opd"}


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None,
    reason="tensorboard is not installed: --track tensorboard was NOT tested",
)
def test_tensorboard_shows_metrics_of_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    assert tiny("run", out, "--arm", "direct_grpo", "--track", "tensorboard", changes=CHANGES).code == 0
    read = EventAccumulator(str(out / "trackers" / "tensorboard"))
    read.Reload()
    folder = node(out, "direct_grpo", "student_rl")
    logged = [(event.step, event.value) for event in read.Scalars(f"{folder.name}/reward")]
    assert logged == [(row["step"], pytest.approx(row["reward"])) for row in rows(folder / "metrics.jsonl")]
    # What is there of the tracker does not stand in the way of the next start.
    assert tiny("run", out, "--arm", "direct_grpo", "--track", "tensorboard", changes=CHANGES).code == 0


def test_unknown_or_missing_trackers_are_refused_before_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = tiny("run", tmp_path / "run", "--track", "mlflow")
    assert result.code == 2 and "--track mlflow: no such tracker; there are tensorboard, wandb, trackio" in result.err
    monkeypatch.setitem(trackers.TRACKERS, "nowhere_installed", trackers.TRACKERS["tensorboard"])
    result = tiny("run", tmp_path / "run", "--track", "nowhere_installed")
    assert result.code == 2 and "pip install 'headwater[nowhere_installed]'" in result.err
    assert not (tmp_path / "run").exists()


# The hub --------------------------------------------------------------------------------------------------------------


class Hub:
    """The hub's side of two calls: it keeps what is committed in a folder."""

    def __init__(self, folder: Path, refuses: str = "") -> None:
        self.folder, self.refuses = folder, refuses
        self.private: dict[str, bool] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.private[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        for operation in operations:
            target = self.folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                target.write_bytes(file.read())


def test_pushed_model_loads_and_its_card_agrees_with_report(tmp_path: Path) -> None:
    hub, source = Hub(tmp_path), push.find(finished(), "bridge")
    assert (
        push.push(source, "me/student", True, hub) == "https://huggingface.co/me/student" and hub.private["me/student"]
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "me" / "student")
    AutoTokenizer.from_pretrained(tmp_path / "me" / "student")
    files = {path.name for path in (tmp_path / "me" / "student").iterdir()}
    assert files == {path.name for path in (node(finished(), "bridge", "opd") / "model").iterdir()}
    text = (tmp_path / "me" / "student" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers" and "base_model" not in head  # pocket:… is on no hub
    report = load_json(finished() / "report.json")
    mine, before = report["arms"]["bridge"], report["arms"]["base_student"]
    for arm, name in ((mine, "this model"), (before, "the student before")):
        result = arm["accuracy"]["sums"]
        row = (
            f"| sums | {name} | {100 * result['mean']:.1f} | {100 * result['low']:.1f} to {100 * result['high']:.1f} |"
        )
        assert row in text
    assert f"Labels: {mine['labels']['distinct']:.0f} distinct problems" in text
    assert f"{mine['tokens']['teacher_scored']:,.0f} scored by the teacher" in text
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert shown["stages"] == load_json(finished() / "recipe.json")["stages"]


def test_push_accepts_node_folder_and_refuses_damage(tmp_path: Path) -> None:
    source = push.find(node(finished(), "bridge", "warmup") / "model", None)
    assert source.arm == "bridge" and "student after warmup" in push.card(source)
    with pytest.raises(UserError, match=r"push --to me/x: the hub refuses \(no such user\)"):
        push.push(source, "me/x", False, Hub(tmp_path, refuses="no such user"))


def test_push_refuses_invalid_sources_in_one_sentence(tmp_path: Path) -> None:
    for words, message in (
        ((finished(), "--to", "me/x"), "choose an arm with --arm: direct_grpo, bridge"),
        ((finished(), "--arm", "replay", "--to", "me/x"), "--arm replay is not among its arms: direct_grpo, bridge"),
        ((tmp_path, "--to", "me/x"), "is neither a run directory nor the model folder"),
        ((finished(), "--arm", "bridge", "--to", "a b"), "push --to a b: must be owner/name"),
    ):
        answer = call("push", *words)
        assert answer.code == 2 and message in answer.err


# Python ---------------------------------------------------------------------------------------------------------------


def test_python_api_run_equals_command_line_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.pipeline.preflight", lambda *given: None)
    changes = [*TINY, *CHANGES]
    report = headwater.run("pocket", arm="direct_grpo", out=tmp_path / "api", changes=changes)
    assert (
        report["arms"]["direct_grpo"]["accuracy"]
        == load_json(finished() / "report.json")["arms"]["direct_grpo"]["accuracy"]
    )
    # A recipe as plain values, and a second arm in the same folder, which takes over what is done.
    recipe = load_json(tmp_path / "api" / "recipe.json")
    both = headwater.study(recipe, arms=["direct_grpo", "opd_only"], out=tmp_path / "api")
    assert both["arms"].keys() == {"base_student", "base_teacher", "direct_grpo", "opd_only"}
    with pytest.raises(UserError, match="--arm nowhere: no such arm"):
        headwater.run("pocket", arm="nowhere", out=tmp_path / "api")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        headwater.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import headwater", ("torch", "pydantic")),
        ("import headwater.config.recipe, headwater.report.build", ("torch", "transformers")),
        (
            "from headwater.losses import token_losses",
            ("transformers", "pydantic", "datasets", "headwater.models.policy"),
        ),
        (
            "from headwater.sampling.torch_sampler import TorchSampler; from headwater.sampling.base import Request",
            ("datasets", "headwater.pipeline", "headwater.training.loop"),
        ),
    ],
)
def test_public_modules_import_without_unneeded_dependencies(code: str, without: tuple[str, ...]) -> None:
    script = f"{code}\nimport sys; print([name for name in {without!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_help_offers_shell_completion() -> None:
    result = call("--help")
    assert "--install-completion" in result.out and "--show-completion" in result.out


def test_dry_run_options_are_validated() -> None:
    for words, message in (
        (("--on", "h100"), "--on: needs --dry-run"),
        (("--dry-run", "--on", "h1000"), "--on h1000: unknown device; there are b200, h200, h100"),
        (("--dry-run", "--on", "0xh100"), "--on 0xh100: unknown device"),
    ):
        answer = call("run", "pocket", *words)
        assert answer.code == 2 and message in answer.err


def test_merge_refuses_plain_model_folder(tmp_path: Path, qwen3_folder: Path) -> None:
    answer = call("merge", qwen3_folder, tmp_path / "out")
    assert answer.code == 2 and "holds no adapter" in answer.err
    assert json.loads(call("run", "pocket", "--dry-run", "--json", *sets(*CHANGES)).out)
