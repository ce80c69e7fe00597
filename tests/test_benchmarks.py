"""The benchmarks of this folder run to their ends, on little."""

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
@pytest.mark.parametrize(("words", "shown"), [
    (["bench_prediction.py", "--steps", 12, "--prompts-per-step", 8], "steps 7 to 12 |"), (["bench_speed.py"], "response tokens a second"),
    (["bench_trl.py", "--side", "grpo.py", "--steps", 2], '"samples": 256')])
def test_what_it_prints_at_its_end(words, shown):
    assert shown in run_script(f"tests/{words[0]}", *words[1:]).stdout
