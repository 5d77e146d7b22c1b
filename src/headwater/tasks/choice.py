"""Task `choice`: multiple choice with letters A to J. A gold answer is one letter (`B`, `(B)`) or several (`A, C`)."""

from __future__ import annotations

import re

from headwater.tasks import maths_text
from headwater.tasks.thinking import after_thinking

LONGEST = 400  # characters of an answer that are searched for letters
# A standalone letter, possibly in brackets or emphasis; not part of a word or a quantity.
_LETTER = r"[(\[*_\"'`]{0,4}([A-J])[)\]*_\"'`]{0,4}(?![\w'’])"
_JOINED = re.compile(rf"\s*(?:,?\s*(?:and|or|&|/)\s*|,\s*){_LETTER}")
_LEAD = re.compile(
    r"\s*(?:(?:(?:the|option|choice|answer|letter|number)s?|(?:la|die|l['’])\s?(?:opci[óo]n|opzione|option)|a\sop[çc]ão)\b[\s:]*"
    r"|[选選][项項][\s:：]*){0,3}",
    re.IGNORECASE,
)
_FIRST = re.compile(_LETTER)
# `A` and `I` are words too: "A good idea" is no choice, "A because …" is.
_GOES_ON = re.compile(r"\s*(?:$|[.,:;)\]!?(\n–—-]|(?:because|since|as|is|was|and|or|with|for)\b)")
_PICKED = re.compile(
    r"\b(?:choose|pick|select|choosing|picking|selecting|go\s+with|going\s+with|(?:correct|right|best)\s+(?:option|choice)\s+is)\s+"
    rf"(?:(?:option|choice)\s+)?{_LETTER}"
    rf"|\b(?:[Oo]ption\s+|[Cc]hoice\s+)?(?<![\w'’]){_LETTER}(?=\s+is\s+(?:the\s+)?(?:correct|right|best|only\s+correct|answer)\b)"
)
_MENTIONED = re.compile(rf"\b(?:[Oo]ption|[Cc]hoice)\s+(?:is\s+)?{_LETTER}")
_REJECTED_BEFORE = re.compile(
    r"(?:\bnot|n['’]t|\bnever|\bthan|\binstead\s+of|\brule\s+out|\beliminate|\bexclude)\s+(?:\w+\s+){0,2}$"
)
_REJECTED_AFTER = re.compile(
    r"[\s*_]*(?:(?:is|was|are|can|does|would|cannot)\s+(?:\w+\s+)?(?:not|incorrect|wrong|false|impossible|eliminated|ruled|excluded)\b"
    r"|(?:isn|doesn|can|wasn)['’]t\b|cannot\b|是错|是錯|不[对對正])"
)
_MARKED_LINE = re.compile(r"[(\[*_]{0,3}[A-J][*_]{0,2}[).:][*_]{0,2}\s+\S")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}")


def letters_of(statement: str) -> str | None:
    """Letters at the start of an answer, sorted; None if it starts with none.

    Example: `letters_of("(C) and A")` is `"A,C"`, `letters_of("B) Paris")` is `"B"`, `letters_of("A good idea")` None.
    """
    text = _TEXT.sub(r"\1", statement[:LONGEST]).replace("$", "").strip()
    text = text[_LEAD.match(text).end() :]  # type: ignore[union-attr]  # always matches, possibly the empty string
    if re.fullmatch(r"\(?[a-j]\)?\.?", text):
        text = text.upper()
    first = _FIRST.match(text)
    if first is None:
        return None
    letters, place = {first[1]}, first.end()
    while more := _JOINED.match(text, place):
        letters.add(more[1])
        place = more.end()
    if _REJECTED_AFTER.match(text, place):
        return None
    if len(letters) == 1 and first[0] in ("A", "I") and not _GOES_ON.match(text, place):
        return None
    return ",".join(sorted(letters))


def extract(completion: str) -> str | None:
    """Chosen letters: from the box, `####` or "answer is"; else at the last line's start; else "I choose B", "B is correct"; else
    the only option that is named and not rejected ("option B").

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
    lines = [line.strip() for line in text.split("\n") if line.strip()][-2:] or [""]
    last = lines[-1]
    listed = len(lines) == 2 and _MARKED_LINE.match(lines[0])  # the end of a list of all options
    if (
        re.fullmatch(r"[(\[*_]{0,3}[A-Ja-j][)\]*_.]{0,4}", last)
        or last == text
        or (_MARKED_LINE.match(last) and not listed)
    ):
        letters = letters_of(last)
        if letters is not None:
            return letters, ""
    picked = _not_rejected(_PICKED, text)
    if picked:
        return picked[-1], ""
    mentioned = set(_not_rejected(_MENTIONED, text))
    return (mentioned.pop(), "") if len(mentioned) == 1 else (None, "no_answer")


def _not_rejected(pattern: re.Pattern[str], text: str) -> list[str]:
    """Letters that a pattern finds, in order, without those that the words around reject: "option B is wrong"."""
    return [
        match[1] or match[match.lastindex or 1]
        for match in pattern.finditer(text)
        if not (
            _REJECTED_BEFORE.search(text, max(0, match.start() - 40), match.start())
            or _REJECTED_AFTER.match(text, match.end())
        )
    ]


def _same_text(gold: str, completion: str) -> bool:
    """Whether a completion gives the text of the gold choice (`B) 12 km`) instead of its letter."""
    text = re.sub(rf"^\s*{_LETTER}[).:\s]*", "", gold)
    answer, _ = maths_text.extract(completion)
    if answer is None or max(len(text), len(answer)) > LONGEST:
        return False
    wanted, given = (
        " ".join(maths_text.canonical(_TEXT.sub(r" \1 ", part)).casefold().split()) for part in (text, answer)
    )
    return len(wanted) > 1 and wanted == given


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Compare the chosen letters, or the text of a gold such as `B) Paris`, with the gold.

    Reasons: `equal`, `different`, `no_answer`, `truncated`, `error` (bad gold).

    Example: `grade("B", "The answer is (B) Paris.")` gives `(True, "equal")`; "B or C" gives `(False, "different")`.
    """
    wanted = letters_of(gold)
    if wanted is None:
        return False, "error"
    given, missing = _chosen(completion)
    if given is None:
        return (True, "equal") if missing == "no_answer" and _same_text(gold, completion) else (False, missing)
    return (True, "equal") if given == wanted else (False, "different")
