"""What any script needs, nothing of it special to GVM: errors, flags, ranks, signals."""

import argparse
import atexit
import gc
import io
import math
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from tqdm import tqdm
from transformers.utils import logging as transformers_logging


# --- errors ----------------------------------------------------------------------------------
class InputError(Exception):
    """Bad input from the user: one line that names the flag or file and the remedy."""


class RunError(Exception):
    """The run cannot go on, through no fault of its input: one line; checkpoints are kept."""


class Stopped(Exception):
    """The run was asked to end: the step under way is given up."""


def run_script(main) -> None:
    """Call main(). Bad input ends in one line and exit code 2, a run that fails in code 1."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    try:
        main()
    except (InputError, RunError) as error:
        rank = os.environ.get("RANK", "0")  # as text: the error may be that it is no number
        at_rank = f" on rank {rank}" if rank != "0" else ""
        words = str(error).split()  # one line, though a name in it may hold a line break
        print(f"{Path(sys.argv[0]).name}: error{at_rank}:", *words, file=sys.stderr)
        error.__traceback__ = error.__cause__ = None  # the line is enough for torchrun's report
        get_error_handler().record_exception(error)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except RuntimeError as error:  # torch.OutOfMemoryError, or vLLM's when it wakes up
        if "out of memory" in str(error):
            print("out of memory: see --tokens-per-micro-batch, --vllm-memory, "
                  "--gradient-checkpointing, --fsdp", file=sys.stderr)
        raise


class Screen:
    """A stream to be read by people. A run goes on where nobody can read it any more: the terminal
    was closed, the reader of the pipe has ended, the disk is full."""

    def __init__(self, stream):
        if stream is None:  # it was closed before Python started
            stream = open(os.devnull, "w")
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal has no ±
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """As of the stream."""
        return self._try(self.stream.write, text) or 0

    def flush(self) -> None:
        """As of the stream."""
        self._try(self.stream.flush)

    def _try(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError:  # from now on it goes nowhere; what is in its buffer, too
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


# --- flags -----------------------------------------------------------------------------------
def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite number of this kind, int or float, from `low` to `high`."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text}: must be finite, and from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse's own message: "invalid int value"
    return convert


positive_int = number(int, low=1, high=2**31 - 1)
non_negative = number(float, low=0)


def parse_flags(argv: list[str] | None, docstring: str, *add_flags) -> argparse.Namespace:
    """The flags that the functions `add_flags` declare; raises InputError for a wrong one, and for
    a wrong environment: nothing reads that before."""
    check_environment()
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def complain(message: str):  # instead of printing the usage on every rank
        if int(os.environ.get("RANK", 0)) > 0:  # rank 0 says it
            sys.exit(2)
        raise InputError(f"{message} (see --help)")

    parser.error = complain
    for add in add_flags:
        add(parser)
    return parser.parse_args(argv)


# --- ranks -----------------------------------------------------------------------------------
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
         "MASTER_PORT": "0"}  # what torchrun would say to a group of one
SMALLEST = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}


def check_environment() -> None:
    """InputError for an environment that names a rank's place wrongly, or in part: it would wait
    for ranks that never come."""
    remedy = "unset it, or launch with torchrun"
    numbers = {}
    for name, low in SMALLEST.items():
        text = os.environ.get(name, ALONE.get(name, "1"))
        if not text.isdecimal() or len(text) > 5 or not low <= int(text) < 2**16:
            raise InputError(f"{name} is '{text}' in the environment, not a number from {low}: "
                             f"{remedy}")
        numbers[name] = int(text)
    missing = sorted(ALONE.keys() - os.environ.keys())
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if missing and numbers[name] != int(ALONE[name]):
            raise InputError(f"{name} is set in the environment, but not {missing[0]}: {remedy}")
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise InputError(f"RANK is {numbers['RANK']} in the environment, and WORLD_SIZE only "
                         f"{numbers['WORLD_SIZE']}: {remedy}")


def join_ranks() -> torch.device:
    """Join torchrun's process group, or be a group of one; returns this rank's device."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.update({name: ALONE[name] for name in ALONE.keys() - os.environ.keys()})
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo too: samples are gathered as Python objects
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as torchrun does: ranks that share cores get in the way
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(hours=1))  # one rank may draw for long
        # A vLLM engine may have ended it already.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        atexit.register(gc.collect)  # before that: FSDP2's modules hold the group, and may abort
    return device


def print0(text: str) -> None:
    """Print a line, on rank 0 alone."""
    if dist.get_rank() == 0:
        tqdm.write(text)
        sys.stdout.flush()


def gather(items: list) -> list:
    """Every rank's items, in the order of ranks, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def of_rank0(item):
    """Rank 0's item, on every rank: where another machine might round differently, say."""
    return gather([item])[0]


def share_out(items: list, function) -> list:
    """function(items), which returns a list, for all ranks: each computes a share of it."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = gather([function(items[rank::ranks])])
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


def on_every_rank(function, *arguments):
    """The result of a function that waits for no other rank.

    If it raises InputError, RunError or OSError on one rank, all ranks end.
    """
    result, error = None, None
    try:
        result = function(*arguments)
    except (InputError, RunError) as reason:
        error = reason
    except OSError as reason:
        error = InputError(f"--out: {reason}; choose another, or make room")
    messages = gather([error and str(error)])
    if error and str(error) not in messages[: dist.get_rank()]:  # the first rank says it for all
        raise error
    if any(messages):
        sys.exit(2)
    return result


def on_rank0(function, *arguments):
    """As on_every_rank, but only rank 0 calls it: what reads or writes --out."""
    return on_every_rank(function if dist.get_rank() == 0 else lambda *_: None, *arguments)


# --- signals ---------------------------------------------------------------------------------
class StopSignal:
    """SIGTERM, SIGINT or SIGHUP asks a run to save and end; a second signal ends it at once."""

    def __init__(self):
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self)

    def __call__(self, number, frame) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = True

    def on_any_rank(self) -> bool:
        """Whether some rank got it: all ranks must end at the same place."""
        return any(gather([self.received]))
