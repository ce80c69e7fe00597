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
from sympy import Derivative, Expr, Float, I, Integral, Limit, Product, Rational, Sum, binomial
from sympy import factorial, gamma, nan, sign, zoo

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
                     r"|(?<!sqrt)\[|\^\s*\{?\s*(?-i:T)(?![a-zA-Z])|(?<![\\a-z])[a-z]{4,}",
                     re.IGNORECASE)
# "3(4)" and "2\\binom{5}{2}" are products; to the reader they are mixed numbers, 3 + 4.
PRODUCT = re.compile(r"(?:(?<![_^\\\w.])\d[\d.]*|\))\s*(?=\(|\\binom)|\)\s*(?=\d)")
COUNTED = factorial, binomial, gamma, Sum, Product  # they are for whole numbers


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
    is_closed = text.count("{") == text.count("}") and text.count("(") == text.count(")")
    if MISREAD.search(text) or not is_closed:
        return None
    text = PRODUCT.sub(r"\g<0> \\cdot ", text)
    text = re.sub(r"(?<![\\a-zA-Z])I(?![a-zA-Z])", r"\\mathrm{I}", text)  # not the unit i
    try:
        formula = latex2sympy(
            normalize_latex(text, READER), normalization_config=None, conversion_config=LETTERS,
            is_real=not should_treat_as_complex(text), convert_degrees=False)
    except (MemoryError, RecursionError):
        raise  # a failure of the grader, which counts it
    except Exception:  # a box may hold any text, and the reader fails in any way
        return None
    # A set, a truth value; or what may not be evaluated in time.
    if not isinstance(formula, Expr) or formula.has(Integral, Derivative, Limit):
        return None
    exact = {number: Rational(str(number)) for number in formula.atoms(Float)}
    return formula.xreplace(exact | {s: I for s in formula.free_symbols if s.name == "i"})


def same_formula(one: Expr | None, other: Expr | None) -> bool:
    """Whether two formulas have the same value, whatever their variables are."""
    if one is None or other is None or one.has(zoo, nan) or other.has(zoo, nan):
        return False
    return one == other or all(are_equal(a, b) for a, b in values_at_points(one, other))


def same_multiple(one: str, other: str) -> int:
    """1 or -1 if a formula is the same positive or negative multiple of the other everywhere, or
    else 0: also for formulas without variables."""
    ours, theirs = read(one), read(other)
    if ours is None or theirs is None or not theirs.free_symbols:
        return 0
    (a, b), *others = values_at_points(ours, theirs)
    if are_equal(a, Rational(0)) or are_equal(b, Rational(0)):
        return 0
    ratio = (a / b).evalf(LEAST_DIGITS)
    is_constant = all(are_equal(a * d, b * c) for c, d in others)
    return int(sign(ratio)) if is_constant and ratio.is_real else 0


def values_at_points(one: Expr, other: Expr) -> list[tuple[Expr, Expr]]:
    """Both at the same points, by chance but always the same ones, of either sign, near to 0 and
    far from it. Without variables there is one point."""
    names = sorted({symbol.name for symbol in one.free_symbols | other.free_symbols})
    is_counted = one.has(*COUNTED) or other.has(*COUNTED)
    points = []
    for k in range(POINTS if names else 1):
        at = {}
        for i, name in enumerate(names):
            size = Random(f"{name} {k}").randint(200, 3000)
            at[name] = Rational(size, 1009 if k < POINTS / 2 else 91) * (-1) ** (k >> i)
            if is_counted:
                at[name] = Rational(size // 100 + i)
        points.append(tuple(
            formula.xreplace({symbol: at[symbol.name] for symbol in formula.free_symbols})
            for formula in (one, other)))
    return points


def are_equal(one: Expr, other: Expr) -> bool:
    """Whether two numbers are equal: exactly if they are fractions, or in PRECISION digits, but for
    200 of them that rounding may take."""
    gap, size = one - other, max(abs(one.evalf(15)), abs(other.evalf(15)), 1)
    rough = gap.evalf(30)  # soon done, and enough if they differ visibly
    if not rough.is_finite or abs(rough) > max(1e-50, 1e-20 * size):
        return False
    gap = gap.doit()
    if gap.is_Rational:
        return gap == 0
    return bool(abs(gap.evalf(PRECISION)) < size * Rational(10) ** (200 - PRECISION))


def rounded(formula: Expr | None, digits: int) -> Decimal | None:
    """The value of a formula, rounded to significant digits; None if it is no real number."""
    value = formula.evalf(digits + 10) if formula is not None else None
    if value is None or not (value.is_Float or value.is_Rational):
        return None
    return Context(prec=digits, rounding=ROUND_HALF_UP).create_decimal(str(value))
