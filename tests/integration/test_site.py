"""The site that `make docs` builds, opened from its folder in headless Chromium. `make browser` builds it first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, SIZES, require_browser, serious_violations

require_browser()
from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

SITE = Path(__file__).parents[2] / "site"
PAGES = sorted(
    path for path in SITE.glob("*.html") if path.stem != "404"
)  # 404.html is for servers: its paths are absolute
if not PAGES:
    pytest.skip("the site is not built; `make browser` builds it", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, size: str, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page, and its errors and its requests to the network so far."""
    page = browser.new_context(viewport=SIZES[size], color_scheme=scheme).new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
    page.goto(path.as_uri())
    return page, faults


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "dark"), ("phone", "light")])
def test_axe_finds_no_serious_violation_on_any_page(browser: Browser, size: str, scheme: str) -> None:
    failures = {}
    for path in PAGES:
        page, faults = opened(browser, path, size, scheme)
        page.wait_for_load_state("load")
        wider = page.evaluate("document.documentElement.scrollWidth") - SIZES[size]["width"]
        if problems := [*faults, *serious_violations(page), *([f"{wider} px too wide"] if wider > 0 else [])]:
            failures[path.name] = problems
        page.context.close()
    assert failures == {} and len(PAGES) > 20


@pytest.mark.parametrize("size", SIZES)
def test_search_opened_from_folder_lists_page_of_searched_words(browser: Browser, size: str) -> None:
    page, faults = opened(browser, SITE / "index.html", size)
    if size == "phone":
        page.locator("label.md-header__button[for=__search]").click()
    field = page.locator("input.md-search__input")
    field.click()
    field.press_sequentially("forward KL warm-up")
    first = page.locator("a.md-search-result__link").first
    first.wait_for()
    assert "stages.html" in {
        str(link).split("?")[0].split("#")[0].rsplit("/", 1)[1]
        for link in page.locator("a.md-search-result__link").evaluate_all("links => links.map(link => link.href)")
    }
    first.click()
    page.wait_for_url("**/*.html*")
    assert page.locator("mark").count() > 0 and faults == []
