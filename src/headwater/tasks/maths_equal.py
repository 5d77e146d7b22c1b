"""Equality of two canonical answers: exact numbers, structure element by element, the rest by math-verify.

Nothing is evaluated as code; expressions that are too large to compute are rejected first. Each rule here is needed by a case
that math-verify alone gets wrong, or keeps a case from taking seconds (LOG.md, 2026-11-28); comments name one.
"""

from __future__ import annotations

import re
from itertools import chain

from headwater.tasks.maths_clock import same_clock, same_date
from headwater.tasks.maths_numbers import number, same_number
from headwater.tasks.maths_text import enclosed, split, squeezed, tidy, tokens, without_text

LONGEST_LIST = 300  # elements; comparing unordered lists takes quadratic time

_BASED = re.compile(r"\(?0*([0-9A-F]+(?:\.[0-9A-F]+)?)\)?_\{(?:\\text\{)?(\w+)\}?\}")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_HEDGES = {"or", "and", "not", "no", "maybe", "about", "approximately", "roughly", "than", "least", "most", "more",
           "less", "possibly", "perhaps", "plus", "minus", "times", "over", "squared", "cubed", "if", "when", "is",
           "base", "mod", "modulo", "am", "pm", "wrong", "incorrect", "false",
           # Words of other languages that change the number before them.
           "mil", "mille", "mila", "millionen", "millones", "milioni", "miljoen", "miljoner", "millioner", "milliarde", "milliarden",
           "milliard", "milliards", "miliardi", "tausend", "duizend", "tusen", "tusind", "cientos", "cento", "cent", "hundert",
           "ungefähr", "etwa", "mindestens", "höchstens", "oder", "und", "nicht", "environ", "ou", "et", "pas", "non",
           "aproximadamente", "circa", "или", "не", "примерно", "около", "более", "менее",
           "ist", "falsch", "est", "faux", "es", "incorrecto", "incorrecta", "errata",
           "неверно", "неправильно"} | set(_SCALES)  # fmt: skip
_SCALE_STEMS = ("милл", "тыс", "млн", "млрд", "трлн", "milh", "milj", "milio", "tysi", "tisíc")
_RELATIONS = ("<", ">", r"\leq", r"\geq", r"\neq")
_FLIPPED = {">": "<", r"\geq": r"\leq"}
# A trailing unit: words in \text, possibly with a power, or bare words after a number.
_TEXT_UNIT = re.compile(r"^(.*[\w}).!|])\s*\\text\{([^{}]*)\}\s*(?:\^\{[-\d]{1,2}\}|\d{0,1})$", re.DOTALL)
_LETTER = r"[a-zA-Z\u00c0-\u024f\u0400-\u04ff]"
_BARE_UNIT = re.compile(
    rf"^(.*[\d}})])\s+(\(?{_LETTER}{{2,}}(?:[ /-]+{_LETTER}+){{0,4}}\)?|[a-zA-Z]{{1,3}}\^\{{[23]\}})$", re.DOTALL
)
# A unit that needs no space, since its letters are no product of variables: "12cm", "5 m/s".
_CLOSE_UNIT = re.compile(
    r"^([-+]?[\d.,]*\d)\s*(?:[ckm]m|kg|mg|ml|mL|kmh|km/h|kph|mph|[kcm]?m/s|[kcm]?m/(?:min|hr?)|lbs?|ft|hrs?|mins?|secs?|kWh|MB|GB|USD|EUR)"
    r"(?:\^\{[23]\})?$"
)
# Scripts without spaces: a known unit or counter after a number, and what is counted ("42个苹果").
_CJK_UNIT = re.compile(
    r"^(.*[\d})一二三四五六七八九十百千万亿])\s*(?:(?:[个個只本张張页頁种種名位颗顆块塊辆輛棵件条條套组組]|개|명|권|마리)(?P<noun>[\u3400-\u9fff]{0,4})"
    r"|平方厘米|平方米|平方千米|立方厘米|立方米|厘米|毫米|千米|公里|千克|公斤|小时|小時|时间|時間|分钟|分鐘|美元|米|克|吨|噸|升|元|円|원|岁|歳|人|天|日|秒|度"
    r"|บาท|คน|ตัว|ใบ|ลูก|ชิ้น|เล่ม|เมตร|กิโลเมตร|วัน|ชั่วโมง|นาที|টাকা|টি|জন|रुपये|रुपए|تومان|ریال|ريال|دولار|دينار|درهم|جنيه|שקלים)$",
    re.DOTALL,
)
_CJK_HEDGES = re.compile("[以左右多余餘约約至倍万萬亿億千百十分之半不未或]")
_LETTERED = re.compile(r"^\(?([A-J])(?:[).:]+\s*\S.*|\))?$", re.DOTALL)
_WORDS = re.compile(r"^[a-zA-Z][a-zA-Z' -]*$")


# Parts ----------------------------------------------------------------------------------------------------------------


def same(gold: str, answer: str) -> bool:
    """Whether two canonical answers are equivalent.

    Numbers by exact value; lists and sets in any order; pairs, intervals and matrices in the given order; a leading
    `x =`, units and words after a number are ignored; everything else is passed to math-verify.
    """
    for compare in (compare_plainly, _same_list, _same_equation, _same_bracketed, _same_matrix, _same_ratio):
        verdict = compare(gold, answer)
        if verdict is not None:
            return verdict
    return same_mathematics(gold, answer)


def compare_plainly(gold: str, answer: str) -> bool | None:
    """Verdict by cheap rules for numbers with units, words and choice letters; None if they do not decide."""
    if squeezed(gold) == squeezed(answer):
        return True
    for compare in (same_clock, same_date):
        verdict = compare(gold, answer)
        if verdict is not None:
            return verdict
    bare_gold, bare_answer = without_unit(gold), without_unit(answer)
    gold_value, answer_value = number(bare_gold), number(bare_answer)
    if gold_value is not None and answer_value is not None:
        return same_number(gold_value, answer_value, bare_answer)
    gold_based, answer_based = (match and match.groups() for match in map(_BASED.fullmatch, (bare_gold, bare_answer)))
    if gold_based or answer_based:
        # 52_8 is neither 52 nor 52_6; digits are compared as written, without conversion
        return gold_based == answer_based
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words is not None or answer_words is not None:
        # Next to words, letters are a word too: "No" is not N times o.
        gold_words, answer_words = gold_words or _letters(gold), answer_words or _letters(answer)
    if gold_words is not None and answer_words is not None:
        return gold_words == answer_words
    if len(gold) <= 8 and (choice := _LETTERED.fullmatch(gold)) and (chosen := _LETTERED.fullmatch(answer)):
        return choice[1] == chosen[1]
    return None


def _letters(text: str) -> str | None:
    return text.casefold() if re.fullmatch(r"[a-zA-Z]+", text) else None


def without_unit(text: str) -> str:
    """Remove a trailing unit: `12\\text{ cm}^{2}` -> `12`. Words that change the value stay (`\\text{at least }3`).

    A number or an expression must remain, so `\\text{even}` is unchanged. `42\\text{ million}` becomes `42000000`.
    """
    if counted := _CJK_UNIT.fullmatch(text):
        return text if _CJK_HEDGES.search(counted["noun"] or "") else tidy(counted[1])
    if close := _CLOSE_UNIT.fullmatch(text):
        return tidy(close[1])
    match = _TEXT_UNIT.fullmatch(text) or _BARE_UNIT.fullmatch(text)
    if match is None:
        return text
    words = re.findall(rf"{_LETTER}+", match[2].lower())
    rest = tidy(match[1])
    if len(words) == 1 and (scale := _SCALES.get(words[0].rstrip("s"))) and (value := number(rest)) is not None:
        return str(value * scale)
    if not words or _HEDGES & set(words) or any(word.startswith(_SCALE_STEMS) for word in words):
        return text
    if re.search(r"\d", match[2].split("^")[0]):
        return text
    return rest


def _words(text: str) -> str | None:
    """Casefolded plain words; None for anything that may be mathematics."""
    if not (r"\text{" in text or re.search(r"(?<!\\)\b[a-zA-Z]{3,}", text)):
        return None
    folded = " ".join(without_text(text).split()).strip(" .")
    return folded.casefold() if _WORDS.fullmatch(folded) else None


_NO_NAME = re.compile(r"[-+\d<>^]|\\(?:leq|geq|neq|cdot|times|sin|cos|tan|log|ln|sqrt|pm)")


def _elements(text: str) -> list[str]:
    """Elements of a list or set; `a \\pm b` counts as two."""
    inner = enclosed(text, "\\{", "\\}")
    parts: list[str] = []
    for part in split(text if inner is None else inner, (",",)):
        if part.count(r"\pm") == 1:
            parts += [part.replace(r"\pm", "+").replace(r"\mp", "-"), part.replace(r"\pm", "-").replace(r"\mp", "+")]
        elif part:
            parts.append(part)
    return [tidy(part) for part in parts]


def _same_list(gold: str, answer: str) -> bool | None:
    wanted, given = _elements(gold), _elements(answer)
    for parts, union in ((wanted, answer), (given, gold)):
        if len(parts) > 1 and r"\cup" in union and all(_as_interval(part)[0] for part in parts):
            # "x < 2 or x > 3" is a union
            return _unordered(parts, split(union, (r"\cup",)))
    if len(wanted) <= 1 and len(given) <= 1:
        return None
    if len(wanted) != len(given):
        # "(1,2)" and "1,2": a pair without its brackets keeps its order
        if len(wanted) == 1 and gold.startswith("(") and not answer.startswith("\\{"):
            return None if _bracketed(gold) is None else same(gold, f"({answer})")
        if len(given) == 1 and answer.startswith("(") and not gold.startswith("\\{"):
            return None if _bracketed(answer) is None else same(f"({gold})", answer)
        return False
    names = [_named(part)[0] for part in wanted]
    if len({name for name in names if name}) == len(names) and not any(_named(part)[0] for part in given):
        # "x=1, y=2" and "1, 2": without names the order decides
        return all(same(a, b) for a, b in zip(wanted, given, strict=True))
    return _unordered(wanted, given)


def _unordered(wanted: list[str], given: list[str]) -> bool:
    """Whether two lists have the same elements in any order. Equality is transitive, so greedy matching is enough."""
    if len(wanted) != len(given) or len(wanted) > LONGEST_LIST:
        return False
    unmatched = list(given)
    for part in wanted:
        match = next((other for other in unmatched if squeezed(part) == squeezed(other)), None)
        if match is None:
            match = next((other for other in unmatched if same(part, other)), None)
        if match is None:
            return False
        unmatched.remove(match)
    return True


def _named(text: str) -> tuple[str | None, str]:
    """(name, value) of `x = 5`, `f(2) = 5`, `x \\in [0,1]`, `|AB| = 1`; (None, text) if the left side is no name.

    A left side with a sum, a relation or a number makes an equation. The value of a chain `S = 2 + 3 = 5` is the last.
    """
    parts = split(text, ("=", r"\in"))
    if len(parts) < 2 or not all(parts):
        return None, text
    name = re.sub(r"_\{[^{}]*\}|\([^()]*\)", "", parts[0])
    whole_name = re.fullmatch(r"[a-zA-Z\\{}| '/:(),^-]+", parts[0]) if re.search(r"\(.*,.*\)", parts[0]) else None
    if whole_name or (name and not _NO_NAME.search(name)):
        return squeezed(parts[0]), parts[-1]
    return None, text


def without_name(text: str) -> str:
    """Remove a leading name: `x=5` -> `5`. Equations and lists are unchanged."""
    return _named(text)[1] if len(_elements(text)) == 1 else text


def _same_equation(gold: str, answer: str) -> bool | None:
    gold_sides, answer_sides = split(gold, ("=", r"\in")), split(answer, ("=", r"\in"))
    if len(gold_sides) == 1 and len(answer_sides) == 1:
        return None
    gold_name, gold_value = _named(gold)
    answer_name, answer_value = _named(answer)
    if len(gold_sides) > 1 and len(answer_sides) > 1:
        if gold_name is not None and gold_name == answer_name:
            return same(gold_value, answer_value)
        return same_mathematics(gold, answer)
    if gold_name is not None:
        return same(gold_value, answer)
    if answer_name is not None:
        return same(gold, answer_value)
    computed = answer_sides[0] and not re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", answer_sides[0]))
    if len(answer_sides) == 2 and computed:
        # "3 \cdot 4 = 12": a computation; if it holds, its last side is the answer
        return same(gold, answer_sides[1]) and same(answer_sides[1], answer_sides[0])
    return False


def _as_interval(text: str) -> tuple[str | None, str]:
    """(variable, interval) of an inequality in one variable: `x > 2` gives ("x", "(2,\\infty)"); (None, text) for anything else."""
    sides = split(text, _RELATIONS)
    signs = [token for token, _, depth in tokens(text) if depth == 0 and token in _RELATIONS]
    inside = sides[0].strip("|") if sides[0].startswith("|") else ""
    if len(sides) == 2 and signs[0] in ("<", r"\leq") and _is_name(inside) and number(sides[1]) is not None:
        sides, signs = [f"-({sides[1]})", inside, sides[1]], signs * 2  # |x| < 2 is -2 < x < 2
    if signs and set(signs) <= _FLIPPED.keys():
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in reversed(signs)]
    if len(sides) == 2 and _is_name(sides[0]) and not _is_name(sides[1]):
        sides, signs = [r"-\infty", *sides], ["<", *signs]
    elif len(sides) == 2 and _is_name(sides[1]) and not _is_name(sides[0]):
        sides, signs = [*sides, r"\infty"], [*signs, "<"]
    if len(sides) != 3 or not _is_name(sides[1]) or not set(signs) <= {"<", r"\leq"}:
        return None, text
    left, right = "[" if signs[0] == r"\leq" else "(", "]" if signs[1] == r"\leq" else ")"
    return sides[1], f"{left}{sides[0]},{sides[2]}{right}"


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"(?:[a-zA-Z]|\\(?:alpha|beta|gamma|theta|lambda|mu|phi|omega))(?:_\{\w+\})?", text))


def _bracketed(text: str) -> tuple[str, list[str], str] | None:
    """`[0, 1)` -> ("[", ["0", "1"], ")"); None unless one pair of brackets encloses at least two parts."""
    if not text or text[0] not in "([" or text[-1] not in ")]":
        return None
    inner = enclosed(text, text[0], text[-1])
    parts = [] if inner is None else split(inner, (",",))
    return (text[0], parts, text[-1]) if len(parts) > 1 else None


def _same_bracketed(gold: str, answer: str) -> bool | None:
    """Pairs, points and intervals: same brackets, same elements, same order. Sympy would take seconds for some.

    Inequalities are compared as intervals: `x > 2` and `(2,\\infty)` are the same, `x > 2` and `y > 2` are not.
    """
    gold_name, gold_interval = _as_interval(gold)
    answer_name, answer_interval = _as_interval(answer)
    if gold_name and answer_name and gold_name != answer_name:
        return False
    wanted, given = _bracketed(gold_interval), _bracketed(answer_interval)
    if wanted is None or given is None:
        return None
    if (wanted[0], wanted[2]) != (given[0], given[2]) or len(wanted[1]) != len(given[1]):
        return False
    return all(same(a, b) for a, b in zip(wanted[1], given[1], strict=True))


def _matrix(text: str) -> list[list[str]] | None:
    """Cells of a matrix by row; None for anything else."""
    if not (text.startswith(r"\begin{matrix}") and text.endswith(r"\end{matrix}") and text.count(r"\begin") == 1):
        return None
    body = text.removeprefix(r"\begin{matrix}").removesuffix(r"\end{matrix}").strip().removesuffix("\\\\")
    return [[tidy(cell) for cell in row.split("&")] for row in body.split("\\\\")]


def _same_matrix(gold: str, answer: str) -> bool | None:
    """Compare matrices cell by cell. Sympy does not finish in time for some, e.g. with trigonometric entries."""
    wanted, given = _matrix(gold), _matrix(answer)
    if wanted is None or given is None:
        return False if (r"\begin" in gold) != (r"\begin" in answer) else None
    if [len(row) for row in wanted] != [len(row) for row in given] or sum(map(len, wanted)) > LONGEST_LIST:
        return False
    return all(same(a, b) for a, b in zip(chain(*wanted), chain(*given), strict=True))


def _same_ratio(gold: str, answer: str) -> bool | None:
    """Ratios `2:3` and times of day `12:00`, part by part."""
    wanted, given = split(gold, (":",)), split(answer, (":",))
    if len(wanted) == 1 and len(given) == 1:
        return None
    return len(wanted) == len(given) and all(same(a, b) for a, b in zip(wanted, given, strict=True))


# Mathematics ----------------------------------------------------------------------------------------------------------


def same_mathematics(gold: str, answer: str) -> bool:
    """Parse both and compare with math-verify. Different if one does not parse."""
    from headwater.tasks import maths_symbols  # imports sympy (half a second): workers only

    gold, answer = without_unit(gold), without_unit(answer)
    return maths_symbols.equal(gold, answer)
