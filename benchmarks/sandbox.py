"""Measure the Python sandbox: the time that a run takes to start, and that of thousands of gradings.

    python -m benchmarks.sandbox [--gradings 4096] [--workers 2]

The problems are of HumanEval's form: a function, and `check(candidate)` with assertions. Every completion is different, so no verdict
comes from the verifier's cache; one in four is wrong. Raises RuntimeError if a verdict is not the right one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

from headwater.tasks import sandbox
from headwater.tasks.verifier import Verifier

STARTS = 40
PROBLEMS = {
    "close_pairs": (
        "def close_pairs(numbers, threshold):\n    ordered = sorted(numbers)\n"
        "    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))",
        [(([1.0, 2.0, 3.0], 0.5), False), (([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3), True), (([1.0, 2.0, 5.9, 4.0, 5.0], 0.95), True)],
    ),
    "groups": (
        "def groups(text):\n    result, current, depth = [], '', 0\n    for c in text.replace(' ', ''):\n        current += c\n"
        "        depth += 1 if c == '(' else -1\n        if depth == 0:\n            result.append(current)\n            current = ''\n"
        "    return result",
        [(("(()()) ((())) ()",), ["(()())", "((()))", "()"]), (("( ) (( )) (( )( ))",), ["()", "(())", "(()())"])],
    ),
    "deviation": (
        "def deviation(numbers):\n    mean = sum(numbers) / len(numbers)\n"
        "    return sum(abs(x - mean) for x in numbers) / len(numbers)",
        [(([1.0, 2.0, 3.0, 4.0],), 1.0), (([1.0, 1.0],), 0.0), (([2.0, 4.0],), 1.0)],
    ),
    "primes": (
        "def primes(n):\n    sieve = [True] * n\n    for k in range(2, n):\n        for m in range(2 * k, n, k):\n"
        "            sieve[m] = False\n    return [k for k in range(2, n) if sieve[k]]",
        [((20,), [2, 3, 5, 7, 11, 13, 17, 19]), ((2,), []), ((12,), [2, 3, 5, 7, 11])],
    ),
    "histogram": (
        "from collections import Counter\ndef histogram(text):\n    counts = Counter(text.split())\n"
        "    most = max(counts.values(), default=0)\n    return {word: count for word, count in counts.items() if count == most}",
        [(("a b b a c",), {"a": 2, "b": 2}), (("",), {}), (("x y y",), {"y": 2})],
    ),
    "longest_run": (
        "def longest_run(values):\n    best = length = 0\n    previous = None\n    for value in values:\n"
        "        length = length + 1 if value == previous else 1\n        previous = value\n        best = max(best, length)\n"
        "    return best",
        [(([1, 1, 2, 2, 2, 3],), 3), (([],), 0), (([5],), 1), ((["a", "a", "b"],), 2)],
    ),
}  # fmt: skip
"""Function: its solution, and (arguments, expected answer) of each assertion."""


def gradings(count: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(gold answer, completion) pairs, and the reason of each right verdict."""
    pairs, reasons = [], []
    for number in range(count):
        name, (solution, cases) = list(PROBLEMS.items())[number % len(PROBLEMS)]
        lines = [f"    assert candidate(*{arguments!r}) == {answer!r}" for arguments, answer in cases]
        tests = "def check(candidate):\n" + "\n".join(lines)
        right = number % 4 != 0
        code = f"{solution if right else solution.replace('return ', 'return not ')}\n# {number}"
        pairs.append((json.dumps({"tests": tests, "entry_point": name}), f"```python\n{code}\n```"))
        reasons.append("equal" if right else "different")
    return pairs, reasons


def starts(count: int) -> list[float]:
    """Seconds of each run of an empty program, the first one with the start of its server."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        if not sandbox.run("", "pass").passed:
            raise RuntimeError("the sandbox does not run an empty program")
        seconds.append(time.perf_counter() - began)
    return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gradings", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    first, *rest = (1000 * seconds for seconds in starts(STARTS))
    print(f"layers: {', '.join(sandbox.layers())}")
    print(
        f"start: median {statistics.median(rest):.1f} ms, largest {max(rest):.1f} ms of {len(rest)}; {first:.0f} ms with the server's"
    )
    pairs, reasons = gradings(options.gradings)
    with Verifier("python", workers=options.workers, seconds=30.0) as verifier:
        verifier(pairs[:1])  # starts a worker
        began = time.perf_counter()
        verdicts = verifier(pairs[1:])
        seconds = time.perf_counter() - began
    wrong = sum(verdict.reason != reason for verdict, reason in zip(verdicts, reasons[1:], strict=True))
    if wrong:
        raise RuntimeError(f"{wrong} of {len(verdicts)} verdicts are not the right ones")
    print(
        f"gradings: {len(verdicts)} in {seconds:.1f} s with {options.workers} workers, {1000 * seconds / len(verdicts):.1f} ms each"
    )


if __name__ == "__main__":
    main()
