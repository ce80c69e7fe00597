"""What a run leaves on the disk: its folder and lock, the log, checkpoints; and how it goes on.

    OUT/args.json              flags and versions
    OUT/log.jsonl              a line for each step, cut back to the checkpoint on --resume
    OUT/samples.jsonl          likewise, the samples of some prompts of each step
    OUT/checkpoints/step-N/    model and tokenizer for from_pretrained, optimizer.pt, state.json

A checkpoint is there whole or not at all. All functions are called on every rank, unless they say
that rank 0 calls them.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import math
import os
import shutil
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint.state_dict as state_dicts
from safetensors import SafetensorError

from data import Problem, Sample, compare_problems, sample_rows
from files import append_rows, read_json, write_json
from run import InputError, RunError, number, of_rank0, on_rank0, positive_int, print0

FORMAT = 3  # of a run's folder. A change of RunState, or of what a flag means, needs another one
LEFT_BY_A_RUN = ("args.json", "log.jsonl", "samples.jsonl", "checkpoints")
CHECKPOINT = "step-" + 6 * "[0-9]"  # other names beside these are somebody else's
# What the log counts from the start of the run; all other metrics are of one step.
TOTALS = ("samples", "samples_not_finite", "tokens", "updates", "updates_empty",
          "updates_not_finite", "grader_failures")
PHASES = ("sample", "sync", "grade", "score", "train", "eval", "save")  # what its seconds are for
SMALL_GAP, LARGE_GAP = 0.01, 0.1  # of sampler_gap, nats a token; rounding stays below the first
SHOWN = "step samples accept_rate predicted_accept_rate loss eval_accuracy seconds".split()
# Checkpoints hold whole tensors under plain names, so that any number of ranks can load them.
WHOLE = state_dicts.StateDictOptions(full_state_dict=True, cpu_offload=True)


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    """Where a run is kept."""
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run, seen by all nodes; None: runs/OBJECTIVE-ALLOCATOR-SEED, "
        "or -predicted-SEED")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    add("--save-every", type=positive_int, default=10, help="steps; the last is always saved")
    add("--keep", type=positive_int, default=2, help="checkpoints kept")
    add("--keep-samples", type=number(int, low=0), default=16,
        help="prompts of each step whose samples are kept, in samples.jsonl")


def run_folder(args: argparse.Namespace) -> Path:
    """--out, or a name by what is run."""
    how = args.allocator + ("-predicted" if args.candidates_per_step else "")
    return Path(args.out or f"runs/{args.objective}-{how}-{args.seed}")


@dataclass
class RunState:
    """What a checkpoint keeps beside the model and the optimizer, as JSON."""

    step: int = -1  # the last one that was finished; 0 is the evaluation before training
    totals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TOTALS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    saved: int = -1  # the step of the newest checkpoint
    plan: dict | None = None  # of the E-step, where one serves several steps: see gvm.e_step
    plan_flags: dict = field(default_factory=dict)  # those that made it
    predictor: dict = field(default_factory=dict)  # what Predictor has learnt: arrays
    problems: dict[str, str] = field(default_factory=dict)  # by name of the data: their digest
    last_solved: int = 0  # the last step that had a right sample
    last_update: int = 0  # the last step that had an update
    gap_is_said: bool = False  # a warning of sampler_gap has been printed
    not_finite: int = 0  # updates in a row, until now, that were not finite
    log_bytes: int = 0  # the length of log.jsonl
    samples_bytes: int = 0  # the length of samples.jsonl

    @contextmanager
    def timer(self, phase: str):
        """Add the time that the `with` block takes, without phases inside it, to this phase's."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - before
        self.seconds[phase] += time.perf_counter() - start - inside


def watch_run(state: RunState, metrics: dict, args) -> None:
    """Warn of ten steps that teach nothing; RunError after ten updates that were not finite."""
    watch_sampler(state, metrics.get("sampler_gap") or 0.0, args)
    if metrics.get("updates"):
        state.not_finite, state.last_update = 0, state.step
    state.not_finite += metrics.get("updates_not_finite", 0)
    if metrics.get("samples_not_finite"):  # those of a policy that is NaN are wrong: no updates
        state.not_finite += metrics.get("updates_empty", 0)
    if state.not_finite >= 10:
        raise RunError("ten updates in a row were not finite; --resume with a lower --lr")
    if metrics.get("accept_rate"):
        state.last_solved = state.step
    if state.last_solved and state.step == state.last_solved + 10:
        print0("warning: no sample of the last ten steps was right; if the run has diverged, "
               f"go on from a checkpoint before step {state.last_solved}, with a lower --lr")
    elif state.step == state.last_update + 10:
        print0("warning: no update in the last ten steps: no prompt had samples that teach, right "
               "ones, or for GRPO right and wrong ones; take easier problems, a higher "
               "--samples-per-prompt, or a better model")


def watch_sampler(state: RunState, gap: float, args) -> None:
    """Warn once if samples are not quite the policy's; RunError if they are not, from the start."""
    reason = (f"the sampler's log-probs are off by {gap:.2g} nats a token: it does not have the "
              "trainer's model, but another dtype or version of it")
    remedy = "--truncated-is 2, which lets tokens count less that the trainer finds less likely"
    if gap > LARGE_GAP and not state.last_update and args.truncated_is is None:
        raise RunError(f"{reason}; mend that, or --resume with {remedy}")
    if gap > SMALL_GAP and not state.gap_is_said:
        state.gap_is_said = True
        print0(f"warning: {reason}; see {remedy}")


def note_problems(state: RunState, data: dict[str, list[Problem]]) -> None:
    """Keep digests of the problems; InputError if they are not those of the checkpoint."""
    digests = compare_problems(state.problems, data)
    if not digests.keys() <= state.problems.keys():
        state.plan = None  # it was made for other data
    state.problems = digests


# --- the folder and its log ------------------------------------------------------------------
def claim_folder(out: Path, left_by_a_run: tuple[str, ...], resume: bool):
    """Make `out`, locked for a `with` block; InputError if a run is there, or, without `resume`,
    left files of these names."""

    def lock_folder():
        if not resume and any((out / name).exists() for name in left_by_a_run):
            raise InputError(f"--out {out}: holds a run already; --resume continues it, "
                             "another --out starts afresh")
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: process {lock.read()} is running there; "
                             "wait for it, end it, or choose another") from error
        lock.truncate(0)
        print(os.getpid(), end="", file=lock, flush=True)
        return lock

    return on_rank0(lock_folder) or nullcontext()


def start_log(out: Path, args: argparse.Namespace, state: RunState) -> None:
    """On rank 0: record flags and versions in args.json; cut what is logged to the checkpoint's."""
    record = out / "args.json"
    if record.exists():
        before = read_json(record, "flags") | {"resume": args.resume}
        changed = [name for name, value in vars(args).items() if value != before.get(name)]
        if changed:
            print0(f"warning: resumed with other values of {', '.join(changed)} than before")
    versions = {found.name: found.version for found in importlib.metadata.distributions()}
    write_json(record, {"format": FORMAT, "flags": vars(args), "versions": versions})
    for name, length in (("log.jsonl", state.log_bytes), ("samples.jsonl", state.samples_bytes)):
        if (out / name).exists():
            os.truncate(out / name, min(length, (out / name).stat().st_size))


def write_log(out: Path, state: RunState, metrics: dict) -> None:
    """On rank 0: add up the TOTALS, append a line to log.jsonl, and print its main figures."""
    for name in TOTALS:
        state.totals[name] += metrics.get(name, 0)
    line = {"step": state.step, **metrics, **state.totals, "seconds": sum(state.seconds.values())}
    line |= {f"seconds_{phase}": value for phase, value in state.seconds.items()}
    # JSON has no NaN.
    line = {k: v if v is not None and math.isfinite(v) else None for k, v in line.items()}
    state.log_bytes = append_rows(out / "log.jsonl", [line])
    print0("  ".join(f"{name} {line[name]:.4g}" for name in SHOWN if line.get(name) is not None))


def write_samples(out: Path, state: RunState, problems: list[Problem],
                  samples: list[Sample]) -> None:
    """On rank 0: append the samples of these problems to samples.jsonl, rows as eval.py's."""
    ids = {problem.id for problem in problems}
    rows = sample_rows([sample for sample in samples if sample.problem in ids], problems)
    if rows:
        rows = [{"step": state.step} | row for row in rows]
        state.samples_bytes = append_rows(out / "samples.jsonl", rows)


# --- checkpoints -----------------------------------------------------------------------------
def save_checkpoint(out: Path, state: RunState, model, optimizer, tokenizer, keep: int) -> None:
    """Write OUT/checkpoints/step-N, and keep the newest `keep`.

    It is not written twice, nor after updates that are not finite.
    """
    if state.saved == state.step or state.not_finite > 0:
        return
    state.saved = state.step
    weights, moments = state_dicts.get_model_state_dict(model, options=WHOLE), None
    names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: weights[name] for name in names & weights.keys()}  # a tied head only once
    if optimizer.state:  # it has none before its first step, and asking would make a step
        moments = state_dicts.get_optimizer_state_dict(model, optimizer, options=WHOLE)
    final = out / "checkpoints" / f"step-{state.step:06d}"
    partial = final.with_suffix(".partial")

    def write():
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if moments is not None:
                torch.save(moments, partial / "optimizer.pt")
            write_json(partial / "state.json", asdict(state))
            digests = {path.name: digest(path) for path in partial.iterdir()}
            write_json(partial / "digests.json", digests)
            digest(partial / "digests.json")
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has many names
            shutil.rmtree(partial, ignore_errors=True)  # it may not have come so far
            raise InputError(f"--out: the checkpoint of step {state.step} cannot be written "
                             f"({error}); make room, then --resume") from error
        shutil.rmtree(final, ignore_errors=True)  # a broken one, which --resume passed over
        partial.rename(final)
        remove_old_checkpoints(final, state, keep)

    on_rank0(write)


def newest_checkpoint(out: Path) -> tuple[Path | None, RunState]:
    """The newest whole checkpoint, or None, and its state. Warns of damaged ones; InputError if
    none is whole, or if another version of this project has made the run."""

    def find():
        record, folder = out / "args.json", out / "checkpoints"
        saved = sorted(folder.glob(CHECKPOINT), reverse=True)
        if record.exists() and read_json(record).get("format") != FORMAT:
            raise InputError(f"--resume: {out} was made by another version of this project; go on "
                             "with that one, or choose another --out")
        for path in saved:
            try:
                digests = read_json(path / "digests.json")
                if digests and all(digest(path / n) == value for n, value in digests.items()):
                    return path, RunState(**read_json(path / "state.json"))
            except (OSError, InputError, TypeError):
                pass  # as good as another digest
            print0(f"warning: {path} is damaged, trying the one before")
        if saved:
            raise InputError(f"--resume: no checkpoint in {out} is whole; choose another --out")
        return None, RunState()

    return of_rank0(on_rank0(find))


def load_optimizer(checkpoint: Path, model, optimizer) -> None:
    """Load the optimizer's state from a checkpoint, if it had one."""
    path = checkpoint / "optimizer.pt"
    if path.exists():
        flags = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        moments = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state_dicts.set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        optimizer.param_groups[0].update(flags)  # they win over those of the checkpoint
        for state in optimizer.state.values():  # copies: the file may be deleted, not stay mapped
            state.update({name: value.clone() for name, value in state.items()})


def remove_old_checkpoints(newest: Path, state: RunState, keep: int) -> None:
    """On rank 0: keep the newest `keep`, and one from before the last step with a right sample."""
    saved = sorted(newest.parent.glob(CHECKPOINT))
    older = [path for path in saved if path <= newest]  # --resume passed over the others
    kept = older[-keep:]
    if state.step > state.last_solved:  # the run may have diverged since
        kept += [path for path in older if path.name < f"step-{state.last_solved:06d}"][-1:]
    for path in set(saved) - set(kept):
        shutil.rmtree(path)


def digest(path: Path) -> str:
    """SHA-256 of a file, which is first brought to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
