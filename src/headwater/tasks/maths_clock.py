"""Times of day (`3:45 PM`, `15:45`, `noon`) and dates (`2024-05-01`, `May 1, 2024`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headwater.tasks.maths_text import without_text

LONGEST = 80  # characters
_NAMED = re.compile(r"(?<![a-z])(?:[ap]\.?\s?m(?![a-z])|noon|midnight|morning|afternoon|evening)", re.IGNORECASE)
_TIME = re.compile(
    r"(?:at )?(?P<hour>\d{1,2})(?:[:.](?P<minute>\d\d)(?::(?P<second>\d\d))?)?(?: ?o'?clock)?"
    r"(?: ?(?P<half>[ap])\.? ?m\.?| (?P<word>noon|midnight)| in the (?P<part>morning|afternoon|evening))?"
)
_HALF_DAY = 12 * 3600


@dataclass(frozen=True)
class Clock:
    """A time of day. Example: `3:45 PM` is `Clock(seconds=56700, certain=True, named=True)`.

    seconds  since midnight; before noon if `certain` is False
    certain  whether the half of the day is known: `15:45` and `03:45` are certain, `3:45` is not
    named    whether it is a time by its words: AM, PM, noon; without them `3:45` may be a ratio and `3` a number
    """

    seconds: int
    certain: bool
    named: bool


def read_clock(text: str) -> Clock | None:
    """Parse a canonical answer as a time of day; None for anything else.

    Example: `read_clock("12\\\\text{ noon}") == read_clock("12:00 p.m.")`.
    """
    if len(text) > LONGEST:
        return None
    spelled = " ".join(without_text(text.replace("{:}", ":")).lower().split())
    spelled = re.sub(r"\s*:\s*", ":", spelled)
    if spelled.strip(".") in ("noon", "midnight"):
        return Clock(_HALF_DAY if "noon" in spelled else 0, certain=True, named=True)
    match = _TIME.fullmatch(spelled)
    if match is None or int(match["minute"] or 0) > 59 or int(match["second"] or 0) > 59:
        return None
    hour, rest = int(match["hour"]), 60 * int(match["minute"] or 0) + int(match["second"] or 0)
    if match["word"]:
        return Clock(_HALF_DAY if match["word"] == "noon" else 0, True, True) if (hour, rest) == (12, 0) else None
    half = match["half"] or {"morning": "a", "afternoon": "p", "evening": "p"}.get(match["part"] or "", "")
    if half == "" and (
        "." in spelled or hour > 23 or (match["minute"] is None and match["hour"] != str(min(hour, 12)))
    ):
        return None  # 3.45 and 15 are numbers
    if half == "" and (hour > 12 or match["hour"].startswith("0")):
        return Clock(3600 * hour + rest, certain=True, named=False)
    if not 1 <= hour <= 12:
        return None
    return Clock(3600 * (hour % 12) + rest + (_HALF_DAY if half == "p" else 0), certain=half != "", named=half != "")


def same_clock(gold: str, answer: str) -> bool | None:
    """Whether two canonical answers are the same time of day; None unless both are times and one is named (AM, PM, noon).

    An answer without AM or PM is accepted, like a number without its unit; the wrong one is not.

    Example: `3:45 PM` is the same as `15:45` and `3:45`, but not as `3:45 AM`.
    """
    if not (_NAMED.search(gold) or _NAMED.search(answer)):
        return None
    wanted, given = read_clock(gold), read_clock(answer)
    if wanted is None or given is None or not (wanted.named or given.named):
        return None
    if wanted.certain and given.certain:
        return wanted.seconds == given.seconds
    return wanted.seconds % _HALF_DAY == given.seconds % _HALF_DAY


# Dates ----------------------------------------------------------------------------------------------------------------

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    r"|dec(?:ember)?)\.?"
)
_WEEKDAY = r"(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day\s?,?\s?)?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_DATES = [
    re.compile(pattern)
    for pattern in (
        r"(?P<year>\d{4})-(?P<month>0\d|1[0-2])-(?P<day>[0-2]\d|3[01])",
        rf"{_WEEKDAY}{_MONTH}\s?{_DAY}(?:\s?,?\s?(?P<year>\d{{4}}))?",
        rf"{_WEEKDAY}(?:the\s)?{_DAY}\s?(?:of\s)?{_MONTH}(?:\s?,?\s?(?P<year>\d{{4}}))?",
        r"(?P<year>\d{4})\s?年\s?(?P<month>\d{1,2})\s?月\s?(?P<day>\d{1,2})\s?日",
    )
]


def read_date(text: str) -> tuple[int | None, int, int] | None:
    """Parse a canonical answer as (year or None, month, day); None for anything else. `05/01/2024` has two readings and is no date.

    Example: `read_date("May 1st, 2024")` is `(2024, 5, 1)`.
    """
    if len(text) > LONGEST:
        return None
    spelled = " ".join(without_text(text).lower().split())
    match = next((match for pattern in _DATES if (match := pattern.fullmatch(spelled))), None)
    if match is None:
        return None
    month = int(match["month"]) if match["month"].isdigit() else _MONTHS.index(match["month"][:3]) + 1
    return (int(match["year"]) if match["year"] else None), month, int(match["day"])


def same_date(gold: str, answer: str) -> bool | None:
    """Whether two canonical answers are the same date; None unless both are dates, or one is written as 2024-05-01.

    An answer without a year is another than one with it.
    """
    wanted, given = read_date(gold), read_date(answer)
    if wanted is not None and given is not None:
        return wanted == given
    # 2024-05-01 is no subtraction, whose value is 2018.
    return False if _DATES[0].fullmatch(gold) or _DATES[0].fullmatch(answer) else None
