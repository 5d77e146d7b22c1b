"""Custom grader: does the answer contain the same words as the gold answer, in any order?

Run from this folder:  headwater run own_grader.yaml --out runs/own_grader
"""


def same_words(gold: str, completion: str) -> bool:
    """Grade the last line. Return a bool, or (bool, reason); anything else counts as an error."""
    lines = completion.strip().splitlines() or [""]
    return sorted(lines[-1].split()) == sorted(gold.split())
