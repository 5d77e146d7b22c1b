"""Sweeps: values, folder names, summary sentences, plot and page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from fake_runs import ARMS, by_problem, fake_run, graded
from headwater.errors import UserError
from headwater.report import build as report
from headwater.report import sweep as sweep_report
from headwater.report import sweep_page
from headwater.report.svg import TEXT
from headwater.runs.sweep import Sweep, folder_name, lay_out, text_of


def pocket(vary: str, values: str | None = None, *changes: str, arms: list[str] | None = None) -> Sweep:
    return lay_out("pocket", vary, None if values is None else values.split(","), arms, None, list(changes))


def values_of(sweep: Sweep) -> list[Any]:
    return [point.value for point in sweep.points]


# Definition of a sweep ---------------------------------------------------------------------------------------------------------


def test_default_budgets_are_multiples_of_recipe_budget() -> None:
    sweep = pocket("labels", None, "labels.budget=100")
    assert values_of(sweep) == [25, 50, 100, 200] and sweep.arms == ("direct_grpo", "bridge")
    assert [point.recipe.labels.budget for point in sweep.points] == [25, 50, 100, 200]
    with pytest.raises(UserError, match=r"sets no labels\.budget to begin from"):
        pocket("labels", None, "labels.budget=null")


def test_default_teachers_are_of_student_family() -> None:
    assert values_of(pocket("teacher")) == [
        "pocket:qwen3-student", "pocket:qwen3-teacher", "pocket:qwen3-teacher-large",
    ]  # fmt: skip
    assert pocket("teacher").arms == ("direct_grpo", "raw_teacher", "bridge")
    assert values_of(pocket("teacher", None, "models.student=pocket:llama-student"))[-1] == "pocket:llama-teacher"
    with pytest.raises(UserError, match="name the teachers of /models/mine with --values"):
        pocket("teacher", None, "models.student=/models/mine")


def test_lambda_uses_group_size_of_student_rl_and_keeps_rollouts_per_step() -> None:
    sweep = pocket("lambda", None, "stages.student_rl.group_size=4")
    assert values_of(sweep) == [0.0, 0.25, 0.5, 0.75, 1.0] and sweep.arms == ("mixed",)
    for point in sweep.points:
        opd = point.recipe.stages.opd
        assert (opd.objective, opd.sparse_share, opd.group_size, opd.batch_size) == ("mixed", point.value, 4, 64)
    own = pocket("lambda", "0.5", "stages.opd.group_size=16").points[0].recipe.stages.opd
    assert own.group_size == 16  # --set has the last word


def test_lambda_refuses_batch_not_divisible_by_groups() -> None:
    with pytest.raises(UserError, match=r"lambda, value 0: .*batch_size 60 is not a multiple of group_size 8"):
        pocket("lambda", "0,1", "stages.opd.batch_size=60")


def test_any_field_can_be_varied_with_parsed_values() -> None:
    sweep = pocket("stages.opd.optim.lr", "1e-4,0.001,.5")
    assert values_of(sweep) == [0.0001, 0.001, 0.5]
    assert [point.name for point in sweep.points] == ["0.0001", "0.001", "0.5"]
    assert [point.recipe.stages.opd.optim.lr for point in sweep.points] == [0.0001, 0.001, 0.5]
    assert pocket("labels.budget", "16").vary == "labels"  # the same thing under its own name


@pytest.mark.parametrize(
    ("vary", "values", "message"),
    [
        ("labels", "64,0", "value 0: .*labels.budget"),
        ("labels", "64,many", "value many: .*labels.budget"),
        ("lambda", "0,1.5", "value 1.5: .*sparse_share"),
        ("stages.opd.optim.lr", "1e-3,0.001", "1e-3 and 0.001 are the same"),
        ("models.teacher", "a/b,a-b", "folders.*a/b and a-b are the same"),
        ("stages.opd.optim.rate", "1,2", "unknown field stages.opd.optim.rate"),
        ("stages.opd.optim.lr", None, "name the values to try with --values"),
        ("--seeds", "1", "name labels, teacher, lambda or a field"),
    ],
)
def test_invalid_variation_is_refused_in_one_sentence(vary: str, values: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pocket(vary, values)


def test_folder_names_derive_from_values() -> None:
    assert folder_name("pocket:qwen3-teacher") == "pocket-qwen3-teacher"
    assert folder_name("/models/Qwen3-8B/") == "models-Qwen3-8B"
    assert folder_name(1.0) == "1" and folder_name(2.5e-7) == "2.5e-07" and folder_name("..") == "empty"
    assert text_of(True) == "true"


def test_point_command_gives_same_recipe_in_same_folder() -> None:
    sweep = pocket("lambda", "0.25", "labels.budget=32")
    words = shlex.split(sweep.study_command(sweep.points[0], Path("my runs")))
    assert words[:3] == ["headwater", "study", "pocket"] and words[-2:] == ["--out", "my runs/0.25"]
    from headwater.config.builtin import find_recipe

    changes = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert find_recipe("pocket", changes) == sweep.points[0].recipe


# Sentences, tables, plot and page of made-up results -------------------------------------------------------------------------------


def scored(mean: float) -> dict[str, Any]:
    return {"sums": {"mean": mean, "low": mean - 0.02, "high": mean + 0.02, "per_seed": {"101": mean}}}


def made_up(vary: str, values: list[Any], bridge: list[float | None], direct: float = 0.5) -> dict[str, Any]:
    """A sweep of direct_grpo against bridge; None is a point that failed. Differences above 0.03 are certain."""
    points = []
    for value, mean in zip(values, bridge, strict=True):
        arms, contrasts = {}, []
        if mean is not None:
            by_arm = {"base_student": 0.1, "direct_grpo": direct, "bridge": mean}
            costs = {"labels": {"distinct": 64, "checks": 640}, "flops": 1e9}
            arms = {name: {"accuracy": scored(value), **costs} for name, value in by_arm.items()}
            difference, p = mean - direct, 0.001 if abs(mean - direct) > 0.03 else 0.4
            ends = {"low": difference - 0.03, "high": difference + 0.03, "p": p}
            pair = {"a": "bridge", "b": "direct_grpo", "eval": "sums", "difference": difference, **ends}
            contrasts = [{**pair, "seeds": 1, "problems": 500}]
        failed = None if arms else "no group had rewards that differ"
        page = f"{value}/report.html" if arms else None
        points.append({"value": value, "failed": failed, "command": "headwater study", "report": page, "page": page,
                       "seeds": [101], "evals": ["sums"], "arms": arms, "contrasts": contrasts})  # fmt: skip
    result = {"recipe": "pocket", "vary": vary, "field": vary, "values": values, "seeds": [101], "evals": ["sums"],
             "arms": ["direct_grpo", "bridge"], "command": "headwater sweep", "points": points, "across": []}  # fmt: skip
    return {**result, "said": sweep_report.sentences(result)}


def test_sentences_state_better_undecided_and_changed_order() -> None:
    result = made_up("labels", [64, 128, 256, 512], [0.6, 0.58, 0.51, 0.4])["said"]
    assert result == [
        "On sums, at labels 64 and 128 bridge is better than direct_grpo; at labels 512 bridge is worse than direct_grpo; "
        "at labels 256 bridge is not shown to differ from direct_grpo. The order reverses between labels 128 and 512."
    ]


def test_failed_point_is_shown_in_sentences_table_plot_and_page() -> None:
    result = made_up("labels", [64, 128], [0.6, None])
    assert result["said"][1] == "labels 128 failed: no group had rewards that differ."
    plot, _ = sweep_page.plot(result)
    assert ">128 (failed)<" in plot.svg and ">64<" in plot.svg
    assert "failed: no group had rewards that differ" in sweep_page.page(result, plot)
    assert sweep_page.cell(result["points"][1], "bridge", "sums") == "failed"


@pytest.mark.usefixtures("undrawn")
def test_reports_without_sweep_arm_count_as_no_result(tmp_path: Path) -> None:
    fake_run(tmp_path / "64", seeds=(0,), arms={"direct_grpo": ARMS["direct_grpo"]})
    report.write(tmp_path / "64")
    page = sweep_page.write(pocket("labels", "64", arms=["bridge"]), tmp_path, {})
    assert (page["points"][0]["arms"], page["evals"]) == ({}, [])
    assert page["said"] == ["labels 64 has not run yet."]
    assert "No point has a result yet." in (tmp_path / "sweep.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("undrawn")
def test_arms_not_compared_in_paper_are_compared_with_first(tmp_path: Path) -> None:
    names = ["warmup_only", "raw_teacher", "replay"]
    fake_run(tmp_path / "64", arms={name: ARMS[name] for name in names})
    report.write(tmp_path / "64")
    page = sweep_page.write(pocket("labels", "64", arms=names), tmp_path, {})
    (point,) = page["points"]
    pairs = {(row["a"], row["b"]): row for row in point["contrasts"]}
    assert set(pairs) == {("raw_teacher", "warmup_only"), ("replay", "warmup_only")}
    for (a, b), row in pairs.items():
        shares = [
            [right for seed in (0, 1, 2) for rights in by_problem(graded(tmp_path / "64", arm, seed), "correct").values()
             for right in rights]
            for arm in (a, b)
        ]  # fmt: skip
        difference = sum(shares[0]) / len(shares[0]) - sum(shares[1]) / len(shares[1])
        assert row["difference"] == pytest.approx(difference, abs=2e-6) and row["low"] < difference < row["high"]
        assert (row["seeds"], row["problems"]) == (3, 60)


def test_single_arm_is_compared_with_itself_at_first_value() -> None:
    result = made_up("lambda", [0.0, 0.5, 1.0], [0.6, 0.62, 0.5])
    against = [{**result["points"][0]["contrasts"][0], "arm": "bridge", "a": value, "b": 0.0} for value in (0.5, 1.0)]
    against[1] |= {"low": -0.13, "high": -0.07, "p": 0.001}
    result |= {"arms": ["bridge"], "across": [against[0] | {"low": -0.01, "high": 0.05, "p": 0.4}, against[1]]}
    assert sweep_report.sentences(result) == [
        "On sums, at lambda 1 bridge is worse than bridge at lambda 0; at lambda 0.5 bridge is not shown to differ from bridge at "
        "lambda 0. Highest at lambda 0.5, 62.0 %; as the highest of several it overstates what new runs would give."
    ]


def test_model_names_are_shortened_if_still_distinct() -> None:
    names = sweep_report.names({"values": ["pocket:a", "/models/b/", 0.5]})
    assert names == {"pocket:a": "a", "/models/b/": "b", 0.5: "0.5"}
    assert list(sweep_report.names({"values": ["x/model", "y/model"]}).values()) == ["x/model", "y/model"]


@pytest.mark.parametrize(
    ("vary", "values", "kind"),
    [
        ("labels", [64, 128], "log"),
        ("lambda", [0.0, 1.0], "linear"),
        ("stages.opd.steps", [40, 80], "linear"),
        ("stages.opd.optim.lr", [1e-4, 1e-3], "log"),
        ("teacher", ["a", "b"], "category"),
    ],
)
def test_axis_kind_follows_values(vary: str, values: list[Any], kind: str) -> None:
    assert sweep_page.axis_kind(made_up(vary, values, [0.5, 0.6])) == kind


def test_plot_spaces_doubling_budgets_equally_and_names_every_line() -> None:
    result = made_up("labels", [64, 128, 256], [0.5, 0.6, 0.7])
    (plot, png), (again, png_again) = sweep_page.plot(result), sweep_page.plot(result)
    svg = plot.svg
    assert (svg, png) == (again.svg, png_again)
    for word in ("bridge 70.0", "direct_grpo 50.0", "student before 10.0", ">64<", ">128<", ">256<", "log scale"):
        assert word in svg
    places = []
    for label in (">64<", ">128<", ">256<"):
        before = svg[: svg.index(label)]
        places.append(float(before[before.rindex('x="') + 3 :].split('"')[0]))
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.01)


def test_page_inlines_plot_in_page_colours_and_fetches_nothing() -> None:
    result = made_up("labels", [64, 128], [0.6, 0.7])
    result["said"] = ["<b>&"]
    page = sweep_page.page(result, sweep_page.plot(result)[0])
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page
    assert "currentColor" in page and TEXT not in page.split("<svg")[1].split("</svg>")[0]
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")
    description = page.split('role="img" aria-label="')[1].split('"')[0]
    assert "accuracy on sums, %" in description and "labels (distinct problems), log scale" in description
    assert "student before 10.0 at 64, 10.0 at 128" in description
    assert "bridge 60.0 (58.0 to 62.0) at 64, 70.0 (68.0 to 72.0) at 128" in description
