"""Runs of different recipes side by side: compare.html and compare.json.

Runs of one recipe are one study and have one report (`build`). Runs of different recipes cannot be merged, but their arms,
settings and curves can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from headwater.config.arms import DESCRIPTIONS
from headwater.report.build import summarize
from headwater.report.contrasts import paired_difference, reading
from headwater.report.figures import Interval
from headwater.report.format import accuracy_text, count, duration, percent, training_costs, units
from headwater.report.html_contrasts import SIZE, difference_columns
from headwater.report.html_curves import curves
from headwater.report.render import render
from headwater.report.stages import accuracies
from headwater.report.study import Study, read_study
from headwater.report.verdict import failure_state
from headwater.report.view import Column, Section, Table, evaluation_column, interval_axis
from headwater.storage.files import first_difference, read_json, write_atomic, write_json
from headwater.storage.run_dir import FREE, RunDir
from headwater.storage.untrusted import refuse_links, refuse_malformed_files

MISSING = "–"


def of_one_recipe(outs: Sequence[Path]) -> bool:
    """Whether the runs may be merged into one report; also true where a folder holds no run, which `build` refuses."""
    recipes = [read_json(RunDir(out).recipe) for out in outs if RunDir(out).recipe.exists()]
    with refuse_malformed_files(outs[0]):
        return all(first_difference(recipes[0] | FREE, recipe | FREE) is None for recipe in recipes[1:])


def write(out: Path, outs: Sequence[Path]) -> dict[str, Any]:
    """Write compare.json and compare.html of the runs `outs` into `out`. Returns the contents of compare.json.

    Raises UserError for a folder without a run.
    """
    refuse_links(out, "report")
    values, html = _built(outs)
    write_json(out / "compare.json", values)
    write_atomic(out / "compare.html", html)
    return values


def current_page(outs: Sequence[Path]) -> str:
    """The page as `write` would write it now. Raises UserError as `write` does."""
    return _built(outs)[1]


def _built(outs: Sequence[Path]) -> tuple[dict[str, Any], str]:
    studies = {}
    for name, folder in zip(run_names(outs), outs, strict=True):
        refuse_links(folder, "report")
        with refuse_malformed_files(folder):
            studies[name] = read_study([folder])
    with refuse_malformed_files(outs[0]):
        values = compare(studies)
        return values, page(studies, values)


def run_names(outs: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart.

    Example: `runs/a` and `old/b` are `a` and `b`; `x/run` and `y/run` are `x/run` and `y/run`.
    """
    parts = [Path(out).resolve().parts for out in outs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def compare(studies: dict[str, Study]) -> dict[str, Any]:
    """What compare.json holds: each run's arms, the settings that differ, and the differences from the first run.

    `differences` has paired differences of the same arm on the evaluation problems and seeds that both runs have.
    """
    reports = {name: summarize(study) for name, study in studies.items()}
    evals = list(dict.fromkeys(eval_name for report in reports.values() for eval_name in report["evals"]))
    arms = list(dict.fromkeys(arm for report in reports.values() for arm in report["arms"]))
    keys = ("accuracy", "labels", "tokens", "flops", "seconds", "failed", "unfinished")
    runs = {
        name: {
            "recipe": report["recipe"],
            "seeds": report["seeds"],
            "arms": {arm: {key: row[key] for key in keys} for arm, row in report["arms"].items()},
        }
        for name, report in reports.items()
    }
    first, *others = studies
    differences = [
        {"arm": arm, "eval": eval_name, "a": name, "b": first, **row}
        for name in others
        for arm in arms
        for eval_name in evals
        if (row := paired_difference(*(studies[run].results(arm, eval_name) for run in (name, first))))
    ]
    settings = differing_settings({name: study.recipe for name, study in studies.items()})
    return {"runs": runs, "arms": arms, "evals": evals, "settings": settings, "differences": differences}


def differing_settings(recipes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Dotted field -> run -> value, for the fields in which the recipes differ. A missing field is null.

    A section that some recipes lack, such as a stage, is one row with its number of fields.
    """
    flat = {name: dict(_leaves(recipe)) for name, recipe in recipes.items()}
    rows: dict[str, dict[str, Any]] = {}
    for field in sorted({field for values in flat.values() for field in values}):
        parts = field.split(".")
        for end in range(1, len(parts)):
            section = ".".join(parts[:end])
            sizes = {name: sum(other.startswith(f"{section}.") for other in values) for name, values in flat.items()}
            if not all(sizes.values()) and not any(section in values for values in flat.values()):
                rows[section] = {name: f"{size} fields" if size else None for name, size in sizes.items()}
                break
        else:
            rows[field] = {name: values.get(field) for name, values in flat.items()}
    return {
        field: row for field, row in rows.items() if any(value != next(iter(row.values())) for value in row.values())
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, value) of everything that is not itself a mapping with entries, without nulls."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif value is not None:
        yield path, value


# Tables and page ------------------------------------------------------------------------------------------------------


def tables(values: dict[str, Any]) -> list[Table]:
    """Accuracy and costs by arm and run for each evaluation, differences from the first run, and the settings that differ."""
    runs = values["runs"]
    result = [_results(values, eval_name) for eval_name in values["evals"] or [""]]
    if values["differences"]:
        result.append(_differences(values))
    rows = [(field, *(_setting(row[run]) for run in runs)) for field, row in values["settings"].items()]
    columns = [Column("field", itemgetter(0)), *(Column(name, itemgetter(i)) for i, name in enumerate(runs, 1))]
    result.append(Table("Settings that differ", columns, rows))
    return result


def _results(values: dict[str, Any], eval_name: str) -> Table:
    """A group of rows per arm, one row for each run that has the arm."""
    rows: list[Any] = []
    scores: list[dict[str, Any]] = []
    for arm in values["arms"]:
        of_arm = {name: run["arms"][arm] for name, run in values["runs"].items() if arm in run["arms"]}
        measured = accuracies(of_arm, eval_name)
        scores += measured.values()
        rows.append(f"{arm}: {DESCRIPTIONS[arm]}" if arm in DESCRIPTIONS else arm)
        rows += [(name, row, measured.get(name)) for name, row in of_arm.items()]
    axis = interval_axis(scores, lambda value: f"{percent(max(0.0, value))} %")
    columns = [
        Column("run", itemgetter(0)),
        Column("accuracy\n%\u00a0[95\u00a0%]", lambda row: _accuracy_or_state(*row[1:]), "right"),
        Column("", lambda row: row[2] and Interval.of(row[2]), axis=axis),
        Column("labels", lambda row: count(row[1]["labels"]["distinct"]), "right"),
        Column("training FLOPs", lambda row: units(row[1]["flops"]), "right"),
        Column("training time", lambda row: duration(row[1]["seconds"]), "right"),
    ]
    return Table(f"Accuracy{f' on {eval_name}' if eval_name else ''} and costs, means per seed", columns, rows)


def _differences(values: dict[str, Any]) -> Table:
    rows = values["differences"]
    columns = [
        Column("run, arm", lambda c: f"{c['a']}, {c['arm']}"),
        *evaluation_column(values["evals"]),
        *difference_columns(rows),
        Column("higher", reading, nowrap=True),
        SIZE,
    ]
    return Table(f"Differences from {next(iter(values['runs']))}, paired", columns, rows)


def _accuracy_or_state(arm: dict[str, Any], accuracy: dict[str, Any] | None) -> str:
    if accuracy is not None:
        return accuracy_text(accuracy)
    return next(map(failure_state, arm["failed"].values()), "unfinished" if arm["unfinished"] else MISSING)


def _setting(value: Any) -> str:
    text = MISSING if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def page(studies: dict[str, Study], values: dict[str, Any]) -> str:
    """The page: the tables, and the curves of all runs in common panels."""
    sections = [Section("Side by side", "side_by_side", {"tables": tables(values)}), curves(joined(studies))]
    title = f"{' and '.join(values['runs'])} side by side"
    view = {"title": title, "headline": headline(values), "sections": [section for section in sections if section]}
    return render("compare.html.j2", view)


def headline(values: dict[str, Any]) -> str:
    """The best arm of each run on the first evaluation. Example: `Best on sums: a: bridge 66.8 %; b: bridge 61.0 %.`"""
    if not values["evals"]:
        return "No run has a result yet."
    eval_name, parts = values["evals"][0], []
    for name, run in values["runs"].items():
        scores = {arm: row["mean"] for arm, row in accuracies(run["arms"], eval_name).items()}
        if not scores:
            parts.append(f"{name}: no result")
            continue
        best = max(scores, key=scores.__getitem__)
        costs = training_costs(run["arms"][best]) or "without training"
        parts.append(f"{name}: {best} {percent(scores[best])} % ({costs})")
    return f"Best on {eval_name}: {'; '.join(parts)}."


def joined(studies: dict[str, Study]) -> Study:
    """All runs as one study whose arms are named after their runs, for curves in common panels."""
    arms = {f"{name}: {arm}": by_seed for name, study in studies.items() for arm, by_seed in study.arms.items()}
    return Study({}, {}, arms, tuple(run for study in studies.values() for run in study.runs))
