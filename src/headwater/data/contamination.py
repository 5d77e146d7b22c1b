"""Contamination: find problems that an evaluation set contains too, verbatim or reworded with long shared word runs."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.types import Problem, letters_and_digits, strip_sizing, user_turns

NGRAM = 13
"""Consecutive words that two texts must share (as in GPT-3 and most later work)."""
COMMON = 10
"""An n-gram that more of the searched problems than this contain is a common phrase ("where m and n are relatively prime
positive integers, find m + n") and no evidence of a copy (also GPT-3's rule)."""
SHARE = 0.5
"""Fraction of the shorter text that shared n-grams must cover: one shared phrase is no copy."""
NEAR = 0.8
"""Covered by this fraction, common n-grams included, a text is a copy: a problem copied eleven times is still a copy."""

Gram = tuple[str, ...]
_WORD = re.compile(r"\d+|[a-z]+|[^\W\d_a-z]")


@dataclass(frozen=True, slots=True)
class Leak:
    """A problem that an evaluation set contains too.

    why    `exact`: the same letters and digits; `ngram`: enough of the shorter text is shared in 13-word runs
    like   the evaluation problem's id
    share  covered fraction of the shorter text; 1.0 if exact

    Example: `Leak("9f8b…", "amc23", "ngram", "51c0…", 0.89)`.
    """

    problem_id: str
    eval: str
    why: Literal["exact", "ngram"]
    like: str
    share: float


def words_of(text: str) -> list[str]:
    """Split into numbers and runs of Latin letters; every other letter is a word of its own, as Chinese has no spaces.

    Example: `words_of("Find $|2x|$!")` is `["find", "2", "x"]`.
    """
    return _WORD.findall(strip_sizing(text).casefold())


def find_leaks(problems: Sequence[Problem], evals: Mapping[str, Sequence[Problem]]) -> list[Leak]:
    """One leak per problem and evaluation set that shares it, in the order of both; linear in the length of the texts.

    Texts shorter than NGRAM words are compared as a whole only. Spaces, punctuation, case and signs are ignored, so "a + b"
    matches "a − b": removing a few problems too many is better than a contaminated evaluation. Of a conversation the user's turns
    are compared, without those that the conversations repeat (`repeated_turns`); a single turn is compared with whole problems.

    Example: `find_leaks(train, {"math500": test})` is `[Leak("9f8b…", "math500", "exact", "51c0…", 1.0)]`.
    """
    repeated = frozenset[str]().union(*map(repeated_turns, (problems, *evals.values())))
    indexed = [
        (name, problem, words_of(_asked(problem, repeated))) for name, group in evals.items() for problem in group
    ]
    whole: dict[str, dict[str, str]] = defaultdict(dict)
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    by_gram: dict[Gram, list[int]] = defaultdict(list)
    for index, (name, problem, words) in enumerate(indexed):
        whole[letters_and_digits(_asked(problem))].setdefault(name, problem.id)
        for turn in _turns(problem, repeated) if problem.turns else ():
            parts[letters_and_digits(turn)].setdefault(name, problem.id)
        for gram in _grams(words):
            if not (indices := by_gram[gram]) or indices[-1] != index:
                indices.append(index)
    searched = [words_of(_asked(problem, repeated)) for problem in problems]
    # Shared n-grams with their start positions; most texts share none.
    shared = [[(start, gram) for start, gram in enumerate(_grams(words)) if gram in by_gram] for words in searched]
    counts = Counter(gram for grams in shared for gram in {gram for _, gram in grams})
    leaks: list[Leak] = []
    for problem, words, grams in zip(problems, searched, shared, strict=True):
        letters = letters_and_digits(_asked(problem))
        same = parts.get(letters, {}) | whole.get(letters, {})
        for turn in _turns(problem, repeated) if problem.turns else ():
            same |= whole.get(letters_and_digits(turn), {})
        leak_by_eval = {name: Leak(problem.id, name, "exact", other_id, 1.0) for name, other_id in same.items()}
        for index, (rare, any_) in _covered(grams, by_gram, counts).items():
            name, other, other_words = indexed[index]
            shorter = min(len(words), len(other_words))
            share = any_ / shorter
            better = name not in leak_by_eval or (
                leak_by_eval[name].why == "ngram" and share > leak_by_eval[name].share
            )
            if better and (rare / shorter >= SHARE or share >= NEAR):
                leak_by_eval[name] = Leak(problem.id, name, "ngram", other.id, round(share, 3))
        leaks += [leak_by_eval[name] for name in evals if name in leak_by_eval]
    return leaks


def repeated_turns(problems: Sequence[Problem]) -> frozenset[str]:
    """User turns before the last one that at least two conversations, and half of all, share.

    They are few-shot examples, or a document that many questions are about: sharing them makes no copies.
    """
    earlier = [user_turns(problem.turns)[:-1] for problem in problems if problem.turns]
    talks = [turns for turns in earlier if turns]
    counts = Counter(turn for turns in talks for turn in set(turns))
    return frozenset(turn for turn, count in counts.items() if count >= max(2, len(talks) / 2))


def _turns(problem: Problem, without: frozenset[str] = frozenset()) -> list[str]:
    """What the user asks, turn by turn."""
    if not problem.turns:
        return [problem.text]
    *earlier, last = user_turns(problem.turns)
    return [*(turn for turn in earlier if turn not in without), last]


def _asked(problem: Problem, without: frozenset[str] = frozenset()) -> str:
    """The text that is compared."""
    return "\n".join(_turns(problem, without))


def _grams(words: Sequence[str]) -> list[Gram]:
    return [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


def _covered(
    grams: Sequence[tuple[int, Gram]], by_gram: Mapping[Gram, Sequence[int]], counts: Mapping[Gram, int]
) -> dict[int, tuple[int, int]]:
    """Words covered by the n-grams shared with each evaluation problem: by uncommon n-grams, and by all of them."""
    ends: dict[int, tuple[int, int]] = {}  # where the words covered so far end, likewise
    covered: dict[int, tuple[int, int]] = {}
    for start, gram in grams:
        end = start + NGRAM
        for index in by_gram[gram]:
            (rare_end, any_end), (rare, any_) = ends.get(index, (0, 0)), covered.get(index, (0, 0))
            any_, any_end = any_ + end - max(start, any_end), end
            if counts[gram] <= COMMON:
                rare, rare_end = rare + end - max(start, rare_end), end
            ends[index], covered[index] = (rare_end, any_end), (rare, any_)
    return covered
