"""figures/plot.py: curves by hand, and the script as users run it."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

SCRIPT = ROOT / "figures" / "plot.py"
spec = importlib.util.spec_from_file_location("plot", SCRIPT)
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


@pytest.fixture
def runs(tmp_path):
    """Three runs of two kinds; the second seed of the first kind was stopped before its last evaluation."""
    accuracies = {"raft-gvm-0": [0.4, 0.6, 0.7], "raft-gvm-1": [0.5, 0.8], "raft-uniform-0": [0.4, 0.5, 0.6]}
    for number, (name, values) in enumerate(accuracies.items()):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "log.jsonl").open("w") as log:
            for i, value in enumerate(values):
                counts = {"samples": 100 * i, "tokens": (1000 + 100 * number) * i, "updates": 2 * i, "seconds": 1.5 * i}
                log.write(json.dumps({"step": 5 * i, **counts, "eval_accuracy": value}) + "\n")
                log.write(json.dumps({"step": 5 * i + 1, **counts}) + "\n")  # a step without an evaluation
    return [tmp_path / name for name in accuracies]


def test_curves_by_hand(runs):
    points = [point for run in runs for point in plot.read_points(run)]
    found = plot.curves(points, "tokens")
    assert [name.rpartition("/")[2] for name in found] == ["raft-gvm, 2 seeds", "raft-uniform, 1 seed"]
    two, one = found.values()
    assert two == pytest.approx(np.array([[0, 0.45, 0.1], [1050, 0.7, 0.2]]))  # half the range is the standard error
    assert one == pytest.approx(np.array([[0, 0.4, 0], [1200, 0.5, 0], [2400, 0.6, 0]]))


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)


@pytest.mark.slow
def test_what_was_saved_draws_the_same_picture(runs, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(*runs, "--save", tmp_path / "points.jsonl", "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert run(tmp_path / "points.jsonl", "--out", tmp_path / "b.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run(tmp_path / "points.jsonl", "--x", "seconds", "--out", tmp_path / "c.png").returncode == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize(("content", "complaint"), [
    (None, "No such file"), ("", "holds no evaluations"), ("[1]\n", "holds no evaluations"), ("text\n", "is not a log"),
    ('{"step": 1}\n', "holds no evaluations")])
def test_bad_input_is_one_line_and_leaves_no_picture(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    done = run(tmp_path / "bad.jsonl", "--out", tmp_path / "a.png")
    assert done.returncode == 2 and complaint in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "a.png").exists()
