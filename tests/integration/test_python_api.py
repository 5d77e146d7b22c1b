"""docs/python-api.md: its programs run as printed and give what the page says; the result is typed."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

import headwater
from forked_runs import Place, warm_runs
from headwater.errors import UserError
from headwater.report.result import Result
from runs import TINY, tiny

PAGE = (Path(__file__).parents[2] / "docs" / "python-api.md").read_text(encoding="utf-8")


def programs() -> dict[str, str]:
    """The page's programs by file name."""
    return {name: code for code, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, re.DOTALL)}


def test_documented_programs_run_as_printed(tmp_path: Path) -> None:
    for name, code in programs().items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    rows = [{"question": f"{n:02d}+{n + 1:02d}+20+30", "answer": f"{(2 * n + 51) % 100:02d}"} for n in (3, 40)]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    printed = {}
    for name in ("train.py", "check.py"):
        ended = warm_runs().run(whole=True, undrawn=True, place=Place(tmp_path, script=tmp_path / name))
        assert ended.code == 0, ended.err
        printed[name] = ended.out.splitlines()
    metrics = next((tmp_path / "runs" / "mine" / "nodes").glob("student_rl*/metrics.jsonl"))
    rewards = [json.loads(line)["reward"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    node = metrics.parent.name
    assert printed["train.py"][:2] == [f"{node} step {at}: reward {value:.2f}" for at, value in enumerate(rewards, 1)]
    assert printed["train.py"][2].split()[0] == "2"
    recipe = json.loads((tmp_path / "runs" / "mine" / "recipe.json").read_text(encoding="utf-8"))
    assert (recipe["task"], recipe["compute"]["sampler"]) == ("mine:last_word", "mine:small_batches")
    errors, verdicts, accuracy, valid, arm, reasons = printed["check.py"]
    assert (errors, verdicts, valid) == ("[]", "[True, False]", "True")
    assert 0.0 <= float(accuracy) <= 1.0 and arm in ("bridge", "bridge_rl", "direct_grpo", "None")
    assert 0.0 <= float(reasons.split()[0]) <= 1.0 and len(reasons.split()) > 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("api") / "run"
    assert tiny("study", out, "--arms", "direct_grpo,warmup_only", "--seeds", "0,1").code == 0
    return out


def test_result_equals_report_values(run: Path) -> None:
    written = json.loads((run / "report.json").read_text(encoding="utf-8"))
    result = headwater.rebuild_report(run)
    assert isinstance(result, Result) and result.report == written and dict(result) == written
    arm, row = result.arms["direct_grpo"], written["arms"]["direct_grpo"]
    accuracy = arm.accuracy["sums"]
    assert (accuracy.mean, accuracy.low, accuracy.high) == tuple(
        row["accuracy"]["sums"][key] for key in ("mean", "low", "high")
    )
    assert accuracy.per_seed == {seed: row["accuracy"]["sums"]["per_seed"][str(seed)] for seed in (0, 1)}
    assert (arm.labels, arm.checks, arm.flops) == (row["labels"]["distinct"], row["labels"]["checks"], row["flops"])
    assert [line["arm"] for line in result.rows()] == list(written["arms"])
    assert result.seeds == (0, 1) and result.verdict == written["verdict"]


def test_result_names_each_student_folder(run: Path) -> None:
    result = headwater.rebuild_report(run)
    folders = result.arms["direct_grpo"].student_folders
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    assert {seed: folder.parent.name for seed, folder in folders.items()} == {
        seed: plan["arms"]["direct_grpo"][str(seed)][-1] for seed in (0, 1)
    }
    assert all((folder / "config.json").is_file() for folder in folders.values())
    assert result.arms["base_student"].student_folders == {}
    with pytest.raises(UserError, match=r"holds 4 trained students: choose one of"):
        assert result.student_folder


def test_result_shows_page_in_notebook(run: Path) -> None:
    shown = headwater.rebuild_report(run)._repr_html_()
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" style="[^"]*" srcdoc="([^"]*)"></iframe>', shown)
    assert frame and html.unescape(frame[1]) == (run / "report.html").read_text(encoding="utf-8")


def test_package_lists_its_functions() -> None:
    functions = {"diagnose", "evaluate", "grade", "probe", "read_recipe", "rebuild_report", "run", "study", "validate"}
    types = {"EvaluationSettings", "ProbeResult", "Recipe", "Result"}
    assert functions | types <= set(dir(headwater))
    assert all(callable(getattr(headwater, name)) for name in functions | types)


def test_run_takes_recipe_object_with_changes(tmp_path: Path) -> None:
    recipe = headwater.read_recipe("pocket", TINY)
    assert isinstance(recipe, headwater.Recipe) and recipe.evaluate.samples == 2
    result = headwater.run(recipe, arm="direct_grpo", out=tmp_path / "mine", changes={"evaluate.samples": 1})
    assert isinstance(result, headwater.Result) and result.arms["direct_grpo"].accuracy["sums"].mean <= 1.0
    written = json.loads((tmp_path / "mine" / "recipe.json").read_text(encoding="utf-8"))
    assert written == {**recipe.model_dump(mode="json"), "evaluate": {**written["evaluate"], "samples": 1}}


def test_functions_raise_sentence_of_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rebuild_report: name at least one run directory"):
        headwater.rebuild_report()
    with pytest.raises(UserError, match=r"^recipe nothing: no such file"):
        headwater.diagnose("nothing")
    with pytest.raises(UserError, match=r"^recipe: .*labels.budget"):
        headwater.run({**json.loads(headwater.read_recipe("pocket").model_dump_json()), "labels": {"budget": -1}})
    with pytest.raises(UserError, match=r"task 'sum' is unknown"):
        headwater.grade([("1", "1")], task="sum")
    with pytest.raises(UserError, match=r"nothing.jsonl"):
        headwater.validate(tmp_path / "nothing.jsonl")
