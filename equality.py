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

from formulas import same_multiple, same_value
from wording import CLOCK, split_choice, split_unit, tidy, with_thousands, words


def equivalent(one: str, other: str) -> bool:
    """Whether two answers are equal, whichever is the reference. May hang: see grader.py."""
    (letter, text), (other_letter, other_text) = split_choice(tidy(one)), split_choice(tidy(other))
    if letter and other_letter and letter != other_letter:
        return False
    if not (text and other_text):  # of a choice with its text either is enough
        return bool(letter and other_letter)
    # "100,101" is a number, or a list if the other answer is one for certain.
    number, other_number = with_thousands(text), with_thousands(other_text)
    is_certain = (number == text) != (other_number == other_text)
    return same_list(number, other_number) or is_certain and same_list(text, other_text)


# --- lists, intervals, tuples, matrices --------------------------------------------------------
BRACKETS = re.compile(r"(\\\{|\\langle|[(\[{])|(\\\}|\\rangle|[)\]}])|\\\\")
SEPARATOR = r"[,;]|\\cup(?![a-zA-Z])|\b(?:and|or)\b"
SET_BUILDER = re.compile(r"\\\{\s*[a-zA-Z]\s*(?:\\in[^|:]*)?(?:\||\\mid|:)(.*)\\\}")
MEMBER = re.compile(r"[a-zA-Z]\s*\\in(?![a-zA-Z])")  # x in ...
RELATION = re.compile(r"(\\(?:le|ge|ne|approx)(?![a-zA-Z])|[<>=])")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}")


def same_list(one: str, other: str) -> bool:
    """Whether two lists, of one element or more, have the same ones in any order."""
    ours, theirs = elements(one), elements(other)
    equal = [[same_element(a, b) for b in theirs] for a in ours] if len(ours) == len(theirs) else []
    return bool(equal) and all(map(any, equal)) and all(map(any, zip(*equal)))


def elements(text: str) -> list[str]:
    r"""Of a list, a set, a union, alternatives: `1, 2`, `\{1, 2\}`, `x < 1 or x > 2`, `\pm 1`."""
    text = MEMBER.sub("", SET_BUILDER.sub(r"\1", text))
    opening, inside, _ = in_brackets(text)
    parts = split_outside(SEPARATOR, inside if opening == r"\{" else text)
    signed = [re.sub(r"\\pm(?![a-zA-Z])", sign, part) for part in parts for sign in "+-"]
    return list(dict.fromkeys(part.strip() for part in signed if part.strip()))


def split_outside(separator: str, text: str) -> list[str]:
    """Split a text at the separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(f"{BRACKETS.pattern}|({separator})", text):
        depth += bool(token[1]) - bool(token[2])
        if token[3] and depth == 0:
            parts.append(text[start : token.start()])
            start = token.end()
    return [*parts, text[start:]]


def in_brackets(text: str) -> tuple[str, str, str]:
    """(opening, inside, closing) of brackets around the whole text; without any ("", text, "")."""
    depth, first = 0, BRACKETS.match(text)
    for token in BRACKETS.finditer(text) if first and first[1] else ():
        depth += bool(token[1]) - bool(token[2])
        if depth == 0:
            if token.end() < len(text):
                break
            return first[1], text[first.end() : token.start()].strip(), token[2]
    return "", text, ""


def ordered_parts(text: str) -> tuple[tuple, list[str]] | None:
    """Of an interval, a tuple, a matrix: (what it is, its parts in order). None for the rest.

    An inequality for one variable is an interval.
    """
    if matrix := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in matrix[2].split(r"\\") if row.strip()]
        return ("matrix", *map(len, rows)), [part.strip() for row in rows for part in row]
    opening, inside, closing = in_brackets(text)
    parts = split_outside("[,;]", inside)
    if opening in ("(", "[", r"\langle") and len(parts) > 1:
        kind = opening.replace(r"\langle", "("), closing.replace(r"\rangle", ")")
        return (*kind, len(parts)), [part.strip() for part in parts]
    return as_interval(RELATION.split(text))


def as_interval(chain: list[str]) -> tuple[tuple, list[str]] | None:
    r"""`-2 \le x < 1` is [-2, 1), and `x > 3` is (3, \infty). chain: sides, relations between."""
    if all(relation in (">", r"\ge") for relation in chain[1::2]):
        chain = [MIRRORED.get(part, part) for part in reversed(chain)]
    sides, relations = [side.strip() for side in chain[::2]], chain[1::2]
    if not relations or any(relation not in ("<", r"\le") for relation in relations):
        return None
    if len(sides) == 2 and is_name(sides[0]):
        sides, relations = [r"-\infty", *sides], ["<", *relations]
    elif len(sides) == 2 and is_name(sides[1]):
        sides, relations = [*sides, r"\infty"], [*relations, "<"]
    if len(sides) != 3 or not is_name(sides[1]):
        return None
    kind = "(" if relations[0] == "<" else "[", ")" if relations[1] == "<" else "]"
    return (*kind, 2), sides[::2]


def same_element(one: str, other: str) -> bool:
    """Whether two answers that are no lists are equal."""
    if one.replace(" ", "") == other.replace(" ", ""):
        return True
    if in_brackets(one)[0] == in_brackets(other)[0] == r"\{":  # sets in a list
        return same_list(one, other)
    ours, theirs = ordered_parts(one), ordered_parts(other)
    if ours or theirs:
        return bool(ours and theirs) and ours[0] == theirs[0] and all(
            map(same_element, ours[1], theirs[1]))
    if RELATION.search(one) or RELATION.search(other):
        return same_relation(one, other)
    return same_quantity(one, other)


# --- relations -------------------------------------------------------------------------------
def is_name(text: str) -> bool:
    r"""Whether it may stand before `=`: `x`, `x_1`, `\theta`, `f(x)`, `f^{-1}(x)`, `Area`."""
    name = r"\\?[a-zA-Z][a-zA-Z ]*'?(\^\{-1\})?(_(\w|\{[^{}]*\}))?\s*(\([\w, ]*\))?"
    return bool(re.fullmatch(name, text.strip()))


MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def same_relation(one: str, other: str) -> bool:
    """Whether two relations are equal, or a relation `x = 5` and a value."""
    if not (RELATION.search(one) and RELATION.search(other)):
        relation, value = (one, other) if RELATION.search(one) else (other, one)
        left, symbol, right = outer_sides(relation)
        says_value = symbol in ("=", r"\approx") and (is_name(left) or same_element(left, right))
        return says_value and same_element(right, value)
    (left, symbol, right), (other_left, other_symbol, other_right) = map(outer_sides, (one, other))
    if symbol == other_symbol and left == other_left and same_element(right, other_right):
        return True
    # As (left - right) compared with 0: one must be a multiple of the other.
    factor = same_multiple(f"({left})-({right})", f"({other_left})-({other_right})")
    if symbol in MIRRORED and factor < 0:
        symbol = MIRRORED[symbol]
    return symbol == other_symbol and factor != 0


def outer_sides(relation: str) -> tuple[str, str, str]:
    """The first side, the relation and the last side, of a chain as well: `x = 2 + 3 = 5`."""
    left, symbol, *_, right = RELATION.split(relation)
    return left.strip(), symbol, right.strip()


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
    if same_value(ours, theirs):
        return True
    if unit != other_unit and "percent" in (unit, other_unit):
        ours, theirs = (rf"{value} \cdot 10^{{-2}}" if which == "percent" else value
                        for value, which in ((ours, unit), (theirs, other_unit)))
        return same_value(ours, theirs)
    return False


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
