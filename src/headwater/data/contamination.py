"""Problems that also stand in an evaluation set: the same text, or a rewording that keeps most of it word for word."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.types import Problem, letters_and_digits, strip_sizing

NGRAM = 13
"""Words in a row that two texts must share (GPT-3's choice, and most others' since)."""
COMMON = 10
"""An n-gram of more of the searched problems than this is how such problems are worded ("where m and n are relatively
prime positive integers, find m + n"), not what they ask (GPT-3's rule, too)."""
SHARE = 0.5
"""The part of the shorter text that shared n-grams must cover: one shared phrase is no copy."""
NEAR = 0.8
"""Covered by this much, common n-grams included, a text is a copy: a problem that was copied eleven times is still one."""

_WORD = re.compile(r"\d+|[a-z]+|[^\W\d_a-z]")


@dataclass(frozen=True, slots=True)
class Leak:
    """A problem that stands in an evaluation set too.

    why    `exact`: the same letters and digits; `ngram`: so much of the shorter text is shared in 13-word runs
    like   the evaluation problem's id
    share  the covered part of the shorter text; 1.0 where exact

    Example: `Leak("9f8b…", "amc23", "ngram", "51c0…", 0.89)`.
    """

    problem_id: str
    eval: str
    why: Literal["exact", "ngram"]
    like: str
    share: float


def words_of(text: str) -> list[str]:
    """Numbers, and runs of letters; each letter beyond the Latin ones stands alone, as Chinese has no spaces.

    Example: `words_of("Find $|2x|$!")` is `["find", "2", "x"]`.
    """
    return _WORD.findall(strip_sizing(text).casefold())


def find_leaks(problems: Sequence[Problem], evals: Mapping[str, Sequence[Problem]], n: int = NGRAM) -> list[Leak]:
    """One leak for each problem and evaluation set that shares it, in the order of both; linear in the texts' length.

    Texts shorter than n words are compared as wholes only. Spaces, punctuation, case and signs are ignored, so "a + b"
    counts as "a − b": an evaluation is better kept clean by a few problems too many.

    Example: `find_leaks(train, {"math500": test})` is `[Leak("9f8b…", "math500", "exact", "51c0…", 1.0)]`.
    """
    held = [(name, one, words_of(one.text)) for name, ones in evals.items() for one in ones]
    by_letters: dict[str, dict[str, str]] = defaultdict(dict)
    by_gram: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for index, (name, one, words) in enumerate(held):
        by_letters[letters_and_digits(one.text)].setdefault(name, one.id)
        for gram in _grams(words, n):
            if not (places := by_gram[gram]) or places[-1] != index:
                places.append(index)
    searched = [words_of(one.text) for one in problems]
    # Where in a text shared n-grams begin; most texts share none.
    shared = [[place for place, gram in enumerate(_grams(words, n)) if gram in by_gram] for words in searched]
    seen: Counter[tuple[str, ...]] = Counter()
    for words, places in zip(searched, shared, strict=True):
        seen.update({tuple(words[place : place + n]) for place in places})
    leaks: list[Leak] = []
    for one, words, places in zip(problems, searched, shared, strict=True):
        found = {
            name: Leak(one.id, name, "exact", other, 1.0)
            for name, other in by_letters.get(letters_and_digits(one.text), {}).items()
        }
        for index, (rare, any_) in _covered(words, places, by_gram, seen, n).items():
            name, other, other_words = held[index]
            shorter = min(len(words), len(other_words))
            share = max(rare, any_) / shorter
            better = name not in found or (found[name].why == "ngram" and share > found[name].share)
            if better and (rare / shorter >= SHARE or any_ / shorter >= NEAR):
                found[name] = Leak(one.id, name, "ngram", other.id, round(share, 3))
        leaks += [found[name] for name in evals if name in found]
    return leaks


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def _covered(
    words: Sequence[str],
    places: Sequence[int],
    by_gram: Mapping[tuple[str, ...], Sequence[int]],
    seen: Mapping[tuple[str, ...], int],
    n: int,
) -> dict[int, tuple[int, int]]:
    """For each evaluation problem: how many words the n-grams shared with it cover, uncommon ones and all of them."""
    reached: dict[int, tuple[int, int]] = {}  # where the cover of uncommon, and of all n-grams, ends
    counts: dict[int, tuple[int, int]] = {}
    for place in places:
        gram = tuple(words[place : place + n])
        end, common = place + n, seen[gram] > COMMON
        for index in by_gram[gram]:
            (rare_end, any_end), (rare, any_) = reached.get(index, (0, 0)), counts.get(index, (0, 0))
            any_, any_end = any_ + end - max(place, any_end), end
            if not common:
                rare, rare_end = rare + end - max(place, rare_end), end
            reached[index], counts[index] = (rare_end, any_end), (rare, any_)
    return counts
