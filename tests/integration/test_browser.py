"""The report of a real pocket study in headless Chromium. `make browser` installs the requirements."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, SIZES, require_browser, serious_violations
from fake_runs import ARMS, MORE_ARMS, fake_run
from headwater.report import build as report
from runs import all_arms

require_browser()
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket study of every arm, with its report."""
    out = tmp_path_factory.mktemp("browser") / "study"
    shutil.copytree(all_arms(), out, ignore=shutil.ignore_patterns("checkpoint", "model", "cache"))
    report.write(out)
    return out


@pytest.fixture(scope="module")
def open_page() -> Iterator[Callable[..., Any]]:
    """A context manager that opens a page and fails on any request, console message, error or dialog."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        @contextmanager
        def open_in_browser(path: Path, size: str = "desktop", scheme: Any = "light", **more: Any) -> Iterator[Page]:
            context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, **more)
            page = context.new_page()
            faults: list[str] = []
            page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
            page.on(
                "request",
                lambda request: None if request.url.split("#")[0] == path.as_uri() else faults.append(request.url),
            )
            page.goto(path.as_uri())
            yield page
            assert faults == []
            context.close()

        yield open_in_browser
        browser.close()


def go_to_rollouts(page: Page) -> None:
    """Follow the link to the section. Sections off the screen are not laid out (content-visibility): they have no inner text.

    A plain scroll misses the section, because the sections above it grow when they come into view.
    """
    page.locator("nav a", has_text="Rollouts").click()
    page.locator("#rollout-list article").first.wait_for()
    expect(page.locator("#rollout-count")).to_contain_text("match", use_inner_text=True)


def heads(page: Page) -> list[str]:
    return page.locator("#rollout-list article > p:first-child").all_inner_texts()


def test_every_section_and_figure_is_shown_without_network_access(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        assert page.locator("h2").count() == page.locator("nav a").count() >= 10
        shown = page.locator("figure svg[role=img]").all()
        names = [path.stem for path in (study / "figures").glob("*.svg")]
        files_only = [name for name in names if name.startswith(("accuracy-", "contrasts-"))]
        assert len(shown) == len(names) - len(files_only) > 20
        for figure in shown:
            assert figure.get_attribute("aria-label")
            box = figure.bounding_box()
            assert box is not None and box["width"] > 150 and box["height"] > 80
            assert figure.locator("path").count() > 5
        rows = page.locator("#arms tbody tr").count()
        assert page.locator("#arms td.forest .mean").count() == rows >= 20


def test_navigation_and_arms_fit_at_desktop_width(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        for selector in ("nav", "#arms .wide", "#comparisons .wide"):
            wider = page.locator(selector).first.evaluate("element => element.scrollWidth - element.clientWidth")
            assert wider <= 0, f"{selector} scrolls sideways by {wider} px"


def test_arms_on_page_match_report_json(study: Path, open_page: Any) -> None:
    values = json.loads((study / "report.json").read_text(encoding="utf-8"))
    with open_page(study / "report.html") as page:
        rows = page.locator("#arms tbody tr").evaluate_all(
            """rows => rows.map(row => [row.cells[0].firstChild.textContent,
                Object.fromEntries([...row.cells].map(cell => [cell.dataset.label, cell.innerText]))])"""
        )
        assert [name for name, _ in rows] == list(values["arms"])
        for name, cells in rows:
            arm = values["arms"][name]
            accuracy = arm["accuracy"]["sums"]
            mean, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("mean", "low", "high"))
            assert cells["accuracy %\u00a0[95\u00a0%]"] == f"{mean}\n[{low}, {high}]", name
            assert [cells["labels"], cells["checks"]] == [
                f"{arm['labels'][key]:,}" for key in ("distinct", "checks")
            ], name


def test_arms_on_phone_show_accuracy_forest_and_labels(study: Path, open_page: Any) -> None:
    values = json.loads((study / "report.json").read_text(encoding="utf-8"))
    with open_page(study / "report.html", "phone") as page:
        rows = page.locator("#arms tbody tr").all()
        assert len(rows) == len(values["arms"])
        for row, arm in zip(rows, values["arms"].values(), strict=True):
            assert (row.locator("td.forest").bounding_box() or {})["width"] > 300
            assert (
                f"{100 * arm['accuracy']['sums']['mean']:.1f}" in row.locator("td[data-label^=accuracy]").inner_text()
            )
            labels = row.locator("td[data-label=labels]")
            assert labels.inner_text() == f"{arm['labels']['distinct']:,}"
            box = labels.bounding_box() or {}
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390
        assert page.locator("#arms th.axis").is_visible()


@pytest.mark.parametrize("size", SIZES)
def test_captions_and_figures_fit_without_scrolling_sideways(study: Path, open_page: Any, size: str) -> None:
    """Folded tables of numbers may scroll, but not their captions."""
    with open_page(study / "report.html", size) as page:
        page.add_style_tag(content="main > section { content-visibility: visible !important }")
        page.locator("details").evaluate_all("all => all.forEach(details => { details.open = true; })")
        for part in page.locator("caption span, figure, nav").all():
            box = part.bounding_box()
            assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= SIZES[size]["width"]
        open_tables = page.locator("main > section > .wide").evaluate_all(
            "regions => regions.filter(r => r.scrollWidth > r.clientWidth).map(r => r.ariaLabel)"
        )
        assert open_tables == []


def curve(page: Page, title: str) -> Any:
    """The first panel of this metric, in view, with the values that it carries."""
    panel = page.locator(f'#training-curves svg[aria-label^="{title}"]').first
    page.locator("nav a", has_text="Training curves").click()
    panel.scroll_into_view_if_needed()
    return panel, json.loads(panel.get_attribute("data-curve") or "")


def test_pointer_shows_values_of_nearest_step(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        panel, data = curve(page, "reward (share correct)")
        box, (left, _, right, _) = panel.bounding_box(), data["frame"]
        line, (first, last) = data["lines"][0], data["x"]
        step, reward = line["x"][1], line["y"][1]
        across = left + (step - first) / (last - first) * (right - left)
        page.mouse.move(box["x"] + box["width"] * across / 252, box["y"] + box["height"] / 2)
        text = page.locator(".values-box").inner_text().splitlines()
        assert text[0] == f"step {step}" and text[1] == f"{float(f'{reward:.3g}'):g} {line['label']}"
        page.mouse.move(0, 0)
        assert page.locator(".values-box").count() == 0


def test_smoothing_draws_mean_of_last_points(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        panel, data = curve(page, "entropy, nats a token")
        (_, bottom, _, top), (low, high) = data["frame"], data["y"]
        path, values = panel.locator(".line0 path").first, data["lines"][0]["y"]
        page.select_option("#curve-options [name=smoothing]", "3")
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path.get_attribute("d") or "")]
        means = [sum(last) / len(last) for end in range(1, len(values) + 1) if (last := values[max(0, end - 3) : end])]
        assert heights == pytest.approx([bottom + (m - low) / (high - low) * (top - bottom) for m in means], abs=0.06)


def test_logarithmic_axis_keeps_ratios_apart_equally(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        page.locator("nav a", has_text="Training curves").click()
        panels = page.locator("#training-curves svg[data-curve]").all()
        carried = [json.loads(panel.get_attribute("data-curve") or "") for panel in panels]
        ranges = [[value for line in data["lines"] for value in line["y"]] for data in carried]
        place = next(i for i, values in enumerate(ranges) if min(values) > 0 and max(values) > 3 * min(values))
        panel, data = panels[place], carried[place]
        page.select_option("#curve-options [name=axis]", "log")
        drawn = panel.locator(".line0 path").first.get_attribute("d") or ""
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn)]
        logs = [math.log(value) for value in data["lines"][0]["y"]]
        slope = (heights[-1] - heights[0]) / (logs[-1] - logs[0])
        expected = [heights[0] + slope * (value - logs[0]) for value in logs]
        assert heights == pytest.approx(expected, abs=0.3) and not panel.locator(".values").is_visible()
        page.select_option("#curve-options [name=axis]", "linear")
        assert panel.locator(".values").is_visible()


def test_arrow_keys_read_values_of_all_curves_of_stage(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        _, data = curve(page, "reward (share correct)")
        row = page.locator("#training-curves .figures").first
        row.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        step = sorted({step for line in data["lines"] for step in line["x"]})[1]
        assert row.locator(".values-box").count() == row.locator("svg[data-curve]").count() > 3
        assert (page.locator("#curve-values").text_content() or "").startswith(f"step {step}: ")
        page.keyboard.press("Escape")
        assert row.locator(".values-box").count() == 0


def test_filters_and_search_select_rollouts_and_survive_reload(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        go_to_rollouts(page)
        everything = page.locator("#rollout-count").inner_text()
        page.select_option("#filters [name=stage]", label="On-policy distillation")
        page.wait_for_timeout(300)
        assert heads(page) and all("On-policy distillation" in head for head in heads(page))
        page.select_option("#filters [name=arm]", label="opd_only")
        page.wait_for_timeout(300)
        assert heads(page) and all("opd_only" in head for head in heads(page))
        page.reload()
        go_to_rollouts(page)
        assert page.locator("#filters [name=arm]").input_value() != ""
        assert heads(page) and all("opd_only" in head for head in heads(page))
        page.click("#filters button[type=reset]")
        page.wait_for_timeout(300)
        page.select_option("#filters [name=verdict]", label="wrong")
        page.fill("#filters [name=search]", "7")
        page.wait_for_timeout(300)
        texts = page.locator("#rollout-list article").all_inner_texts()
        assert texts and all("✗ wrong" in text and "7" in text for text in texts)
        page.fill("#filters [name=search]", "")
        page.select_option("#filters [name=verdict]", label="cut at max_tokens")
        page.wait_for_timeout(300)
        assert heads(page) and all(head.startswith("✗ cut at max_tokens ") for head in heads(page))
        page.fill("#filters [name=search]", "no rollout says this")
        page.wait_for_timeout(300)
        assert heads(page) == [] and page.locator("#rollout-count").inner_text().startswith("0 of ")
        page.click("#filters button[type=reset]")
        page.wait_for_timeout(300)
        assert page.locator("#rollout-count").inner_text() == everything


def test_dense_reward_colours_tokens_and_sparse_reward_whole_texts(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        go_to_rollouts(page)
        page.select_option("#filters [name=stage]", label="On-policy distillation")
        page.wait_for_timeout(300)
        tokens = page.locator("#rollout-list pre span[title$=nats]")
        titles = [token.get_attribute("title") or "" for token in tokens.all()]
        assert len(titles) > 20 and all(re.fullmatch(r"[+−]\d+\.\d\d nats", title) for title in titles)
        strongest = max(range(len(titles)), key=lambda index: float(titles[index].split()[0].replace("−", "")))
        assert "color-mix" in (tokens.nth(strongest).get_attribute("style") or "")
        page.select_option("#filters [name=stage]", label="Teacher RL")
        page.wait_for_timeout(300)
        assert page.locator("#rollout-list pre span[title]").count() == 0
        assert "the same for every token" in page.locator("#rollout-list").inner_text()


def test_every_control_is_reachable_by_keyboard(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = set()
        for _ in range(400):
            page.keyboard.press("Tab")
            reached.add(
                page.evaluate(
                    "(e => e.id || e.name || e.getAttribute('aria-label') || e.tagName)(document.activeElement)"
                )
            )
        assert {"stage", "arm", "verdict", "seed", "search", "rollout-more", "SUMMARY"} <= reached
        before = page.locator("#rollout-list article").count()
        page.focus("#rollout-more")
        page.keyboard.press("Enter")
        assert page.locator("#rollout-list article").count() == before + 10
        assert page.evaluate("document.activeElement.tagName") == "ARTICLE"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation_and_page_fits_screen(
    study: Path, open_page: Any, size: str, scheme: str
) -> None:
    with open_page(study / "report.html", size, scheme) as page:
        # Lay out all sections, not only those on the screen, so that axe checks them.
        page.evaluate(
            "document.querySelectorAll('main > section').forEach(section => section.style.contentVisibility = 'visible')"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
        assert serious_violations(page) == []


def test_completions_are_inserted_as_text(tmp_path: Path, open_page: Any) -> None:
    hostile = "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)><b>bold</b>\u202e"
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]}, text=hostile)
    report.write(out)
    with open_page(out / "report.html") as page:
        go_to_rollouts(page)
        shown = page.locator("#rollout-list pre").first
        assert "<script>alert(1)</script>" in shown.inner_text()
        assert page.locator("#rollouts img, #rollouts b, #rollout-list script").count() == 0
        page.wait_for_timeout(200)


def test_page_without_javascript_shows_everything_but_rollouts(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html", java_script_enabled=False) as page:
        assert page.locator(".no-script").is_visible() and not page.locator("#filters").is_visible()
        assert page.locator("figure svg").count() > 20


def test_print_style_hides_navigation_and_filters(study: Path, open_page: Any) -> None:
    with open_page(study / "report.html") as page:
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible() and not page.locator("#filters").is_visible()
        assert page.locator("#arms table").is_visible()


def test_large_study_opens_in_two_seconds(tmp_path: Path, open_page: Any) -> None:
    twelve = dict(list({**ARMS, **MORE_ARMS}.items())[:12])
    out = fake_run(tmp_path / "out", seeds=(0, 1, 2, 3, 4), arms=twelve, problems=100, steps=60)
    report.write(out)
    with open_page(out / "report.html") as page:
        milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        size = (out / "report.html").stat().st_size
        print(f"5 seeds × 12 arms: {size / 1e6:.2f} MB, open after {milliseconds / 1000:.2f} s")
        assert size < 3_000_000 and milliseconds < 2000
