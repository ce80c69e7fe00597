r"""Odd and hostile answers, with the score that a mathematician would give: what test_answers.py grades.

BOXED: (content of the response's last box, reference answer, score). A mathematician reads what was meant: another way
of writing the same number, set or expression is right, and units, degrees and "x =" may be left out or added. What
differs in value, in the order of a tuple, or in the kind of an interval's ends is wrong, and so is what cannot be read.
WHOLE: (whole response, reference answer, score): which box counts.
"""

BOXED = [
    # integers and decimals
    ("18", "18", 1), ("18.0", "18", 1), ("18.00", "18", 1), ("+18", "18", 1), ("-18", "18", 0), ("017", "17", 1),
    ("1,234", "1234", 1), ("1{,}234", "1234", 1), (r"1\,234", "1234", 1), ("1 234", "1234", 1), ("12,34", "1234", 0),
    (r"11,\! 111,\! 111,\! 100", "11111111100", 1), (r"11,\!111,\!111,\!100", "11111111100", 1),
    ("11111111100", r"11,\! 111,\! 111,\! 100", 1), (r"11,\! 111,\! 111,\! 101", "11111111100", 0),
    ("1,234,567", "1234567", 1), ("1234.5", "1,234.5", 1), ("0.5", ".5", 1), (".5", "0.5", 1), ("0.50", "0.5", 1),
    ("-.5", "-0.5", 1), ("0.333", r"\frac{1}{3}", 0), ("0.33333333", r"\frac{1}{3}", 0), ("3.14", r"\pi", 0),
    ("3.14159265358979", r"\pi", 0), ("1e3", "1000", 1), (r"1 \times 10^3", "1000", 1), (r"10^{3}", "1000", 1),
    (r"2.5 \cdot 10^{-2}", "0.025", 1), ("1000000000000000000001", "1000000000000000000000", 0),
    ("9007199254740993", "9007199254740992", 0), ("0", "0.0", 1), ("-0", "0", 1), ("0", "", 0), ("17", "18", 0),
    (r"\text{eighteen}", "18", 0), ("18?", "18", 0), ("18!", "18", 0), ("3!", "6", 1), ("$18$", "18", 1),
    (r"\(18\)", "18", 1), (r"\mathbf{18}", "18", 1), (r"\mathrm{18}", "18", 1), (r"\text{18}", "18", 1),
    (r"{18}", "18", 1), (r"\displaystyle 18", "18", 1), (r"18.", "18", 1), (r"18\ ", "18", 1), (r"\;18", "18", 1),
    (r"\,18\,", "18", 1), (r"~18", "18", 1), (r"18 \\", "18", 1),
    # fractions and roots
    (r"\frac12", r"\frac{1}{2}", 1), (r"\dfrac{1}{2}", r"\frac{1}{2}", 1), (r"\tfrac{1}{2}", r"\frac{1}{2}", 1),
    (r"\cfrac{1}{2}", r"\frac{1}{2}", 1), ("1/2", r"\frac{1}{2}", 1), (r"1 / 2", "0.5", 1), (r"\frac{2}{4}", "1/2", 1),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", 1), (r"\frac{1}{-2}", r"-\frac{1}{2}", 1), (r"\frac{-1}{-2}", "1/2", 1),
    (r"\frac{1}{2}", "2", 0), (r"\frac{2}{1}", "2", 1), (r"3\frac{1}{2}", r"\frac{7}{2}", 1), (r"3 \frac12", "3.5", 1),
    (r"\frac{1}{0}", "1", 0), (r"\frac{0}{0}", "0", 0), (r"\frac{3}{4}", "0.75", 1), (r"\frac{10}{3}", "3.33", 0),
    (r"\sqrt{2}", r"2^{1/2}", 1), (r"\sqrt2", r"\sqrt{2}", 1), (r"\sqrt{8}", r"2\sqrt{2}", 1),
    (r"2\sqrt2", r"\sqrt 8", 1),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", 1), (r"\sqrt[3]{8}", "2", 1), (r"\sqrt[3]{-8}", "-2", 1),
    (r"\sqrt{4}", "-2", 0), (r"\sqrt{2}", "1.414", 0), (r"1.4142135623730951", r"\sqrt{2}", 0),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}", 1), (r"2+\sqrt{3}", r"\sqrt{3}+2", 1),
    (r"\sqrt{3}-2", r"2-\sqrt{3}", 0),
    (r"(1+\sqrt5)/2", r"\frac{1+\sqrt{5}}{2}", 1), (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt{2}", 1),
    # constants, powers, functions
    (r"2\pi", r"\pi \cdot 2", 1), (r"\pi/2", r"\frac{\pi}{2}", 1), (r"\frac{\pi}{2}", "90", 0),
    (r"e^2", r"\mathrm{e}^2", 1),
    (r"\ln 8", r"3\ln 2", 1), (r"\log_{2} 8", "3", 1), (r"\sin 30^\circ", r"\frac12", 1),
    (r"\cos\frac{\pi}{3}", "1/2", 1),
    (r"2^{10}", "1024", 1), (r"2^10", r"2^{10}", 1), (r"(-2)^3", "-8", 1), (r"-2^2", "-4", 1), (r"4^{-1}", "0.25", 1),
    (r"\binom{5}{2}", "10", 1), (r"|{-3}|", "3", 1), (r"\left| -3 \right|", "3", 1), (r"\lfloor 3.7 \rfloor", "3", 1),
    (r"i^2", "-1", 1), (r"3+4i", r"4i+3", 1), (r"3-4i", "3+4i", 0), (r"\infty", r"\infty", 1),
    (r"-\infty", r"\infty", 0),
    (r"+\infty", r"\infty", 1),
    # percent, degrees, units, money, "x ="
    (r"50\%", r"50\%", 1), (r"50\%", "50", 1), (r"50", r"50\%", 1), (r"0.5", r"50\%", 1), (r"5\%", r"50\%", 0),
    (r"90^\circ", "90", 1), ("90", r"90^\circ", 1), (r"90^{\circ}", r"90^\circ", 1), (r"90\text{ degrees}", "90", 1),
    (r"45^\circ", r"90^\circ", 0), (r"\$18", "18", 1), ("18", r"\$18", 1), (r"\$1,234.50", "1234.5", 1),
    (r"18\text{ cm}", "18", 1), ("18", r"18\text{ cm}", 1), (r"18 \mathrm{~cm}^2", "18", 1),
    (r"18\text{ apples}", "18", 1),
    ("18 dollars", "18", 1), (r"17\text{ cm}", r"18\text{ cm}", 0), (r"x=18", "18", 1), ("18", "x = 18", 1),
    (r"x=17", "18", 0), (r"f(x)=x^2", "x^2", 1), (r"x \approx 18", "18", 1), (r"n = 18.", "18", 1),
    # expressions
    ("x^2-1", "(x-1)(x+1)", 1), ("x^2 - 1", "x^2+1", 0), ("2x+2", "2(x+1)", 1), ("x+y", "y+x", 1), ("xy", "yx", 1),
    (r"\frac{x}{2}", "0.5x", 1), (r"x \cdot y", "xy", 1), (r"a^2+2ab+b^2", "(a+b)^2", 1), ("x^2", "2x", 0),
    ("X", "x", 0),
    (r"\frac{1}{x}", "x^{-1}", 1), (r"\sqrt{x^2}", "x", 0), (r"\sin^2 x + \cos^2 x", "1", 1),
    (r"n(n+1)/2", r"\frac{n^2+n}{2}", 1),
    ("2n", "n+n", 1), (r"\alpha", "a", 0), (r"x_1", "x_{1}", 1), (r"x_1", "x_2", 0), (r"y=2x+1", "y=1+2x", 1),
    (r"y=2x+1", "2x-y+1=0", 1), ("y = 2x+1", "y = 2x-1", 0), (r"x>3", r"3<x", 1), (r"x \ge 3", "x>3", 0),
    # intervals, tuples, sets, lists, matrices
    ("(1,2)", "(1, 2)", 1), ("(1,2)", "(2,1)", 0), ("[1,2]", "(1,2)", 0), ("[1,2)", "[1,2)", 1), ("(1,2]", "[1,2)", 0),
    (r"\left(1,2\right)", "(1,2)", 1), (r"\left[1,2\right)", "[1,2)", 1), (r"(-\infty, 3]", r"(-\infty,3]", 1),
    (r"(-\infty,3)", r"(-\infty,3]", 0), (r"(-\infty,0)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,0)", 1),
    (r"x \in [1,2]", "[1,2]", 1), (r"1 \le x \le 2", "[1,2]", 1), (r"(0.5, 1)", r"(\frac12, 1)", 1),
    ("(1,2,3)", "(1,2)", 0),
    (r"(1, -2, 3)", "(1,-2,3)", 1), (r"\{1,2\}", r"\{2,1\}", 1), (r"\{1,2\}", "1,2", 1), ("1,2", "2,1", 1),
    ("1, 2, 3", "1, 2", 0),
    ("1 and 2", "1, 2", 1), (r"1\text{ and }2", "1,2", 1), (r"1\text{ or }2", "1,2", 1), (r"x=1, x=2", "1,2", 1),
    (r"x=1 \text{ or } x=2", r"\{1,2\}", 1), (r"\pm 2", r"2,-2", 1), (r"\pm 2", "2", 0),
    (r"3 \pm \sqrt2", r"3+\sqrt2, 3-\sqrt2", 1),
    ("1", "1,2", 0), ("1,2", "1", 0), (r"\{1\}", "1", 1), (r"\emptyset", r"\{\}", 1), (r"\varnothing", r"\emptyset", 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", 1),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 1),
    (r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", 0),
    (r"\begin{pmatrix}1/2\\0.5\end{pmatrix}", r"\begin{pmatrix}\frac12\\ \frac12\end{pmatrix}", 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}", 0),
    # text
    (r"\text{even}", "even", 1), ("even", r"\text{even}", 1), (r"\text{Even}", r"\text{even}", 1),
    (r"\text{odd}", r"\text{even}", 0),
    (r"\textbf{(B)}", r"\text{(B)}", 1), ("B", r"\text{(B)}", 1), (r"(B)", "B", 1), ("A", "B", 0),
    (r"\text{B}", "B", 1),
    (r"\text{Yes}", "Yes", 1), (r"\text{No}", "Yes", 0), (r"\text{Evelyn}", "Evelyn", 1), (r"\text{p - q}", "p - q", 1),
    (r"\text{ellipse}", r"\text{circle}", 0), (r"\text{Monday}", r"\text{Tuesday}", 0), ("2516_8", "2516_{8}", 1),
    ("2516_8", "2516_9", 0), (r"4210_5", "4210_{5}", 1), ("10:30", "10:30", 1), (r"10\text{:}30", "10:30", 1),
    ("10:31", "10:30", 0),
    (r"3:2", r"\frac{3}{2}", 1), (r"3:2", "2:3", 0), (r"\text{undefined}", r"\text{undefined}", 1),
    # hostile
    ("9^{9^{9}}", "1", 0), ("9^{9^{9^{9}}}", "18", 0), ("10000!", "18", 0), (r"2^{-10^{10}}", "0", 0),
    ("7" * 1000, "7" * 1000, 1),
    ("7" * 1000, "7" * 999 + "8", 0), ("7" * 100_000, "18", 0), ("1" + "+1" * 3000, "18", 0), ("(" * 1000, "18", 0),
    (r"\frac{1}{" * 500 + "2" + "}" * 500, "18", 0), ("{" * 50 + "18" + "}" * 50, "18", 1),
    (r"\text{" * 100 + "18" + "}" * 100, "18", 1),
    ("\0", "18", 0), ("18\0", "18", 0), ("\u202e81", "18", 0), ("１８", "18", 1), ("𝟏𝟖", "18", 1), ("١٨", "18", 1),
    ("−18", "-18", 1), ("½", "0.5", 1), ("²", "2", 0), ("x²", "x^2", 1), ("π", r"\pi", 1), ("√2", r"\sqrt{2}", 1),
    ("∞", r"\infty", 1),
    ("__import__('os').abort()", "1", 0), ("exit()", "18", 0), ("lambda x: x", "18", 0), ("None", "0", 0),
    ("nan", "nan", 1),
    ("nan", "18", 0), (r"\undefined{18}", "18", 0), (r"\newcommand{\x}{18}\x", "18", 0), ("%18", "18", 0),
    ("18 % 5", "3", 0),
    ("", "18", 0), (" ", "18", 0), ("\n18\n", "18", 1), (r"\left(18", "18", 0), (r"18\right)", "18", 0),
    (r"\ldots", "18", 0),
    ("18, \\ldots", "18", 0), (r"\text{The answer is }18", "18", 1), ("I do not know", "18", 0), ("18 or 17", "18", 0),
    ("18/", "18", 0),
]

# Contents of the boxes for which the grader gives another score, by the reason.
# test_answers.py fails if one of these comes right, or another goes wrong.
DIFFERS = {
    "a decimal of six digits and more may stand for an exact number": ["0.33333333", "3.14159265358979"],
    "the principal cube root of a negative number is complex": [r"\sqrt[3]{-8}"],
    "words have to stand after a number": [r"\text{The answer is }18"],
    "data sets write it where there is no answer": ["nan"],
}

WHOLE = [
    (r"\boxed{17} no, \boxed{18}", "18", 1), (r"\boxed{18} no, \boxed{17}", "18", 0), (r"The answer is 18.", "18", 0),
    (r"\boxed{18", "18", 0), (r"\boxed{\boxed{18}}", "18", 1), (r"\text{so \boxed{18}}", "18", 1),
    (r"\boxed 18", "18", 0),
    (r"\fbox{18}", "18", 0), (r"Put your answer within \boxed{}. It is 18.", "18", 0),
    (r"\boxed{18} as in \boxed{}", "18", 0),
    (r"$\boxed{18}$.", "18", 1), (r"\[\boxed{18}\]", "18", 1), (r"\boxed{x} where x = 18", "18", 0),
    (r"\\boxed{18}", "18", 1),
    ("", "18", 0), ("\\boxed{18}" * 2000, "18", 1), ("a" * 100_000 + r"\boxed{18}", "18", 1),
    (r"\boxed{18} " + "}" * 1000, "18", 1),
    # boxes that belong together, and boxes that do not
    (r"\boxed{(1, 2)}, \boxed{(2, 1)}", "(1,2), (2,1)", 1), (r"\boxed{(1, 2)}, \boxed{(2, 1)}", "(2,1)", 0),
    (r"\boxed{2} \text{ and } \boxed{3}", "2, 3", 1), (r"$\boxed{2}$ and $\boxed{3}$", "3,2", 1),
    (r"$x=\boxed{2}$ or $\boxed{3}$", "3", 0), (r"\boxed{2}, \boxed{3}, and \boxed{5}", "2,3,5", 1),
    (r"\boxed{2} \quad \boxed{3}", "2,3", 1), (r"\[\boxed{2} \qquad \text{or}\qquad \boxed{3}\]", "2,3", 1),
    (r"\boxed{18}, \boxed{18}", "18", 1), ("$\\boxed{18}$\n\n$$\\boxed{18}$$", "18", 1),
    (r"\boxed{1} is wrong; so \boxed{2}, \boxed{3}", "2,3", 1), (r"\boxed{2}, hence $x = \boxed{3}$", "3", 1),
    (r"\boxed{\boxed{2}, \boxed{3}}", "2,3", 1), (r"\boxed{\frac{1}{2}} or \boxed{-\frac12}", r"\pm 0.5", 1),
    (r"\boxed{2} android \boxed{3}", "3", 1),
    (r"\boxed{not \boxed{5}}", "5", 0), (r"\boxed{6 \boxed{5}}", "5", 0), (r"\boxed{\boxed{5} or 6}", "5", 0),
    (r"\boxed{\{18\}}", "18", 1), (r"\boxed{1}8", "18", 0), (r"\boxed{" * 1000, "18", 0), ("18\\boxed{ }", "18", 0),
]


def compare() -> None:
    """Print where the two rewards, this project's and Math-Verify's as it comes, leave the table."""
    from grader import REWARDS, Grader

    cases = [(f"\\boxed{{{boxed}}}", answer, score) for boxed, answer, score in BOXED] + WHOLE
    scores = []
    for name in ("answer", "math-verify"):
        with Grader(REWARDS[name]) as grader:
            scores.append([int(score) for score, _ in grader(*zip(*[case[:2] for case in cases]))])
    ours, theirs = scores
    print("want ours theirs")
    for (response, answer, score), a, b in zip(cases, ours, theirs):
        if not a == b == score:
            print(f"{score:4d} {a:4d} {b:6d}  {response[:60]!r} for {answer[:40]!r}")
    agree = [sum(found == case[2] for found, case in zip(found_by, cases)) for found_by in scores]
    print(f"of {len(cases)}: the grader agrees in {agree[0]}, Math-Verify as it comes in {agree[1]}")


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    compare()
