"""Task `choice`: multiple choice with letters A to J. A gold answer is one letter (`B`, `(B)`) or several (`A, C`)."""

from __future__ import annotations

import re

from headwater.tasks import maths_text
from headwater.tasks.thinking import after_thinking

LONGEST = 400  # characters of an answer that are searched for letters
# A standalone letter, possibly in brackets or emphasis; not part of a word or a quantity.
_LETTER = r"[(\[*_\"'`]{0,4}([A-J])[)\]*_\"'`]{0,4}(?![\w'’])"
_JOINED = re.compile(rf"\s*(?:,?\s*(?:and|or|&|/)\s*|,\s*){_LETTER}")
_LEAD = re.compile(r"\s*(?:(?:the|option|choice|answer|letter|number)s?\b[\s:]*){0,3}", re.IGNORECASE)
_FIRST = re.compile(_LETTER)
# `A` and `I` are words too: "A good idea" is no choice, "A because …" is.
_GOES_ON = re.compile(r"\s*(?:$|[.,:;)\]!?(\n–—-]|(?:because|since|as|is|was|and|or|with|for)\b)")
_CHOSEN = re.compile(
    rf"\b(?:choose|pick|select|option|choice|choosing|picking|selecting)\s+(?:is\s+)?(?:option\s+|choice\s+)?{_LETTER}"
)
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")


def letters_of(statement: str) -> str | None:
    """Letters at the start of an answer, sorted; None if it starts with none.

    Example: `letters_of("(C) and A")` is `"A,C"`, `letters_of("B) Paris")` is `"B"`, `letters_of("A good idea")` None.
    """
    text = _TEXT.sub(r"\1", statement[:LONGEST]).replace("$", "").strip()
    if re.fullmatch(r"\(?[a-j]\)?\.?", text):
        text = text.upper()
    text = text[_LEAD.match(text).end() :]  # type: ignore[union-attr]  # always matches, possibly the empty string
    first = _FIRST.match(text)
    if first is None:
        return None
    letters, place = {first[1]}, first.end()
    while more := _JOINED.match(text, place):
        letters.add(more[1])
        place = more.end()
    if len(letters) == 1 and first[0] in ("A", "I") and not _GOES_ON.match(text, place):
        return None
    return ",".join(sorted(letters))


def extract(completion: str) -> str | None:
    """Chosen letters: from the box, `####` or "answer is"; else alone on the last line; else "option B".

    Example: `extract("It is Paris.\\nAnswer: **B**")` is `"B"`.
    """
    return _chosen(completion)[0]


def _chosen(completion: str) -> tuple[str | None, str]:
    answer, missing = maths_text.extract(completion)
    if missing == "truncated":
        return None, missing
    if answer is not None:
        letters = letters_of(answer)
        return letters, "" if letters else "no_answer"
    text = after_thinking(completion).strip()
    last = text.rpartition("\n")[2].strip()
    if re.fullmatch(r"[(\[*_]{0,3}[A-Ja-j][)\]*_.]{0,4}", last) or last == text:
        letters = letters_of(last)
        if letters is not None:
            return letters, ""
    choices = _CHOSEN.findall(text)
    return (choices[-1], "") if choices else (None, "no_answer")


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare the chosen letters with the gold; reasons `equal`, `different`, `no_answer`, `truncated`, `error` (bad gold).

    Example: `grade("B", "The answer is (B) Paris.")` gives `(True, "equal")`; "B or C" gives `(False, "different")`.
    """
    wanted = letters_of(gold)
    if wanted is None:
        return False, "error"
    given, missing = _chosen(completion)
    if given is None:
        return False, missing
    return (True, "equal") if given == wanted else (False, "different")
