"""The task `maths`: answers to mathematics problems in GSM8K, MATH, AIME and DAPO style.

math-verify does the mathematics. Ours is what surrounds it: where the answer stands, one spelling, cheap exact
comparison first, and refusing what would take forever. Limits of time and memory are `verifier`'s.
"""

from __future__ import annotations

from headwater.tasks import maths_text
from headwater.tasks.maths_equal import compare_plainly, same, without_unit
from headwater.tasks.maths_numbers import number

LONGEST_ANSWER = 3000  # characters beyond four times the gold answer's; longer answers are only compared as they stand


def extract(completion: str) -> str | None:
    """The answer that a completion states, for votes: equal numbers give equal text; None without an answer.

    Example: `extract("so \\boxed{\\dfrac12}")` and `extract("The answer is 0.50.")` both give `"1/2"`.
    """
    answer, _ = maths_text.extract(completion)
    if answer is None or len(answer) > LONGEST_ANSWER:
        return answer
    spelled = without_unit(maths_text.canonical(answer))
    value = number(spelled)
    return maths_text.squeezed(spelled) if value is None else str(value)


def quick(gold: str, completion: str) -> tuple[bool, str] | None:
    """The outcome where cheap exact comparison settles it: most integers and words, and whatever is degenerate.

    Example: `quick("1,080", "… \\n#### 1080")` gives `(True, "equal")`, `quick("2x", "\\boxed{x+x}")` gives None.
    """
    answer, missing = maths_text.extract(completion)
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
    verdict = compare_plainly(maths_text.canonical(gold), maths_text.canonical(answer))
    return None if verdict is None else (verdict, "equal" if verdict else "different")


def grade(gold: str, completion: str) -> tuple[bool, str]:
    """(correct, reason): reason is `equal`, `different`, `no_answer`, `truncated` (a box that never closes) or `error`.

    Unbounded in time: call it through `verifier.Verifier`. Raises MemoryError.
    """
    outcome = quick(gold, completion)
    if outcome is not None:
        return outcome
    answer, _ = maths_text.extract(completion)
    assert answer is not None
    equal = same(maths_text.canonical(gold), maths_text.canonical(answer))
    return equal, "equal" if equal else "different"
