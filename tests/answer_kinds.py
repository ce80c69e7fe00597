r"""Answers by what makes them hard to compare, with the score that they deserve: what test_answers.py grades both ways.

(one answer, another, whether they are equal). `python tests/answer_kinds.py` prints how many of each kind are judged
so, here and by Math-Verify as it comes.
"""

KINDS = {
    "what cannot be read is not read in part": [
        (r"0.\overline{5} \text{ or } \frac{1}{2}", r"\frac12", 0), ("@ $17$ @", "17", 0),
        (r"?? \frac{3}{4}", r"\frac34", 0), (r"\frac{1}{2", r"\frac12", 0), (r"\clubsuit $5$", "5", 0),
        (r"\text{Let } x \text{ be } \frac{1}{2}", r"\frac{1}{2}", 0), ("}{ 17", "17", 0),
        (r"2^{ \frac{1}{2}", r"\frac12", 0), ("$3$ &&& $5$", "5", 0), (r"\frac{3}{4} \neq ?", r"\frac34", 0),
        (r"\frac{5}{6} \wedge\wedge", r"\frac56", 0), ("the number $12$ of apples", "12", 0), (r"12 \ne 13", "13", 0),
        (r"12 \ne 13", "12", 0),
    ],
    "tiny and huge numbers": [
        ("1.6e-19", "1.7e-19", 0), (r"1.6 \times 10^{-19}", "1.6e-19", 1), (r"1.6 \times 10^{-19}", "1.7e-19", 0),
        (r"\frac{40!}{19!21!}", r"\frac{40!}{20!20!}", 0), (r"\frac{1}{2^{100}}", r"\frac{1}{2^{101}}", 0),
        (r"\frac{1}{2^{100}}", "2^{-100}", 1), ("e^{-50}", "e^{-51}", 0), (r"\frac{1}{e^{50}}", "e^{-50}", 1),
        (r"1-\frac{1}{10^{30}}", r"1-\frac{1}{10^{31}}", 0), ("1-10^{-30}", r"1-\frac{1}{10^{30}}", 1),
        ("0.0000001", "0", 0), ("0.0000001", "0.0000002", 0), ("10^{100}+1", "10^{100}", 0),
        (r"\sqrt{10^{40}+1}", "10^{20}", 0), ("0.0000001", "10^{-7}", 1),
        (r"\pi \cdot 10^{-9}", r"3\cdot 10^{-9}", 0), (r"\frac{1}{40!}", r"\frac{1}{41!}", 0),
        (r"\frac{1}{7^{30}}", "0", 0), ("5.67e-8", "5.68e-8", 0), (r"6.62607015 \times 10^{-34}", "6.626e-34", 0),
        (r"\binom{100}{50}", r"\binom{100}{49}", 0), ("(0, 10^{-9})", "(0, 10^{-8})", 0),
        (r"\{10^{-9}\}", r"\{10^{-8}\}", 0),
        (r"\begin{pmatrix}10^{-9}\\1\end{pmatrix}", r"\begin{pmatrix}10^{-8}\\1\end{pmatrix}", 0),
        ("x = 10^{-9}", "x = 10^{-8}", 0), ("10^{-9} x", "10^{-8} x", 0), ("0.00000012x", "0.00000013x", 0),
        ("2^{2023}-1", "2^{2023}", 0), (r"\frac{3^{2024}-1}{2}", r"\frac{3^{2024}+1}{2}", 0), ("2018!-1", "2018!", 0),
        (r"1-\frac1{2019!}", r"1-\frac1{2020!}", 0), (r"1-\frac{1}{2024!}", "1", 0), (r"2-\frac1{2^{2023}}", "2", 0),
        (r"\binom{2000}{1000}", r"\binom{2000}{1000}+1", 0), ("1-(5/6)^{1000}", "1-(5/6)^{999}", 0),
        ("2^{1700}+n", "2^{1700}+n+1", 0), (r"(2+\sqrt3)^{100}", r"(2+\sqrt3)^{100}+(2-\sqrt3)^{100}", 0),
        (r"\sqrt{8}", r"2\sqrt2", 1), (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", 1), ("2^{2024}-2^{2023}", "2^{2023}", 1),
        (r"\frac{2019!}{2018!}", "2019", 1), (r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt5}{4}", 1),
    ],
    "decimals for exact numbers": [
        ("0.333333", r"\frac13", 1), ("0.33333", r"\frac13", 0), ("0.33", r"\frac13", 0),
        ("0.3333334", r"\frac13", 0), ("0.333334", r"\frac13", 0), ("3.14159", r"\pi", 1), ("3.1416", r"\pi", 0),
        ("3.14160", r"\pi", 0), ("1.41421", r"\sqrt2", 1), ("1.41422", r"\sqrt2", 0), ("0.5", "0.50", 1),
        ("0.5", "0.51", 0), ("0.5", r"\frac12", 1), ("0.125", r"\frac18", 1), ("0.12", r"\frac18", 0),
        ("0.125001", r"\frac18", 0), ("0.0909091", r"\frac1{11}", 1), ("0.090909", r"\frac1{11}", 0),
        (r"33.3333\%", r"\frac13", 1), ("18.0000001", "18", 0), ("17.9999999", "18", 0), ("1000000.4", "1000000", 0),
        ("0.6667", r"\frac23", 0), ("0.666667", r"\frac23", 1), ("0.666666", r"\frac23", 0),
        ("-0.333333", r"-\frac13", 1), ("2.5", r"2\frac12", 1), ("2.71828", "e", 1), ("1.0", "1", 1),
        ("100", "100.0", 1), ("1.87e6", "1870001", 0), (r"0.5\pi", r"\frac{\pi}{2}", 1), ("1.5x", r"\frac{3x}{2}", 1),
    ],
    "equations": [
        ("x^2+2=0", "x^2+1=0", 0), ("x^2+1=0", "x^2+1=0", 1), ("2x^2+2=0", "x^2+1=0", 1), ("x^2 = -1", "x^2+1=0", 1),
        ("x^2+y^2=-1", "x^2+y^2=-2", 0), ("x^2+y^2+z^2=-1", "x^4=-3", 0), ("e^x = -1", "e^x=-2", 0),
        ("y=2x+1", "2x-y+1=0", 1), ("y=2x+1", "y=2x-1", 0), ("x = 3", "y = 3", 0), ("x^2+y^2=4", "x^2+y^2=9", 0),
        ("|x|=-1", "|x|=-2", 0), (r"\sqrt{x} = -1", r"\sqrt{x} = -3", 0),
        ("5x - 7y + 11z + 4 = 0", "10x-14y+22z+8=0", 1), ("0=1", "0=2", 0), ("x+y=1", "x+y=2", 0),
        (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36", 1), ("x+2=18", "18", 0), (r"3 \cdot 6 = 18", "18", 1),
        ("18 = x", "18", 0), ("x > -x^2 - 1", "x>-x^2-2", 0), ("x+y>3", "3<x+y", 1), ("x+y>3", r"x+y\ge 3", 0),
        ("x+y>3", "x+y<3", 0), ("2x+2y>6", "x+y>3", 1), (r"x \ne 2", r"x \neq 2", 1), (r"x \ne 2", "x = 2", 0),
        (r"x \ne 2", r"x \ne 3", 0), ("0<x<y<1", "0<y<x<1", 0), ("a<b<c", "a<d<c", 0), ("x=y=z", "x=z", 0),
        ("x=1=2", "x=2", 0), ("x=2=5", "5", 0), ("x=2+3=5", "5", 1), ("x>0 and x<1", "x>0 or x<1", 0),
        ("x>2 and x<1", "x>2 or x<1", 0), (r"M\cup N", "M, N", 0), (r"\sum_{k=1}^{10}k", "55", 1),
        (r"S=\{1,2\}", r"\{1,2\}", 1), ("(x,y)=(1,2)", "(1,2)", 1), ("(x,y)=(2,1)", "(1,2)", 0),
        (r"\sqrt x = 3", "3", 0), (r"m\angle A = 18", "18", 1), ("|x-1|=|1-x|", "5", 0),
    ],
    "units and scale words": [
        (r"18 \text{ cm}^3", r"18 \text{ cm}^2", 0), (r"18 \text{ cm}^2", r"18 \text{ cm}^2", 1),
        ("18", r"18 \text{ cm}^2", 1), (r"18 \text{ square centimeters}", r"18 \text{ cm}^2", 1),
        (r"18\text{ sq cm}", r"18 \mathrm{~cm}^2", 1), (r"5 \text{ m}", r"5 \text{ km}", 0),
        (r"5 \text{ km}", "5 km", 1), ("5km", r"5\text{ km}", 1), ("5", "5 km", 1),
        (r"5 \text{ meters}", r"5 \text{ m}", 1), (r"5\text{ kg}", r"5\text{ g}", 0), (r"5\text{ g}", "5", 1),
        (r"5 \text{ million}", "5000000", 1), (r"5 \text{ million}", "5,000,000", 1),
        (r"2.5 \text{ billion}", "2500000000", 1), (r"5 \text{ million}", r"5 \text{ billion}", 0),
        (r"5 \text{ thousand}", "5 million", 0), ("3 dozen", "36", 1), (r"5 \text{ million}", "5", 0),
        (r"5\text{ hundred}", "500", 1), ("5 million dollars", r"\$5{,}000{,}000", 1), ("7:15 am", "7:15 pm", 0),
        (r"7:15\text{ a.m.}", "7:15 am", 1), (r"7:15\text{ p.m.}", r"7:15\text{ a.m.}", 0), ("7:15 AM", "7:15", 1),
        ("7 pm", "7:00 p.m.", 1), ("7:15", "7:16 pm", 0), (r"7{:}15\text{ pm}", "7:15 PM", 1),
        ("10:30 am", "10:31 am", 0), ("18 dollars", r"\$18", 1), ("18 cents", r"\$18", 0),
        ("18 cents", "18 dollars", 0), (r"\$18", "18", 1), ("€18", r"\$18", 0),
        (r"25^\circ\text{C}", r"25^\circ\text{F}", 0), (r"25^\circ\text{C}", "25", 1),
        (r"25^\circ C", "25 degrees Celsius", 1), (r"60 \text{ degrees}", r"60^\circ", 1),
        (r"60 \text{ radians}", r"60^\circ", 0), ("60 miles per hour", "60 mph", 0), ("60 miles per hour", "60", 1),
        (r"60 \text{ mi/h}", "60 miles per hour", 1), ("60 km/h", "60 m/s", 0),
        (r"5 \text{ seconds}", r"5 \text{ minutes}", 0), ("5 minutes", "5 min", 1), ("3 hours", "3 hrs", 1),
        (r"18 \text{ inches}", r"18 \text{ feet}", 0), (r"864 \mbox{ inches}^2", r"864 \text{ in}^2", 1),
        (r"864 \mbox{ inches}^2", "864", 1), (r"864 \mbox{ inches}", r"864 \text{ inches}^2", 0),
        ("9 apples", "9 oranges", 0), ("9 apples", "9 apple", 1), ("9 (apples)", "9", 1),
        ("9 (apples)", "9 apples", 1), ("9 (apples)", "8 (apples)", 0), ("9", "9 (cm)", 1), ("9 (kg)", "9 (g)", 0),
        (r"9 \text{ (apples)}", "9", 1), ("12 (square feet)", r"12\text{ ft}^2", 1), ("3 squared", "3", 0),
        ("5 factorial", "5", 0), ("3 tenths", "3", 0), ("5 abc", "5", 0), ("5m", "5", 0), ("5x", "5", 0),
        ("5xyz", "5", 0), ("5 or more", "5", 0), (r"5 \text{ or } 6", "5", 0), ("2abc", "2", 0),
        (r"5\text{ percent}", r"5\%", 1), (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}", 1),
        (r"2\pi\text{ cm}", r"2\pi", 1), ("45 mL", "45 L", 0), (r"45\text{ L}", "45 liters", 1),
        (r"15\mbox{ cm}^2", "15", 1), (r"3 \text{ units}", "3", 1), (r"3 \text{ square units}", "3", 1),
        (r"3\text{ square units}", r"3\text{ units}^2", 1), (r"5\mathbf{m}", "5", 0), ("9 m", "9", 1),
        ("9 m", r"9\text{ m}", 1), ("9 s", "9 m", 0), ("9 m/s", "9", 1), ("9 m/s", "9 meters per second", 1),
        ("9 in.", "9 inches", 1), ("9m", "9", 0), ("18平方厘米", r"18 \text{ cm}^2", 1),
        (r"5\,\text{kg}\cdot\text{m/s}", "5", 1), (r"\tan 45^\circ", "1", 1), (r"\sin 30^\circ", r"\frac12", 1),
        (r"\tan 20^\circ", r"\tan 20", 0), (r"90\degree", "90", 1),
    ],
    "lists of three-digit numbers": [
        ("100,101", "100, 101", 1), ("100,101", "100101", 1), ("100, 101", "100101", 0),
        ("100,101,102", "102, 101, 100", 1), ("100,101,102", r"\{100, 101, 102\}", 1), ("(100,101)", "(100, 101)", 1),
        ("(100,101)", "(101, 100)", 0), ("125,216", "125, 217", 0), ("125,216", "125217", 0), ("1,234", "1234", 1),
        ("100,101", "101,100", 0), ("12,345", "12345", 1), (r"\{100,200\}", "100, 200", 1),
        ("100 and 101", "100,101", 1), ("-100,101", "-100, 101", 1),
    ],
    "repeating decimals": [
        (r"\frac{1}{3}", r"0.\overline{3}", 1), (r"0.\dot{3}", r"\frac13", 1), (r"0.1\overline{6}", r"\frac16", 1),
        (r"0.\overline{142857}", r"\frac17", 1), (r"0.\dot{1}4285\dot{7}", r"\frac17", 1),
        (r"0.\dot{1}\dot{8}", r"\frac{2}{11}", 1), (r"0.\overline{9}", "1", 1), (r"0.\overline{3}", "0.3", 0),
        (r"0.\overline{3}", "0.333333", 1), (r"0.\overline{3}", r"0.\overline{33}", 1),
        (r"0.\overline{3}", r"0.\overline{4}", 0), (r"2.\overline{6}", r"\frac83", 1),
        (r"-0.\overline{6}", r"-\frac23", 1), (r".\overline{5}", r"\frac59", 1), (r"0.\bar{3}", r"\frac13", 1),
        (r"33.\overline{3}\%", r"33\frac13\%", 1), (r"0.\overline3", r"\frac13", 1),
    ],
    "degree signs, colours, bold": [
        ("54°", "54", 1), ("54°", r"54^\circ", 1), ("54°", "55", 0), (r"54^{\circ}", "54°", 1),
        (r"\boldsymbol{18}", "18", 1), (r"\textcolor{blue}{18}", "18", 1), (r"\color{red}{18}", "18", 1),
        (r"\color{red} 18", "18", 1), (r"{\color{red}18}", "18", 1), ("**18**", "18", 1), (r"\mathbf{18}", "18", 1),
        (r"\bm{x+1}", "x+1", 1), (r"\textcolor{blue}{\frac{1}{2}}", r"\frac12", 1),
        (r"\boldsymbol{\frac{1}{2}}", "0.5", 1), (r"\textbf{18}", "18", 1), (r"\textcolor{blue}{18}", "19", 0),
        (r"\mathbf{\text{18}}", "18", 1), (r"\Large 18", "18", 1), (r"\underline{18}", "18", 1),
    ],
    "intervals": [
        (r"k \geq \sqrt{5}", r"[\sqrt{5}, \infty)", 1), ("x > 3", r"(3,\infty)", 1), ("x > 3", r"[3,\infty)", 0),
        ("3 < x", r"(3,\infty)", 1), (r"x \le -2", r"(-\infty,-2]", 1), (r"-2 \le x < 1", "[-2,1)", 1),
        (r"1 > x \ge -2", "[-2,1)", 1), (r"\{x|-2\leq x < 1\}", "[-2,1)", 1), (r"\{x \mid x > 3\}", r"(3,\infty)", 1),
        (r"\{x : x > 3\}", r"(3, +\infty)", 1), (r"\{x \in \mathbb{R} \mid x > 3\}", "x>3", 1),
        (r"x<1 \text{ or } x>5", r"(-\infty,1)\cup(5,\infty)", 1), (r"(-\infty,1)\cup(5,\infty)", "x<1 or x>=5", 0),
        (r"\{x | x<1 \text{ or } x>5\}", r"(-\infty,1)\cup(5,\infty)", 1), ("x ≥ 3", r"[3, \infty)", 1),
        (r"x \in (3, \infty)", "x>3", 1), ("1 < x < 2", "(1,2)", 1), ("1 < x < 2", "[1,2]", 0), ("1<x<2", "(1,3)", 0),
        ("[-2,1)", "[-2,1]", 0), (r"a \leqslant 2", r"(-\infty, 2]", 1), ("x > 3", "x < 3", 0),
        (r"\left(-\infty, \frac{1}{2}\right]", r"x \le 0.5", 1), (r"(3,+\infty)", r"(3, \infty)", 1),
        ("x>3 or x<-3", r"(-\infty,-3)\cup(3,\infty)", 1), (r"(2,\infty)", r"(-\infty,2)", 0),
        (r"\{x\mid x\ge 2\}", r"\{x|x>2\}", 0), (r"m\in[2,+\infty)", r"m \geq 2", 1),
        (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)", 1), (r"(0,9) \cup (9,36)", "(0,36)", 0),
        (r"x<1 \lor x>2", r"(-\infty,1)\cup(2,\infty)", 1), (r"\left\{x\middle|x>3\right\}", r"(3,\infty)", 1),
        ("x>1 and x<2", "x>1", 0),
    ],
    "phrases": [
        ("Yes.", "Yes", 1), ("yes", "Yes", 1), ("No", "Yes", 0), ("No", "no", 1), ("No", "on", 0),
        (r"\text{no}", "No", 1), (r"\text{Inconsistent}", "Inconsistent", 1),
        (r"\text{inconsistent.}", "Inconsistent", 1), ("east", "seat", 0), (r"\text{east}", "seat", 0),
        ("listen", "silent", 0), (r"\text{Monday}", "Monday", 1), ("all real numbers", r"\text{All real numbers}", 1),
        ("no solution", r"\text{No solutions}", 0), ("no solution", r"\text{No solution}", 1), ("xy", "yx", 1),
        (r"\text{June 20}", "June 20", 1), (r"\text{June 20}", "June 21", 0), ("True", r"\text{False}", 0),
        ("TRUE", "True", 1), ("isosceles triangle", r"\text{isosceles triangle}", 1), ("neither", "either", 0),
        (r"\text{odd}", "odd", 1), ("odd", "dod", 0), ("does not exist", r"\text{Does not exist}", 1),
        (r"\mathrm{Evelyn}", r"\text{Evelyn}", 1), ("non-zero", "nonzero", 0), ("Diverges", r"\textbf{diverges}", 1),
        ("abba", "baba", 0), ("not yes", "yes", 0), ("x > 0 for all x", "x < 0 for all x", 0),
        ("red, blue", r"\text{blue and red}", 1), ("north-west", "north west", 1), ("Never", "ever", 0),
        ("even", "never", 0), ("Alice", "Bob", 0), ("sin", "ins", 0), ("5 not", "5", 0), ("not 5", "5", 0),
    ],
    "multiple choice": [
        ("8", r"\textbf{(C)}\ 8", 1), ("C", r"\textbf{(C)}\ 8", 1), (r"\textbf{(C)}\ 8", "8", 1),
        (r"\text{(C) } 8", "C", 1), (r"\textbf{(C)}\ 9", r"\textbf{(C)}\ 8", 0),
        (r"\textbf{(D)}\ 8", r"\textbf{(C)}\ 8", 0), (r"\textbf{(C) }8", r"\textbf{(C)}\ 8", 1), ("C.", "C", 1),
        ("(C)", "C", 1), ("C)", "C", 1), ("D", "C", 0), ("C. 8", "C", 1), ("C. 8", "8", 1), ("C. 9", "8", 0),
        ("A, B, C, D", "C", 0), ("ABCD", "C", 0), ("(A) 5 (B) 6 (C) 8", r"\textbf{(C)}\ 8", 0),
        ("A or B or C", "C", 0), ("A and C", "A, C", 1), (r"\text{C}", "C", 1), (r"\textbf{C}", "(C)", 1),
        ("Option C", "C", 1), (r"\text{(C)}\ \frac{1}{2}", "0.5", 1), ("A", "a", 0), ("(A) (B) (C) (D) 8", "8", 0),
        ("(A) 8 (B) 8", "8", 0), ("C: 8", "C", 0), (r"\textbf{(E)}\ \text{none of these}", "E", 1),
        (r"\mathrm{(C)}\ 8", "(C)", 1), (r"(\text{C})", "C", 1), (r"\textbf{C.}\ 8", "C", 1),
        (r"\textbf{(C)}\ 8", "9", 0), ("B", r"\textbf{(C)}\ 8", 0), ("8, 9, 10", r"\textbf{(C)}\ 8", 0),
        ("(A) 1 (B) 2 (C) 3 (D) 4 (E) 5", "A", 0), ("(B) or (C)", "(B)", 0), ("(B), (C)", "(B)", 0),
        ("(B) and (C)", "(B)", 0), ("(B)(C)", "B", 0), ("(I) and (II)", "(I)", 0),
        (r"\text{I. and III.}", r"\text{I}", 0), ("A. B. C. D", "A", 0),
        (r"\textbf{(A)}\ 1\qquad\textbf{(B)}\ 2", "A", 0), ("C", "(C) 5, (D) 6", 0), ("(C)^2", "C", 0),
        ("(A)+B", "A", 0), ("(E)=mc^2", "E", 0), (r"(A)\cup(B)", "A", 0), ("(A)+1", "1", 0), ("(A)-1", "-1", 0),
        ("(A)x", "x", 0), (r"\textbf{(B)}\ -5", "-5", 1), ("D) 4", "D", 1),
    ],
    "e-notation": [
        ("0.001", "1e-3", 1), ("10^{-3}", "1e-3", 1), (r"7.4\times 10^{-12}", "7.4e-12", 1),
        (r"1.87 \cdot 10^6", "1.87e6", 1), ("1.87e6", "1870000", 1), ("1.87E6", "1.87e+6", 1),
        ("1.87e6", "1.88e6", 0), ("1.87e6", "1.87e7", 0), (r"1.87 \times 10^{6} \text{ m}", "1.87e6", 1),
        (r"-2.5 \times 10^{-3}", "-0.0025", 1), ("4.5e33", r"4.5 \times 10^{33}", 1),
        ("4.5e33", r"4.5 \times 10^{34}", 0), (r"3\times10^8", "3e8", 1), ("3 × 10^8", "300000000", 1),
        (r"\approx 3e8", "3e8", 0), ("1e3", "1000", 1), ("2e", "2e", 1), ("1.6*10^-19", "1.6e-19", 1),
        (r"3 \times 10^{8} \text{ m/s}", "3e8", 1), (r"3 \times 10^{8} \mathrm{~m/s}", "3e8", 1),
        (r"9.8 \text{ m/s}^2", r"9.8 \text{ m/s}", 0), (r"9.8 \text{ m s}^{-2}", "9.8", 1),
        ("5 feet 3 inches", "5", 0), ("5 feet 3 inches", "5 feet 3 inches", 1),
        ("5 feet 3 inches", "5 feet 2 inches", 0), (r"5\text{ J}", r"5 \text{ N}", 0),
        (r"5\text{ J}", r"5 \text{ joules}", 1), (r"5\,\text{m}", "5", 1), (r"5 \text{ m}/\text{s}", "5", 1),
        (r"-2.5 \text{ kJ/mol}", "-2.5", 1),
    ],
    "Chinese punctuation and units": [
        ("18厘米", "18", 1), ("18厘米", "18 cm", 1), ("18厘米", "18米", 0), ("（1，2）", "(1,2)", 1), ("1，2", "1, 2", 1),
        ("1、2", "1,2", 1), ("18。", "18", 1), ("１８", "18", 1), ("50％", r"50\%", 1), ("18元", "18", 1), ("x＝5", "5", 1),
        ("是", "是", 1), ("是", "否", 0), ("18厘米", "19", 0), ("3：2", "3:2", 1), ("［1，2）", "[1,2)", 1), ("18 个", "18", 1),
        ("18平方厘米", "18", 1),
    ],
    "three-digit ends of intervals": [
        ("[0,100]", "(0,100)", 0), ("(0,360)", "[0,360]", 0), ("(0,100)", "100", 0), ("(5,120)", "5120", 0),
        ("(3,100),(4,200)", "3100,4200", 0), (r"\{100,200\}", "(100,200)", 0), ("[0,100]", "[0, 100]", 1),
        ("(0,360)", "0<x<360", 1), (r"(2,12)\cup(12,102)", r"(2,12) \cup (12102)", 0), ("1, 0", "1,000", 0),
        ("10,80", "10,080", 0), ("500,58", "58{,}500", 0), ("32, 348", r"\$32,348", 0), ("1,234", "1, 234", 0),
        ("11,111", "11,111", 1),
    ],
    "variables of either sign and case": [
        ("|x|", "-x", 0), (r"\sqrt{x^2}", "|x|", 1), (r"\sqrt{x^2}", "x", 0), (r"\sqrt{x^2}", "-x", 0),
        ("|x-1|", "1-x", 0), (r"\frac{|x|}{x}", "-1", 0), ("y=|x|", "y=-x", 0), (r"\sqrt{(x-3)^2}", "3-x", 0),
        ("R^2-r^2", "0", 0), (r"\pi(R^2-r^2)", r"\pi(R-r)(R+r)", 1), (r"\frac{R}{r}", "1", 0), ("M+m", "2m", 0),
        ("N", "n", 0), (r"\pi R^2", r"\pi r^2", 0), ("2^T", "2", 0), ("x^T", "x", 0), ("f'(x)=2x", "f(x)=2x", 0),
        ("y''+y=0", "y'+y=0", 0), ("x'", "x", 0), ("5'6''", "56", 0), ("f'(x)=2x", "2x", 1),
        ("f'(x)=2x", "f'(x) = x+x", 1), ("i^2", "-1", 1), ("(1+i)^2", "2i", 1), (r"e^{i\pi}", "-1", 1),
        ("3-4i", "3+4i", 0),
    ],
    "words that change a number": [
        ("5 lakh", "5", 0), ("5 crore", "5", 0), ("5 sixths", "5", 0), ("5 ninths", "5", 0), ("5 thirty", "5", 0),
        ("5 doubled", "5", 0), ("5 halved", "5", 0), ("5 negative", "5", 0), ("5 inverse", "5", 0),
        ("5 root", "5", 0), ("5 cosh", "5", 0), ("5 binary", "5", 0), ("5 modulo", "5", 0), ("5 wrong", "5", 0),
        ("5 never", "5", 0), ("5 except", "5", 0), ("5 fewer", "5", 0), ("5 multiplied", "5", 0), ("5万", "5", 0),
        ("5万", "50000", 1), ("5倍", "5", 0), ("5个半", "5", 0), ("5不对", "5", 0), ("3 tens", "3", 0),
    ],
    "percent": [
        (r"\frac12\%", r"\frac12", 0), (r"0.5\%", "0.5", 0), (r"50\%", "50", 1), (r"50\%", "0.5", 1),
        (r"50\%", "500", 0), (r"x\%", "x", 0), (r"12.5\%", r"\frac18", 1), (r"12.5\%", "12.5", 1),
    ],
    "numbers side by side": [
        ("1 2", "12", 0), ("2 3 5", "235", 0), (r"1\quad 2", "12", 0), ("$1$ $2$", "12", 0), (r"5\$6", "56", 0),
        ("2**3", "23", 0), ("3 1/2", "31/2", 0), ("3 1/2", "2", 0), ("2 1/2", "5/2", 1), ("2 1/2", "2.5", 1),
        (r"\frac 1 2", "0.5", 1), ("1 234", "1234", 1), ("5{6}", "11", 0), (r"5\phantom{6}", "11", 0),
        (r"1+2+\ldots+10", "13", 0), ("0xFF", "0", 0), ("5.5.5", "2.75", 0), ("1_000", "1", 0), ("1/0", "2/0", 0),
        ("10^-3", "0.001", 1), ("2^-3", r"\frac18", 1),
    ],
    "lists with repetitions": [
        ("1,1,2,3,5", "1,2,3,5", 0), ("1,1", "1", 0), ("1,1,2", "1,2,2", 0), ("1/2, 2/4, 3", "1/2, 3, 6/2", 0),
        ("2,1,1", "1,2,1", 1),
    ],
    "words in formulas": [
        ("2pi", r"2\pi", 1), ("pi/2", r"\frac{\pi}{2}", 1), ("sqrt(2)", r"\sqrt2", 1),
        ("1/sqrt(2)", r"\frac{\sqrt2}{2}", 1), ("2sqrt3", r"2\sqrt{3}", 1),
    ],
}


def main() -> None:
    """Print the table."""
    from grader import REWARDS, Grader

    print("| kind | pairs | judged so here | by Math-Verify as it comes |\n|---|---|---|---|")
    for kind, cases in KINDS.items():
        pairs = [pair for one, other, _ in cases for pair in ((one, other), (other, one))]
        counts = []
        for name in ("answer", "math-verify"):
            with Grader(REWARDS[name]) as grader:
                verdicts = grader([f"\\boxed{{{given}}}" for given, _ in pairs], [answer for _, answer in pairs])
            counts.append(sum(verdicts[i][0] == cases[i // 2][2] for i in range(len(pairs))))
        print(f"| {kind} | {len(pairs)} | {counts[0]} | {counts[1]} |")


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
