"""The HTML report: templates, page, figures, rollout sample; and the width of the terminal's tables."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import io
import itertools
import json
import math
import re
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import pytest

from fake_runs import ARMS, BASE_S, MORE_ARMS, fake_run, printed
from headwater.report import build as report
from headwater.report import figures, html_curves, html_stages, render, svg
from headwater.report.figures import Interval
from headwater.report.format import console, units
from headwater.report.label_flow import Flow, evenly_spaced, label_flow
from headwater.report.view import Axis, Column, RowHeader, Table


@pytest.mark.parametrize("evals", [("sums",), ("math500", "aime24", "aime25")])
def test_terminal_table_fits_in_100_columns(tmp_path: Path, evals: tuple[str, ...]) -> None:
    built = report.build([fake_run(tmp_path / "out", arms={**ARMS, **MORE_ARMS}, evals=evals)])
    text = printed(built, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    accuracy = built["arms"]["bridge_rl"]["accuracy"][evals[-1]]
    line = f"{100 * accuracy['mean']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    assert line in text
    assert list(built["arms"])[-1] == "zz_own"


def test_console_to_file_is_110_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(io.StringIO()).width == 110


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (999, "999"),
        (1000, "1.00k"),
        (1234567, "1.23M"),
        (99_960, "100k"),
        (999_900, "1.00M"),
        (2.5e12, "2.50T"),
        (0, "0"),
    ],
)
def test_units_keep_three_digits(value: float, text: str) -> None:
    assert units(value) == text


class _Page(html.parser.HTMLParser):
    """Collects tags, ids and attributes, and checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.attributes += attrs
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in ("meta", "br", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def _table(table: Table) -> str:
    template = '{% import "parts.html.j2" as parts %}{{ parts.table(table) }}'
    return render.ENVIRONMENT.from_string(template).render(table=table)


def test_every_template_compiles() -> None:
    names = render.ENVIRONMENT.list_templates(filter_func=lambda name: name.endswith(".j2"))
    assert {"report.html.j2", "sweep.html.j2", "sections/arms.html.j2"} <= set(names)
    for name in names:
        render.ENVIRONMENT.get_template(name)


def test_missing_template_value_is_error_not_empty_text() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render.render("status.html.j2", {"rows": []})


def test_table_alignment_follows_column_not_text() -> None:
    columns = [
        Column("arm", itemgetter(0)),
        Column("half", itemgetter(1)),
        Column("labels", itemgetter(2), "right"),
        Column("reading", itemgetter(3), nowrap=True),
    ]
    text = _table(Table("t", columns, [["bridge", "1H", "none", "12 of 13"], "a group"]))
    assert '<th scope="col">half</th>' in text and '<th scope="col" class="number">labels</th>' in text
    assert '<th scope="row">bridge</th>' in text and "<td>1H</td>" in text
    assert '<td class="number">none</td>' in text and '<td class="reading">12 of 13</td>' in text
    assert '<th scope="rowgroup" colspan="4">a group</th>' in text


def test_table_cells_span_rows_of_entry_and_draw_intervals() -> None:
    axis = Axis(0.0, 2.0, ("0", "2"))
    columns = [
        Column("arm", itemgetter(0), spans=True),
        Column("evaluation", itemgetter(1)),
        Column("", itemgetter(2), axis=axis),
        Column("time", itemgetter(3), spans=True),
    ]
    interval = Interval(1.0, 0.5, 1.5, level=3.0, seeds=(0.9, 1.1))
    rows = [["a", "x", interval, "1 s"], ["a", "y", None, "1 s"]]
    text = _table(Table("t", columns, rows, rows_per_entry=2))
    assert (
        text.count('<th scope="row" rowspan="2">a</th>') == 1
        and text.count('<td rowspan="2" data-label="time">1 s</td>') == 1
    )
    # 0.5, 1 and 1.5 on an axis from 0 to 2; the level 3 is clipped to its right end.
    for part in (
        "left:25.0%;right:calc(100% - 75.0%)",
        'class="mean" style="left:50.0%"',
        'class="level" style="left:100.0%"',
    ):
        assert part in text
    assert _parsed(text).tags["i"] == 5


@pytest.mark.usefixtures("undrawn")
def test_zero_measure_is_shown_and_missing_one_is_dash(fake_report: dict[str, Any]) -> None:
    first = fake_report["stages"][0]
    rows = [{**first, "informative": value, "accuracy": {"sums": {"mean": 0.0}}, "ends": {}} for value in (0.0, None)]
    section = html_stages.stages({**fake_report, "stages": rows})
    assert section is not None
    text = _table(section.view["table"])
    assert text.count('<td class="number">0.00</td>') == 1 and text.count('<td class="number">0.0</td>') == 2
    assert text.count('<td class="number">–</td>') == 1  # of `informative`; measures that no stage has are left out


def test_every_kind_of_cell_is_escaped_and_cleaned() -> None:
    bad = "<i>\"'&\x00\ud800"
    header = RowHeader(bad, (bad,), (bad,), href=bad)
    text = _table(Table(bad, [Column(bad, itemgetter(index)) for index in range(3)], [[header, bad, [bad]], bad]))
    assert "<i>" not in text and "\x00" not in text and "\ud800" not in text
    # Caption and aria-label; 3 heads; header, href, detail, warning; cell; list item; group.
    assert text.count("&lt;i&gt;&#34;&#39;&amp;\ufffd\ufffd") == 12


def test_page_is_well_formed_and_self_contained(fake_study: Path, fake_report: dict[str, Any]) -> None:
    text = (fake_study / "report.html").read_text()
    page = _parsed(text)
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in references} <= set(page.ids)
    assert not page.tags.keys() & {"link", "img", "iframe", "object", "image"}
    # Only the data element, which does not run, and the script that the Content-Security-Policy allows by its hash.
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="rollouts-data">', "<script>"]
    script = re.search(r"<script>(.*?)</script>", text, flags=re.DOTALL).group(1)  # type: ignore[union-attr]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'" in text
    external = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
    assert external == []
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {"http://www.w3.org/2000/svg"}
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", text)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert len(text.encode()) < 3_000_000
    accuracy = fake_report["arms"]["bridge"]["accuracy"]["sums"]
    assert f">{100 * accuracy['mean']:.1f}<" in text
    for title in ("reward (share correct)", "KL(teacher ‖ student), nats a token", "entropy, nats a token"):
        assert f">{title}<" in text.replace("&#8214;", "‖")


def test_text_from_run_files_cannot_become_markup(tmp_path: Path) -> None:
    hostile = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\x00\ud800\x1b[31m '\""
    out = fake_run(tmp_path / "out", seeds=(0,), text=hostile)
    name = "<b>pocket</b>$x^2$"
    recipe = json.loads((out / "recipe.json").read_text())
    (out / "recipe.json").write_text(json.dumps({**recipe, "name": name, "task": "<script>alert(2)</script>"}))
    (out / "env.json").write_text(json.dumps({"<i>os</i>": "<u>x</u>"}))
    plan = json.loads((out / "plan.json").read_text())
    plan["arms"]['"><script>alert(3)</script>$_'] = plan["arms"]["bridge"]
    (out / "plan.json").write_text(json.dumps(plan))
    metrics = next(out.glob("nodes/opd*/metrics.jsonl"))
    metrics.write_text(metrics.read_text().replace('"lr"', '"<script>$\\\\frac$</script> id=\\"x\\""'))
    report.write(out)
    text = (out / "report.html").read_text()
    page = _parsed(text)
    assert page.tags["script"] == 2 and not page.tags.keys() & {"img", "u", "em"}
    assert "<b>pocket" not in text and "<i>os" not in text and "alert(3)</script>" not in text
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    rows = _data(text)["rows"]
    assert any("<script>alert(1)</script>" in row["text"] for row in rows)
    assert (
        "\x00" not in text
        and "\x1b" not in text
        and not any("\x00" in row["text"] or "\x1b" in row["text"] for row in rows)
    )
    assert len(page.ids) == len(set(page.ids))


def test_very_long_completion_is_truncated(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]}, text="x" * 100_000)
    report.write(out)
    text = (out / "report.html").read_text()
    row = _data(text)["rows"][0]
    assert len(text) < 150_000 and len(row["text"]) == 1600 and row["cut"] == 98_400


def _data(text: str) -> Any:
    """The JSON that browse.js reads."""
    return json.loads(re.search(r'id="rollouts-data">(.*?)</script>', text, flags=re.DOTALL).group(1))  # type: ignore[union-attr]


@pytest.mark.usefixtures("undrawn")
def test_100_000_rollouts_are_sampled_within_bounds_stated_on_page(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]})
    node = next(out.glob("nodes/opd*"))
    info = json.loads((node / "node.json").read_text())
    (node / "node.json").write_text(json.dumps({**info, "settings": {"objective": "opd", "batch_size": 10_000}}))
    for step in (1, 5, 10):  # of its twelve steps, those with stored rollouts
        rows = ({"problem_id": f"p{n}", "sample": 0, "completion": f"{n} " * 40, "tokens": 600} for n in range(33_400))
        (node / "rollouts").mkdir(exist_ok=True)
        (node / "rollouts" / f"{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write(out)
    text = (out / "report.html").read_text()
    rows_shown = [row for row in _data(text)["rows"] if row["stage"] == "On-policy distillation"]
    assert len(text) < 3_000_000
    assert sorted({row["step"] for row in rows_shown}) == [1, 5, 10] and len(rows_shown) == 18
    assert f"A sample of {len(_data(text)['rows'])} of about 120," in text  # 12 steps × 10,000, and the evaluation


@pytest.mark.usefixtures("undrawn")
def test_rollout_data_has_problem_completion_and_dense_signal(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]})
    node = next(out.glob("nodes/opd*"))
    (node / "rollouts").mkdir()
    row = {"problem_id": "p1", "sample": 0, "completion": "=5", "tokens": 3, "finish": "stop"}
    dense = {**row, "pieces": ["=", "5", ""], "signal": [-4.25, -1.0, 0.5]}
    (node / "rollouts" / "000001.jsonl").write_text(f"{json.dumps({**row, 'sample': 1})}\n{json.dumps(dense)}\n")
    (out / "problems.jsonl").write_text(json.dumps({"id": "p1", "text": "2+3 </script>"}) + "\n")
    report.write(out)
    data = _data((out / "report.html").read_text())
    first, second = (row for row in data["rows"] if row["problem"] == "p1")
    assert first["signal"] == [-4.25, -1.0, 0.5] and first["pieces"] == ["=", "5", ""] and "signal" not in second
    assert data["problems"][first["question"]] == "2+3 </script>" and data["arms"][first["arms"][0]] == "bridge"


def test_every_figure_is_written_as_svg_and_csv(fake_study: Path, fake_report: dict[str, Any]) -> None:
    names = {path.stem for path in (fake_study / "figures").glob("*.svg")}
    assert names == {path.stem for path in (fake_study / "figures").glob("*.csv")}
    assert {"accuracy-sums", "contrasts-sums", "labels", "stages-Accuracy-sums", "cost-training_FLOPs-sums"} <= names
    bridge = fake_report["arms"]["bridge"]["accuracy"]["sums"]
    rows = list(csv.DictReader((fake_study / "figures" / "accuracy-sums.csv").open()))
    csv_row = next(row for row in rows if row["row"] == "bridge")
    assert [float(csv_row[key]) for key in ("mean", "low", "high")] == [bridge[key] for key in ("mean", "low", "high")]
    flows = list(csv.DictReader((fake_study / "figures" / "labels.csv").open()))
    spent = {(row["pool"], row["stage"], row["arm"]): float(row["labels"]) for row in flows}
    assert spent["second half (2H)", "Student RL", "bridge_rl"] == 64 and "raw_teacher" not in {
        arm for *_, arm in spent
    }


def test_same_files_give_same_page_and_figures(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "out", seeds=(0,), arms={"direct_grpo": ARMS["direct_grpo"]})
    report.write(run)
    before = {path: path.read_bytes() for path in (run / "report.html", *(run / "figures").iterdir())}
    report.write(run)
    assert {path: path.read_bytes() for path in before} == before


def test_report_of_five_seeds_of_twelve_arms_takes_seconds(tmp_path: Path) -> None:
    arms = dict(list({**ARMS, **MORE_ARMS}.items())[:12])
    out = fake_run(tmp_path / "out", seeds=(0, 1, 2, 3, 4), arms=arms, problems=100, steps=60)
    start = time.process_time()
    report.write(out)
    seconds = time.process_time() - start
    size = (out / "report.html").stat().st_size
    print(f"report of 5 seeds × {len(arms)} arms: {seconds:.1f} s of processor time, {size / 1e6:.2f} MB")
    assert size < 3_000_000
    assert seconds < 20


def test_page_shows_predictions_comparisons_conditions_and_costs(tmp_path: Path) -> None:
    more = {name: MORE_ARMS[name] for name in ("bridge_1h", "opd_only", "teacher_2h")}
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms={**ARMS, **more})
    built = report.write(out)
    text = (out / "report.html").read_text()
    page = _parsed(text)
    assert page.open == []
    for title in ("The paper's predictions", "Equal labels and compute", "Conditions", "Stage by stage"):
        assert title in html.unescape(text)
    shown = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for row in built["predictions"]:
        assert row["reading"] in shown and row["why"].split("; ")[0] in shown
    descriptions = [value or "" for key, value in page.attributes if key == "aria-label"]
    cost = [label for label in descriptions if "against training FLOPs" in label]
    assert len(cost) == 1 and "bridge " in cost[0] and "at 56G" in cost[0] and "base_student" in cost[0]
    assert any(
        label.startswith("overlap on student prefixes over training steps, 2 seeds: raw_teacher")
        for label in descriptions
    )
    assert any(label.startswith("best of group (pass@G) over training steps, 2 seeds: ") for label in descriptions)
    assert any(label.startswith("Seconds by part of the work: ") for label in descriptions)


def test_axis_limits_have_margin_and_are_never_equal() -> None:
    low, high = svg.spanning([2.0, 2.0])
    assert low < 2 < high
    assert svg.spanning([0.0]) == (-5e-7, 5e-7)


def test_label_use_bands_are_evenly_spaced_in_order_of_targets() -> None:
    assert evenly_spaced([7, 0], 4) == [2.5, 0.5]
    assert evenly_spaced([1, 0, 2], 6) == [2.5, 0.5, 4.5]
    assert evenly_spaced([3, 3, 3], 3) == [0, 1, 2]  # equal targets keep their order
    flows = [Flow("first", "RL", 64.0, ("a", "b")), Flow("second", "SFT", 32.0, ("c",))]
    plot = label_flow("labels", "Labels", flows, ["a", "b", "c", "d"])
    assert plot.description.endswith("first to RL, 64 labels, to a, b; second to SFT, 32 labels, to c; no labels in d")
    assert plot.csv.splitlines()[1:] == ["first,RL,64.0,a", "first,RL,64.0,b", "second,SFT,32.0,c"]
    heights = {text: float(y) for y, text in re.findall(r'y="([\d.]+)"[^>]*>([^<]+)<', plot.svg)}
    gaps = [b - a for a, b in itertools.pairwise(heights[name] for name in ("a", "b", "c", "d: none"))]
    assert all(abs(gap - gaps[0]) < 0.01 and gap > 15 for gap in gaps)


def test_legend_of_arms_is_in_order_of_last_values() -> None:
    ends = {"middle": 30.5, "low": 20.0, "high": 40.0}
    series = [figures.Series(name, style, (0, 1), (0.1, end / 100)) for style, (name, end) in enumerate(ends.items())]
    axis = figures.ValueAxis(ticks={0: "before", 1: "RL"})
    plot = figures.line_plot("s", {"Accuracy": series}, axis, [])
    assert plot.description.startswith("Accuracy: middle 10.0 at before, 30.5 at RL; low 10.0 at before, 20.0 at RL;")
    assert re.findall(r">(\w+ [\d.]+)</text>", plot.svg) == ["high 40.0", "middle 30.5", "low 20.0"]


def test_curves_show_mean_and_range_over_seeds_at_common_steps() -> None:
    def series(*seeds: list[float]) -> list[figures.Series]:
        """The metric of each seed at the steps 1, 2, …"""
        rows = [[{"step": step, "reward": value} for step, value in enumerate(seed, 1)] for seed in seeds]
        return html_curves.mean_curves([("bridge", rows)], "reward")

    plot = figures.curves("a", "reward", series([0.0, 1.0, 2.0], [2.0, 3.0]))
    # At the common steps 1 and 2 the means are 1 and 2, the minima 0 and 1, the maxima 2 and 3.
    assert plot.description == "reward over training steps, 2 seeds: bridge from 1 to 2"
    assert f'aria-label="{plot.description}"' in plot.element
    assert plot.csv.splitlines()[1:] == ["bridge,1,1.0,0.0,2.0", "bridge,2,2.0,1.0,3.0"]
    apart = figures.curves("b", "x", series([0.0], [math.nan, 0.0]))
    assert "no step in common" in apart.description


def test_equal_cost_arms_are_plotted_next_to_each_other() -> None:
    assert figures.sideways_shifts([256, 256, 256, 512]) == [-5.0, 0.0, 5.0, 0.0]
    series = [figures.Series(name, style, [256.0], [0.5], [0.4], [0.6]) for style, name in enumerate("abc")]
    series.append(figures.Series("base_student", None, (), [0.1]))
    plot = figures.line_plot("c", {"Accuracy on sums": series}, figures.ValueAxis("labels"), [])
    assert plot.description.endswith("c 50.0 (40.0 to 60.0) at 256.0; base_student 10.0")
    verticals = re.findall(r'd="M ([\d.]+) [\d.]+\nL ([\d.]+) [\d.]+\n"[^>]*stroke: var\(--series', plot.element)
    xs = [float(x) for x, end in verticals if x == end]
    assert len(xs) == 3 and all(abs(b - a - 5.0) < 0.2 for a, b in itertools.pairwise(xs))


def test_inline_figure_uses_page_colours_and_keeps_axis_labels() -> None:
    series = [figures.Series("a", 0, (1, 2), (0.25, 0.75), (0.25, 0.75), (0.25, 0.75))]
    plot = figures.curves("d", "share", series)
    assert "currentColor" in plot.element and "var(--series0, #0072b2)" in plot.element and svg.TEXT not in plot.element
    assert ">0.75<" in plot.element.replace("\n", "") or ">0.7<" in plot.element.replace("\n", "")
    ids = re.findall(r' id="([^"]+)"', plot.element)
    other = figures.curves("e", "share", series)
    assert ids and not set(ids) & set(re.findall(r' id="([^"]+)"', other.element))


def test_file_stems_are_portable_and_unique() -> None:
    assert figures.file_stem("accuracy", "sums") == "accuracy-sums"
    stems = [figures.file_stem("way", name) for name in ("../../x", "a/b", "a:b", "é" * 300)]
    assert len(set(stems)) == 4 and all(re.fullmatch(r"[A-Za-z0-9_-]{1,70}", stem) for stem in stems)
