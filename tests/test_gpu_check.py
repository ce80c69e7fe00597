"""gpu_check.py on a CPU: its rows, without the packages that it must not need, and a check that raises."""

import os
import subprocess
import sys

import gpu_check
import pytest
from conftest import ROOT
from transformers import AutoConfig

# Python runs a file of this name when it starts.
WITHOUT = """import importlib.metadata, sys
for name in ("vllm", "datasets", "math_verify"):
    sys.modules[name] = None  # cannot be imported
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("no-such-package" if name == "math-verify" else name)
"""
UPDATE, BF16, PRODUCT = "update of 2,045 tokens, ", "norms in bf16, ", "delta^T h alone in bf16, "
ROWS = [
    "log-probs against fp32, ", "log-probs against fp32: largest", "gradient of ",
    "KL reference of the policy itself, 127 tokens: largest k3", "KL reference: its buffers", "RAFT++, 6 steps: accuracy",
    "RAFT++, step 6: sampler_gap", "resumed at step 3: accuracy", "resumed at step 3: parameters",
    BF16 + "toy: mean", BF16 + "toy: largest", PRODUCT + "toy", BF16 + "random weights: mean",
    BF16 + "random weights: largest", PRODUCT + "random weights", "norms, random weights: share of a forward pass",
    "FSDP2 against DDP",
    *(f"{UPDATE}{how} checkpointing: {what}" for how in ("with", "without") for what in ("GB", "tokens/s", "of the ")),
    "a checkpoint of ", "... checked and loaded in", "... with the weights that were saved", "raft.py as a process",
    "vllm sampler", "vllm seeds", "vllm, tied head", "vllm, untied head",
]
TWO = ["DDP on two ranks against one", "FSDP2 on two ranks against one", "two ranks, resumed at step 2", "vllm with FSDP2"]


def rows_printed(tmp_path, *launch) -> list[list[str]]:
    """The cells of the table that the script prints on a CPU without those packages, and its head's."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *launch, ROOT / "tests" / "gpu_check.py", "--peak-tflops", "1"],
                          capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, header, *rows = [[cell.strip() for cell in line.split(" | ")] for line in done.stdout.splitlines()]
    assert machine[0].startswith("CPU") and header == ["check", "measured", "expected", "ok"]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "names"), [
    ([], ROWS), (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], TWO)])
def test_on_a_cpu_every_row_is_there_and_ok(tmp_path, launch, names):
    rows = rows_printed(tmp_path, *launch)
    assert [row[3] for row in rows] == ["yes"] * len(names)
    assert all(row[0].startswith(name) for row, name in zip(rows, names, strict=True))
    assert rows[-1][1] == "not run: no vllm"


def test_a_check_that_raises_fails_and_the_others_go_on(device, monkeypatch, capsys):
    def raises(device, options):
        raise RuntimeError("no luck\ntoday")

    def works(device, options):
        return [gpu_check.at_most("this", 1.0, 2.0)]

    monkeypatch.setattr(gpu_check, "CHECKS", {"that": raises, "this": works})
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    rows = [[cell.strip() for cell in line.split(" | ")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["that", "RuntimeError: no luck", "no error", "NO"], ["this", "1", "<= 2", "yes"]]
    assert ended.value.code == 1
    monkeypatch.setattr(gpu_check, "CHECKS", {"this": works})
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([])
    assert ended.value.code == 0


def test_a_row_is_not_ok_above_its_bound_nor_if_it_is_not_a_number():
    assert [gpu_check.at_most("", value, 1.0).ok for value in (1.0, 1.1, float("nan"))] == [True, False, False]


def test_operations_of_an_update_by_hand():
    """The toy: 0.36 M parameters, 3 layers, d = 96; rows of 10 and 20 tokens."""
    config = AutoConfig.from_pretrained(gpu_check.TOY)
    total = gpu_check.memory.parameter_counts(config)[0]
    assert gpu_check.training_flop(config, [10, 20]) == 6 * total * 30 + 6 * 3 * 96 * (100 + 400)
