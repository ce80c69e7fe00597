"""What the answer is: the box of a response, and what a reference reduces to.

    extract_boxed("Adding up, we get \\boxed{18}.")       # "18"
    reference_answer("She has 3 * 6 eggs.\n#### 18")      # "18"
"""

import re

import numpy as np

# How data sets write that there is none. Not "none", which answers "which of these are prime?".
NO_ANSWER = ("proof", "notfound", "not found", "n/a", "nan", "null")
# What may stand between boxes that are one answer: "\boxed{2} and $\boxed{3}$".
BETWEEN_BOXES = re.compile(r"(?:[\s,;$~{}]|and\b|or\b|\\(?:text|mathrm|q?quad|[,;:! \\()\[\]]))*")


def extract_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}`; None if there is none or it never closes.

    Boxes with nothing but "and", "or", commas and spaces between them are one: "2, 3".
    """
    contents = []
    for part in reversed(re.split(r"\\boxed\s*\{", text)[1:]):
        depth = 1
        for token in re.finditer(r"\\.|[{}]", part, re.DOTALL):
            depth += {"{": 1, "}": -1}.get(token.group(), 0)  # `\{`, a printed brace, does not nest
            if depth == 0:
                break
        if depth or (contents and not BETWEEN_BOXES.fullmatch(part, token.end())):
            break
        contents.insert(0, part[: token.start()].strip())
    return ", ".join(dict.fromkeys(contents)) if contents else None


def reference_answer(value) -> str:
    """What belongs in the box, from what real files hold; "" if there is nothing.

    `... #### 1,234` (GSM8K) -> "1234"; a solution -> the content of its last box; 27.0 or "27.0"
    (AMC) -> "27"; "$x$, $y$" -> "x, y"; ["$2$", "$3$"] (OlympiadBench) -> "2, 3".
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(filter(None, map(reference_answer, value)))
    if value is None or value != value or isinstance(value, (dict, bytes)):
        return ""  # NaN, the only value that differs from itself, is a missing one
    if isinstance(value, float):
        value = np.format_float_positional(value, trim="-")  # not 1e+16
    text = str(value).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "").removeprefix("$")
    if (boxed := extract_boxed(text)) is not None:
        return boxed
    text = re.sub(r"(?<!\\)\$", "", text).strip()  # dollars around math, not \$
    return re.sub(r"^([-+]?\d+)\.0+$", r"\1", text)
