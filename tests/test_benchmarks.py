"""Benchmarks of this folder run to their ends, on little. (bench_prediction.py and bench_speed.py take longer: by hand.)"""

import bench_variance
import pytest
from conftest import run_script


@pytest.mark.slow
def test_the_error_of_the_gradient(device, monkeypatch, capsys):
    for name, few in (("POPULATION", 4), ("ESTIMATES", 2), ("TAUGHT_STEPS", 1)):
        monkeypatch.setattr(bench_variance, name, few)
    monkeypatch.setattr("sys.argv", ["bench_variance.py"])  # flags are read from there
    pool = bench_variance.make_pool()
    bench_variance.rarely_solved(pool)
    bench_variance.table(pool, 32, ["log-likelihood", "reward, grpo"], bench_variance.RULES)
    bench_variance.table(pool, 32, ["reward, grpo"], bench_variance.DIVIDED)
    bench_variance.left_out(pool)
    printed = capsys.readouterr().out
    assert "256 samples, " in printed and printed.count("reward, grpo ") == 2
    assert "8 at random x 8" in printed and "p predicted: " in printed


@pytest.mark.slow
def test_our_side_of_the_comparison_with_trl():
    assert '"samples": 256' in run_script("tests/bench_trl.py", "--side", "grpo.py", "--steps", 2).stdout
