"""The task `exact`: the answer is the gold text, white space aside. For names, short words, codes, anything with one spelling."""

from __future__ import annotations

import unicodedata

from headwater.tasks import maths_text


def folded(text: str) -> str:
    """White space folded, Unicode composed; case and punctuation stay.

    Example: `folded(" New\\n  York ")` is `"New York"`.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def after_thinking(completion: str) -> str:
    """What follows the last `</think>`; all of it where there is none."""
    return completion.rpartition("</think>")[2]


def answer_of(completion: str) -> tuple[str | None, str]:
    """The answer, and why there is none: as the task `maths` finds it, else all that follows the thinking.

    Example: `answer_of("So the answer is Paris.")` and `answer_of("Paris")` both give `("Paris", "")`.
    """
    stated, missing = maths_text.extract(completion)
    if missing == "truncated":
        return None, missing
    answer = folded(after_thinking(completion) if stated is None else stated)
    return (answer, "") if answer else (None, "no_answer")


def extract(completion: str) -> str | None:
    return answer_of(completion)[0]


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """(correct, reason): `equal`, `different`, `no_answer` or `truncated`. Linear in the text.

    Example: `grade("New York", "I think \\\\boxed{New  York}")` gives `(True, "equal")`.
    """
    wanted = folded(gold)
    if wanted and folded(after_thinking(completion)) == wanted:
        return True, "equal"  # a gold answer may itself hold `####` or `answer is`
    answer, missing = answer_of(completion)
    if answer is None:
        return False, missing
    return (True, "equal") if wanted and answer == wanted else (False, "different")
