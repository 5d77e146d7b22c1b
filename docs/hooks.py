"""For the site: links that lead out of docs/ (to the log or the sources) stand there as plain text, since the site has no such pages."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """mkdocs calls it for every page. From docs/stages/ one step up is still within docs/."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return re.sub(rf"\[([^\]]+)\]\({re.escape(up)}[^)]*\)", r"\1", markdown)
