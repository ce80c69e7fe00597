"""How answers are written: the many ways to typeset one, multiple choices, words, units.

    tidy("\\textbf{(C)}\\ 18\\text{ cm}^2")     # "(C) 18 cm ^2"
    split_choice("(C) 18 cm ^2")              # ("C", "18 cm ^2")
    split_unit("18 cm ^2")                    # ("18", "cm2")
"""

import re
import unicodedata

SYMBOLS = {  # what models and data sets write in Unicode
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ",
    "°": r"^\circ ", "℃": r"^\circ C", "²": "^2", "³": "^3", "½": r"\frac12 ", "√": r"\sqrt ",
    "±": r"\pm ", "¾": r"\frac34 ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R} ", "∠": r"\angle ",
    "∶": ":", "£": r"\pounds ", "€": r"\euro ", "¥": r"\yen ", "¢": " cent ", "、": ",",
    "。": ".", "∣": "|",
    "或": " or ", "和": " and ",
}
BRACKETS = r"(\\\{|\\langle|[(\[{])|(\\\}|\\rangle|[)\]}])|\\\\"
END = r"(?![a-zA-Z])"  # of a command: \le, but not \left
LOOKS = {  # what only changes how an answer looks, each with an example
    r"(?<!\\)\\[()\[\]]|(?<!\\)\$": " ",  # $18$ and \(18\)
    r"^\s*\*\*|\*\*\s*$": "",  # **18**
    r"^\s*(?i:(?:the )?(?:final )?answer(?: is|:)|option\b|choice\b):?": "",  # The answer is 18
    rf"\\(?:left|right|middle|[bB]igg?[lr]?|displaystyle|[lL]arge|LARGE|[hH]uge){END}\s*": "",
    r"\\lbrace": r"\\{",
    r"\\rbrace": r"\\}",
    r"\\(?:text)?color(?:box)?\s*(?:\[\w*\])?\s*\{[^{}]*\}": "",  # \textcolor{blue}{18}
    r",\\!\s*|(?<=\d)\{,\}(?=\d)": "",  # 10,\!080 and 10{,}080
    r"\\!\s*": "",
    r"\b([apAP])\.?[mM]\b\.?": r"\1m",  # 7 p.m.
    r"(?<![a-zA-Z])\{\s*([,:])\s*\}": r"\1",  # 3{:}2
    rf"(?<!\\)\\[,;: ]|~|\\q?quad{END}|\s+": " ",
    r"\\[dtc]frac": r"\\frac",
    r"\\frac\s*(\d)": r"\\frac{\1}",  # \frac12, of which the next line reads the 2
    r"(\\frac\{[^{}]*\})\s*(\d)": r"\1{\2}",
    r"(?<![\d.])(\d+) (\d+) ?/ ?(\d+)": r"\1\\frac{\2}{\3}",  # 3 1/2
    r"([_^]|\\sqrt)(\d)(?= \d)": r"\1{\2}",  # 2^3 5
    r"\\(mathbb|mathcal|vec|hat|dot|bar|pmod)\s+(\w)": r"\\\1{\2}",  # \mathbb R
    r"[\[(]\s*(\\begin\{(?:array|matrix)\}.*?\\end\{(?:array|matrix)\})\s*[\])]": r"\1",
    r"\^\s*(-\s*(?:\d+|[a-zA-Z]))": r"^{\1}",  # 10^-3
    r"(?<![\\a-zA-Z])(pi|sqrt)(?![a-zA-Z])": r"\\\1 ",  # 2pi
    r"\\sqrt\s*\(([^()]*)\)": r"\\sqrt{\1}",  # sqrt(2)
    rf"\\(?:leqslant|leq|le){END}|<=": r"\\le ",
    rf"\\(?:geqslant|geq|ge){END}|>=": r"\\ge ",
    rf"\\neq?{END}|!=": r"\\ne ",
    r"\\\{\s*\\\}|\\varnothing": r"\\emptyset ",
    r"(?<![\\a-zA-Z])infinity": r"\\infty ",
    "平方": " square ",
    "立方": " cubic ",
    "千米|公里": " km ",  # before 千, a thousand
    "千克|公斤": " kg ",
    "千瓦": " kw ",
}
FONT = rf"\\(?:text|math|boldsymbol|bm|mbox|emph|underline|boxed)(?:bf|it|rm|normal|sf|tt)?{END}\s*"
SCALES = {"hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}",
          "trillion": "10^{12}", "dozen": "12", "百": "10^{2}", "千": "10^{3}", "万": "10^{4}",
          "亿": "10^{8}"}


def tidy(text: str) -> str:
    """The answer, written in one of the ways that look alike or mean the same."""
    wide = {c: unicodedata.normalize("NFKC", c) for c in text if "\uff01" <= c <= "\uff5e"}
    text = "".join(SYMBOLS.get(c) or wide.get(c, c) for c in text)
    for pattern, replacement in LOOKS.items():
        text = re.sub(pattern, replacement, text)
    while (plain := re.sub(FONT + r"\{([^{}]*)\}", _plain_text, text)) != text:
        text = plain
    text = re.sub(FONT + r"(?=\{)", "", text)  # around a formula with braces of its own
    text = _tidy_numbers(text)
    text = re.sub(r"(?:[\s,;:\\]|(?<!\.)\.(?!\.))+$", "", text)
    text = re.sub(r"\s*:\s*", ":", text)
    text = re.sub(r"\s+", " ", text).strip()
    while in_brackets(text)[0] == "{":
        text = in_brackets(text)[1]
    return text


def _plain_text(match: re.Match) -> str:
    r"""The content of a \text{...}. After a number, a letter in it is a unit: 5\text{ m/s}."""
    content, before = match[1], match.string[: match.start()].rstrip()
    if not match[0].startswith((r"\text", r"\mathrm", r"\mbox")):  # a vector: 5\mathbf{m}
        return f" {content} " if before[-1:].isalpha() else content
    if re.search(r"(?:[\d})/]|\\cdot)$", before):
        content = re.sub(r"\b[a-zA-Z]{1,2}\b", lambda unit: UNITS.get(unit[0], unit[0]), content)
    return f" {content} "


def _tidy_numbers(text: str) -> str:
    r"""50\%, 90^\circ, 5 million, 0.\dot{3} and 0.\overline{3} as words and formulas."""
    text = re.sub(r"\\?%", " percent ", text)
    text = re.sub(r"(?<=\d )([mgshLNJWVK]|in)(?=\.?$|/[smh]\b|\^[23]$)",
                  lambda unit: UNITS[unit[0]], text)
    circle = r"(?:\{\s*\})?\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree"
    text = re.sub(rf"(\\(?:sin|cos|tan|cot))\s*[({{]?\s*([\d.]+)\s*(?:{circle})\s*[)}}]?",
                  r"\1(\\frac{\2\\pi}{180})", text)
    text = re.sub(circle, " degree ", text)
    text = re.sub(r"degrees?\s+C(elsius)?\b", " celsius ", text, flags=re.IGNORECASE)
    text = re.sub(r"degrees?\s+F(ahrenheit)?\b", " fahrenheit ", text, flags=re.IGNORECASE)
    text = re.sub(rf"(?<=[\d}}])\s*({'|'.join(SCALES)})(?:s?\b|(?<=[百千万亿]))",
                  lambda match: rf" \times {SCALES[match[1].lower()]} ", text, flags=re.IGNORECASE)
    text = re.sub(r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?",
                  lambda match: rf"\overline{{{''.join(filter(None, match.groups()))}}}", text)
    return re.sub(r"(?<!\d)(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d{1,100})\}?",
                  _repeating_decimal, text)


def _repeating_decimal(match: re.Match) -> str:
    r"""0.1\overline{6} is (16 - 1) / 90."""
    integer, fixed, repeated = match.groups()
    numerator = int(integer + fixed + repeated) - int(integer + fixed or 0)
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def in_brackets(text: str) -> tuple[str, str, str]:
    """(opening, inside, closing) of brackets around the whole text; without any ("", text, "")."""
    depth, first = 0, re.match(BRACKETS, text)
    for token in re.finditer(BRACKETS, text) if first and first[1] else ():
        depth += bool(token[1]) - bool(token[2])
        if depth == 0:
            if token.end() < len(text):
                break
            return first[1], text[first.end() : token.start()].strip(), token[2]
    return "", text, ""


def split_choice(text: str) -> tuple[str, str]:
    """(letter, text) of a multiple choice: "(C) 8", "C. 8", "(C)", "C"; ("", text) of the rest.

    Two letters are no choice, nor is one in a formula or a list: "(A) or (B)", "(A) + 1".
    """
    mark = r"(?:\(\s*([A-J])\s*\)|([A-J])[.):])"
    option = r"(?: |(?=\d))(?!(?:and|or)\b|[,;/+=^_]|- |\\c[au]p)(.*)"
    match = re.fullmatch(rf"{mark}(?:{option}|$)|([A-J])", text)
    if not match or re.search(mark, match[3] or ""):
        return "", text
    return match[1] or match[2] or match[4], match[3] or ""


# --- words and units ---------------------------------------------------------------------------
UNITS = {spelling: line.split()[0] for line in """
    metre m meter 米 | cm centimetre centimeter 厘米 | mm millimetre millimeter 毫米
    km kilometre kilometer 千米 公里 | inch in inches | foot ft feet | yard yd | mile mi
    gram g 克 | kg kilogram 千克 公斤 | mg milligram | pound lb | ounce oz | litre l L liter 升
    ml millilitre milliliter 毫升 | second s sec 秒 | minute min 分钟 | hour h hr 小时 | day 天
    year yr 年 | degree deg 度 | radian rad | celsius | fahrenheit | percent pct percentage
    newton N | joule J | watt W | volt V | kelvin K | hertz hz | pascal pa | nm nanometer
    kj | ev | kw | khz | mhz | ghz
    dollar usd 美元 | cent | euro eur | gbp | yuan rmb 元 | am | pm | mph
""".replace("\n", "|").split("|") for spelling in line.split()}
CURRENCIES = {r"\$": "dollar", r"\euro": "euro", r"\pounds": "gbp", r"\yen": "yuan"}
CLOCK = ("am", "pm")
NUMBER_WORDS = set("""
    half halves third fourth quarter fifth sixth seventh eighth ninth tenth twelfth sixteenth
    hundredth thousandth millionth billionth one two three four five six seven eight nine ten eleven
    twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty
    sixty seventy eighty ninety zero lakh crore quadrillion score gross pair double doubled triple
    tripled twice halved squared cubed factorial root inverse reciprocal conjugate complement
    opposite negative negated imaginary times plus minus over divided multiplied added subtracted
    raised choose mod modulo rem remainder remaining base binary octal hexadecimal ternary more less
    fewer above below minimum maximum max not wrong false incorrect none never neither except unless
    undefined impossible infinite infinity exclusive but otherwise when without only until between
    through excluded smaller greater larger bigger least most approximately roughly maybe grand mega
    kilo myriad googol permille quintillion fold tenfold quadrupled reversed inverted squareroot
    cuberoot modulus power exponent product sum difference quotient time off invalid nothing void
    unknown error loss debt deficit short ago recurring repeating ish point abc abcd sin cos tan log
    exp cosh sinh cosine sine logarithm gcd lcm arg det dim ceil floor
""".split())  # after a number they may change it
CHANGING = re.compile("[百千万亿倍半折成负不以上下左右多约零一二两三四五六七八九十]")

# Words have three letters or more, or stand in these tables.
SHORT_WORDS = "(?:no|on|up|is|it|we|he|if|so|to|do|go|(?-i:[IVX]{2}))"
SHORT_UNITS = "|".join(unit for unit in UNITS if len(unit) > 1 and unit != "in" and unit.isascii())
WORD = (rf"(?<![\\a-zA-Z_{{])(?:{SHORT_UNITS}|sq|m/s)s?{END}"
        rf"|(?<![\\\w{{^])(?:[a-zA-Z]{{3,}}|{SHORT_WORDS}\b)|[\u4e00-\u9fff]+")
POWER = r"\s*\^\s*\{?\s*-?[1-3]\s*\}?|(?<=[a-zA-Z])[23]"
UNIT = re.compile(rf"{WORD}|/\s*[a-zA-Z]{END}|{POWER}|[\s/.()]|\\cdot{END}", re.IGNORECASE)


def split_unit(text: str) -> tuple[str | None, str]:
    r"""(formula, unit): `18 cm ^2` is ("18", "cm2"), `\$18` ("18", "dollar"), `18` ("18", "").

    Words that are no unit of a number are no formula: (None, "").
    """
    if money := re.fullmatch(r"([+-]?)\s*(\\\$|\\euro|\\pounds|\\yen)\s*(.*)", text):
        return money[1] + money[3], CURRENCIES[money[2]]
    if based := re.fullmatch(r"(\d+)\s*_\s*\{?\s*([2-9]|[1-3]\d)\s*\}?", text):
        return based[1], f"base {based[2]}"
    first = re.search(WORD, text, re.IGNORECASE)
    if first is None:
        return text, ""
    formula, tail = text[: first.start()].rstrip(" ("), text[first.start() :]
    found = re.findall(WORD, tail, re.IGNORECASE)
    if (not UNIT.sub("", tail) and all(map(_may_be_unit, found))
            and re.search(r"\d|\\[a-zA-Z]", formula)):
        return formula, _unit_name(tail)
    is_formula = re.search(r"[+*=^_|\\]", text) or text.lower() in UNITS  # as mg without a number
    return (text, "") if is_formula else (None, "")


def _may_be_unit(word: str) -> bool:
    """Whether a word after a number says what is counted. One without a vowel may be variables."""
    singular = _singular(word.lower())
    if not word.isascii():
        return not CHANGING.search(word)
    is_known = word in UNITS or singular in UNITS or word.lower() == "sq"
    changes = {word.lower(), singular} & NUMBER_WORDS
    return is_known or not changes and bool(re.search("[aeiou]", word.lower()))


def _singular(word: str) -> str:
    return word if word in UNITS else word.removesuffix("s")


def _unit_name(tail: str) -> str:
    """One name for all spellings of a unit: "inch2" for "square inches" and "in^2"."""
    names, power = [], ""
    for token in re.findall(r"-?\d|/|[^\W\d_]+", tail.replace(" per ", "/")):
        word = token if token in UNITS else _singular(token.lower())
        if token[-1].isdigit():
            names[-1:] = [name + token for name in names[-1:]]
        elif word in ("square", "sq", "cubic"):
            power = "3" if word == "cubic" else "2"
        elif word != "unit":
            names.append(UNITS.get(word, word) + power)
            power = ""
    return " ".join(names)


def words(text: str) -> str:
    """A text to be compared, case and punctuation aside."""
    text = re.sub(r"[.,;:!?'\"](?!\d)|(?<=[a-z])-(?=[a-z])", " ", text.lower())
    return " ".join(text.split())
