"""When two numbers or formulas have the same value: exactly, or as far as a decimal has digits.

    same_value("0.50", "\\frac{1}{2}")          # True
    same_value("0.333333", "\\frac{1}{3}")      # True; 0.33 is not
    same_value("2^{-60}", "2^{-61}")           # False, though both are next to nothing
"""

import re
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from functools import lru_cache
from random import Random

from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from math_verify.grader import should_treat_as_complex
from sympy import Expr, Float, Rational, sign, simplify

LEAST_DIGITS = 6  # of a decimal that may stand for an exact number
DIGITS = 500  # in which formulas are evaluated
POINTS = 5  # at which those with variables are
POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?$")
NUMBER = re.compile(r"[+-]?(\d{1,1000}\.?\d{0,1000}|\.\d{1,1000})(e[+-]?\d{1,4})?", re.IGNORECASE)
READER = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")


def same_value(one: str, other: str) -> bool:
    """Whether two numbers or formulas are equal. An exact one, next to a decimal, is rounded to as
    many digits as that has. Two written numbers are compared as they are: 0.5 is not 0.51."""
    ours, theirs = written_number(one), written_number(other)
    if ours is not None and theirs is not None:
        return ours == theirs
    if ours is None and theirs is None:
        return same_formula(read(one), read(other))
    number, formula = (theirs, read(one)) if ours is None else (ours, read(other))
    if same_formula(Rational(Fraction(number)), formula):
        return True
    _, digits, exponent = number.as_tuple()
    is_decimal = exponent != 0
    return is_decimal and number == rounded(formula, max(len(digits), LEAST_DIGITS))


def written_number(text: str) -> Decimal | None:
    r"""The value of `-1.50`, `2e3`, `2 \times 10^{3}`; None for other texts."""
    text = POWER_OF_TEN.sub(r"e\1", text).replace(" ", "")
    return Decimal(text) if NUMBER.fullmatch(text) else None


# --- formulas --------------------------------------------------------------------------------
@lru_cache(maxsize=4096)
def read(text: str) -> Expr | None:
    """A formula, its decimals as fractions; None if it cannot be read.

    Only Math-Verify's LaTeX reader is used: the one for plain expressions ends in Python's `eval`.
    """
    try:
        formula = latex2sympy(normalize_latex(text, READER), normalization_config=None,
                              is_real=not should_treat_as_complex(text), convert_degrees=False)
    except (MemoryError, RecursionError):
        raise  # a failure of the grader, which counts it
    except Exception:  # a box may hold any text, and the reader fails in any way
        return None
    if not isinstance(formula, Expr):  # a set, a truth value
        return None
    return formula.xreplace({number: Rational(str(number)) for number in formula.atoms(Float)})


def same_formula(one: Expr | None, other: Expr | None) -> bool:
    """Whether two formulas have the same value, whatever their variables are."""
    if one is None or other is None:
        return False
    if one == other:
        return True
    points = values_at_points(one, other)
    if all(agree(ours, theirs) for ours, theirs in points):
        return True
    # An exact 0 may come as a tiny number, none of whose digits is right.
    is_tiny = any(value.is_finite and abs(value) < 1e-50 for pair in points for value in pair)
    return bool(is_tiny and simplify(one - other) == 0)


def same_multiple(one: str, other: str) -> int:
    """1 or -1 if a formula is the same positive or negative multiple of the other everywhere, or
    else 0: also for formulas without variables."""
    ours, theirs = read(one), read(other)
    if ours is None or theirs is None or not theirs.free_symbols:
        return 0
    ratios = [value / divisor for value, divisor in values_at_points(ours, theirs) if divisor != 0]
    is_constant = ratios and all(agree(ratios[0], ratio) for ratio in ratios)
    return int(sign(ratios[0])) if is_constant and ratios[0].is_real else 0


def values_at_points(one: Expr, other: Expr) -> list[tuple[Expr, Expr]]:
    """Values of both at the same points, by chance but always the same; one without variables."""
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    points = []
    for k in range(POINTS if names else 1):
        at = {name: Rational(Random(f"{name} {k}").randint(-3000, 3000), 1009) for name in names}
        points.append(tuple(
            formula.xreplace({symbol: at[symbol.name] for symbol in formula.free_symbols})
            .evalf(DIGITS) for formula in (one, other)))
    return points


def agree(one: Expr, other: Expr) -> bool:
    """Whether two values are equal but for rounding: in all digits but ten."""
    if not (one.is_finite and other.is_finite):  # infinite, or no number
        return False
    return bool(abs(one - other) <= max(abs(one), abs(other)) * Float(10) ** (10 - DIGITS))


def rounded(formula: Expr | None, digits: int) -> Decimal | None:
    """The value of a formula, rounded to significant digits; None if it is no real number."""
    value = formula.evalf(digits + 10) if formula is not None else None
    if value is None or not (value.is_Float or value.is_Rational):
        return None
    return Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal(str(value))
