"""Forms in which a prompt may ask for the answer, for strict reading: only an answer in that form counts.

The graders of `tasks` read leniently: any usual statement of the answer. The difference of the two is what a model loses by its
format alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from headwater.tasks.announced import last_match
from headwater.tasks.maths_text import last_box
from headwater.tasks.thinking import after_thinking

_HASHES = re.compile(r"####[ \t]*([^\s#][^\n]*)")


def boxed(completion: str) -> str | None:
    """The last complete box after the thinking. Example: `boxed("so \\boxed{41}, no: \\boxed{42}.")` is `"\\boxed{42}"`."""
    content, _ = last_box(after_thinking(completion))
    return rf"\boxed{{{content}}}" if content else None


def hashes(completion: str) -> str | None:
    """The last line end after `####`, as in GSM8K. Example: `hashes("6·7 = 42\\n#### 42")` is `"#### 42"`."""
    match = last_match(_HASHES, after_thinking(completion))
    return f"#### {match.group(1)}" if match is not None else None


FORMS: Mapping[str, tuple[str, Callable[[str], str | None]]] = {"boxed": ("boxed", boxed), "hashes": ("####", hashes)}
"""Form -> (text by which a prompt asks for it, function that finds the answer in this form)."""


def form_asked_for(template: str, problems: Iterable[str]) -> str | None:
    """The form that the template, or else every problem, names; None if there is no such form.

    Example: `form_asked_for("{problem}\\nEnd with `#### answer`.", [])` is `"hashes"`.
    """
    texts = list(problems)
    for name, (mark, _) in FORMS.items():
        if mark in template or (texts and all(mark in text for text in texts)):
            return name
    return None
