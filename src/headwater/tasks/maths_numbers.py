"""Plainly written numbers, by exact value. No floats: a rounded answer must not pass for the exact one."""

from __future__ import annotations

import re
from fractions import Fraction

from headwater.tasks.maths_text import MOST_BRACKETS, matching

LONGEST_NUMBER = 4000  # digits; Python itself refuses to read 4300
LARGEST_POWER = 20_000  # of ten, in a number's own spelling

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d+"
_DECIMAL = re.compile(rf"([-+]*)\s*(?:({_INTEGER})(\.\d*)?|(\.\d+))")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?(\d+)\}?")
_RATIO = re.compile(r"([-+]?)\s*(?:(\d+)\s*)?\\frac\{\s*([-+]?\d+)\s*\}\{\s*([-+]?\d+)\s*\}")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*([-+]?\d+)")
_SCIENTIFIC = re.compile(
    r"(?:([-+]?[\d,]*\.?\d+)\s*(?:\\times|\\cdot|x)\s*)?10\^\{([-+]?\d{1,6})\}|([-+]?\d+\.?\d*)[eE]([-+]?\d{1,6})"
)


def number(text: str) -> Fraction | None:
    """The exact value of a plainly written number, or None for anything else.

    Understood: `1,080`, `-.5`, `2\\frac{1}{2}`, `3/4`, `6.72\\times 10^{-5}`, `0.\\overline{27}`, in brackets or not.
    """
    text = text.strip()
    if not text or len(text) > LONGEST_NUMBER or not any(char in "0123456789" for char in text):
        return None
    for _ in range(MOST_BRACKETS):
        if not (text.startswith("(") and text.endswith(")") and matching(text, 0) == len(text) - 1):
            break
        text = text[1:-1].strip()
    if found := _DECIMAL.fullmatch(text):
        sign, whole, part, bare = found.groups()
        digits = (whole or "0").replace(",", "") + (part if part not in (None, ".") else bare or "")
        return _signed(sign, Fraction(digits))
    if found := _RATIO.fullmatch(text) or _SLASH.fullmatch(text):
        sign, mixed, above, below = found.groups()
        if int(below) == 0 or (mixed is not None and above[0] in "+-"):
            return None
        return _signed(sign, int(mixed or 0) + Fraction(int(above), int(below)))
    if found := _SCIENTIFIC.fullmatch(text):
        power = int(found[2] or found[4])
        if abs(power) > LARGEST_POWER:
            return None
        return Fraction((found[1] or found[3] or "1").replace(",", "")) * Fraction(10) ** power
    if found := _REPEATING.fullmatch(text):
        sign, whole, fixed, cycle = found.groups()
        nines = 10 ** len(fixed) * (10 ** len(cycle) - 1)
        return _signed(sign, Fraction(int(whole + fixed + cycle) - int(whole + fixed or "0"), nines))
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign.count("-") % 2 else value


def same_number(gold: Fraction, answer: Fraction, spelling: str) -> bool:
    """Exactly equal; or the answer is a float's whole printout (15 digits and more) of the gold value.

    A shorter decimal is a rounded answer, and a rounded answer is a different one.
    """
    if gold == answer:
        return True
    _, dot, decimals = spelling.rpartition(".")
    if not dot or not decimals.isdigit() or len(spelling.replace(".", "").lstrip("-0")) < 15 or gold.denominator == 1:
        return False
    return abs(gold - answer) <= Fraction(1, 2 * 10 ** len(decimals))
