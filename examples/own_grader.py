"""A grader of your own: is the answer the same set of words, whatever their order?

Run from this folder:  headwater run own_grader.yaml --out runs/own_grader
"""


def same_words(gold: str, completion: str) -> bool:
    """The last line is the answer. Return a bool, or (bool, reason); anything else counts as an error."""
    lines = completion.strip().splitlines() or [""]
    return sorted(lines[-1].split()) == sorted(gold.split())
