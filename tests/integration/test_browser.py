"""The report in a real browser: headless Chromium on the page of a real pocket study. `make browser` brings what it needs.

Without Chromium (or HEADWATER_CHROMIUM, the path of one) and playwright all of it is skipped, and said so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes import ARMS, MORE_ARMS, fake_run
from headwater.report import build as report
from runs import all_arms

CHROMIUM = os.environ.get("HEADWATER_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
AXE = Path(os.environ.get("HEADWATER_AXE", Path(__file__).parents[2] / ".axe/package/axe.min.js"))
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

try:
    from playwright.sync_api import Page, sync_playwright
except ImportError:
    CHROMIUM = None
if CHROMIUM is None:
    said = "THE BROWSER TESTS DO NOT RUN: no chromium or no playwright here; `make browser` brings them"
    warnings.warn(said, stacklevel=1)
    pytest.skip(said, allow_module_level=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real pocket study of every arm, with its page."""
    out = tmp_path_factory.mktemp("browser") / "study"
    shutil.copytree(all_arms(), out, ignore=shutil.ignore_patterns("checkpoint", "model", "cache"))
    report.write(out)
    return out


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[..., Any]]:
    """A context manager: a page's path -> the open page, which must ask for nothing and complain of nothing."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        @contextmanager
        def open_(path: Path, size: str = "desktop", scheme: Any = "light", **more: Any) -> Iterator[Page]:
            context = browser.new_context(viewport=SIZES[size], color_scheme=scheme, **more)
            page = context.new_page()
            faults: list[str] = []
            page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("dialog", lambda dialog: faults.append(f"dialog {dialog.message}"))
            page.on(
                "request", lambda asked: None if asked.url.split("#")[0] == path.as_uri() else faults.append(asked.url)
            )
            page.goto(path.as_uri())
            yield page
            assert faults == []
            context.close()

        yield open_
        browser.close()


def to_rollouts(page: Page) -> None:
    """What is off the screen is not laid out, and has no inner text."""
    page.locator("#rollouts").scroll_into_view_if_needed()
    page.locator("#rollout-list article").first.wait_for()


def heads(page: Page) -> list[str]:
    return page.locator("#rollout-list article > p:first-child").all_inner_texts()


def test_every_section_and_every_plot_is_there_and_nothing_is_asked_of_any_network(study: Path, opened: Any) -> None:
    with opened(study / "report.html") as page:
        assert page.locator("h2").count() == page.locator("nav a").count() >= 10
        shown = [one.get_attribute("aria-label") for one in page.locator("figure svg[role=img]").all()]
        drawn = [path.stem for path in (study / "figures").glob("*.svg")]
        for_papers = [name for name in drawn if name.startswith(("accuracy-", "contrasts-"))]
        assert len(shown) == len(drawn) - len(for_papers) > 20
        for one in page.locator("figure svg[role=img]").all():
            box = one.bounding_box()
            assert box is not None and box["width"] > 150 and box["height"] > 80
            assert one.locator("path").count() > 5
        rows = page.locator("#arms tbody tr").count()
        assert page.locator("#arms td.forest .mean").count() == rows >= 20


def test_at_desktop_width_navigation_and_arms_are_seen_whole(study: Path, opened: Any) -> None:
    with opened(study / "report.html") as page:
        for seen in ("nav", "#arms .wide", "#comparisons > .wide"):
            wider = page.locator(seen).first.evaluate("element => element.scrollWidth - element.clientWidth")
            assert wider <= 0, f"{seen} scrolls sideways by {wider} px"


def test_the_arms_on_the_page_are_those_of_the_values_file(study: Path, opened: Any) -> None:
    found = json.loads((study / "report.json").read_text(encoding="utf-8"))
    with opened(study / "report.html") as page:
        rows = page.locator("#arms tbody tr").evaluate_all(
            "rows => rows.map(row => [row.cells[0].firstChild.textContent, [...row.cells].slice(1).map(c => c.innerText)])"
        )
        assert [name for name, _ in rows] == list(found["arms"])
        for name, cells in rows:
            arm = found["arms"][name]
            accuracy = arm["accuracy"]["sums"]
            mean, low, high = (f"{100 * accuracy[key]:.1f}" for key in ("mean", "low", "high"))
            assert cells[:2] == [mean, f"{low} to {high}"], name
            assert cells[5:7] == [f"{arm['labels'][key]:,}" for key in ("distinct", "checks")], name


def test_filters_and_search_show_what_they_say_and_survive_a_reload(study: Path, opened: Any) -> None:
    with opened(study / "report.html") as page:
        to_rollouts(page)
        everything = page.locator("#rollout-count").inner_text()
        page.select_option("#filters [name=stage]", label="On-policy distillation")
        page.wait_for_timeout(300)
        assert heads(page) and all("On-policy distillation" in head for head in heads(page))
        page.select_option("#filters [name=arm]", label="opd_only")
        page.wait_for_timeout(300)
        assert heads(page) and all("opd_only" in head for head in heads(page))
        page.reload()
        to_rollouts(page)
        assert page.locator("#filters [name=arm]").input_value() != ""
        assert heads(page) and all("opd_only" in head for head in heads(page))
        page.click("#filters button[type=reset]")
        page.wait_for_timeout(300)
        page.select_option("#filters [name=verdict]", label="wrong")
        page.fill("#filters [name=search]", "7")
        page.wait_for_timeout(300)
        texts = page.locator("#rollout-list article").all_inner_texts()
        assert texts and all("✗ wrong" in text and "7" in text for text in texts)
        page.fill("#filters [name=search]", "no rollout says this")
        page.wait_for_timeout(300)
        assert heads(page) == [] and page.locator("#rollout-count").inner_text().startswith("0 of ")
        page.click("#filters button[type=reset]")
        page.wait_for_timeout(300)
        assert page.locator("#rollout-count").inner_text() == everything


def test_tokens_carry_the_teachers_signal_under_dense_reward_and_one_colour_under_sparse(
    study: Path, opened: Any
) -> None:
    with opened(study / "report.html") as page:
        to_rollouts(page)
        page.select_option("#filters [name=stage]", label="On-policy distillation")
        page.wait_for_timeout(300)
        tokens = page.locator("#rollout-list pre span[title$=nats]")
        titles = [token.get_attribute("title") or "" for token in tokens.all()]
        assert len(titles) > 20 and all(re.fullmatch(r"[+−]\d+\.\d\d nats", title) for title in titles)
        strongest = max(range(len(titles)), key=lambda place: float(titles[place].split()[0].replace("−", "")))
        assert "color-mix" in (tokens.nth(strongest).get_attribute("style") or "")
        page.select_option("#filters [name=stage]", label="Teacher RL")
        page.wait_for_timeout(300)
        assert page.locator("#rollout-list pre span[title]").count() == 0
        assert "the same for every token" in page.locator("#rollout-list").inner_text()


def test_the_keyboard_reaches_everything(study: Path, opened: Any) -> None:
    with opened(study / "report.html") as page:
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
def test_axe_finds_no_serious_fault_and_no_page_is_wider_than_its_screen(
    study: Path, opened: Any, size: str, scheme: str
) -> None:
    with opened(study / "report.html", size, scheme) as page:
        # All of it is laid out, and so looked at, not only what is on the screen.
        page.evaluate(
            "document.querySelectorAll('main > section').forEach(one => one.style.contentVisibility = 'visible')"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size]["width"]
        if not AXE.exists():
            pytest.skip(f"AXE DID NOT RUN: no {AXE}; `make browser` fetches axe-core")
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        grave = [
            (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert grave == [] and found["passes"]


def test_what_a_model_wrote_stays_text(tmp_path: Path, opened: Any) -> None:
    hostile = "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)><b>bold</b>\u202e"
    out = fake_run(tmp_path / "out", seeds=(0,), arms={"bridge": ARMS["bridge"]}, text=hostile)
    report.write(out)
    with opened(out / "report.html") as page:
        to_rollouts(page)
        shown = page.locator("#rollout-list pre").first
        assert "<script>alert(1)</script>" in shown.inner_text()
        assert page.locator("#rollouts img, #rollouts b, #rollout-list script").count() == 0
        page.wait_for_timeout(200)


def test_without_its_script_the_page_still_tells_everything_but_the_rollouts(study: Path, opened: Any) -> None:
    with opened(study / "report.html", java_script_enabled=False) as page:
        assert page.locator(".without").is_visible() and not page.locator("#filters").is_visible()
        assert page.locator("figure svg").count() > 20


def test_on_paper_there_is_no_navigation_and_nothing_is_cut_off(study: Path, opened: Any) -> None:
    with opened(study / "report.html") as page:
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible() and not page.locator("#filters").is_visible()
        assert page.locator("#arms table").is_visible()


def test_a_large_study_opens_in_two_seconds(tmp_path: Path, opened: Any) -> None:
    twelve = dict(list({**ARMS, **MORE_ARMS}.items())[:12])
    out = fake_run(tmp_path / "out", seeds=(0, 1, 2, 3, 4), arms=twelve, problems=100, steps=60)
    report.write(out)
    with opened(out / "report.html") as page:
        milliseconds = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        size = (out / "report.html").stat().st_size
        print(f"5 seeds × 12 arms: {size / 1e6:.2f} MB, open after {milliseconds / 1000:.2f} s")
        assert size < 3_000_000 and milliseconds < 2000
