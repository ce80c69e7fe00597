"""README.md: the code that it shows does what it says."""

import re

import numpy as np
import pytest
from conftest import ROOT, SMALL, read_log

import allocator
import gvm
import raft
from data import InputError

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


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
    raft.main([*map(str, SMALL[:-1]), "1", "--allocator", "middle", "--no-shrink", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[1]["samples"] == 32


def test_a_loss_in_ten_lines(device, tmp_path, monkeypatch):
    run_block('LOSSES["cispo"]', raft, monkeypatch)
    raft.main([*map(str, SMALL[:-1]), "1", "--loss", "cispo", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


def test_an_objective_in_ten_lines(device, tmp_path, monkeypatch):
    run_block('OBJECTIVES["signed"]', raft, monkeypatch)
    words = ["--objective", "signed", "--allocator", "reward", "--out", str(tmp_path / "run")]
    raft.main([*map(str, SMALL[:-1]), "1", *words])
    assert read_log(tmp_path / "run")[1]["updates"] == 2


@pytest.mark.parametrize("words", [["--allocator", "middle"], ["--loss", "cispo"], ["--objective", "mine"],
                                   ["--weighting", "none"], ["--advantage", "none"]])
def test_unknown_names_fail(device, words):
    with pytest.raises(InputError, match=f"{words[0]}: invalid choice"):
        raft.main(words)


def test_the_allocator_in_your_project():
    block, = [block for block in BLOCKS if "from allocator import" in block]
    given = {"num_right": [0, 1, 2], "num_drawn": [2, 2, 2], "norm_right": [0.0, 1.0, 1.0], "norm_wrong": [1.0, 1.0, 0.0]}
    scope = {name: np.array(values) for name, values in given.items()}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["counts"].sum() == 24 and scope["counts"].min() >= 2 and vars(allocator)["allocate"]
