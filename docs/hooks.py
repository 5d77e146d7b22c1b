"""mkdocs hooks: fill in the recipe reference, and replace links that leave docs/ (to the log or the sources) by their text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page."""
    if "<!-- every field of the recipe -->" in markdown:
        root = Path(__file__).parents[1]
        sys.path[:0] = [str(root / "src"), str(root)]
        from tools.recipe_reference import markdown as every_field

        markdown = markdown.replace("<!-- every field of the recipe -->", every_field())
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}[^)]*\)", r"\1", markdown)
