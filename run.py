"""What any script needs, and nothing that is special to GVM: flags, ranks, the folder of a run."""

import argparse
import atexit
import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as state_dicts
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from data import InputError

# --- flags and errors ------------------------------------------------------------------------
def number(kind: type, low: float, high: float = math.inf):
    """An argparse type: a finite number of this kind, int or float, from `low` to `high`."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse's own message: "invalid int value"
    return convert


positive_int = number(int, low=1)
non_negative = number(float, low=0)


def parse_flags(argv: list[str] | None, docstring: str, *add_flags) -> argparse.Namespace:
    """The flags that the functions `add_flags` declare; raises InputError for a wrong one."""
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def complain(message: str):
        raise InputError(f"{message} (see --help)")

    parser.error = complain  # argparse's own prints its usage on every rank
    for add in add_flags:
        add(parser)
    return parser.parse_args(argv)


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where a run is kept, and how often."""
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run, seen by all nodes; None: runs/OBJECTIVE-ALLOCATOR-SEED")
    add("--resume", action="store_true",
        help="continue from the newest checkpoint in --out, or start if there is none")
    add("--save-every", type=positive_int, default=10, help="steps; the last is always saved")
    add("--keep", type=positive_int, default=2, help="checkpoints kept")


def run_script(main) -> None:
    """Call main(); bad input becomes one line from rank 0 and exit code 2."""
    try:
        main()
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("out of memory: see --tokens-per-micro-batch, --vllm-memory, "
              "--gradient-checkpointing", file=sys.stderr)
        raise


# --- ranks -----------------------------------------------------------------------------------
def join_ranks() -> torch.device:
    """Join torchrun's process group, or be a group of one; returns this rank's device."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name, alone in [("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")]:
        os.environ.setdefault(name, alone)
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
    return device


def print0(*values) -> None:
    """print, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(*values, flush=True)


def gather(items: list) -> list:
    """Every rank's items, in the order of ranks, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def on_rank0(function, *arguments):
    """Call a function that writes to --out on rank 0, and return its result there.

    An InputError or OSError is raised on every rank, so that none waits for one that has ended.
    """
    result, errors = None, []
    if dist.get_rank() == 0:
        try:
            result = function(*arguments)
        except InputError as error:
            errors.append(error)
        except OSError as error:
            errors.append(InputError(f"--out: {error}; choose another, or make room"))
    for error in gather(errors):
        raise error
    return result


class StopSignal:
    """SIGTERM asks a run to save and end after its current step."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_) -> None:
        self.received = True

    def on_any_rank(self) -> bool:
        """Whether some rank got it: all ranks must end after the same step."""
        return any(gather([self.received]))


# --- the folder of a run ---------------------------------------------------------------------

# What the log counts from the start of the run; all other metrics are of one step.
TOTALS = ("samples", "tokens", "updates", "updates_empty", "updates_not_finite", "grader_failures")
PHASES = ("sample", "train", "eval")  # what its seconds are for


@dataclass
class RunState:
    """What a checkpoint keeps beside the model and the optimizer, as JSON."""

    step: int = -1  # the last one that was finished; 0 is the evaluation before training
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    plan: dict | None = None  # of the E-step, where one serves several steps
    log_bytes: int = 0  # the length of log.jsonl

    @contextmanager
    def timer(self, phase: str):
        """Add the time that the `with` block takes to the seconds of this phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def claim_folder(out: Path, record: str, resume: bool):
    """Make `out`, and lock it for the `with` block of what this returns. Called on all ranks.

    InputError if it holds a `record` but `resume` is not set, or another process is running there.
    """

    def lock_folder():
        if (out / record).exists() and not resume:
            raise InputError(f"--out {out}: holds a run already; --resume continues it, "
                             "another --out starts afresh")
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: another process is running there; "
                             "wait for it or choose another") from error
        return lock

    return on_rank0(lock_folder) or nullcontext()


def append_rows(path: Path, rows: list[dict]) -> int:
    """Append JSON lines to a file; returns its length in bytes."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        return file.tell()


def start_log(out: Path, args: argparse.Namespace, log_bytes: int) -> None:
    """Record flags and versions in args.json; cut log.jsonl back to the checkpoint's length."""
    record, log = out / "args.json", out / "log.jsonl"
    if record.exists():
        before = json.loads(record.read_text())["flags"] | {"resume": args.resume}
        changed = [name for name, value in vars(args).items() if value != before.get(name)]
        if changed:
            print(f"warning: resumed with other values of {', '.join(changed)} than before")
    packages = ("torch", "transformers", "numpy", "math-verify")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record.write_text(json.dumps({"flags": vars(args), "versions": versions}, indent=1))
    with log.open("ab") as file:
        file.truncate(min(log_bytes, file.tell()))


def write_log(out: Path, state: RunState, metrics: dict) -> None:
    """Add up the TOTALS, append a line to log.jsonl, and print its main figures."""
    for name in TOTALS:
        state.totals[name] += metrics.get(name, 0)
    line = {"step": state.step, **metrics, **state.totals}
    line |= {f"seconds_{phase}": value for phase, value in state.seconds.items()}
    line["seconds"] = sum(state.seconds.values())
    state.log_bytes = append_rows(out / "log.jsonl", [line])
    shown = ("step", "samples", "accept_rate", "predicted_variance", "loss", "eval_accuracy")
    known = [name for name in (*shown, "seconds") if line.get(name) is not None]
    tqdm.write("  ".join(f"{name} {line[name]:.4g}" for name in known))


# Whole tensors under plain names, so that any number of ranks can load what any other has saved.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(out: Path, state: RunState, model, optimizer, tokenizer, keep: int) -> None:
    """Write OUT/checkpoints/step-N, a folder for from_pretrained; keep the newest `keep`.

    It is written beside and renamed, so it is there whole or not at all. Called on all ranks.
    """
    weights, moments = state_dicts.get_model_state_dict(model, options=WHOLE), None
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: weights[name] for name in names & weights.keys()}  # a tied head only once
    if optimizer.state:  # it has none before its first step, and asking would make a step
        moments = state_dicts.get_optimizer_state_dict(model, optimizer, options=WHOLE)

    def write():
        final = out / "checkpoints" / f"step-{state.step:06d}"
        partial = final.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        if moments is not None:
            torch.save(moments, partial / "optimizer.pt")
        sizes = {path.name: path.stat().st_size for path in partial.iterdir()}
        (partial / "state.json").write_text(json.dumps({"state": asdict(state), "sizes": sizes}))
        shutil.rmtree(final, ignore_errors=True)  # a broken one that was passed over
        partial.rename(final)
        saved = sorted(out.glob("checkpoints/step-??????"))
        kept = [path for path in saved if path <= final][-keep:]  # later ones were passed over
        for path in set(saved) - set(kept):
            shutil.rmtree(path)

    on_rank0(write)


def newest_checkpoint(out: Path) -> tuple[Path | None, RunState]:
    """The newest whole checkpoint and its state; (None, a new state) if there is none.

    Warns of broken ones; raises InputError if all are.
    """
    saved = sorted(out.glob("checkpoints/step-??????"), reverse=True)
    for path in saved:
        try:
            record = json.loads((path / "state.json").read_text())
            if all((path / n).stat().st_size == size for n, size in record["sizes"].items()):
                return path, RunState(**record["state"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # as good as a file of the wrong size
        print0(f"warning: {path} is incomplete, trying the one before")
    if saved:
        raise InputError(f"--resume: no checkpoint in {out} is whole; choose another --out")
    return None, RunState()


def load_optimizer(checkpoint: Path, model, optimizer) -> None:
    """Load the optimizer's state from a checkpoint, if it had one. Called on all ranks."""
    path = checkpoint / "optimizer.pt"
    if path.exists():
        flags = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        moments = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state_dicts.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        optimizer.param_groups[0].update(flags)  # they win over those of the checkpoint
        for state in optimizer.state.values():  # copies: the file may be deleted, not stay mapped
            state.update({name: value.clone() for name, value in state.items()})
