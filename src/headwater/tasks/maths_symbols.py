"""Compare expressions: parse with latex2sympy, test at random points, decide with math-verify.

Imported only in the bounded worker processes, since it imports sympy. Parsed expressions are checked for size before anything
is computed. Without these checks eleven cases of 351 take seconds instead of milliseconds (LOG.md, 2026-11-28).
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

# It warns that its own timeout is off; the verifier has one.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

LONGEST = 1500  # characters
DEEPEST = 12  # nested brackets: the parser's time grows exponentially with depth
LARGEST_BITS = 2_000_000  # of a computed integer
LARGEST_POWER = 100_000  # of an expression with symbols, for numeric evaluation
LARGEST_EXPANSION = 200  # of an expression with symbols, for expansion by math-verify: (x+1)^200
LARGEST_FACTORIAL = 5_000
LONGEST_SUM = 10_000
POINTS = 4
DIGITS = 30
_DECIMAL = re.compile(r"(?<![\d.])(\d*)\.(\d+)(?:\\overline\{(\d+)\})?")
_NOT_NUMBERS = (sympy.Integral, sympy.Limit, sympy.Derivative, AppliedUndef, sympy.nan, sympy.zoo, sympy.oo)
_COMPUTED_EARLY = re.compile(r"binom|gcd|lcm")


def equal(gold: str, answer: str) -> bool:
    """Whether two canonical expressions are equivalent; False if one does not parse or is too large.

    Example: `equal("2k+2", "2(k+1)")` is True.
    """
    wanted, given = _parse(gold), _parse(answer)
    if wanted is None or given is None:
        return False
    if _is_truth_value(wanted) or _is_truth_value(given):
        return False  # `0.56 = 56` and `0.56 = 66` are both false, but not the same answer
    if wanted == given:
        return True
    if _too_large(wanted, LARGEST_POWER) or _too_large(given, LARGEST_POWER):
        return False
    if isinstance(wanted, sympy.Expr) and isinstance(given, sympy.Expr):
        agreed = _agree_at_points(wanted, given)  # math-verify alone: (x+1)^{2008} is not (1+x)^{2008}
        if agreed is not None:
            return agreed
    if _too_large(wanted, LARGEST_EXPANSION) or _too_large(given, LARGEST_EXPANSION):
        return False
    return bool(verify(wanted, given, float_rounding=15, numeric_precision=DIGITS, timeout_seconds=None))


def _is_truth_value(parsed: Any) -> bool:
    return isinstance(parsed, (bool, BooleanAtom)) or (isinstance(parsed, sympy.Rel) and not parsed.free_symbols)


def _parse(text: str) -> Any | None:
    if len(text) > LONGEST or _depth(text) > DEEPEST or r"\text" in text or r"\ldots" in text:
        return None
    if _COMPUTED_EARLY.search(text) and re.search(r"\d{5}|\^", text):
        return None  # the parser evaluates these while parsing
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
    # i is the imaginary unit unless it is an index of a sum or product.
    if isinstance(parsed, sympy.Expr) and not parsed.has(sympy.Sum, sympy.Product):
        parsed = parsed.subs({symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"})
    return parsed


def _exact(match: re.Match[str]) -> str:
    """Rewrite a decimal as an exact fraction: floats would make rounded answers equal."""
    whole, decimals, cycle = match.groups()
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
    """Upper bound of |log2| of a constant; inf if it is beyond any limit."""
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
    """Whether evaluating an expression could take long."""
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


def _agree_at_points(wanted: sympy.Expr, given: sympy.Expr) -> bool | None:
    """Compare numerically at random points: False if any differs, True if all agree, None if too few can be evaluated.

    False is certain. Different expressions agree at several random points to 30 digits with negligible probability, and
    this is far cheaper than sympy's simplification, which may not terminate.
    """
    if wanted.has(*_NOT_NUMBERS) or given.has(*_NOT_NUMBERS):
        return None
    names = sorted(wanted.free_symbols | given.free_symbols, key=str)
    draw = random.Random("headwater")
    agreed = 0
    for _ in range(POINTS if names else 1):
        point = {name: sympy.Rational(draw.randint(-4000, 4000) or 1, 997) for name in names}
        try:
            value, against = wanted.subs(point).doit(), given.subs(point).doit()
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
