"""When two answers are equal: as a mathematician reads them, and strictly, since a policy learns
what is paid.

    equivalent("0.5", "\\frac{1}{2}")                # True
    equivalent("5 \\text{ m}", "5 \\text{ km}")      # False: nothing is converted

An answer is taken apart from the outside: a choice and its text, a list, an interval or a tuple, a
relation, a number and its unit, words. What is left is a formula, whose value is compared. What
cannot be read is equal to itself alone.

As a script this is a worker of grader.py.
"""

import json
import logging
import re
import signal
import sys
from contextlib import suppress

from math_verify import parse, verify

from formulas import exceeds_one, same_multiple, same_value
from wording import BRACKETS, CLOCK, in_brackets, split_choice, split_unit, tidy, words

LONGEST = 3000  # characters; what is longer is equal to itself alone

def equivalent(one: str, other: str) -> bool:
    """Whether two answers are equal, whichever is the reference. May hang: see grader.py."""
    if one == other or max(len(one), len(other)) > LONGEST:
        return one == other
    (letter, text), (other_letter, other_text) = split_choice(tidy(one)), split_choice(tidy(other))
    if letter and other_letter and letter != other_letter:
        return False
    if not (text and other_text):  # of a choice with its text either is enough
        return bool(letter and other_letter)
    if same_list(elements(text), elements(other_text)):
        return True
    # "100,101" is a number, but next to what can only be a list it is one as well.
    listed, other_listed = (re.sub(THREE_DIGITS, ", ", t) for t in (text, other_text))
    is_certain = (listed == text) != (other_listed == other_text)
    return is_certain and same_list(elements(listed), elements(other_listed))


# --- lists, intervals, tuples, matrices --------------------------------------------------------
THOUSANDS = r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)"
THREE_DIGITS = r"(?<=\b[1-9]\d\d),(?=[1-9]\d\d\b)"
SEPARATOR = r"[,;]|\\cup(?=\s*(?:[(\[]|\\\{))|\\(?:lor|vee)(?![a-zA-Z])|\b(?:or|and)\b"
SEPARATOR_OF_CONDITIONS = SEPARATOR.replace("|and", "")  # x > 1 and x < 2 is one condition
SET_BUILDER = re.compile(r"\\\{\s*[a-zA-Z]\s*(?:\\in[^|:]*)?(?:\||\\mid|:)(.*)\\\}")
MEMBER = re.compile(r"[a-zA-Z]\s*\\in(?![a-zA-Z])")  # x in ...
RELATION = r"\\(?:le|ge|ne|approx)(?![a-zA-Z])|[<>=]"
INEQUALITY = re.compile(r"\\(?:le|ge)(?![a-zA-Z])|[<>]")
MATRIX = re.compile(r"\\begin\{((?:[pbB]|small)?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}")


def same_list(ours: list[str], theirs: list[str]) -> bool:
    """Whether two lists, of one element or more, have the same ones in any order."""
    left = list(theirs)
    for element in ours:
        found = next((i for i, other in enumerate(left) if same_element(element, other)), None)
        if found is None:
            return False
        del left[found]
    return bool(ours) and not left


def elements(text: str) -> list[str]:
    r"""Of a list, a set, a union, alternatives: `1, 2`, `\{1, 2\}`, `x < 1 or x > 2`, `\pm 1`."""
    union = split_outside(r"(\\cup)", text)[::2]
    if len(union) > 1 and all(map(SET_BUILDER.fullmatch, union)):
        return [element for part in union for element in elements(part)]
    text = MEMBER.sub("", SET_BUILDER.sub(r"\1", text)).strip()
    left, *rest = chain(text)
    if len(rest) == 2 and rest[0] == "=" and is_name(left) and in_brackets(rest[1])[0]:
        text = rest[1]  # S = {1, 2}
    opening, inside, _ = in_brackets(text)
    separator = SEPARATOR_OF_CONDITIONS if INEQUALITY.search(text) else SEPARATOR
    parts = split_outside(f"{THOUSANDS}|({separator})", inside if opening == r"\{" else text)[::2]
    found = []
    for part in filter(None, parts):
        found += [part.replace(r"\pm", sign) for sign in "+-"] if r"\pm" in part else [part]
    return found


def split_outside(separator: str, text: str) -> list[str]:
    """Parts of a text, and between them what its group matches outside of brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(f"{BRACKETS}|{separator}", text):
        depth += bool(token[1]) - bool(token[2])
        if token[3] and depth == 0:
            parts += text[start : token.start()].strip(), token[3]
            start = token.end()
    return [*parts, text[start:].strip()]


def chain(text: str) -> list[str]:
    """Sides of a relation, and the relations between them; one side if it is none."""
    return split_outside(f"({RELATION})", text)


def ordered_parts(text: str) -> tuple[tuple, list[str]] | None:
    """Of an interval, a tuple, a matrix: (what it is, its parts in order). None for the rest.

    An inequality for one variable is an interval.
    """
    if matrix := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
        return ("matrix", *map(len, rows)), [part.strip() for row in rows for part in row]
    opening, inside, closing = in_brackets(text)
    parts = split_outside("([,;])", inside)[::2]
    if opening in ("(", "[", r"\langle") and len(parts) > 1:
        kind = opening.replace(r"\langle", "("), closing.replace(r"\rangle", ")")
        return (*kind, len(parts)), parts
    return as_interval(text)


def as_interval(text: str) -> tuple[tuple, list[str]] | None:
    r"""`-2 \le x < 1` is [-2, 1), and `x > 3` is (3, \infty)."""
    parts = chain(text)
    if all(relation in (">", r"\ge") for relation in parts[1::2]):
        parts = [MIRRORED.get(part, part) for part in reversed(parts)]
    sides, relations = parts[::2], parts[1::2]
    if not relations or any(relation not in ("<", r"\le") for relation in relations):
        return None
    if len(sides) == 2 and is_name(sides[0]):
        sides, relations = [r"-\infty", *sides], ["<", *relations]
    elif len(sides) == 2 and is_name(sides[1]):
        sides, relations = [*sides, r"\infty"], [*relations, "<"]
    ends_are_names = any(is_name(end) and end != r"\infty" for end in sides[::2])
    if len(sides) != 3 or not is_name(sides[1]) or ends_are_names:  # a < b < c is an order
        return None
    kind = "(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]"
    return (*kind, 2), sides[::2]


def same_element(one: str, other: str) -> bool:
    """Whether two answers that are no lists are equal."""
    if squeeze(one) == squeeze(other):
        return True
    if in_brackets(one)[0] == in_brackets(other)[0] == r"\{":  # sets in a list
        return same_list(elements(one), elements(other))
    ours, theirs = ordered_parts(one), ordered_parts(other)
    if ours or theirs:
        return bool(ours and theirs) and ours[0] == theirs[0] and all(
            map(same_element, ours[1], theirs[1]))
    ours, theirs = chain(one), chain(other)
    if len(ours) > 1 and len(theirs) > 1:
        return same_relation(ours, theirs)
    if len(ours) > 1 or len(theirs) > 1:
        relation, value = (ours, other) if len(ours) > 1 else (theirs, one)
        return says_value(relation) and same_element(relation[-1], value)
    return same_quantity(one, other)


def squeeze(text: str) -> str:
    """The text without spaces, but for those between digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


# --- relations -------------------------------------------------------------------------------
MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def is_name(text: str) -> bool:
    r"""Whether it may stand before `=`: `x`, `x_1`, `\theta`, `f^{-1}(x)`, `Area`, `(x, y)`."""
    name = (r"(?!\\(?:sqrt|frac))\\?[a-zA-Z][\\a-zA-Z ]*'*"
            r"(\^\{-1\})?(_(\w|\{[^{}]*\}))?\s*(\([\w, ]*\))?")
    return bool(re.fullmatch(rf"\(?\s*{name}(\s*,\s*{name})*\s*\)?", text))


def says_value(relation: list[str]) -> bool:
    """Whether it names its last side: `x = 5`, `x = 2 + 3 = 5`, `2 + 3 = 5`; not `x + 2 = 5`."""
    first, *others, last = relation[::2]
    are_equal = all(symbol in ("=", r"\approx") for symbol in relation[1::2])
    left = others if is_name(first) else [first, *others]
    return are_equal and all(same_element(side, last) for side in left)


def same_relation(ours: list[str], theirs: list[str]) -> bool:
    """Whether two relations are equal, as `chain` has them."""
    if ours[1::2] == theirs[1::2] and all(map(same_element, ours[::2], theirs[::2])):
        return True
    if says_value(ours) and says_value(theirs) and ours[0] == theirs[0]:
        return same_element(ours[-1], theirs[-1])
    if len(ours) > 3 or len(theirs) > 3:
        return False
    # As (left - right) compared with 0: one must be a multiple of the other.
    (left, symbol, right), (other_left, other_symbol, other_right) = ours, theirs
    factor = same_multiple(f"({left})-({right})", f"({other_left})-({other_right})")
    if symbol in MIRRORED and factor < 0:
        symbol = MIRRORED[symbol]
    return symbol == other_symbol and factor != 0


# --- quantities ------------------------------------------------------------------------------
def same_quantity(one: str, other: str) -> bool:
    """Whether two numbers or formulas with their units, or two texts, are equal."""
    (ours, unit), (theirs, other_unit) = split_unit(one), split_unit(other)
    if ours is None or theirs is None:
        return ours is theirs and words(one) == words(other)
    if unit and other_unit and unit != other_unit:
        return False
    if unit in CLOCK or other_unit in CLOCK:
        return ours.removesuffix(":00").lstrip("0") == theirs.removesuffix(":00").lstrip("0")
    if unit == other_unit or "percent" not in (unit, other_unit):
        return same_value(ours, theirs)
    # 50% is 0.5, and 50 as well: there the sign is missing.
    share, plain = (ours, theirs) if unit == "percent" else (theirs, ours)
    return same_value(rf"{share} \cdot 10^{{-2}}", plain) or (
        same_value(share, plain) and exceeds_one(plain))


# --- a worker of grader.py -------------------------------------------------------------------
def as_it_comes(response: str, answer: str) -> bool:
    """Math-Verify's own judgement of a whole response, as in published figures."""
    gold, given = (parse(text, parsing_timeout=None) for text in (f"${answer}$", response))
    return verify(gold, given, timeout_seconds=None)  # the worker has a deadline


def work(judge, deadline: float) -> None:
    """Lines of (given, answer) pairs in, lines of (is_equal, failed) out.

    The kernel ends the process if one pair takes more than `deadline` seconds.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # or it warns of odd answers
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, deadline)
        verdict = False, True
        with suppress(Exception):  # algebra systems fail in any way; it is counted
            verdict = bool(judge(*json.loads(line))), False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    work({"equivalent": equivalent, "as_it_comes": as_it_comes}[sys.argv[1]], float(sys.argv[2]))
