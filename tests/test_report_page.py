"""What the report looks like: the page, its figures, the terminal's tables."""

from __future__ import annotations

import html.parser
import io
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fakes import ARMS, BASE_S, MORE_ARMS, fake_run, printed
from headwater import figures, report, report_words, svg


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("fake") / "out")


@pytest.fixture(scope="module")
def built(run: Path) -> dict[str, Any]:
    return report.write(run)


@pytest.mark.parametrize("evals", [("sums",), ("math500", "aime24", "aime25")])
def test_the_terminal_table_fits_in_a_hundred_columns(tmp_path: Path, evals: tuple[str, ...]) -> None:
    found = report.build([fake_run(tmp_path / "out", arms={**ARMS, **MORE_ARMS}, evals=evals)])
    text = printed(found, 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    accuracy = found["arms"]["bridge_rl"]["accuracy"][evals[-1]]
    line = f"{100 * accuracy['mean']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    assert line in text
    assert list(found["arms"])[-1] == "zz_own"


def test_output_to_a_file_is_110_columns_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert report.console(io.StringIO()).width == 110


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
    assert report_words.units(value) == text


class _Page(html.parser.HTMLParser):
    """Collects ids, references and headings, and checks that elements close in order."""

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
        if tag not in ("meta", "br", "link"):
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


def test_the_page_is_whole_and_needs_nothing_from_outside(run: Path, built: dict[str, Any]) -> None:
    text = (run / "report.html").read_text()
    page = _parsed(text)
    assert len(page.ids) == len(set(page.ids))
    references = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {a or b for a, b in references} <= set(page.ids)
    assert not page.tags.keys() & {"script", "link", "img", "iframe", "object", "image"}
    outside = [v for k, v in page.attributes if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")]
    assert outside == []
    assert set(re.findall(r"https?://[^\"' )<]+", text)) <= {"http://www.w3.org/2000/svg"}
    levels = [int(level) for level in re.findall(r"<h([1-6])>", text)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert len(text.encode()) < 3_000_000
    accuracy = built["arms"]["bridge"]["accuracy"]["sums"]
    assert f">{100 * accuracy['mean']:.1f}<" in text
    for title in ("reward (share correct)", "KL(teacher ‖ student), nats a token", "entropy, nats a token"):
        assert f">{title}<" in text.replace("&#8214;", "‖")


def test_what_comes_from_files_cannot_become_markup(tmp_path: Path) -> None:
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
    assert not page.tags.keys() & {"script", "img", "b", "i", "u"}
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "\x00" not in text and "\x1b" not in text
    assert len(page.ids) == len(set(page.ids))


def test_a_very_long_completion_is_cut(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"base_student": [BASE_S]}, text="x" * 100_000)
    report.write(out)
    text = (out / "report.html").read_text()
    assert len(text) < 150_000 and "97,500 more characters" in text


def test_five_seeds_of_twenty_arms_are_reported_in_seconds(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0, 1, 2, 3, 4), arms={**ARMS, **MORE_ARMS}, problems=200, steps=60)
    start = time.process_time()
    report.write(out)
    seconds = time.process_time() - start
    size = (out / "report.html").stat().st_size
    print(f"report of 5 seeds × {len(ARMS | MORE_ARMS)} arms: {seconds:.1f} s of processor time, {size / 1e6:.2f} MB")
    assert size < 3_000_000
    assert seconds < 20


def test_the_page_shows_predictions_comparisons_conditions_and_costs(tmp_path: Path) -> None:
    out = fake_run(tmp_path / "out", seeds=(0, 1), arms={**ARMS, **MORE_ARMS})
    found = report.write(out)
    text = (out / "report.html").read_text()
    page = _parsed(text)
    assert page.open == []
    for title in ("The paper's predictions", "Equal labels and compute", "Conditions", "Stage by stage"):
        assert html.escape(title) in text
    said = re.sub(r"<[^>]+>", " ", text)
    for row in found["predictions"]:
        assert f"{row['reading']}" in said and html.escape(row["why"].split("; ")[0]) in said
    described = [value or "" for key, value in page.attributes if key == "aria-label"]
    cost = [one for one in described if "against training FLOPs" in one]
    assert len(cost) == 1 and "bridge " in cost[0] and "at 56G" in cost[0] and "base_student" in cost[0]
    assert any(
        one.startswith("overlap on student prefixes over training steps, 2 seeds: raw_teacher") for one in described
    )
    assert any(one.startswith("Teacher RL, all labels (") and "best of group from" in one for one in described)


def test_round_ticks_and_places_on_an_axis() -> None:
    assert svg.ticks(0, 0.7) == [0.0, 0.2, 0.4, 0.6]
    assert svg.ticks(-3, 12) == [0.0, 5.0, 10.0]
    assert svg.ticks(0.995, 1.0) == [0.995, 0.996, 0.997, 0.998, 0.999, 1.0]
    assert svg.log_ticks(3, 60) == [5.0, 10.0, 20.0, 50.0]
    assert svg.log_ticks(1e8, 3e12) == [1e8, 1e9, 1e10, 1e11, 1e12]
    assert svg.Scale(0, 10, 100, 200).at(5) == 150
    assert svg.Scale(1, 100, 50, 0, log=True).at(10) == pytest.approx(25)
    low, high = svg.spanning([2.0, 2.0])
    assert low < 2 < high
    assert svg.spanning([0.0]) == (-5e-7, 5e-7)


def test_labels_are_spread_without_crossing_and_stay_where_they_can() -> None:
    assert svg.spread([10, 11, 50], 4, 0, 100) == [8.5, 12.5, 50]
    # Unordered wishes keep their order; a block at the edge is pushed inside: 0, 4, 8 for three that want 1, 0 and 2.
    assert svg.spread([1, 0, 2], 4, 0, 100) == [4, 0, 8]
    found = svg.spread([5, 7, 9, 30, 31, 32, 33], 4, 0, 100)
    assert all(b - a >= 4 - 1e-9 for a, b in itertools.pairwise(found))


def test_curves_are_the_mean_and_the_range_over_seeds_where_all_have_a_value() -> None:
    lines = (((1, 2, 3), (0.0, 1.0, 2.0)), ((1, 2), (2.0, 3.0)))
    drawn = figures.curves("reward", [figures.Series("bridge", 0, lines)])
    # Means at the common steps 1 and 2 are 1 and 2; the band has two edges of two points each.
    assert 'aria-label="reward over training steps, 2 seeds: bridge from 1 to 2"' in drawn
    band = re.search(r'<polygon points="([^"]+)"[^>]*opacity="0.13"', drawn)
    assert band is not None and len(band[1].split()) == 4
    assert "no step in common" in figures.curves("x", [figures.Series("a", 0, (((1,), (0.0,)), ((2,), (0.0,))))])


def test_arms_of_one_cost_stand_beside_each_other() -> None:
    points = [figures.Point(name, 256.0, 0.5, 0.4, 0.6) for name in ("a", "b", "c")]
    drawn = figures.against("Accuracy on sums", points, [("base_student", 0.1)], "labels", str)
    uprights = re.findall(
        r'<polyline points="([\d.]+),[\d.]+ ([\d.]+),[\d.]+" fill="none" stroke="var\(--series', drawn
    )
    across = [float(x) for x, again in uprights if x == again]
    assert len(across) == 3 and [round(b - a, 1) for a, b in itertools.pairwise(across)] == [6.0, 6.0]
