"""Whether two answers in canonical spelling mean the same: numbers exactly, structure part by part, the rest by
math-verify. Nothing is evaluated as code; what would be too large to compute with is refused before it is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from headwater.tasks.maths_numbers import number, same_number
from headwater.tasks.maths_text import matching, split, squeezed, tidy, tokens

LONGEST_LIST = 300
_PARTS_DEEP = 6  # lists within tuples within sets …

_BASED = re.compile(r"\(?0*([0-9A-F]+(?:\.[0-9A-F]+)?)\)?_\{(?:\\text\{)?(\w+)\}?\}")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_HEDGES = {"or", "and", "not", "no", "maybe", "about", "approximately", "roughly", "than", "least", "most", "more",
           "less", "possibly", "perhaps", "plus", "minus", "times", "over", "squared", "cubed", "if", "when", "is",
           "base"} | set(_SCALES)  # fmt: skip
_RELATIONS = ("<", ">", r"\leq", r"\geq", r"\neq")
_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", r"\neq": r"\neq"}
# A trailing unit: words in \text (with a power), or bare words after a number.
_TEXT_UNIT = re.compile(r"^(.*[\w}).!|])\s*\\text\{([^{}]*)\}\s*(?:\^\{[-\d]{1,2}\}|\d{0,1})$", re.DOTALL)
_BARE_UNIT = re.compile(r"^(.*[\d})])\s+([a-zA-Z]{2,}(?:[ /-]+[a-zA-Z]+){0,4}|[a-zA-Z]{1,3}\^\{[23]\})$", re.DOTALL)
_LETTERED = re.compile(r"^\(?([A-J])(?:[).:]+\s*\S.*|\))?$", re.DOTALL)
_WORDS = re.compile(r"^[a-zA-Z][a-zA-Z' -]*$")


# Parts ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """An interval or an inequality: `x > 2` and `(2,\\infty)` are both `Range("(", "2", "\\infty", ")")`."""

    left: str
    low: str
    high: str
    right: str
    name: str | None = None


def same(gold: str, answer: str, depth: int = 0) -> bool:
    """Whether an answer means what the gold answer means; both canonical.

    Numbers by exact value; lists, sets and unions in any order; pairs, intervals and matrices as written; a leading
    `x =`, units and words after a number do not matter; what is left is handed to math-verify.
    """
    if squeezed(gold) == squeezed(answer):
        return True
    if depth > _PARTS_DEEP:
        return False
    plain = compare_plainly(gold, answer)
    if plain is not None:
        return plain

    def deeper(one: str, other: str) -> bool:
        return same(one, other, depth + 1)

    for compare in (_same_list, _same_equation, _same_range, _same_bracketed, _same_union, _same_matrix, _same_ratio):
        verdict = compare(gold, answer, deeper)
        if verdict is not None:
            return verdict
    return same_mathematics(gold, answer)


def compare_plainly(gold: str, answer: str) -> bool | None:
    """The verdict where cheap rules settle it: numbers with units, words, letters of a choice. Else None."""
    if squeezed(gold) == squeezed(answer):
        return True
    bare_gold, bare_answer = without_unit(gold), without_unit(answer)
    gold_value, answer_value = number(bare_gold), number(bare_answer)
    if gold_value is not None and answer_value is not None:
        if same_number(gold_value, answer_value, bare_answer):
            return True
        return None if _could_be_list(bare_gold) or _could_be_list(bare_answer) else False
    gold_based, answer_based = _BASED.fullmatch(bare_gold), _BASED.fullmatch(bare_answer)
    if gold_based or answer_based:
        # 21_5 is neither 21 nor 21_6; digits are compared as written, a base is not converted
        return bool(gold_based and answer_based) and gold_based.groups() == answer_based.groups()  # type: ignore[union-attr]
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words is not None or answer_words is not None:
        # Beside words, letters are words too: "No" is not N times o.
        gold_words, answer_words = gold_words or _letters(gold), answer_words or _letters(answer)
    if gold_words is not None and answer_words is not None:
        return gold_words == answer_words
    if len(gold) <= 8 and (choice := _LETTERED.fullmatch(gold)) and (chosen := _LETTERED.fullmatch(answer)):
        return choice[1] == chosen[1]
    if (gold_words is not None and len(gold_words) > 3) or (answer_words is not None and len(answer_words) > 3):
        return False
    if gold_value is not None and re.fullmatch(r"-?[a-zA-Z]", bare_answer):
        return False
    return None


def _letters(text: str) -> str | None:
    return text.casefold() if re.fullmatch(r"[a-zA-Z]+", text) else None


def _could_be_list(text: str) -> bool:
    """`100,200` is a number with a thousands comma or a list of two."""
    return "," in text and not re.search(r",0", text)


def without_unit(text: str) -> str:
    """A quantity without the unit behind it: `12\\text{ cm}^{2}` -> `12`. Words that change the value stay.

    Units are taken off only where a number or an expression remains, so `\\text{even}` stays as it is.
    """
    found = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if found is None:
        return text
    words = re.findall(r"[a-zA-Z]+", found[2].lower())
    rest = tidy(found[1])
    if len(words) == 1 and words[0].rstrip("s") in _SCALES and number(rest) is not None:
        value = number(rest)
        assert value is not None
        return str(value * _SCALES[words[0].rstrip("s")])
    if not words or len(words) > 6 or _HEDGES & set(words) or re.search(r"\d", found[2].split("^")[0]):
        return text
    return rest


def _words(text: str) -> str | None:
    """Plain words, folded for comparison; None for anything that may be mathematics."""
    unwrapped = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    if not (r"\text{" in text or re.search(r"(?<!\\)\b[a-zA-Z]{3,}", text)):
        return None
    folded = " ".join(unwrapped.split()).strip(" .")
    return folded.casefold() if _WORDS.fullmatch(folded) else None


_NO_NAME = re.compile(r"[-+\d<>^]|\\(?:leq|geq|neq|cdot|times|sin|cos|tan|log|ln|sqrt|pm)")
Deeper = Callable[[str, str], bool]


def _elements(text: str) -> list[str]:
    """The parts of a list or a set, each `a \\pm b` as two."""
    inner = text
    if text.startswith("\\{") and text.endswith("\\}") and matching(text, 0) == len(text) - 2:
        inner = text[2:-2]
    parts = [part for part in split(inner, (",",)) if part]
    spread: list[str] = []
    for part in parts:
        if r"\pm" in part and part.count(r"\pm") == 1:
            spread += [part.replace(r"\pm", "+").replace(r"\mp", "-"), part.replace(r"\pm", "-").replace(r"\mp", "+")]
        else:
            spread.append(part)
    return [tidy(part.strip().removeprefix("+")) for part in spread]


def _same_list(gold: str, answer: str, deeper: Deeper) -> bool | None:
    wanted, given = _elements(gold), _elements(answer)
    for parts, union in ((wanted, answer), (given, gold)):
        if len(parts) > 1 and r"\cup" in union and all(_range(part) for part in parts):
            # "x < 2 or x > 3" is a union
            return _unordered(parts, split(union, (r"\cup",)), deeper)
    plain = [text for text in (gold, answer) if not text.startswith("\\{")]
    if len(wanted) <= 1 and len(given) <= 1:
        if len(plain) == 2 or not wanted or not given:
            return None
        return deeper(wanted[0], given[0]) if len(plain) == 0 else None
    if len(wanted) != len(given):
        # "(1,2)" against "1,2": a pair that lost its brackets is still read in its order
        if len(wanted) == 1 and gold.startswith("(") and not answer.startswith("\\{"):
            return None if _bracketed(gold) is None else deeper(gold, f"({answer})")
        if len(given) == 1 and answer.startswith("(") and not gold.startswith("\\{"):
            return None if _bracketed(answer) is None else deeper(f"({gold})", answer)
        return False
    if len(wanted) > LONGEST_LIST or any(r"\ldots" in part for part in wanted + given):
        return False
    names = [_named(part)[0] for part in wanted]
    if len({name for name in names if name}) == len(names) and not any(_named(part)[0] for part in given):
        # "x=1, y=2" against "1, 2": without the names only the order says which is which
        return all(deeper(one, other) for one, other in zip(wanted, given, strict=True))
    return _unordered(wanted, given, deeper)


def _unordered(wanted: list[str], given: list[str], deeper: Deeper) -> bool:
    """Whether two lists hold the same parts in any order. Sameness is transitive, so the first match will do."""
    if len(wanted) != len(given) or len(wanted) > LONGEST_LIST:
        return False
    left = list(given)
    for part in wanted:
        found = next((other for other in left if squeezed(part) == squeezed(other)), None)
        if found is None:
            found = next((other for other in left if deeper(part, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _named(text: str) -> tuple[str | None, str]:
    """(name, value) of `x = 5`, `f(x) = …`, `x \\in [0,1]`, `|AB| = 1`; (None, text) without a name before the sign.

    A left side with a sum, a relation or a number in it is an equation and not a name. A chain `S = 2 + 3 = 5` keeps
    its last value.
    """
    parts = split(text, ("=", r"\in"))
    if len(parts) < 2 or not all(parts):
        return None, text
    name = re.sub(r"_\{[^{}]*\}|\([^()]*\)", "", parts[0])
    whole_name = re.fullmatch(r"[a-zA-Z\\{}| '/:(),^-]+", parts[0]) if re.search(r"\(.*,.*\)", parts[0]) else None
    if whole_name or (name and not _NO_NAME.search(name)):
        return squeezed(parts[0]), parts[-1]
    return None, text


def _same_equation(gold: str, answer: str, deeper: Deeper) -> bool | None:
    gold_sides, answer_sides = split(gold, ("=", r"\in")), split(answer, ("=", r"\in"))
    if len(gold_sides) == 1 and len(answer_sides) == 1:
        return None
    gold_name, gold_value = _named(gold)
    answer_name, answer_value = _named(answer)
    if len(gold_sides) > 1 and len(answer_sides) > 1:
        if gold_name is not None and gold_name == answer_name:
            return deeper(gold_value, answer_value)
        return same_mathematics(gold, answer)
    if gold_name is not None and len(answer_sides) == 1:
        return deeper(gold_value, answer)
    if answer_name is not None and len(gold_sides) == 1:
        return deeper(gold, answer_value)
    computed = answer_sides[0] and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", answer_sides[0]))
    if len(gold_sides) == 1 and len(answer_sides) == 2 and computed:
        # "3 \cdot 4 = 12": a computation, whose last side is the answer when it holds
        return deeper(gold, answer_sides[1]) and deeper(answer_sides[1], answer_sides[0])
    return False


def _relation(text: str) -> tuple[list[str], list[str]]:
    """The sides and the signs between them: `-1 < x \\leq 4` -> (["-1", "x", "4"], ["<", "\\leq"])."""
    signs = [token for token, _, depth in tokens(text) if depth == 0 and token in _RELATIONS]
    return split(text, _RELATIONS), signs


def _range(text: str) -> Range | None:
    """An inequality about one name, as an interval."""
    sides, signs = _relation(text)
    inside = sides[0].strip("|") if sides[0].startswith("|") else ""
    if len(sides) == 2 and signs[0] in ("<", r"\leq") and _is_name(inside) and number(sides[1]) is not None:
        sides, signs = [f"-({sides[1]})", inside, sides[1]], signs * 2  # |x| < 2 is -2 < x < 2
    if len(sides) == 2 and signs[0] != r"\neq":
        if not _is_name(sides[0]) and _is_name(sides[1]):
            sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
        if not _is_name(sides[0]) or _is_name(sides[1]):
            return None
        closed = signs[0] in (r"\leq", r"\geq")
        if signs[0] in ("<", r"\leq"):
            return Range("(", r"-\infty", sides[1], "]" if closed else ")", sides[0])
        return Range("[" if closed else "(", sides[1], r"\infty", ")", sides[0])
    if len(sides) == 3 and _is_name(sides[1]) and r"\neq" not in signs:
        if all(sign in (">", r"\geq") for sign in signs):
            sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
        if all(sign in ("<", r"\leq") for sign in signs):
            left = "[" if signs[0] == r"\leq" else "("
            return Range(left, sides[0], sides[2], "]" if signs[1] == r"\leq" else ")", sides[1])
    return None


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega))(?:_\{\w+\})?", text))


def _interval(text: str) -> Range | None:
    found = _bracketed(text)
    if found is None or len(found[1]) != 2:
        return None
    return Range(found[0], tidy(found[1][0].removeprefix("+")), tidy(found[1][1].removeprefix("+")), found[2])


def _same_range(gold: str, answer: str, deeper: Deeper) -> bool | None:
    """Inequalities with each other and with intervals."""
    gold_signs, answer_signs = _relation(gold)[1], _relation(answer)[1]
    if not gold_signs and not answer_signs:
        return None
    one, other = _range(gold) or _interval(gold), _range(answer) or _interval(answer)
    if one is not None and other is not None:
        if one.name and other.name and one.name != other.name:
            return False
        shape = (one.left, one.right) == (other.left, other.right)
        return shape and deeper(one.low, other.low) and deeper(one.high, other.high)
    if not (gold_signs and answer_signs):
        return False if number(gold) is not None or number(answer) is not None else None
    gold_sides, answer_sides = _relation(gold)[0], _relation(answer)[0]
    for sides, signs in (
        (answer_sides, answer_signs),
        (answer_sides[::-1], [_FLIPPED[sign] for sign in reversed(answer_signs)]),
    ):
        if signs == gold_signs and all(deeper(a, b) for a, b in zip(gold_sides, sides, strict=True)):
            return True
    return same_mathematics(gold, answer)


def _bracketed(text: str) -> tuple[str, list[str], str] | None:
    """`[0, 1)` -> ("[", ["0", "1"], ")"); None unless one pair of brackets goes round at least two parts."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or matching(text, 0) != len(text) - 1:
        return None
    parts = split(text[1:-1], (",",))
    return (text[0], parts, text[-1]) if len(parts) > 1 else None


def _same_bracketed(gold: str, answer: str, deeper: Deeper) -> bool | None:
    """Pairs, points and intervals: the same brackets and the same parts in the same order."""
    one, other = _bracketed(gold), _bracketed(answer)
    if one is None and other is None:
        return None
    if one is None or other is None:
        return None if r"\cup" in gold + answer or r"\setminus" in gold + answer else False
    if (one[0], one[2]) != (other[0], other[2]) or len(one[1]) != len(other[1]) or len(one[1]) > LONGEST_LIST:
        return False
    return all(deeper(a, b) for a, b in zip(one[1], other[1], strict=True))


def _same_union(gold: str, answer: str, deeper: Deeper) -> bool | None:
    wanted, given = split(gold, (r"\cup",)), split(answer, (r"\cup",))
    if len(wanted) == 1 and len(given) == 1:
        return None
    return _unordered(wanted, given, deeper) or same_mathematics(gold, answer)


def _matrix(text: str) -> list[list[str]] | None:
    inner = text[1:-1].strip() if text[:1] in "[(" and text[-1:] in ")]" else text
    if not (inner.startswith(r"\begin{matrix}") and inner.endswith(r"\end{matrix}") and inner.count(r"\begin") == 1):
        return None
    body = inner.removeprefix(r"\begin{matrix}").removesuffix(r"\end{matrix}").strip().removesuffix("\\\\")
    return [[tidy(cell) for cell in row.split("&")] for row in body.split("\\\\")]


def _same_matrix(gold: str, answer: str, deeper: Deeper) -> bool | None:
    one, other = _matrix(gold), _matrix(answer)
    if one is None or other is None:
        return None if r"\begin" in gold and r"\begin" in answer else (False if r"\begin" in gold + answer else None)
    if [len(row) for row in one] != [len(row) for row in other] or sum(map(len, one)) > LONGEST_LIST:
        return False
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return all(deeper(a, b) for a, b in pairs)


def _same_ratio(gold: str, answer: str, deeper: Deeper) -> bool | None:
    """`2:3` and times of day such as `12:00`: part by part, as written."""
    wanted, given = split(gold, (":",)), split(answer, (":",))
    if len(wanted) == 1 and len(given) == 1:
        return None
    return len(wanted) == len(given) and all(deeper(a, b) for a, b in zip(wanted, given, strict=True))


# Mathematics ----------------------------------------------------------------------------------------------------------


def same_mathematics(gold: str, answer: str) -> bool:
    """What no rule above settles: parse both and ask math-verify. What does not parse is different."""
    from headwater.tasks import maths_symbols  # sympy takes half a second to import; only workers need it

    gold, answer = without_unit(gold), without_unit(answer)
    return maths_symbols.equal(gold, answer)
