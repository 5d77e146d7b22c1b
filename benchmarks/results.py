"""Write the results of finished studies and sweeps into docs/results.md.

    python -m benchmarks.results RUNS [--page docs/results.md]

RUNS contains the folders that the page names (`main`, `llama`, `labels`, …). The text between `<!-- NAME:KIND -->` and
`<!-- end -->` is replaced by KIND of RUNS/NAME: `arms`, `contrasts`, `ideas`, `predictions`, `conditions`, `sweep`, or `table`
(the table.md that benchmarks.ten_settings wrote). Plots are written to `results/` next to the page. A block whose run is missing
does not change.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from headwater.config.arms import ARMS
from headwater.report.contrasts import flops_ratio, reading
from headwater.report.format import count, p_text, percent, points, units
from headwater.report.html_contrasts import idea_contrasts

Block = Callable[[Path, str, Path], str]


def read_report(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def interval(score: dict[str, float], scale: Callable[[float], str] = percent) -> str:
    return f"[{scale(score['low'])}, {scale(score['high'])}]"


def arms(run: Path, name: str, plots: Path) -> str:
    report = read_report(run / "report.json")
    eval_name, rows, drawn = report["evals"][0], [], []
    for arm, result in report["arms"].items():
        score = result["accuracy"].get(eval_name)
        if score is None:
            continue
        best = list(result["pass_at_k"][eval_name].items())[-1]
        free = arm.startswith("base_")
        rows.append(
            [
                f"`{arm}`",
                f"**{percent(score['mean'])}** {interval(score)}",
                f"{percent(best[1]['mean'])}",
                "–" if free else count(result["labels"]["distinct"]),
                "–" if free else units(result["flops"], "FLOPs"),
            ]
        )
        drawn.append((arm, score))
    forest(plots / f"{name}.svg", drawn, f"accuracy on {eval_name}, %, 95 % interval over seeds and problems")
    head = ["arm", "accuracy, % [95 %]", f"pass@{best[0]}", "labels", "training FLOPs"]
    return f"{table(head, rows)}\n\n![Accuracy of every arm](results/{name}.svg)"


def forest(path: Path, rows: list[tuple[str, dict[str, Any]]], title: str) -> None:
    figure = Figure(figsize=(7.0, 0.26 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, score) in enumerate(rows):
        axes.plot([100 * score["low"], 100 * score["high"]], [place, place], color="#0072b2", linewidth=1.6)
        accuracies = [100 * value for value in score["per_seed"].values()]
        axes.plot(accuracies, [place] * len(accuracies), "|", color="#555555", markersize=5)
        axes.plot([100 * score["mean"]], [place], "o", color="#0072b2", markersize=4.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def contrasts(run: Path, name: str, plots: Path) -> str:
    report = read_report(run / "report.json")
    rows = []
    for contrast in report["contrasts"]:
        if contrast["b"].startswith("base_") or contrast["eval"] != report["evals"][0]:
            continue
        flops = [units(contrast["flops"][side]) for side in ("a", "b")]
        labels = [count(contrast["labels"][side]) for side in ("a", "b")]
        rows.append(
            [
                f"`{contrast['a']}` − `{contrast['b']}`",
                f"{points(contrast['difference'])} {interval(contrast, points)}",
                p_text(contrast["p"]),
                " / ".join(labels),
                " / ".join(flops),
                " and ".join(contrast["equal"]) or "–",
                reading(contrast),
            ]
        )
    return table(["a − b", "points [95 %]", "p", "labels a / b", "FLOPs a / b", "equal", "a better than b"], rows)


def ideas(run: Path, name: str, plots: Path) -> str:
    """Every follow-up minus the arm that it changes, on each evaluation."""
    report = read_report(run / "report.json")
    several = len(report["evals"]) > 1
    rows = [
        [
            f"`{contrast['a']}` − `{contrast['b']}`",
            *([contrast["eval"]] if several else []),
            f"{points(contrast['difference'])} {interval(contrast, points)}",
            p_text(contrast["p"]),
            flops_ratio(contrast),
            reading(contrast),
            ARMS[contrast["a"]].source or "–",
        ]
        for eval_name in report["evals"]
        for contrast in idea_contrasts(report)
        if contrast["eval"] == eval_name
    ]
    head = ["idea − base", *(["evaluation"] if several else [])]
    return table([*head, "points [95 %]", "p", "FLOPs", "better", "source"], rows)


def predictions(run: Path, name: str, plots: Path) -> str:
    rows = [
        [prediction["name"], prediction["claim"], f"**{prediction['reading']}**", prediction["why"]]
        for prediction in read_report(run / "report.json")["predictions"]
    ]
    return table(["", "claim", "reading", "why"], rows)


def conditions(run: Path, name: str, plots: Path) -> str:
    """C2 at the first and last step of every stage that measures it."""
    report = read_report(run / "report.json")
    rows = []
    for arm, stages in (report["conditions"]["C2"] or {}).items():
        for stage, measures in stages.items():
            ends = [
                "–" if key not in measures else f"{measures[key]['first']:.3f} → {measures[key]['last']:.3f}"
                for key in ("kl_teacher_student", "kl_student_teacher", "overlap_student_prefixes", "entropy_student")
            ]
            rows.append([f"`{arm}`", stage, *ends])
    return table(
        ["arm", "stage", "KL(π_T‖πθ), teacher prefixes", "KL(πθ‖π_T), student prefixes", "top-k overlap", "entropy"],
        rows,
    )


def sweep(run: Path, name: str, plots: Path) -> str:
    report = read_report(run / "sweep.json")
    eval_name, rows = report["points"][0]["evals"][0], []
    for point in report["points"]:
        scores = [point["arms"].get(arm, {}).get("accuracy", {}).get(eval_name) for arm in report["arms"]]
        cells = ["–" if score is None else f"{percent(score['mean'])} {interval(score)}" for score in scores]
        rows.append([str(point["value"]), *cells])
    plots.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "sweep.svg", plots / f"{name}.svg")
    head = [report["vary"], *(f"`{arm}`, %" for arm in report["arms"])]
    return (
        f"{table(head, rows)}\n\n![Accuracy against {report['vary']}](results/{name}.svg)\n\n{' '.join(report['said'])}"
    )


def written_table(run: Path, name: str, plots: Path) -> str:
    return (run / "table.md").read_text(encoding="utf-8").strip()


KINDS: dict[str, Block] = {
    "arms": arms,
    "contrasts": contrasts,
    "ideas": ideas,
    "predictions": predictions,
    "conditions": conditions,
    "sweep": sweep,
    "table": written_table,
}


def fill(page: Path, runs: Path) -> tuple[list[str], list[str]]:
    """Replace the blocks of the page that have a finished run; returns the names of the other runs, and the blocks that lost rows."""
    missing: list[str] = []
    shorter: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        name, build = match[1], KINDS[match[2]]
        try:
            block = build(runs / name, name, page.parent / "results")
        except (FileNotFoundError, KeyError, ValueError):  # not there, or not finished
            missing.append(name)
            return match[0]
        before, now = (text.count("\n|") for text in (match[0], f"\n{block}"))
        if now < before:
            shorter.append(f"{name}:{match[2]} ({before} lines of the table before, {now} now)")
        return f"<!-- {name}:{match[2]} -->\n{block}\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    pattern = r"<!-- ([\w-]+):(\w+) -->\n.*?<!-- end -->"
    page.write_text(re.sub(pattern, replaced, text, flags=re.DOTALL), encoding="utf-8")
    return sorted(set(missing)), shorter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    missing, shorter = fill(options.page, options.runs)
    print(f"{options.page}: written{'; runs missing or unfinished: ' + ', '.join(missing) if missing else ''}")
    for block in shorter:
        print(f"warning: {block}: the run has fewer arms than the page had")


if __name__ == "__main__":
    main()
