"""data.py: what real files hold, the prompt, and a grader that no answer can hang."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SHARED, flags, wait_for
from transformers import AutoTokenizer

from answers import extract_boxed, reference_answer, solution_answer
from data import INSTRUCTION, SYSTEM_PROMPT, Problem, encode_prompt, load_problems, load_prompts
from folder import digest_problems
from grader import Grader
from run import InputError, RunError


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, deadline=2.0) as grader:
        yield grader


@pytest.mark.parametrize(("value", "answer"), [
    ("She has 3 * 4 = <<3*4=12>>12 eggs.\n#### 1,234", "1234"),
    ("so ...\n#### -5", "-5"),
    ("#### $18", "18"),
    ("#### 3, 5", "3, 5"),
    ("#### (1,2)", "(1,2)"),
    ("#### -1,234,567.50", "-1234567.50"),
    ("#### 1,2345", "1,2345"),  # no separator of thousands
    ("#### 18\nThat was all.\n1,2", "18"),
    ("#### 5.0", "5"),
    ("#### Step 1\nSo it is $\\boxed{7}$.", "7"),  # a heading
    ("####", ""),
    ("proof", ""), ("Proof", ""), ("notfound", ""), (" N/A ", ""), ("nan", ""), (["proof"], ""),
    ("None", "None"), ("\\text{proof}", ""),
    ("Hence $x = \\boxed{\\frac{1}{2}}$, since \\boxed{3} is too large.", "3"),
    ("the set \\boxed{\\left\\{ \\frac{a}{b}, 2 \\right.}", "\\left\\{ \\frac{a}{b}, 2 \\right."),
    (27.0, "27"),
    ("27.0", "27"),
    (2.5, "2.5"),
    (204, "204"),
    (1e20, "1" + "0" * 20),
    (1e-7, "0.0000001"),
    (True, "True"),
    ({"value": 3}, ""),
    ([None, "2", float("nan")], "2"),
    ("7" * 5000, "7" * 5000),
    ("\\boxed{2} and \\boxed{3}", "2, 3"),
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


@pytest.mark.parametrize(("value", "answer"), [
    ("42", "42"), (" $3$\n", "3"), ("\\frac12", "\\frac12"), ("$\\frac{1}{2}$.", "\\frac{1}{2}."), (5, "5"), (2.5, "2.5"),
    ("(1, 2)", "(1, 2)"), ("x=2 or x=3", "x=2 or x=3"), ("5 cm", "5 cm"), ("Yes", "Yes"), ("\\sin x", "\\sin x"),
    ("x=1, x=2 or x=3 and y=4 or 5", "x=1, x=2 or x=3 and y=4 or 5"), ("Clearly $a>b$ since $c>0$", ""), ("Clearly $a>b$.", ""),
    (["$1$", "$2$"], "1, 2"), ("so it is \\boxed{\\text{not a prime}}", "\\text{not a prime}"), ("We add them.\n#### 18", "18"),
    ("a proof without a box", ""), ("It is 2.", ""), ("It is $2$", ""), ("Trivial.", ""), ("Let $x=2$. Then $y$ is 3.", ""),
    ("$x=2$\n$y=3$", ""), ("$" + "1+" * 50 + "1$", ""), ("So:\n#### Proof of the lemma", ""), ("proof", ""), (None, ""),
])
def test_a_solution_without_a_box_may_be_a_bare_answer_but_no_text(tmp_path, value, answer):
    assert solution_answer(value) == answer
    path = write(tmp_path / "a.jsonl", [{"problem": "q", "solution": value}])
    if answer:
        assert load_problems(path) == [Problem(0, "q", answer)]
    else:
        with pytest.raises(InputError, match="row 1 has nothing readable in 'solution'"):
            load_problems(path)


@pytest.mark.parametrize(("text", "content"), [
    ("\\boxed{18}", "18"),
    ("\\boxed{1} or rather \\boxed{ 2 }", "2"),
    ("\\boxed{1} or \\boxed{ 2 }", "1, 2"),
    ("$\\boxed{(1, 2)}$,\\quad\\text{ and } $\\boxed{(2, 1)}$.", "(1, 2), (2, 1)"),
    ("\\boxed{1}, so \\boxed{2}, \\boxed{3}", "2, 3"),
    ("\\boxed{1} and \\boxed{2", None),
    ("\\boxed{1 and \\boxed{2}", "2"),
    ("\\boxed{2}\n\n\\boxed{2}", "2"),  # said twice
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


@pytest.mark.parametrize(("text", "number"), [
    ('{"problem": "q", "answer": 1}\n{"problem": "q", "answer": 1}\n', 2), ('\n{"problem": "q", "answer": 1} \r\n', 1),
    ('[{"problem": "q", "answer": 1},\n {"problem": "q", "answer": 1}]', 2), ('{"problem": "q",\n "answer": 1}', 1),
    ('[\n{"problem": "q", "answer": 1}\n]\n', 1),
])
def test_a_json_file_may_hold_json_lines(tmp_path, text, number):
    (tmp_path / "a.json").write_text(text)
    assert load_problems(str(tmp_path / "a.json")) == [Problem(i, "q", "1") for i in range(number)]


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
    ([{"problem": "q", "answer": "1"}, {"problem": "q", "answer": None}], "row 2 has nothing readable in 'answer'"),
    ([{"problem": "q", "answer": "1"}, {"problem": "q"}], r"row 2 has nothing readable .*columns: \['problem'\]"),
    ([{"problem": "q", "solution": "a proof without a box"}], "row 1 has nothing readable in 'solution'"),
    ([{"problem": 3, "answer": "1"}], "row 1 has nothing readable in 'problem'"),
    ([{"problem": True, "answer": True}], "row 1 has nothing readable in 'problem'"),
    ([{"problem": ["q"], "answer": "1"}], "row 1 has nothing readable in 'problem'"),
    ([{"problem": "q", "answer": float("nan")}], "row 1 has nothing readable in 'answer'"),
    ([{"problem": "q", "answer": "1"}, {"problem": "\ud800", "answer": "1"}], "row 2 has nothing readable in .problem"),
    ([{"problem": "q", "answer": "\udfff"}], "row 1 has nothing readable in 'answer'"),
    ([{"text": "q", "answer": "1"}], r"has columns \['text', 'answer'\]; needs one of \('problem', 'question'"),
    ([{"problem": "q", "result": "1"}], r"has columns \['problem', 'result'\]; needs one of \('answer'"),
    ([{"problem\n": "q"}], r"has columns \['problem\\n'\]"),
    ([["q", "1"]], "must hold rows, each an object"),
    ([None], "must hold rows, each an object"),
    ([], "must hold rows"),
])
def test_bad_rows_are_named(tmp_path, rows, complaint):
    with pytest.raises(InputError, match=complaint) as error:
        load_problems(write(tmp_path / "bad.jsonl", rows))
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("a.jsonl", b'{"problem": "q", "answer": "1"}\n{"problem": ', r"a.jsonl: line 2 is not readable JSON \(Expecting"),
    ("a.json", b'[{"problem": "q",\n"answer": }]', "a.json: line 2 is not readable JSON"),
    ("a.json", b'{"problem": "q", "answer": 1}\n{"problem": ', "a.json: line 2 is not readable JSON"),
    ("a.json", b'{"problem": "q"}\n\n{"problem": }\n', "a.json: line 3 is not readable JSON"),
    ("a.json", b"", "must hold rows"),
    ("a.jsonl", b"1\n" + b"[" * 100_000, "line 2 is not readable JSON .*recursion"),
    ("a.jsonl", b'{"problem": "q", "answer": ' + b"7" * 5000 + b"}", "line 1 is not readable JSON .*digits"),
    ("b.jsonl", b'{"problem": "\xff"}', "b.jsonl: 'utf-8' codec"),
    ("c.parquet", b"not parquet", "c.parquet: .*magic bytes not found"),
    ("c.parquet", b"", "c.parquet: "),
])
def test_bad_files_are_named(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=complaint) as error:
        load_problems(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_damaged_parquet_is_named_or_read(tmp_path):
    """Whichever of its bytes are damaged; what is read may be wrong, for pages have no checksum."""
    path, named = tmp_path / "a.parquet", 0
    whole = Path(write(path, [{"problem": f"{i} + {i}?", "answer": str(2 * i)} for i in range(2000)])).read_bytes()
    for seed in range(300):
        damage = random.Random(seed)
        start = damage.randrange(4, len(whole) - 16)
        path.write_bytes(whole[:start] + damage.randbytes(16) + whole[start + 16 :])
        try:
            load_problems(str(path))
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            named += 1
    assert named > 30


@pytest.mark.parametrize(("spec", "complaint"), [
    ("missing.jsonl", "missing.jsonl: no such file"), ("x" * 300 + ".jsonl", "file name too long"),
    ("folder.jsonl", "folder.jsonl: is a directory"), ("folder.parquet", "is a directory"),
    ("missing.jsonl/a.json", "no such file"), ("nobody/nothing", "nor a hub data set"),
    ("", "'': neither"), ("/", "'/': neither"), (":", "':': neither"), ("::", "neither"), (".", "neither"),
    ("y" * 5000, "neither"),
])
def test_what_is_no_file_is_named(tmp_path, monkeypatch, spec, complaint):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match=complaint) as error:
        load_problems(spec)
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"problem": "q", "answer": "1"}])

    def refuse(path):  # what root never meets
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="a.jsonl: permission denied"):
        load_problems(path)


PROOF = {"problem": "Show it.", "answer": "proof"}


def test_rows_without_an_answer_are_dropped_in_training_and_counted(toy, device, tmp_path, capsys):
    tokenizer, good = AutoTokenizer.from_pretrained(toy), {"problem": "1+1", "answer": "2"}
    one = write(tmp_path / "one.jsonl", [good, PROOF, good, {"problem": "\ud800", "answer": "2"}])
    two = write(tmp_path / "two.json", [good, good, {"problem": None, "answer": "2"}])
    problems = load_prompts(f"{one},{two}", "train", tokenizer, flags(), training=True)
    assert [problem.id for problem in problems] == [0, 2, 4, 5]  # their rows, in both files
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{one}: dropped 2 of 4 rows, as row 2 has nothing readable in 'answer'; its columns: {list(good)}",
                    f"{two}: dropped 1 of 3 rows, as row 3 has nothing readable in 'problem'; its columns: {list(good)}"]
    for data in (one, f"{one},{two}", two):
        with pytest.raises(InputError, match="row [23] has nothing readable in '(answer|problem)'"):
            load_prompts(data, "test", tokenizer, flags(), training=False)
    assert len(load_prompts(one, "test", tokenizer, flags(), 1, training=False)) == 1


@pytest.mark.parametrize(("lost", "kept"), [(1, 1), (2, 1)])
def test_a_data_set_that_would_lose_more_than_half_is_refused(toy, device, tmp_path, lost, kept):
    tokenizer = AutoTokenizer.from_pretrained(toy)
    good = write(tmp_path / "good.jsonl", [{"problem": "1+1", "answer": "2"}] * 9)
    path = write(tmp_path / "a.jsonl", [PROOF] * lost + [{"problem": "1+1", "answer": "2"}] * kept)
    if lost == kept:
        assert len(load_prompts(path, "train", tokenizer, flags(), training=True)) == kept
        return
    with pytest.raises(InputError, match="a.jsonl: row 1 has nothing readable in 'answer'; .*; 2 of 3 rows"):
        load_prompts(f"{good},{path}", "train", tokenizer, flags(), training=True)  # each set by itself


def test_empty_lines_cost_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "q", "answer": "1"}' + "\n" * 2_000_000)
    start = time.monotonic()
    assert load_problems(str(path)) == [Problem(0, "q", "1")]
    assert time.monotonic() - start < 10


def test_the_digest_tells_problems_apart():
    one, two = Problem(0, "1+1?", "2"), Problem(1, "2+2?", "4")
    others = [[two, one], [one], [one, Problem(1, "2+2?", "5")], [one, Problem(1, "2+3?", "4")],
              [one, Problem(2, "2+2?", "4")], [one, Problem(1, "2+2?4", "")], [],
              [one, Problem(1, "2+2?", "4", prompt_ids=[1])], [one, Problem(1, "2+2?", "4", prompt_ids=[2])]]
    digests = {digest_problems(problems) for problems in [[one, two], *others]}
    assert len(digests) == 1 + len(others) and {len(digest) for digest in digests} == {16}


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


@pytest.mark.parametrize(("template", "shown"), [
    ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ("{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() }}", "2024-07-26"),
    # As Llama 3.2's.
    ("{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
     "{% else %}{% set date_string = '1 Jan 2020' %}{% endif %}{% endif %}Today: {{ date_string }}", "Today: 26 Jul 2024"),
])
def test_templates_are_told_the_same_date_every_day(toy, template, shown):
    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.chat_template = template
    assert tokenizer.decode(encode_prompt(tokenizer, Problem(0, "1+1", "2"))) == shown


@pytest.mark.parametrize(("template", "complaint"), [
    ("{{ raise_exception('System role not supported') }}", "System role not supported"),
    ("{% for m in messages %}", "fails"), ("{{ messages[5].content.text }}", "fails"), ("{{ 'a' + 1 }}", "fails"),
    ("", None), ("{# nothing #}", "the prompt is empty"),
])
def test_a_broken_chat_template_is_named(toy, template, complaint):
    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.chat_template = template
    if complaint is None:  # none: the plain prompt
        assert encode_prompt(tokenizer, Problem(0, "1+1", "2"))
        return
    with pytest.raises(InputError, match=complaint) as error:
        encode_prompt(tokenizer, Problem(0, "1+1", "2"))
    assert "--model: its chat template" in str(error.value) and "\n" not in str(error.value)


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
    hostile = ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{" + "\\frac{1}{" * 270 + "2" + "}" * 270 + "}"]
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


class WatchedGrader(Grader):
    """Keeps its workers, with those that have ended."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.workers = {}

    def _idle_worker(self):
        worker = super()._idle_worker()
        self.workers[worker.pid] = worker
        return worker

    def alive(self) -> list:
        return [worker for worker in list(self.workers.values()) if worker.poll() is None]


def halves(number: int) -> tuple[list[str], list[str]]:
    """Responses 2i/4 and references, every second of them right, none of them equal as text."""
    return [f"\\boxed{{\\frac{{{2 * i}}}{{4}}}}" for i in range(number)], [str(i // 2) for i in range(number)]


def check_grades(grader, number: int = 8) -> None:
    assert grader(*halves(number)) == [(float(i % 2 == 0), False) for i in range(number)]


def test_idle_workers_may_be_killed():
    with WatchedGrader(workers=2, deadline=5.0) as grader:
        check_grades(grader)
        killed = grader.alive()
        for worker in killed:
            worker.kill()
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        check_grades(grader)
        assert killed and not set(killed) & set(grader.alive())


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_killed_or_stopped_at_work_costs_its_answer_alone(sent):
    with WatchedGrader(workers=1, deadline=3.0) as grader:
        check_grades(grader)
        threading.Timer(0.5, grader.alive()[0].send_signal, [sent]).start()
        start = time.monotonic()
        assert grader(["\\boxed{9^{9^{9^{9}}}}", "\\boxed{18.0}"], ["18", "18"]) == [(0.0, True), (1.0, False)]
        assert time.monotonic() - start < 20
        check_grades(grader)


def test_a_stopped_worker_does_not_outlive_its_grader():
    with WatchedGrader(workers=1) as grader:
        check_grades(grader)
        grader.alive()[0].send_signal(signal.SIGSTOP)
    assert grader.alive() == []


@pytest.mark.slow
def test_workers_killed_at_random_moments_cost_one_answer_each():
    chance, killed, failed = random.Random(0), set(), 0
    with WatchedGrader(workers=2, deadline=5.0) as grader:

        def kill_workers() -> None:
            while len(killed) < 25:
                time.sleep(chance.uniform(0, 0.3))
                for worker in grader.alive()[:1]:
                    worker.kill()
                    killed.add(worker.pid)

        killer = threading.Thread(target=kill_workers)
        killer.start()
        while killer.is_alive():
            grades = grader(*halves(40))
            assert all(broken or score == float(i % 2 == 0) for i, (score, broken) in enumerate(grades))
            failed += sum(broken for _, broken in grades)
        assert 0 < failed <= len(killed)
        check_grades(grader)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Even if it is killed, and a worker hangs."""
    code = ("from grader import Grader\ngrader = Grader(workers=1, deadline=3.0)\ngrader(['\\\\boxed{1.0}'], ['1'])\n"
            "print(grader.idle[0].pid, flush=True)\ngrader(['\\\\boxed{9^{9^{9^{9}}}}'], ['1'])")
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = Path(f"/proc/{int(trainer.stdout.readline())}")
    time.sleep(1)  # it waits for the answer that hangs
    trainer.kill()
    trainer.communicate()
    wait_for(lambda: not worker.exists() or ") Z " in (worker / "stat").read_text(), 10)


def test_a_grader_that_cannot_start_says_so(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Grader(workers=2) as grader, pytest.raises(RunError, match="cannot be started") as error:
        grader(*halves(4))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(sys, "executable", "missing")
    with Grader(workers=2) as grader, pytest.raises(RunError, match="cannot be started"):
        grader(*halves(4))
