"""eval.py: metrics by hand; and the command: the same figures however many ranks, interrupted or not, graded anew."""

import json
import shutil
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT, TOY, Started, flags, run_script, wait_for

import eval as command
from files import read_rows
from eval import evaluate, same_answers
from metrics import pass_at_k, sampling_error, summarise
from run import InputError
from sampler import HfSampler

PROTOCOL = ("--limit", 40, "--samples", 4, "--max-prompt-tokens", 64, "--max-response-tokens", 64,
            "--sampler-batch-size", 16)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    right = np.array([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        subsets = [right[:, chosen].any(axis=1) for chosen in map(list, combinations(range(5), k))]
        assert pass_at_k(right, k) == pytest.approx(np.mean(subsets, axis=0))


def make_rows(answers: str, references: str = "5") -> list[dict]:
    """Rows of one problem after another, "5 6 - 5" each; - is a response without a box, and is cut; _ an empty box."""
    rows = []
    for problem, (given, reference) in enumerate(zip(answers.split("; "), references.split("; "), strict=True)):
        for index, answer in enumerate(given.split()):
            answer = {"-": None, "_": ""}.get(answer, answer)
            text = "" if answer is None else f"so \\boxed{{{answer}}}"
            rows.append({"problem": problem, "index": index, "response": text, "answer": answer,
                         "reference": reference, "score": float(answer == reference), "grader_failed": False,
                         "finish_reason": "stop" if text else "length", "tokens": len(given)})
    return rows


def test_summary_by_hand(grader):
    figures = summarise(make_rows("5 6 5 5; 3 2 4 -; 1 1 1 1", "5; 2; 1"), same_answers(grader))
    means = {name: metric["mean"] for name, metric in figures.items()}
    assert means == pytest.approx({
        "avg@4": (3 / 4 + 1 / 4 + 1) / 3, "pass@2": (1 + 1 / 2 + 1) / 3, "pass@4": 1.0, "maj@4": 2 / 3,
        "response_tokens": 7.0, "truncated": 1 / 12, "no_answer": 1 / 12, "grader_failures": 0.0})
    assert figures["avg@4"]["standard_error"] == pytest.approx(np.std([3 / 4, 1 / 4, 1], ddof=1) / 3**0.5)
    assert figures["avg@4"]["sampling_error"] == pytest.approx((2 * 3 / 16 / 3) ** 0.5 / 3)  # p (1 - p) of 3/4 and 1/4
    assert figures["maj@4"]["standard_error"] == pytest.approx(1 / 3)
    three = summarise(make_rows("5 5 6; 1 2 2", "5; 2"), same_answers(grader))
    assert three["maj@3"]["mean"] == 1.0  # each problem has its own votes
    assert three["pass@2"]["mean"] == three["pass@3"]["mean"] == 1.0
    alone = summarise(make_rows("5 6"), same_answers(grader))["avg@2"]  # one problem has no standard error
    assert alone == {"mean": 0.5, "standard_error": 0.0, "sampling_error": 0.5}
    assert summarise(make_rows("5; 6", "5; 5"), same_answers(grader))["avg@1"]["sampling_error"] is None


def test_the_sampling_error_is_that_of_repeated_evaluations_of_the_same_problems():
    p, random = np.array([0.0, 0.1, 0.5, 0.9, 1.0]), np.random.default_rng(0)
    runs = [(random.random((5, 8)) < p[:, None]).astype(float) for _ in range(4000)]
    spread = np.std([run.mean() for run in runs])
    assert np.sqrt(np.mean([sampling_error(run) ** 2 for run in runs])) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize(("answers", "score"), [
    ("1 2 2", 0), ("5 6", 1), ("6 5", 0), ("- - 5", 1), ("- - -", 0), ("6 7 5 5", 1),
    ("6 5 5.0 6 \\frac{10}{2}", 1),  # three ways to write one number
    ("0.5 \\frac{1}{2} 5", 0),
    ("_ _ 5", 1),  # an empty box has no vote
])
def test_the_majority_is_found_by_equivalence_and_ties_go_to_the_first(grader, answers, score):
    rows = make_rows(answers)
    assert summarise(rows, same_answers(grader))[f"maj@{len(rows)}"]["mean"] == score


def test_evaluate_repeats_itself(device, model_and_tokenizer, grader, problems):
    args, sampler = flags("--eval-samples", 2), HfSampler(*model_and_tokenizer, flags())
    figures = evaluate(sampler, grader, problems[:10], args)
    assert figures == evaluate(sampler, grader, problems[:10], args)
    assert 0 <= figures["eval_accuracy"] <= figures["eval_pass@2"] <= 1 and figures["eval_grader_failures"] == 0


def test_training_evaluates_at_the_temperature_of_its_evaluations(device, model_and_tokenizer, grader, problems):
    sampler, words = HfSampler(*model_and_tokenizer, flags()), ["--eval-samples", 3, "--temperature", 1.5]
    likeliest = evaluate(sampler, grader, problems[:20], flags(*words, "--eval-temperature", 0))
    assert likeliest["eval_pass@3"] == likeliest["eval_accuracy"] > 0  # all samples of a problem are the same
    drawn = evaluate(sampler, grader, problems[:20], flags(*words))
    assert drawn["eval_pass@3"] > drawn["eval_accuracy"]
    assert drawn == evaluate(sampler, grader, problems[:20], flags("--eval-samples", 3))  # not that of training


def run_command(out, *words, ranks: int = 1, **options) -> subprocess.CompletedProcess:
    return run_script("eval.py", "--data", TOY / "eval.jsonl", *PROTOCOL, "--out", out, *words, ranks=ranks, **options)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of an evaluation on one rank, without interruption, and what it printed."""
    out = tmp_path_factory.mktemp("evaluation") / "one"
    return out, run_command(out).stdout


@pytest.mark.slow
def test_what_is_saved_and_shown(straight):
    out, shown = straight
    rows, summary = read_rows(out / "eval.jsonl"), json.loads((out / "summary.json").read_text())
    assert [(row["problem"], row["index"]) for row in rows] == [(i, j) for i in range(40) for j in range(4)]
    assert all(row["score"] == float(row["answer"] == row["reference"]) for row in rows)
    assert all(row["finish_reason"] == "stop" and row["response"].endswith("}") for row in rows)
    figures = summary["results"]["eval"]
    assert figures.pop("problems") == 40
    assert list(figures) == ["avg@4", "pass@2", "pass@4", "maj@4", "response_tokens", "no_answer", "truncated",
                             "grader_failures"]
    assert figures["avg@4"]["mean"] == sum(row["score"] for row in rows) / 160
    assert 0 < figures["avg@4"]["standard_error"] < 0.1 and figures["avg@4"]["mean"] < figures["pass@2"]["mean"]
    protocol = summary["protocol"]
    assert protocol == json.loads((out / "protocol.json").read_text())
    assert (protocol["model"], protocol["revision"], protocol["sampler"]) == (str(TOY), None, "HfSampler")
    assert (protocol["temperature"], protocol["samples"], protocol["seed"]) == (1.0, 4, 0)
    assert protocol["grader"].startswith("answer, math-verify ") and len(protocol["template"]) == len(protocol["weights"]) == 12
    mean, error, sampling = figures["avg@4"].values()
    assert f"| eval | 40 | {mean:.4g} ± {error:.2g} ({sampling:.2g}) |" in shown and "seed: 0" in shown
    assert sampling < error


def test_json_lines_in_a_json_file_are_evaluated(device, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text("".join((TOY / "eval.jsonl").read_text().splitlines(keepends=True)[:3]))
    words = ["--data", file, "--samples", 1, "--out", tmp_path / "out", *PROTOCOL[4:]]
    command.main(list(map(str, words)))
    assert "| x | 3 |" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "out" / "x.jsonl")) == 3


@pytest.mark.slow
def test_two_ranks_give_the_same_figures(straight, tmp_path):
    run_command(tmp_path / "two", ranks=2)
    assert (tmp_path / "two" / "summary.json").read_text() == (straight[0] / "summary.json").read_text()
    assert read_rows(tmp_path / "two" / "eval.jsonl") == read_rows(straight[0] / "eval.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_gives_the_same_figures(straight, tmp_path, ranks):
    out = tmp_path / "killed"
    words = (*PROTOCOL, "--sampler-batch-size", 4, "--out", out)  # saves more often, which changes nothing else
    run = Started("eval.py", "--data", TOY / "eval.jsonl", *words, ranks=ranks, mark=out)
    wait_for(lambda: (out / "eval.jsonl").exists(), 60)
    run.kill()
    whole = (straight[0] / "eval.jsonl").read_bytes()
    saved = (out / "eval.jsonl").read_bytes()
    assert len(saved) < len(whole)
    (out / "eval.jsonl").write_bytes(whole[: len(saved) + 300])  # in the middle of a problem, and of a line
    shown = run_command(out, "--resume", ranks=ranks)
    assert (out / "summary.json").read_text() == (straight[0] / "summary.json").read_text()
    assert (out / "eval.jsonl").read_bytes() == whole
    assert f"{whole[: len(saved) + 300].count(10)}/160" in shown.stderr  # those were not drawn again


@pytest.mark.slow
def test_lines_that_are_missing_are_drawn_whichever_they_are(straight, tmp_path):
    out = tmp_path / "held"
    shutil.copytree(straight[0], out)
    lines = (out / "eval.jsonl").read_text().splitlines(keepends=True)
    (out / "eval.jsonl").write_text("".join(lines[:4] + lines[5:9] + lines[11:]))  # (1, 0), (2, 1), (2, 2) are gone
    run_command(out, "--resume")
    assert sorted((out / "eval.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert (out / "summary.json").read_text() == (straight[0] / "summary.json").read_text()


@pytest.mark.slow
def test_rescore_grades_anew_and_needs_no_model(straight, tmp_path):
    rows = read_rows(straight[0] / "eval.jsonl")
    right = next(row for row in rows if row["score"])
    right["response"], right["score"] = right["response"].replace("boxed{", "boxed{0"), 0.0  # still right
    rows[-1] |= {"response": "no box", "answer": "1"}
    file = tmp_path / "old" / "eval.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = run_script("eval.py", "--rescore", file, "--model", "nobody/nothing", "--out", tmp_path / "new").stdout
    changed = 1 + int(rows[-1]["score"])
    assert f"{changed} of 160 scores differ" in shown and "| eval | " in shown
    anew = read_rows(tmp_path / "new" / "eval.jsonl")
    assert anew[rows.index(right)]["score"] == 1.0 and anew[-1]["score"] == 0.0 and anew[-1]["answer"] is None
    assert file.read_text() == "".join(json.dumps(row) + "\n" for row in rows)  # nothing overwritten
    run_script("eval.py", "--rescore", file, cwd=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.parametrize(("words", "complaint"), [
    (["--data", "math500", "--rescore", "x.jsonl"], "--rescore: not allowed with argument --data"),
    (["--rescore", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--rescore", "other.jsonl"], "other.jsonl: line 1 is no sample"),
    (["--rescore", "part.jsonl", "--out", "."], "part.jsonl: is not of these problems"),
    (["--rescore", "twice.jsonl"], "twice.jsonl: holds a sample twice"),
    (["--rescore", "typed.jsonl"], "typed.jsonl: line 1 is no sample"),
    (["--rescore", "empty.jsonl"], "empty.jsonl: is empty, or uneven"),
    (["--rescore", "uneven.jsonl"], "--rescore uneven.jsonl: is empty, or uneven"),
    (["--data", "a/x.jsonl,b/x.jsonl"], "end alike"),
    (["--data", "nobody/nothing"], "nor one of math500"),
    (["--data", "eval.jsonl", "--samples", "0"], "--samples"),
])
def test_bad_input_is_named(device, tmp_path, monkeypatch, words, complaint):
    (tmp_path / "other.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    row = {name: kind() for name, kind in command.COLUMNS.items()}
    files = {"uneven": [row, row | {"index": 1}, row | {"problem": 1}], "twice": [row, row], "part": [row],
             "typed": [row | {"score": "1"}], "empty": []}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=complaint):
        command.main([*words, "--max-prompt-tokens", "64", "--max-response-tokens", "64"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in before} == before


@pytest.mark.slow
def test_files_of_others_are_not_touched(straight, tmp_path):
    """The data lies in --out; a folder has files of that name and no protocol; a foreign file has one long line."""
    data = tmp_path / "eval.jsonl"
    data.write_text("\n".join((TOY / "eval.jsonl").read_text().splitlines()[:3]))  # no newline at the end
    (tmp_path / "foreign.jsonl").write_text('{"one": "line"}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run_script("eval.py", "--data", data, *PROTOCOL, "--out", tmp_path, check=False)
    assert done.returncode == 2 and "eval.jsonl: is not of these problems" in done.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    shutil.copytree(straight[0], tmp_path / "held")
    (tmp_path / "held" / "foreign.jsonl").write_text('{"one": "line"}')
    run_command(tmp_path / "held", "--resume")
    assert (tmp_path / "held" / "foreign.jsonl").read_text() == '{"one": "line"}'
    done = run_script("eval.py", "--rescore", tmp_path / "held" / "eval.jsonl", "--out", tmp_path / "held", check=False)
    assert done.returncode == 2 and "holds a run already" in done.stderr
    (tmp_path / "held" / "protocol.json").write_text("")
    done = run_command(tmp_path / "held", "--resume", check=False)
    assert done.returncode == 2 and "protocol.json: is damaged" in done.stderr and done.stderr.count("\n") <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("words", "complaint"), [
    ([], "one of the arguments --data --rescore is required"), (["--data", "math500"], "context of 512")])
def test_bad_input_is_one_line(tmp_path, words, complaint):
    done = run_script("eval.py", *words, check=False, cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr
    assert done.stderr.startswith("eval.py: error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_another_protocol_is_not_mixed_in(straight, tmp_path):
    before = {path.name: path.read_bytes() for path in straight[0].iterdir() if path.name != "lock"}
    for words, complaint in [([], "--resume continues it"), (["--resume", "--seed", 1], "another seed"),
                             (["--resume", "--data", straight[0].parent / "eval.jsonl"], "is not of these problems")]:
        (straight[0].parent / "eval.jsonl").write_text('{"problem": "1+1", "answer": "3"}\n')
        done = run_command(straight[0], *words, check=False)
        assert done.returncode == 2 and complaint in done.stderr
    assert {name: (straight[0] / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_model_of_the_hub_is_named_by_its_commit(tmp_path, monkeypatch):
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--some--toy"
    shutil.copytree(TOY, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    run_command(tmp_path / "out", "--model", "some/toy", "--limit", 1)
    protocol = json.loads((tmp_path / "out" / "protocol.json").read_text())
    assert (protocol["model"], protocol["revision"]) == ("some/toy", commit)


@pytest.mark.slow
def test_running_it_imports_neither_gvm_nor_raft_nor_itself_twice():
    program = (
        "import runpy, sys\nsys.argv = ['eval.py', '--help']\n"
        "try:\n    runpy.run_path('eval.py', run_name='__main__')\n"
        "except SystemExit:\n    print(sorted({'allocator', 'eval', 'gvm', 'raft', 'grpo'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
