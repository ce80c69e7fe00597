"""README.md and tests/README.md: the code that they show does what they say."""

import ast
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SMALL, read_log, run_script

import grader as grader_module
import grpo
import gvm
import losses
import raft
from data import Sample
from files import read_rows
from grader import Grader, Reward
from losses import OBJECTIVES, Objective
from run import InputError

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README + (ROOT / "tests" / "README.md").read_text(), re.DOTALL)
ONE_STEP = [*map(str, SMALL[:-1]), "1"]


def block_with(mark: str) -> str:
    block, = [block for block in BLOCKS if mark in block]
    return block


def test_a_rule_and_a_loss_in_a_file_of_one_s_own(tmp_path):
    """As it is shown, beside raft.py."""
    script = tmp_path / "mine.py"
    script.write_text(block_with('RULES["middle"]'))
    run_script(script, *ONE_STEP, "--allocator", "middle", "--loss", "cispo", "--reward", "brief", "--out",
               tmp_path / "run")
    line = read_log(tmp_path / "run")[1]
    assert line["samples"] == 32 and line["updates"] >= 1 and line["updates"] + line["updates_empty"] == 2
    flags = json.loads((tmp_path / "run" / "args.json").read_text())["flags"]
    assert (flags["allocator"], flags["loss"], flags["reward"]) == ("middle", "cispo", "brief")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    right = [row for row in rows if row["answer"] == row["reference"]]
    assert all(row["score"] == (row["tokens"] <= 13) for row in right)
    assert {row["score"] for row in right} == {0.0, 1.0}


def test_a_log_goes_to_a_tracker(tmp_path, monkeypatch):
    """Its lines, one after the other, as they are in the file."""
    lines = []
    tracker = SimpleNamespace(init=lambda project: SimpleNamespace(log=lines.append))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "raft-gvm-0").mkdir(parents=True)
    (tmp_path / "runs" / "raft-gvm-0" / "log.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": null}\n')
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    exec(block_with("wandb"), {})
    assert lines == [{"step": 0}, {"step": 1, "loss": None}]


@pytest.mark.parametrize("given", [0.5, 2, None])
def test_a_reward_is_0_or_1(given):
    sample = Sample(0, 0, [1], np.zeros(1, np.int32), True, "\\boxed{1}")
    with Grader(Reward(lambda sample, is_equal: given)) as grader:
        with pytest.raises(InputError, match=f"--reward: gave {given} to a sample; it must be 0 or 1"):
            grader.grade([sample], ["1"])


@pytest.mark.parametrize(("mark", "script", "show_help"), [
    ('RULES["middle"]', "gvm.py", "add_budget_flags(parser := argparse.ArgumentParser()); parser.print_help()"),
    ('LOSSES["cispo"]', "losses.py", "add_loss_flags(parser := argparse.ArgumentParser()); parser.print_help()")])
@pytest.mark.slow
def test_its_lines_can_stand_below_the_dictionary(mark, script, show_help):
    """The module with the README's function and entry put there is imported, and its help names the new entry."""
    table, name = re.fullmatch(r'(\w+)\["(\w+)"\]', mark).groups()
    mine = block_with(mark)
    function, = [node for node in ast.parse(mine).body if isinstance(node, ast.FunctionDef) and node.name == name]
    entry, = [line for line in mine.splitlines() if line.startswith(mark)]
    block = ["", "", *ast.get_source_segment(mine, function).splitlines(), "", "", entry]
    lines = (ROOT / script).read_text().splitlines()
    after, = [node.end_lineno for node in ast.parse("\n".join(lines)).body
              if isinstance(node, ast.Assign) and node.targets[0].id == table]
    text = "\n".join(lines[:after] + block + lines[after:])
    assert len(text.splitlines()) < 300  # nothing turns red
    program = f"import sys\nsys.argv = [{script!r}, '--help']\nexec(compile({text!r}, {script!r}, 'exec'))\n{show_help}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and name in done.stdout, done.stderr


@pytest.mark.slow
def test_a_rule_that_compares_prompts_works_with_a_pilot_and_with_predictions(device, tmp_path, monkeypatch):
    def hardest(p, norm_right, norm_wrong, args):
        return np.where(np.arange(len(p)) == np.argmin(p), 1.0, 0.0)

    monkeypatch.setitem(gvm.RULES, "hardest", gvm.Rule(hardest))
    words = [*ONE_STEP, "--allocator", "hardest", "--out"]
    raft.main([*words, str(tmp_path / "run"), "--pilot-samples", "2"])
    line = read_log(tmp_path / "run")[1]
    assert line["samples"] == 32 and line["predicted_variance"] is None
    raft.main([*words, str(tmp_path / "other"), "--candidates-per-step", "16"])
    samples = read_rows(tmp_path / "other" / "samples.jsonl")
    assert samples and len({sample["problem"] for sample in samples}) == 1  # all go to one prompt


@pytest.fixture
def mine(monkeypatch):
    """The README's file imported; what it adds is undone by the test."""
    monkeypatch.setitem(gvm.RULES, "middle", None)
    monkeypatch.setitem(losses.LOSSES, "cispo", None)
    monkeypatch.setitem(grader_module.REWARDS, "brief", None)
    exec(compile(block_with('RULES["middle"]'), "README.md", "exec"), {"__name__": "mine"})


def test_an_allocation_rule_in_ten_lines(mine):
    weights = gvm.RULES["middle"].weights(np.array([0.0, 0.3, 0.9, 1.0]), None, None, None)
    assert weights.tolist() == [0, 1, 1, 0]


def test_a_loss_in_ten_lines(mine, device, tmp_path):
    raft.main([*ONE_STEP, "--loss", "cispo", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


@pytest.mark.slow
def test_an_objective_is_an_entry(device, tmp_path, monkeypatch):
    def signed_objective(samples, args):
        is_right = np.array([sample.reward > 0 for sample in samples], dtype=bool)
        return np.where(is_right, 1.0, -1.0), np.ones(len(samples), dtype=bool)

    monkeypatch.setitem(OBJECTIVES, "signed", Objective(signed_objective, smallest_group=1))
    words = ["--objective", "signed", "--allocator", "reward", "--out", str(tmp_path / "run")]
    raft.main([*ONE_STEP, *words])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


@pytest.mark.parametrize("words", [["--allocator", "middle"], ["--loss", "cispo"], ["--objective", "mine"],
                                   ["--weighting", "none"], ["--advantage", "none"]])
def test_unknown_names_fail(device, words):
    with pytest.raises(InputError, match=f"{words[0]}: invalid choice"):
        grpo.main(words)


def test_the_table_of_eight_prompts_is_what_allocator_py_prints():
    done = subprocess.run([sys.executable, "allocator.py"], cwd=ROOT, capture_output=True, text=True)
    printed = [line.split() for line in done.stdout.splitlines() if re.fullmatch(r"[\d. ]+", line)]
    for name, column in (("p", 0), ("G", 1), ("n", 2)):
        cells = re.search(rf"^\| `{name}` \| (.*) \|$", README, re.MULTILINE)[1].split(" | ")
        assert [float(cell) for cell in cells] == [float(row[column]) for row in printed]
    assert "37.0 with 8 samples of each, 19.0 with these n" in done.stdout
    assert "falls from 37, with 8 for each, to 19" in README


def test_the_closed_form_in_your_project():
    scope = {"p": np.array([0.0, 0.1, 0.5, 1.0]), "G": np.array([0.0, 2.0, 1.0, 1.0])}
    exec(compile(block_with("from allocator import"), "README.md", "exec"), scope)
    assert scope["counts"].sum() == 32 and scope["counts"].min() == 2 and scope["counts"].argmax() == 1
