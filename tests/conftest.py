"""What several tests share: the toy, a process group of one, samples made by hand, and scripts as users run them."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model is an error at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what the tests compare to the last bit is equal on CPUs
os.environ["OMP_NUM_THREADS"] = "1"  # here as in the processes that the tests start

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import raft
import run
from data import TOY, Sample, load_prompts
from grader import Grader
from gvm import settle_budget
from pretrained import load_model

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"  # published files, where they are at hand


# What pytest itself may have been started with is not for the tests, nor for what they start.
NOT_HANDED_DOWN = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                   "PYTHONIOENCODING", "PYTHONWARNINGS", "TQDM_DISABLE", "TRANSFORMERS_VERBOSITY")


def pytest_addoption(parser) -> None:
    """`--all` runs the slow tests as well."""
    parser.addoption("--all", action="store_true", help="run the tests that are marked slow as well")


def pytest_configure(config) -> None:
    """The marker, and an environment that is the same on every machine."""
    config.addinivalue_line("markers", "slow: takes seconds, or needs vLLM; left out without --all")
    for name in NOT_HANDED_DOWN:
        os.environ.pop(name, None)


def pytest_collection_modifyitems(config, items: list) -> None:
    """Leave out what is marked slow, unless --all is there or the test was asked for by name."""
    if config.getoption("--all") or any("::" in argument for argument in config.args):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


def slow(*values):
    """A parameter whose test is slow."""
    return pytest.param(values[0] if len(values) == 1 else values, marks=pytest.mark.slow)


def flags(*words: str, add_flags=raft.add_flags) -> Namespace:
    """The flags of raft.py, or of another script, with their defaults."""
    return run.parse_flags(list(map(str, words)), raft.__doc__, add_flags)


def settled(*words: str, add_flags=raft.add_flags) -> Namespace:
    """Likewise, with those that follow from others filled in, as raft.py does it."""
    args = flags(*words, add_flags=add_flags)
    settle_budget(args, args.objective)
    return args


def m_step(learner, optimizer, problems, samples, args, reference=None) -> dict:
    """The M-step, as raft.train does it: metrics."""
    policy = getattr(learner, "module", learner)  # DDP's, or FSDP2's own
    return raft.train_step(learner, optimizer, raft.prepare_updates(policy, reference, problems, samples, args), args)


def make_sample(problem: int, reward: float, response: list[int], prompt=(5, 6, 7), **fields) -> Sample:
    """A sample of given token ids; the sampler's log-probs are 0 unless given."""
    fields = {"sampler_logprobs": np.zeros(len(response), np.float32)} | fields
    response_ids = np.array(response, np.int32)
    return Sample(problem, 0, list(prompt), response_ids, finished=True, reward=reward, **fields)


def command(script: str, *words, ranks: int = 1, launch=("--standalone",)) -> list[str]:
    """The command line of a script, under torchrun if there are several ranks; launch: more flags of torchrun."""
    launch = ["-m", "torch.distributed.run", *launch, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / script), *map(str, words)]


def default_signals() -> None:
    """In a new process: signals do what they do by default, though a shell may have started us to ignore them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run_script(script: str, *words, ranks: int = 1, check: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a script to its end and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command(script, *words, ranks=ranks), capture_output=True, text=True, env=environment,
                          timeout=300, preexec_fn=default_signals, **options)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


class Started:
    """A script that goes on in the background; its flags must hold the path `mark`, by which its workers are found."""

    def __init__(self, script: str, *words, mark: Path, **launch):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.mark, self.output = str(mark).encode(), mark.with_suffix(".output")
        self.process = subprocess.Popen(command(script, *words, **launch), env=environment, preexec_fn=default_signals,
                                        stdout=self.output.open("w"), stderr=subprocess.STDOUT)

    def workers(self) -> list[int]:
        """The processes that are left of it, torchrun included."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                if self.mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def kill(self) -> None:
        """kill -9 for torchrun and every worker, as if the machine went away."""
        for worker in self.workers():
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        self.process.wait(timeout=60)


SMALL = ["--prompts-per-step", 8, "--samples-per-prompt", 4, "--updates-per-step", 2, "--eval-samples", 1,
         "--eval-every", 2, "--save-every", 2, "--keep", 1, "--max-response-tokens", 40, "--kl-coef", 0.01,
         "--gradient-checkpointing", "--steps", 4]  # a run of four steps


def read_log(out, drop=("seconds",)) -> list[dict]:
    """The log without its times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(drop)} for line in lines]


def same_log(found: dict, expected: dict) -> bool:
    """Whether two lines of the log differ by no more than rounding."""
    null = {name for name, value in expected.items() if value is None and found[name] is None}
    found, expected = ({name: 0.0 if name in null else value for name, value in line.items()} for line in (found, expected))
    return found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def parameters(out, step: int) -> dict[str, torch.Tensor]:
    """The model of a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step-{step:06d}").state_dict()


def distance(one: dict, other: dict) -> float:
    """The norm of the difference of two sets of parameters.

    Without the keys' biases: a softmax does not see them, so that their gradient is what rounding leaves, of which AdamW
    makes whole steps.
    """
    names = [name for name in one if not name.endswith("k_proj.bias")]
    return torch.stack([(one[name] - other[name]).norm() for name in names]).norm().item()


def wait_for(condition, seconds: float = 120) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_killed_and_resumed(script: str, words: list, straight: Path, out: Path, ranks: int) -> None:
    """A run killed after its checkpoint of step 2 and resumed equals `straight`, which was not, bit for bit."""
    words = [*words, "--out", out]
    run = Started(script, *words, ranks=ranks, mark=out)
    wait_for((out / "checkpoints" / "step-000002").is_dir)
    run.kill()
    assert not (out / "checkpoints" / "step-000004").exists()
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "sam')  # a line cut short
    with (out / "samples.jsonl").open("a") as samples:
        samples.write('{"step": 3, "pro')
    done = run_script(script, *words, "--resume", ranks=ranks)
    assert "step 0 " not in done.stdout  # it went on, and did not start afresh
    assert read_log(out) == read_log(straight)
    assert (out / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()
    resumed, expected = parameters(out, 4), parameters(straight, 4)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000004"]  # --keep 1


def check_same_update(expected: dict, found: dict) -> None:
    """What `ranks.py update` wrote in two places: the same log-probs, norms, gradients, parameters and metrics."""
    for kind in ("gradient model.", "gradient norms", "log-probs", "prompt states", "model."):
        one, two = (torch.cat([tensor.flatten() for name, tensor in result.items() if name.startswith(kind)])
                    for result in (expected, found))
        bound = 1e-6 if kind == "model." else 1e-5  # an update moves the parameters by a hundredth of themselves
        assert one.norm() > 1e-3 and (one - two).norm() < bound * one.norm(), kind
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert value == pytest.approx(found[name], rel=1e-4, abs=1e-9), name


def check_sigterm_saves_the_step_and_exits(script: str, words: list, out: Path, ranks: int) -> None:
    """A run of 1000 steps ends after the one in which SIGTERM comes; it leaves its checkpoint and no process behind."""
    words = [*SMALL[:-1], 1000, "--save-every", 1000, *words, "--out", out]
    run = Started(script, *words, ranks=ranks, mark=out)
    wait_for(lambda: (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text().splitlines()) > 1)
    run.process.terminate()
    code = run.process.wait(timeout=60)
    assert code == 0 or ranks > 1, run.output.read_text()  # torchrun has an exit code of its own
    last = read_log(out)[-1]["step"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    wait_for(lambda: not run.workers(), 10)


@pytest.fixture(scope="session")
def toy() -> str:
    """The folder of the toy model."""
    return str(TOY)


@pytest.fixture(scope="session", autouse=True)
def device():
    """The device of a process group of one, which any test may find, whichever of them are run."""
    yield run.join_ranks()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def grader():
    """Two grading workers."""
    with Grader(workers=2, deadline=5.0) as grader:
        yield grader


@pytest.fixture(scope="session")
def problems(toy, device):
    """The toy's training problems, with their prompts."""
    return load_prompts(f"{toy}/train.jsonl", "train", AutoTokenizer.from_pretrained(toy), flags(), training=True)


@pytest.fixture
def model_and_tokenizer(device):
    """A fresh copy of the toy model, and its tokenizer."""
    return load_model(flags(), device)
