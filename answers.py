"""What the answer is: the box of a response, what a reference reduces to, and whether they agree.

    extract_boxed("Adding up, we get \\boxed{18}.")       # "18"
    reference_answer("She has 3 * 6 eggs.\n#### 18")      # "18"
    equivalent("18.0", "18")                             # True
"""

import re

import numpy as np

THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")  # "1,234", but not "3, 5" or "(1,2)"
# How data sets write that there is none. Not "none", which answers "which of these are prime?".
NO_ANSWER = ("proof", "notfound", "n/a", "nan", "null")
WORD = re.compile(r"(?<!\\)\b(?!(?:and|or)\b)[^\W\d_]{2,}")  # see solution_answer; not \frac
# `\{` is a printed brace, which nests nothing.
BRACE = re.compile(r"\\(?!\\?boxed).|(?P<opening>\\boxed\s*\{|\{)|(?P<closing>\})", re.DOTALL)
# What may stand between boxes that are one answer: "\boxed{2} and $\boxed{3}$".
BETWEEN_BOXES = re.compile(
    r"(?:[\s,;$~{}，、或和]|and\b|or\b|\\(?:text|mathrm|q?quad|[,;:! \\()\[\]]))*")


def extract_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None if there is none or it never closes.

    Boxes with nothing but "and", "or", commas and spaces between them are one: "2, 3".
    """
    contents, after = [], None
    for start, inside, end in reversed(_outer_boxes(text)):
        if after is not None and not BETWEEN_BOXES.fullmatch(text, end + 1, after):
            break
        contents.insert(0, text[inside:end].strip())
        after = start
    return ", ".join(dict.fromkeys(contents)) if contents else None


def _outer_boxes(text: str) -> list[tuple[int, int, int]]:
    """(its start, its content's start, its end) of each box in no other box; [] if the last one
    never closes."""
    openings, boxes = [], []
    for token in BRACE.finditer(text):
        if token["opening"]:
            openings.append(token)
        elif token["closing"] and openings:
            opening = openings.pop()
            if opening[0] != "{":
                boxes = [box for box in boxes if box[0] < opening.start()]
                boxes.append((opening.start(), opening.end(), token.start()))
    unclosed = [opening.start() for opening in openings if opening[0] != "{"]
    return [] if unclosed and boxes and unclosed[-1] > boxes[-1][2] else boxes


def reference_answer(value) -> str:
    """What belongs in the box, from what real files hold; "" if there is nothing.

    A solution -> the content of its last box; `... #### 1,234` (GSM8K) -> "1234", by the line of
    the mark alone; 27.0 or "27.0" (AMC) -> "27"; "$x$, $y$" -> "x, y"; ["$2$", "$3$"]
    (OlympiadBench) -> "2, 3"; "proof" (NuminaMath) -> "".
    """
    value = value.tolist() if isinstance(value, np.ndarray) else value  # of a parquet file
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(reference_answer, value)))
    if value is None or value != value or isinstance(value, (dict, bytes)):
        return ""  # NaN, the only value that differs from itself, is a missing one
    if isinstance(value, float):
        value = np.format_float_positional(value, trim="-")  # not 1e+16
    text = str(value).strip()
    _, mark, line = text.rpartition("####")  # without a mark, all of the text
    if (boxed := extract_boxed(text)) is not None:  # first: "####" may be a heading before it
        return "" if is_no_answer(boxed) else boxed
    text = line.partition("\n")[0] if mark else text
    text = re.sub(r"(?<!\\)\$", "", text).strip()  # dollars around math, not \$
    if mark and THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if is_no_answer(text):
        return ""
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)


def equivalent(boxed: str, answer: str) -> bool:
    """equality.equivalent: the imports of that file take seconds, and most need none of them."""
    import equality

    return equality.equivalent(boxed, answer)


def is_no_answer(text: str) -> bool:
    """Whether it is a data set's mark for none, also as `\\text{Proof.}`."""
    return re.sub(r"\\text|[{}.\s]", "", text).lower() in NO_ANSWER


def solution_answer(value) -> str:
    """As reference_answer, for a column of solutions; "" for a text that does not say its answer.

    It does so in a box, by a mark, or if it is a bare answer, `42` or `$\\frac12$`: one line of at
    most 100 characters with at most one word, and none if it ends in a full stop. (A word has two
    letters or more; "and" and "or" do not count.)
    """
    answer = reference_answer(value)
    if extract_boxed(str(value)) is not None:
        return answer
    words, most_words = len(WORD.findall(answer)), 0 if answer.endswith(".") else 1
    is_bare = "\n" not in answer and len(answer) <= 100 and words <= most_words
    return answer if is_bare else ""
