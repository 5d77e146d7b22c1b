"""Task `exact`: the answer must equal the gold text up to white space. For names, words and codes with one spelling."""

from __future__ import annotations

import unicodedata

from headwater.tasks import maths_text
from headwater.tasks.thinking import after_thinking


def folded(text: str) -> str:
    """Collapse white space and compose Unicode (NFC); keep case and punctuation.

    Example: `folded(" New\\n  York ")` is `"New York"`.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def answer_of(completion: str) -> tuple[str | None, str]:
    """Extract (answer, reason if None): as in task `maths`, else all text after the thinking.

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
    """Compare texts; reasons `equal`, `different`, `no_answer`, `truncated`. Linear time.

    Example: `grade("New York", "I think \\\\boxed{New  York}")` gives `(True, "equal")`.
    """
    wanted = folded(gold)
    if wanted and folded(after_thinking(completion)) == wanted:
        return True, "equal"  # a gold answer may itself contain `####` or `answer is`
    answer, missing = answer_of(completion)
    if answer is None:
        return False, missing
    return (True, "equal") if wanted and answer == wanted else (False, "different")
