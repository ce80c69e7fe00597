"""What several tests share: the toy, a process group of one, samples made by hand, and scripts as users run them."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model is an error at once

import numpy as np
import pytest
import torch.distributed as dist

import eval as evaluation
import gvm
import raft
from data import Grader, load_problems, parse
from eval import Sample

ROOT = Path(__file__).parents[1]
TOY = ROOT / "tests" / "toy"


def flags(*words: str) -> Namespace:
    """The flags of raft.py, with their defaults."""
    old, sys.argv = sys.argv, ["raft.py", *map(str, words)]
    try:
        return parse("", evaluation.add_flags, gvm.add_flags, raft.add_flags)
    finally:
        sys.argv = old


def make_sample(problem: int, reward: float, response: list[int], prompt=(5, 6, 7), **fields) -> Sample:
    """A sample of given token ids."""
    return Sample(problem, 0, np.array(prompt, np.int32), np.array(response, np.int32), True, reward, **fields)


def command(script: str, *words, ranks: int = 1) -> list[str]:
    """The command line of a script, under torchrun if there are several ranks."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / script), *map(str, words)]


def run_script(script: str, *words, ranks: int = 1, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a script to its end and return what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(script, *words, ranks=ranks), capture_output=True, text=True, env=environment,
                          timeout=300, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


class Started:
    """A script that goes on in the background; its flags must hold the path `mark`, by which its workers are found."""

    def __init__(self, script: str, *words, ranks: int = 1, mark: Path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.mark, self.output = str(mark).encode(), mark.with_suffix(".output")
        self.process = subprocess.Popen(command(script, *words, ranks=ranks), env=environment,
                                        stdout=self.output.open("w"), stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """kill -9 for torchrun and every worker, as if the machine went away."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if self.mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass  # it ended meanwhile
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def toy() -> str:
    """The folder of the toy model."""
    return str(TOY)


@pytest.fixture(scope="session")
def device():
    """The device of a process group of one."""
    yield evaluation.setup()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def grader():
    """Two grading workers."""
    with Grader(workers=2, deadline=5.0) as grader:
        yield grader


@pytest.fixture(scope="session")
def problems(toy):
    """The toy's training problems."""
    return load_problems(f"{toy}/train.jsonl")


@pytest.fixture
def model_and_tokenizer(device):
    """A fresh copy of the toy model, and its tokenizer."""
    return evaluation.load_model(flags(), device)
