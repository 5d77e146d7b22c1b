"""Expressions compared with sympy: parsed by latex2sympy, refuted at random points, decided by math-verify.

Imported only where sympy is needed. Everything that parses is checked for size before anything is computed with it.
"""

from __future__ import annotations

import logging
import math
import random
import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify import verify
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import BooleanAtom

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns once for each timeout that is left to us

LONGEST = 1500  # characters
DEEPEST = 12  # brackets within brackets: the parser's time grows exponentially with them
LARGEST_BITS = 2_000_000  # of an integer that may be computed
LARGEST_POWER = 100_000  # of what has a name in it, when numbers are put in for the names
LARGEST_EXPANSION = 200  # (x+1)^200 can still be expanded
LARGEST_FACTORIAL = 5_000
LONGEST_SUM = 10_000
POINTS = 4
DIGITS = 30
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:\\overline\{(\d+)\})?")
_NOT_NUMBERS = (sympy.Integral, sympy.Limit, sympy.Derivative, AppliedUndef, sympy.nan, sympy.zoo, sympy.oo)
_COMPUTED_EARLY = re.compile(r"binom|gcd|lcm")


def equal(gold: str, answer: str) -> bool:
    """Whether two canonical expressions mean the same; False for what does not parse or is too large.

    Example: `equal("2k+2", "2(k+1)")` is True.
    """
    one, other = _parse(gold), _parse(answer)
    if one is None or other is None:
        return False
    if _mere_truth(one) or _mere_truth(other):
        return False  # `0.56 = 56` is false and so is `0.56 = 66`; that does not make them the same answer
    if one == other:
        return True
    if _too_large(one, LARGEST_POWER) or _too_large(other, LARGEST_POWER):
        return False
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        agreed = _agree_at_points(one, other)
        if agreed is not None:
            return agreed
    if _too_large(one, LARGEST_EXPANSION) or _too_large(other, LARGEST_EXPANSION):
        return False
    return bool(verify(one, other, float_rounding=15, numeric_precision=DIGITS, timeout_seconds=None))


def _mere_truth(parsed: Any) -> bool:
    return isinstance(parsed, (bool, BooleanAtom)) or (isinstance(parsed, sympy.Rel) and not parsed.free_symbols)


def _parse(text: str) -> Any | None:
    if len(text) > LONGEST or _depth(text) > DEEPEST or r"\text" in text or r"\ldots" in text:
        return None
    if _COMPUTED_EARLY.search(text) and re.search(r"\d{5}|\^", text):
        return None  # the parser computes these while it reads
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _DECIMAL.sub(_exact, text)
    try:
        parsed = latex2sympy(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return None
    # The letter i is the imaginary unit unless it counts something.
    if isinstance(parsed, sympy.Expr) and not parsed.has(sympy.Sum, sympy.Product):
        parsed = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})
    return parsed


def _exact(found: re.Match[str]) -> str:
    """A decimal as the fraction it is: floats would make rounded answers equal."""
    whole, decimals, cycle = found.groups()
    value = Fraction(f"{whole or 0}.{decimals}")
    if cycle:
        value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(decimals))
    return rf"(\frac{{{value.numerator}}}{{{value.denominator}}})"


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _bits(expression: Any) -> float:
    """A bound on the size of a constant: log2 of its magnitude or of its reciprocal's; inf when beyond any bound."""
    if isinstance(expression, sympy.Rational):
        return float(max(abs(expression.p).bit_length(), expression.q.bit_length()))
    if isinstance(expression, sympy.Pow):
        size = _bits(expression.exp)
        if size > 64:
            return math.inf
        return max(_bits(expression.base), 1.0) * 2.0**size
    if isinstance(expression, sympy.exp):
        return 2.0 * 2.0 ** min(_bits(expression.args[0]), 1000)
    if isinstance(expression, sympy.factorial):
        size = _bits(expression.args[0])
        return math.inf if size > 40 else size * 2.0**size
    if isinstance(expression, (sympy.Add, sympy.Mul)):
        return sum(_bits(part) for part in expression.args)
    return max([8.0, *(_bits(part) for part in expression.args if isinstance(part, sympy.Basic))])


def _too_large(expression: Any, largest_power: int) -> bool:
    """Whether computing with an expression could take more than a moment."""
    parts = sympy.preorder_traversal(expression) if isinstance(expression, sympy.Basic) else iter(expression)
    for count, part in enumerate(parts):
        if count > 2000:
            return True
        if isinstance(part, sympy.Pow):
            if part.base.free_symbols and part.exp.is_Number and abs(part.exp) > largest_power:
                return True
            if not part.free_symbols and _bits(part) > LARGEST_BITS:
                return True
            if _bits(part.exp) > 64:
                return True
        counted = isinstance(part, sympy.factorial) and not part.free_symbols
        if counted and _bits(part.args[0]) > math.log2(LARGEST_FACTORIAL):
            return True
        if isinstance(part, (sympy.Sum, sympy.Product)):
            for limit in part.limits:
                if any(end.is_number and end.is_finite and _bits(end) > math.log2(LONGEST_SUM) for end in limit[1:]):
                    return True
        if isinstance(part, sympy.MatPow):
            return True
        if isinstance(part, sympy.exp) and _bits(part) > LARGEST_BITS:
            return True
    return False


def _agree_at_points(one: sympy.Expr, other: sympy.Expr) -> bool | None:
    """False when two expressions differ at a point; True when they agree at all; None when too few can be computed.

    A difference is certain. Agreement of two different expressions at several random points to 30 digits has no
    realistic probability, and is far cheaper to see than sympy's simplification, which may not end.
    """
    if one.has(*_NOT_NUMBERS) or other.has(*_NOT_NUMBERS):
        return None
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    draw = random.Random("headwater")
    agreed = 0
    for _ in range(POINTS if names else 1):
        point = {name: sympy.Rational(draw.randint(-4000, 4000) or 1, 997) for name in names}
        try:
            value, against = one.subs(point).doit(), other.subs(point).doit()
            if value.is_Rational and against.is_Rational:
                if value != against:
                    return False
                agreed += 1
                continue
            difference = sympy.N(value - against, DIGITS, maxn=300)
            scale = 1 + abs(sympy.N(value, DIGITS))
        except (MemoryError, RecursionError):
            raise
        except Exception:
            continue
        if not difference.is_number or difference.has(sympy.nan, sympy.zoo, sympy.oo):
            continue
        if not abs(difference) < scale * sympy.Float(10) ** -200:
            return False
        agreed += 1
    return True if agreed >= (2 if names else 1) else None
