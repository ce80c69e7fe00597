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


def test_the_readme_s_figure_has_its_points():
    points = plot.read_points(ROOT / "figures" / "toy.jsonl")
    found = plot.curves(points, "samples")
    assert len(found) == 4 and all(name.endswith("10 seeds") for name in found)
    last = {name.split(",")[0]: f"{curve[-1, 1]:.3f}" for name, curve in found.items()}
    table = (ROOT / "README.md").read_text()
    assert f"| {last['raft-gvm']} |\n" in table and f"| {last['grpo-reward']} |\n" in table
    accuracy = {(point["run"], point["step"]): point["accuracy"] for point in points}
    for ours, theirs in (("raft-gvm", "raft-uniform"), ("grpo-reward", "grpo-uniform")):
        rows = []
        for step in (5, 10, 20, 30):  # pairs of seeds; 2.262: Student's t, 9 degrees of freedom, 95 %
            pairs = np.array([[accuracy[f"{name}-{seed}", step] for name in (ours, theirs)] for seed in range(10)])
            gains = pairs[:, 0] - pairs[:, 1]
            rows.append([*pairs.mean(axis=0), f"{gains.mean():.3f} ± {2.262 * gains.std(ddof=1) / np.sqrt(10):.3f}"])
        for means in list(zip(*rows))[:2]:
            assert " | ".join(f"{value:.3f}" for value in means) in table
        assert f"| difference | | {' | '.join(row[2] for row in rows)} |" in table


def test_the_readme_s_differences_at_equal_tokens():
    """Accuracy where our curve, linear between evaluations, has spent what uniform had at its step."""
    runs: dict[str, list[dict]] = {}
    for point in plot.read_points(ROOT / "figures" / "toy.jsonl"):
        runs.setdefault(point["run"], []).append(point)
    for ours, theirs in (("raft-gvm", "raft-uniform"), ("grpo-reward", "grpo-uniform")):
        cells = []
        for step in (5, 10, 20, 30):
            gains = []
            for seed in range(10):
                other, = [point for point in runs[f"{theirs}-{seed}"] if point["step"] == step]
                tokens, accuracies = zip(*[(point["tokens"], point["accuracy"]) for point in runs[f"{ours}-{seed}"]])
                gains.append(np.interp(other["tokens"], tokens, accuracies) - other["accuracy"])
            cells.append(f"{np.mean(gains):.3f} ± {2.262 * np.std(gains, ddof=1) / np.sqrt(10):.3f}")
        assert f"| difference after as many tokens as uniform's | | {' | '.join(cells)} |" in (ROOT / "README.md").read_text()
