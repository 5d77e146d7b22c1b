"""Headless Chromium with axe-core, for tests of pages. `make browser` installs the requirements."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("HEADWATER_CHROMIUM") or next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
AXE = Path(os.environ.get("HEADWATER_AXE", Path(__file__).parents[2] / ".axe/package/axe.min.js"))
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}

try:
    from playwright.sync_api import Page
except ImportError:
    CHROMIUM = None


def require_browser() -> None:
    """Skip the calling test module, with a warning, without playwright or Chromium (found on PATH, or by HEADWATER_CHROMIUM)."""
    if CHROMIUM is None:
        reason = "THE BROWSER TESTS DO NOT RUN: chromium or playwright is missing; `make browser` installs playwright"
        warnings.warn(reason, stacklevel=2)
        pytest.skip(reason, allow_module_level=True)


def serious_violations(page: Page) -> list[tuple[Any, ...]]:
    """What axe calls serious or critical: rule, first element, reason. Skips the test where axe-core is missing."""
    if not AXE.exists():
        pytest.skip(f"AXE DID NOT RUN: {AXE} is missing; `make browser` fetches axe-core")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    results = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert results["passes"]
    return [
        (violation["id"], violation["nodes"][0]["html"][:200], violation["nodes"][0]["failureSummary"])
        for violation in results["violations"]
        if violation["impact"] in ("serious", "critical")
    ]
