"""Grading: odd answers with a mathematician's score, references against themselves, and how fast it goes."""

import time
from multiprocessing import Pool

import json
import os
import re

import pytest
from answer_kinds import KINDS
from conftest import ROOT, SHARED
from odd_answers import BOXED, DIFFERS, WHOLE

from answers import equivalent
from data import load_problems
from grader import REWARDS, Grader


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_are_hard_to_compare(kind):
    """The same judgement both ways, by the very function: no shortcut for equal texts."""
    for one, other, score in KINDS[kind]:
        assert [equivalent(one, other), equivalent(other, one)] == [bool(score)] * 2, (one, other)


def test_answers_seen_elsewhere(grader):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    rows = [json.loads(line) for line in (SHARED / "answers_seen_elsewhere.jsonl").read_text().splitlines()]
    found = grader([row["response"] for row in rows], [row["answer"] for row in rows])
    assert [row["response"] for row, (given, _) in zip(rows, found) if given != row["expected"]] == []


@pytest.mark.parametrize("mark", ["proof", "Proof", "notfound"])
def test_a_data_set_s_mark_for_no_answer_is_never_given(grader, mark):
    responses = [f"\\boxed{{{mark}}}", f"\\boxed{{\\text{{{mark}}}}}"]
    assert grader(responses, [mark] * 2) == [(False, False)] * 2


@pytest.mark.parametrize("name", ["math500", "gsm8k_test"])
def test_no_digit_of_a_reference_can_be_changed(name):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    accepted = []
    for answer in {problem.answer for problem in load_problems(str(SHARED / f"{name}.jsonl"))}:
        for digit in re.finditer(r"\d", answer):
            changed = f"{answer[: digit.start()]}{(int(digit[0]) + 1) % 10}{answer[digit.end() :]}"
            accepted += [(changed, answer)] * equivalent(changed, answer)
    assert accepted == []


@pytest.mark.slow
def test_so_many_problems_contain_a_formula_that_equals_their_answer(grader):
    """Copied from the question, it counts: tests/README.md says of how many problems."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    found = set()
    for problem in load_problems(str(SHARED / "math500.jsonl")):
        formulas = re.findall(r"\$([^$]+)\$", problem.question)
        verdicts = grader([f"\\boxed{{{formula}}}" for formula in formulas], [problem.answer] * len(formulas))
        found |= {problem.id for is_equal, _ in verdicts if is_equal}
    said = f"{len(found)} of the 500 MATH500 problems contain one"
    assert said in (ROOT / "tests" / "README.md").read_text()


def test_math_verify_as_it_comes_is_another_reward():
    """It reads a response without a box, and e-notation not at all."""
    responses, answers = ["The answer is $18$.", "\\boxed{0.001}", "\\boxed{18}"], ["18", "1e-3", "18"]
    for name, verdicts in (("math-verify", [True, False, True]), ("answer", [False, True, True])):
        with Grader(REWARDS[name], workers=1) as grader:
            assert grader(responses, answers) == [(verdict, False) for verdict in verdicts]

def test_workers_are_as_many_as_the_cores_that_this_process_may_use(monkeypatch):
    allowed = os.sched_getaffinity(0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    try:
        os.sched_setaffinity(0, {min(allowed)})  # as Slurm and containers do it
        with Grader() as grader:
            assert grader.threads._max_workers == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.slow
def test_odd_answers_get_a_mathematician_s_score(grader):
    cases = [(f"\\boxed{{{boxed}}}", answer, score) for boxed, answer, score in BOXED] + WHOLE
    assert len(set(cases)) == len(cases) > 200
    found = grader([case[0] for case in cases], [case[1] for case in cases])
    differing = [f"\\boxed{{{boxed}}}" for group in DIFFERS.values() for boxed in group]
    assert {response for (response, _, score), (given, _) in zip(cases, found) if given != score} == set(differing)


def test_numbers_with_spaced_commas_are_one_number(grader):
    r"""As MATH writes them: `11,\! 111,\! 111,\! 100`."""
    numbers = [7 ** (3 + i // 3) + i for i in range(89)]
    spaced = [f"{number:,}".replace(",", ",\\! "[: 3 + i % 2]) for i, number in enumerate(numbers)]
    boxes = [f"\\boxed{{{number}}}" for number in spaced]
    assert grader(boxes, list(map(str, numbers))) == [(1.0, False)] * 89
    assert grader([f"\\boxed{{{number}}}" for number in numbers], spaced) == [(1.0, False)] * 89
    assert grader(boxes, [str(number + 1) for number in numbers]) == [(0.0, False)] * 89


def is_itself(answer: str) -> bool:
    return equivalent(answer, answer)


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "math500", "aime24"])
def test_references_equal_themselves_without_the_shortcut(name):
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not here")
    answers = sorted({problem.answer for problem in load_problems(str(SHARED / f"{name}.jsonl"))})
    with Pool(2) as pool:
        equal = pool.map(is_itself, answers, chunksize=20)
    assert [answer for answer, same in zip(answers, equal) if not same] == []


def test_a_minute_is_enough_for_8192_responses(grader):
    """Typical text, each answer another one, so that nothing is graded twice; measured on a fraction of them."""
    number, text = 1024, "We add the numbers and simplify, as above. " * 40
    responses = [f"{text}\\boxed{{\\frac{{{2 * i + 1}}}{{{i + 2}}}}}" for i in range(number)]
    answers = [f"\\frac{{{2 * (2 * i + 1)}}}{{{2 * (i + 2 + i % 2)}}}" for i in range(number)]  # right for even i
    grader(responses[:8], answers[:8])  # its processes are there
    start = time.perf_counter()
    scores = [score for score, _ in grader(responses, answers)]
    seconds = time.perf_counter() - start
    assert scores == [float(i % 2 == 0) for i in range(number)]
    print(f"{60 * number / seconds:.0f} responses a minute")
    assert 60 * number / seconds > 8192
