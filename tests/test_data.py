"""data.py: what real files hold, the prompt, and a grader that no answer can hang."""

import json
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED
from transformers import AutoTokenizer

from data import (
    INSTRUCTION,
    SYSTEM_PROMPT,
    Grader,
    InputError,
    Problem,
    encode_prompt,
    extract_boxed,
    load_problems,
    reference_answer,
)


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline=2.0) as grader:
        yield grader


@pytest.mark.parametrize(("value", "answer"), [
    ("She has 3 * 4 = <<3*4=12>>12 eggs.\n#### 1,234", "1234"),
    ("so ...\n#### -5", "-5"),
    ("#### $18", "18"),
    ("Hence $x = \\boxed{\\frac{1}{2}}$, since \\boxed{3} is too large.", "3"),
    ("the set \\boxed{\\left\\{ \\frac{a}{b}, 2 \\right.}", "\\left\\{ \\frac{a}{b}, 2 \\right."),
    (27.0, "27"),
    ("27.0", "27"),
    (2.5, "2.5"),
    (204, "204"),
    ("$\\frac{3}{4}$", "\\frac{3}{4}"),
    ("$x=2$, $y=3$", "x=2, y=3"),
    ("\\$5", "\\$5"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    (["$2$", "3.0"], "2, 3"),
    (["$(0,1]$", "$\\infty$"], "(0,1], \\infty"),
    (None, ""),
    (float("nan"), ""),
    ("   ", ""),
    ([], ""),
])
def test_reference_answer(value, answer):
    assert reference_answer(value) == answer


@pytest.mark.parametrize(("text", "content"), [
    ("\\boxed{18}", "18"),
    ("\\boxed{1} or rather \\boxed{ 2 }", "2"),
    ("\\boxed{\\frac{1}{1+\\frac{1}{2}}}.", "\\frac{1}{1+\\frac{1}{2}}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\left[0, 1\\right)} and more }", "\\left[0, 1\\right)"),
    ("\\boxed{a \\\\{b} }", "a \\\\{b}"),
    ("\\boxed{1} then \\boxed{2", None),  # the final answer was cut
    ("no box", None),
    ("no box }", None),
    ("\\boxed{}", ""),
])
def test_extract_boxed(text, content):
    assert extract_boxed(text) == content


def write(path: Path, rows) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\ufeff" + "".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_local_files(tmp_path, name):
    rows = [{"question": " 1+1? ", "answer": 2.0, "extra": "x"}, {"question": "2+2?", "answer": 4.0, "extra": "y"}]
    spec = write(tmp_path / name, rows)
    assert load_problems(spec) == [Problem(0, "1+1?", "2"), Problem(1, "2+2?", "4")]
    assert load_problems(spec, limit=1) == [Problem(0, "1+1?", "2")]


@pytest.mark.parametrize("column", ["problem", "question", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "final_answer", "reference_answer"])
def test_columns(tmp_path, column, answer):
    assert load_problems(write(tmp_path / "a.jsonl", [{column: "q", answer: ["7"]}])) == [Problem(0, "q", "7")]


def test_an_answer_column_goes_before_a_solution(tmp_path):
    both = {"problem": "q", "solution": "so \\boxed{8}", "answer": "7"}
    assert load_problems(write(tmp_path / "a.jsonl", [both]))[0].answer == "7"
    both["final_answer"] = both.pop("answer")  # OlympiadBench has both, too
    assert load_problems(write(tmp_path / "c.jsonl", [both]))[0].answer == "7"
    del both["final_answer"]
    assert load_problems(write(tmp_path / "b.jsonl", [both]))[0].answer == "8"


@pytest.mark.parametrize(("rows", "complaint"), [
    ([{"problem": "q", "answer": "1"}, {"problem": "q", "answer": None}], "row 2 has no answer in 'answer'"),
    ([{"problem": "q", "answer": "1"}, {"problem": "q"}], r"row 2 has no answer .*columns: problem"),
    ([{"problem": "q", "solution": "a proof without a box"}], "row 1 has no answer in 'solution'"),
    ([{"problem": 3, "answer": "1"}], "row 1 has no text in 'problem'"),
    ([{"text": "q", "answer": "1"}], "found columns text, answer; needs one of problem, question, prompt"),
    ([{"problem": "q", "result": "1"}], "found columns problem, result; needs one of answer"),
    ([["q", "1"]], "every row must be an object"),
    ([], "holds no problems"),
])
def test_bad_rows_are_named(tmp_path, rows, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        load_problems(write(tmp_path / "bad.jsonl", rows))
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "a.jsonl").write_text('{"problem": "q", "answer": "1"}\n{"problem": ')
    (tmp_path / "b.jsonl").write_bytes(b'{"problem": "\xff"}')
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    for name, complaint in [("a.jsonl", "line 2 is not JSON"), ("b.jsonl", "not UTF-8"), ("c.parquet", "not a parquet"),
                            ("missing.jsonl", "no such file"), ("nobody/nothing", "nor a hub data set")]:
        with pytest.raises(InputError, match=complaint):
            load_problems(str(tmp_path / name) if "." in name else name)


@pytest.mark.parametrize(("name", "size", "last"), [
    ("gsm8k_train", 7473, "50"), ("gsm8k_test", 1319, "14"), ("math500", 500, None), ("aime24", 30, None)])
def test_published_files(name, size, last):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    problems = load_problems(str(SHARED / f"{name}.jsonl"))
    assert len(problems) == size and last in (None, problems[-1].answer)
    assert all(problem.answer and "\\boxed" not in problem.answer for problem in problems)


def test_the_prompt_is_the_chat_template_s_or_plain(toy):
    tokenizer = AutoTokenizer.from_pretrained(toy)
    problem = Problem(0, "7+15-4", "18")
    assert tokenizer.decode(encode_prompt(tokenizer, problem)) == "<|user|>7+15-4<|assistant|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert tokenizer.decode(encode_prompt(tokenizer, problem)) == f"{SYSTEM_PROMPT}7+15-4\n{INSTRUCTION}"
    tokenizer.chat_template = None
    plain = tokenizer.decode(encode_prompt(tokenizer, problem))
    assert "7+15-4" in plain and SYSTEM_PROMPT in plain and INSTRUCTION in plain


@pytest.mark.parametrize(("boxed", "answer", "score"), [
    ("18", "18", 1), ("18.0", "18", 1), ("0.5", "\\frac{1}{2}", 1), ("\\frac12", "0.5", 1), ("1,234", "1234", 1),
    ("(1, 2)", "(2, 1)", 0), ("x^2 - 1", "(x-1)(x+1)", 1), ("17", "18", 0), ("\\text{even}", "even", 1),
    ("", "18", 0), ("3\\%", "4\\%", 0), ("__import__('os').abort()", "1", 0),
])
def test_grades(grader, boxed, answer, score):
    assert grader([f"I think it is \\boxed{{{boxed}}}."], [answer]) == [(float(score), False)]


def test_only_the_last_box_counts(grader):
    assert grader(["\\boxed{18} no, \\boxed{17}", "18", "\\boxed{18"], ["18"] * 3) == [(0.0, False)] * 3


def test_hung_workers_are_killed_and_the_others_go_on(grader):
    hostile = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{" + "\\frac{1}{" * 3000 + "2" + "}" * 3000 + "}"]
    start = time.monotonic()
    grades = grader([*hostile, "\\boxed{18.0}"], ["18"] * 3)
    assert time.monotonic() - start < 30
    assert grades == [(0.0, True), (0.0, True), (1.0, False)]
    assert grader(["\\boxed{0.50}"], ["1/2"]) == [(1.0, False)]


@pytest.mark.parametrize("boxed", [
    "7" * 100_000, "\0", "{" * 50, "\\text{" * 500, "𝟙" * 100, "\u202e81", "1" + "+1" * 5000])
def test_odd_answers_score_zero(grader, boxed):
    (score, _), = grader([f"\\boxed{{{boxed}}}"], ["18"])
    assert score == 0.0
