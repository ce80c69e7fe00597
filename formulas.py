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
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import should_treat_as_complex
from sympy import Expr, Float, I, PrecisionExhausted, Rational, nan, sign, zoo

LEAST_DIGITS = 6  # of a decimal that may stand for an exact number
PRECISION = 3000  # digits; what is 0 in so many is 0
POINTS = 8  # at which formulas with variables are compared
POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?$")
NUMBER = re.compile(
    r"([+-]?) ?((?:\d{1,3}(?:([ ,])\d{3})(?:\3\d{3}){0,300}|\d{0,1000})(?:\.\d{0,1000})?)"
    r"(e[+-]?\d{1,4})?", re.IGNORECASE)
READER = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
LETTERS = ConversionConfig(lowercase_symbols=False)
# What the reader takes for something else: "5{6}" for 5 + 6, "1 2" for 12, "f'" for f, and so on.
MISREAD = re.compile(r"(?<![_^\d])\d+\s*\{|\d\s+\d|['\"$]|dots|phantom|\.\d*\.|\d_|(?<!\d)0[xbo]"
                     r"|(?<!sqrt)\[|\^\s*\{?\s*T(?![a-zA-Z])", re.IGNORECASE)


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
    is_decimal = exponent != 0 and len(digits) >= LEAST_DIGITS
    return is_decimal and number == rounded(formula, len(digits))


def written_number(text: str) -> Decimal | None:
    r"""The value of `-1.50`, `1,234`, `2e3`, `2 \times 10^{3}`; None for other texts."""
    match = NUMBER.fullmatch(POWER_OF_TEN.sub(r"e\1", text))
    if not match or not re.search(r"\d", match[2]):
        return None
    return Decimal(match[1] + re.sub("[ ,]", "", match[2]) + (match[4] or ""))


def exceeds_one(text: str) -> bool:
    """Whether a number or a formula is known to be above 1."""
    number = written_number(text)
    value = rounded(read(text), LEAST_DIGITS) if number is None else number
    return value is not None and value > 1


# --- formulas --------------------------------------------------------------------------------
@lru_cache(maxsize=4096)
def read(text: str) -> Expr | None:
    """A formula, its decimals as fractions; None if it cannot be read.

    Only Math-Verify's LaTeX reader is used: the one for plain expressions ends in Python's `eval`.
    """
    if MISREAD.search(text):
        return None
    try:
        formula = latex2sympy(
            normalize_latex(text, READER), normalization_config=None, conversion_config=LETTERS,
            is_real=not should_treat_as_complex(text), convert_degrees=False)
    except (MemoryError, RecursionError):
        raise  # a failure of the grader, which counts it
    except Exception:  # a box may hold any text, and the reader fails in any way
        return None
    if not isinstance(formula, Expr):  # a set, a truth value
        return None
    exact = {number: Rational(str(number)) for number in formula.atoms(Float)}
    return formula.xreplace(exact | {s: I for s in formula.free_symbols if s.name == "i"})


def same_formula(one: Expr | None, other: Expr | None) -> bool:
    """Whether two formulas have the same value, whatever their variables are."""
    if one is None or other is None or one.has(zoo, nan) or other.has(zoo, nan):
        return False
    return one == other or all(is_zero(a - b) for a, b in values_at_points(one, other))


def same_multiple(one: str, other: str) -> int:
    """1 or -1 if a formula is the same positive or negative multiple of the other everywhere, or
    else 0: also for formulas without variables."""
    ours, theirs = read(one), read(other)
    if ours is None or theirs is None or not theirs.free_symbols:
        return 0
    (a, b), *others = values_at_points(ours, theirs)
    if is_zero(a) or is_zero(b) or not all(is_zero(a * d - b * c) for c, d in others):
        return 0
    ratio = (a / b).evalf(LEAST_DIGITS)
    return int(sign(ratio)) if ratio.is_real else 0


def values_at_points(one: Expr, other: Expr) -> list[tuple[Expr, Expr]]:
    """Both at the same points, by chance but always the same ones, of either sign, near to 0 and
    far from it. Without variables there is one point."""
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    points = []
    for k in range(POINTS if names else 1):
        at = {}
        for i, name in enumerate(names):
            size = Random(f"{name} {k}").randint(200, 3000)
            at[name] = Rational(size, 1009 if k < POINTS / 2 else 91) * (-1) ** (k >> i)
        points.append(tuple(
            formula.xreplace({symbol: at[symbol.name] for symbol in formula.free_symbols})
            for formula in (one, other)))
    return points


def is_zero(value: Expr) -> bool:
    """Whether a number is 0: exactly, or in as many digits as are looked at."""
    try:
        return value.evalf(2, maxn=PRECISION, strict=True) == 0
    except PrecisionExhausted:
        return True


def rounded(formula: Expr | None, digits: int) -> Decimal | None:
    """The value of a formula, rounded to significant digits; None if it is no real number."""
    value = formula.evalf(digits + 10) if formula is not None else None
    if value is None or not (value.is_Float or value.is_Rational):
        return None
    return Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal(str(value))
