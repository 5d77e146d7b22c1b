"""Parse numerals to exact fractions. No floats: a rounded answer must not equal the exact one."""

from __future__ import annotations

import re
from fractions import Fraction

from headwater.tasks.maths_text import without_brackets

LONGEST_NUMBER = 4000  # digits; Python refuses to parse more than 4300
LARGEST_POWER = 20_000  # of ten, in scientific notation

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = re.compile(rf"([-+]*)\s*(?:({_INTEGER})(\.\d*)?|(\.\d+))")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_RATIO = re.compile(r"([-+]?)\s*(?:(\d+)\s*)?\\frac\{\s*([-+]?\d+)\s*\}\{\s*([-+]?\d+)\s*\}")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*([-+]?\d+)")
_SCIENTIFIC = re.compile(
    r"([-+]?)\s*(?:([\d,]*\.?\d+)\s*(?:\\times|\\cdot|x)\s*)?10\^\{([-+]?\d{1,6})\}"
    r"|([-+]?)\s*(\d+\.?\d*)[eE]([-+]?\d{1,6})"
)


def number(text: str) -> Fraction | None:
    """Exact value of a numeral; None for anything else.

    Formats: `1,080`, `-.5`, `2\\frac{1}{2}`, `3/4`, `6.72\\times 10^{-5}`, `-1e-07`, `0.\\overline{27}`, each also in
    brackets; `四十二`.
    """
    text = text.strip()
    if not text or len(text) > LONGEST_NUMBER:
        return None
    if not any(char in "0123456789" for char in text):
        return _han_number(text)
    text = without_brackets(text, "(", ")")
    if match := _DECIMAL.fullmatch(text):
        sign, whole, part, bare = match.groups()
        digits = (whole or "0").replace(",", "") + (part if part not in (None, ".") else bare or "")
        return _signed(sign, Fraction(digits))
    if match := _RATIO.fullmatch(text) or _SLASH.fullmatch(text):
        sign, mixed, above, below = match.groups()
        if int(below) == 0 or (mixed is not None and above[0] in "+-"):
            return None
        return _signed(sign, int(mixed or 0) + Fraction(int(above), int(below)))
    if match := _SCIENTIFIC.fullmatch(text):
        power = int(match[3] or match[6])
        if abs(power) > LARGEST_POWER:
            return None
        digits = (match[2] or match[5] or "1").replace(",", "")
        return _signed(match[1] or match[4] or "", Fraction(digits) * Fraction(10) ** power)
    if match := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = match.groups()
        nines = 10 ** len(fixed) * (10 ** len(cycle) - 1)
        return _signed(sign, Fraction(int(whole + fixed + cycle) - int(whole + fixed or "0"), nines))
    return None


_HAN = {
    "零": 0, "〇": 0, "一": 1, "二": 2, "两": 2, "兩": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9,
    "十": 10, "百": 100, "千": 1000, "万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8,
}  # fmt: skip
LONGEST_HAN_NUMBER = 30  # characters


def _han_number(text: str) -> Fraction | None:
    """Value of a Chinese or Japanese numeral in its standard spelling (`四十二`, `一万零五`); None for others, such as `三四`."""
    if len(text) > LONGEST_HAN_NUMBER or not _HAN.keys() >= set(text):
        return None
    total = section = 0
    digit: int | None = None
    lowest_myriad, lowest_unit = 10**12, 10**4
    for value in map(_HAN.__getitem__, text):
        if value < 10:
            if digit:  # two digits without a unit between them: "三四" is about three or four
                return None
            digit = value
        elif value < 10**4:
            if value >= lowest_unit or (digit is None and section):
                return None
            section, lowest_unit, digit = section + (digit or 1) * value, value, None
        else:
            if value >= lowest_myriad or section + (digit or 0) == 0:
                return None
            total, lowest_myriad = total + (section + (digit or 0)) * value, value
            section, lowest_unit, digit = 0, 10**4, None
    if digit and len(text) > 1 and _HAN[text[-2]] >= 100:
        return None  # "一百五" is 150 in speech and 105 to the letter
    return Fraction(total + section + (digit or 0))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign.count("-") % 2 else value


def same_number(gold: Fraction, answer: Fraction, spelling: str) -> bool:
    """Exactly equal, or the answer is a full float printout (15 or more digits) of the gold value.

    A shorter decimal is rounded, and rounded answers are wrong.
    """
    if gold == answer:
        return True
    _, dot, decimals = spelling.rpartition(".")
    if not dot or not decimals.isdigit() or len(spelling.replace(".", "").lstrip("-0")) < 15 or gold.denominator == 1:
        return False
    return abs(gold - answer) <= Fraction(1, 2 * 10 ** len(decimals))
