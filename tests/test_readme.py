"""README.md: the code that it shows does what it says."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, read_log

import allocator
import grpo
import gvm
import raft
from data import InputError

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("mark", "script", "show_help"), [
    ('RULES["middle"]', "gvm.py", "add_budget_flags(parser := argparse.ArgumentParser()); parser.print_help()"),
    ('LOSSES["cispo"]', "raft.py", "")])
def test_its_lines_can_stand_below_the_dictionary(mark, script, show_help):
    """The module with the README's lines put there is imported, and its help names the new entry."""
    block, = [block for block in BLOCKS if mark in block]
    table, name = re.fullmatch(r'(\w+)\["(\w+)"\]', mark).groups()
    text = re.sub(rf"^{table} = .*$", lambda line: f"{line[0]}\n\n{block}", (ROOT / script).read_text(), flags=re.MULTILINE)
    program = f"import sys\nsys.argv = [{script!r}, '--help']\nexec(compile({text!r}, {script!r}, 'exec'))\n{show_help}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and name in done.stdout, done.stderr


def test_a_rule_that_compares_prompts_works_with_a_pilot(device, tmp_path, monkeypatch):
    def hardest(p, norm_right, norm_wrong, args):
        return np.where(np.arange(len(p)) == np.argmin(p), 1.0, 0.0)

    monkeypatch.setitem(gvm.RULES, "hardest", hardest)
    words = [*map(str, SMALL[:-1]), "1", "--allocator", "hardest", "--out", str(tmp_path / "run")]
    raft.main([*words, "--no-predict", "--pilot-samples", "2"])
    line = read_log(tmp_path / "run")[1]
    assert line["samples"] == 32 and line["predicted_variance"] is None


def run_block(mark: str, module, monkeypatch) -> None:
    """Run the README's lines that hold `mark` at the end of a module, as one who adds them there; undone by the test."""
    block, = [block for block in BLOCKS if mark in block]
    for table in ("RULES", "LOSSES", "OBJECTIVES"):
        if hasattr(module, table):
            monkeypatch.setattr(module, table, dict(getattr(module, table)))
    exec(compile(block, "README.md", "exec"), vars(module))


def test_an_allocation_rule_in_ten_lines(device, tmp_path, monkeypatch):
    run_block('RULES["middle"]', gvm, monkeypatch)
    weights = gvm.RULES["middle"](np.array([0.0, 0.3, 0.9, 1.0]), None, None, None)
    assert weights.tolist() == [0, 1, 1, 0]
    raft.main([*map(str, SMALL[:-1]), "1", "--allocator", "middle", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[1]["samples"] == 32


def test_a_loss_in_ten_lines(device, tmp_path, monkeypatch):
    run_block('LOSSES["cispo"]', raft, monkeypatch)
    raft.main([*map(str, SMALL[:-1]), "1", "--loss", "cispo", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


def test_an_objective_is_an_entry(device, tmp_path, monkeypatch):
    def signed_objective(samples, args):
        is_right = np.array([sample.reward > 0 for sample in samples], dtype=bool)
        return np.where(is_right, 1.0, -1.0), np.ones(len(samples), dtype=bool)

    monkeypatch.setitem(raft.OBJECTIVES, "signed", signed_objective)
    words = ["--objective", "signed", "--allocator", "reward", "--out", str(tmp_path / "run")]
    raft.main([*map(str, SMALL[:-1]), "1", *words])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


@pytest.mark.parametrize("words", [["--allocator", "middle"], ["--loss", "cispo"], ["--objective", "mine"],
                                   ["--weighting", "none"], ["--advantage", "none"]])
def test_unknown_names_fail(device, words):
    with pytest.raises(InputError, match=f"{words[0]}: invalid choice"):
        grpo.main(words)


def test_the_table_of_eight_prompts_is_what_allocator_py_prints():
    done = subprocess.run([sys.executable, "allocator.py"], cwd=ROOT, capture_output=True, text=True)
    printed = [line.split() for line in done.stdout.splitlines() if re.fullmatch(r"[\d. ]+", line)]
    text = (ROOT / "README.md").read_text()
    for name, column in (("p", 0), ("G", 1), ("n", 2)):
        cells = re.search(rf"^\| `{name}` \| (.*) \|$", text, re.MULTILINE)[1].split(" | ")
        assert [float(cell) for cell in cells] == [float(row[column]) for row in printed]
    assert "37.0 with 8 samples of each, 19.0 with these n" in done.stdout
    assert "falls from 37, with 8 for each, to 19" in text


def test_the_allocator_in_your_project():
    block, = [block for block in BLOCKS if "from allocator import" in block]
    generator = np.random.default_rng(0)
    scope = {"num_steps": 5, "states_of": lambda prompts: generator.normal(size=(len(prompts), 6)), "prompts": range(9),
             "sample_and_grade": lambda prompts, counts: {
                 "num_right": generator.binomial(counts, 0.5), "num_drawn": counts, "norm_right": 1.0 * (counts > 0),
                 "norm_wrong": 1.0 * (counts > 0)}}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["counts"].sum() == 16 and scope["predictor"].learnt["p mean"].any() and vars(allocator)["allocate"]
