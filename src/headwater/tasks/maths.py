"""Task `maths`: grade final answers in the formats of GSM8K, MATH, AIME and DAPO.

math-verify compares expressions. This package adds answer extraction, normalization, cheap exact comparison first, and
rejection of expressions that are too large. `verifier` enforces time and memory limits.
"""

from __future__ import annotations

import re
from datetime import timedelta

from headwater.tasks import maths_text
from headwater.tasks.maths_clock import read_clock
from headwater.tasks.maths_equal import compare_plainly, same, without_name, without_unit
from headwater.tasks.maths_numbers import number

LONGEST_ANSWER = 3000  # characters beyond four times the gold's length; longer answers are only compared as text
_PERCENT = re.compile(r"(?:[%％٪]|\bper\s?cent(?:age)?|\bpct)[\s}$.)\\]{0,9}\Z", re.IGNORECASE)


def extract(completion: str) -> str | None:
    """Canonical answer for majority votes: equal numbers give equal text; None without an answer.

    Example: `extract("so \\boxed{\\dfrac12}")` and `extract("The answer is 0.50.")` both give `"1/2"`.
    """
    answer, _ = maths_text.extract_value(completion)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return answer
    spelled = maths_text.canonical(answer)
    clock = read_clock(spelled)
    if clock is not None and clock.named:
        return str(timedelta(seconds=clock.seconds)).removesuffix(":00")
    bare = without_unit(without_name(spelled))
    value = number(bare)
    return maths_text.squeezed(bare) if value is None else str(value)


def quick(gold: str, completion: str) -> tuple[bool, str] | None:
    """Outcome if a cheap exact comparison decides (most integers and words, degenerate texts), else None.

    Example: `quick("1,080", "… \\n#### 1080")` gives `(True, "equal")`, `quick("2x", "\\boxed{x+x}")` gives None.
    """
    answer, missing = maths_text.extract_value(completion)
    if answer is None:
        return False, missing
    gold = gold.strip()
    if not gold:
        return False, "different"
    if answer == gold:
        return True, "equal"
    if len(answer) > LONGEST_ANSWER + 4 * len(gold) or len(gold) > LONGEST_ANSWER:
        equal = "".join(answer.split()) == "".join(gold.split())
        return equal, "equal" if equal else "different"
    if _same_share(gold, answer):
        return True, "equal"
    verdict = compare_plainly(maths_text.canonical(gold), maths_text.canonical(answer))
    return None if verdict is None else (verdict, "equal" if verdict else "different")


def _same_share(gold: str, answer: str) -> bool:
    """Whether exactly one of two answers is a percentage and the other the share that it stands for: `10%` and `0.1`.

    Minerva's and MATH's graders ignore the sign, so that 10% also equals 10 (`canonical` does this); math-verify accepts both, because
    10% is 0.1. With a sign on both sides or on neither the numbers must be equal: 0.5% is not 50%, and 0.5 is not 50.
    """
    signs = [_PERCENT.search(text) is not None for text in (gold, answer)]
    if signs[0] == signs[1]:
        return False
    values = [number(without_unit(maths_text.canonical(text))) for text in (gold, answer)]
    percentage, share = values if signs[0] else values[::-1]
    return percentage is not None and share is not None and percentage == 100 * share


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """Grade a completion; (correct, `equal` | `different` | `no_answer` | `truncated`). Truncated: a box never closes.

    Unbounded in time: call it through `verifier.Verifier`. Raises MemoryError.
    """
    outcome = quick(gold, completion)
    if outcome is not None:
        return outcome
    answer, _ = maths_text.extract_value(completion)
    assert answer is not None
    equal = same(maths_text.canonical(gold), maths_text.canonical(answer))
    return equal, "equal" if equal else "different"
