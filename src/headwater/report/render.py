"""Render HTML pages from the jinja2 templates in report/templates/.

Every page is one self-contained file: style sheet, figures and script are inline, and nothing is fetched from the network.
Autoescape is on and every printed string passes `clean`, so text from a run directory cannot become markup. The page's
Content-Security-Policy allows only our own script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def clean(text: str) -> str:
    """Replace characters that HTML or UTF-8 cannot hold with U+FFFD."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text.replace("\r\n", "\n"))


def anchor(title: str) -> str:
    """The id of a section. Example: `anchor("The paper's predictions")` is `the-paper-s-predictions`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def asset(name: str) -> Markup:
    """Our own style sheet or script, unescaped."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))


def csp_hash(script: str) -> str:
    """The source expression that allows an inline script. Example: `sha256-47DEQ…=`."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _finalize(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_finalize,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
ENVIRONMENT.filters.update(anchor=anchor, csp_hash=csp_hash)
ENVIRONMENT.globals.update(asset=asset)


def render(template: str, values: dict[str, Any]) -> str:
    """Render a template of report/templates/. Raises jinja2.UndefinedError if it prints a value that is missing."""
    return ENVIRONMENT.get_template(template).render(values)
