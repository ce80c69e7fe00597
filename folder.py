"""A run's folder: its lock, what is logged, where it stands, and what is warned of.

    OUT/args.json              flags and versions
    OUT/log.jsonl              a line for each step, cut back to the checkpoint on --resume
    OUT/samples.jsonl          likewise, the samples of some prompts of each step
    OUT/checkpoints/step-N/    see checkpoint.py
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from data import Problem, Sample, sample_rows
from files import append_rows, read_json, write_json
from run import InputError, RunError, number, of_rank0, on_every_rank, on_rank0, positive_int
from run import print0

FORMAT = 5  # of a run's folder. A change of RunState, or of what a flag means, needs another one
LEFT_BY_A_RUN = ("args.json", "log.jsonl", "samples.jsonl", "checkpoints")
# What the log counts from the start of the run; all other metrics are of one step.
TOTALS = ("samples", "samples_not_finite", "tokens", "updates", "updates_empty",
          "updates_not_finite", "grader_failures")
PHASES = ("sample", "predict", "sync", "grade", "score", "train", "eval", "save")  # of its seconds
SMALL_GAP, LARGE_GAP = 0.01, 0.1  # of sampler_gap, nats a token; rounding stays below the first
SHOWN = "step samples accept_rate predicted_accept_rate loss eval_accuracy seconds".split()


def add_folder_flags(parser: argparse.ArgumentParser) -> None:
    """Where a run is kept."""
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder of the run, seen by all nodes; None: runs/OBJECTIVE-ALLOCATOR-SEED, "
        "or -predicted-SEED")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    add("--save-every", type=positive_int, default=10, help="steps; the last is always saved")
    add("--keep", type=positive_int, default=2, help="checkpoints kept")
    add("--keep-samples", type=number(int, 0, 2**31 - 1), default=16,
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
    gap = metrics.get("sampler_gap") or 0.0
    if gap > SMALL_GAP and not state.gap_is_said:
        state.gap_is_said = True
        print0(f"warning: {gap_is_large(gap)}")
    not_finite = metrics.get("updates_not_finite", 0)
    if metrics.get("samples_not_finite"):  # those of a policy that is NaN are wrong: no updates
        not_finite += metrics.get("updates_empty", 0)
    if metrics.get("updates") or not not_finite:
        state.not_finite = 0
    if metrics.get("updates"):
        state.last_update = state.step
    state.not_finite += not_finite
    if state.not_finite >= 10:
        raise RunError("ten updates in a row were not finite; --resume with a lower --lr")
    if metrics.get("accept_rate"):
        state.last_solved = state.step
    if state.last_solved and state.step == state.last_solved + 10:
        print0("warning: no sample of the last ten steps was right; if the run has diverged, "
               f"go on from a checkpoint before step {state.last_solved}, if there is one, with a "
               "lower --lr")
    elif state.step == state.last_update + 10:
        print0("warning: no update in the last ten steps: no prompt had samples that teach, right "
               "ones, or for GRPO right and wrong ones; take easier problems, a higher "
               "--samples-per-prompt, a better model, or, where most are truncated, a higher "
               "--max-response-tokens")


def say_finished(out: Path, state: RunState, checkpoint: Path, args) -> None:
    """Of a run with no step left; a signal may have left its last evaluation out."""
    print0(f"{out}: is at step {state.step} of --steps {args.steps}; nothing is left to do")
    print0(f"to evaluate it: eval.py --model {checkpoint} --data {args.eval_data} "
               f"--max-prompt-tokens {args.max_prompt_tokens} "
               f"--max-response-tokens {args.max_response_tokens} --samples {args.eval_samples} "
               f"--temperature {args.eval_temperature} --seed {args.seed} --reward {args.reward}")


def say_saved(out: Path, state: RunState) -> None:
    """Whether the last step of a run is in a checkpoint."""
    print0(f"saved in {out}/checkpoints" if state.saved == state.step else "warning: the last "
           "updates were not finite, so their steps are not saved; --resume with a lower --lr")


def gap_is_large(gap: float) -> str:
    """What a sampler_gap, in nats a token, means."""
    return (f"the sampler's log-probs are off by {gap:.2g} nats a token: it does not have the "
            "trainer's model, but another dtype or version of it; mend that, or set --truncated-is "
            "2, by which tokens count less that the trainer finds less likely")


def refuse_other_model(gap: float) -> None:
    """RunError for the gap of a run's first update with one, if it says that the models differ."""
    if gap > LARGE_GAP:
        raise RunError(f"{gap_is_large(gap)}; then --resume")


def digest_problems(problems: list[Problem]) -> str:
    """16 hex digits that change with any id, question, answer or prompt: with a changed file, and
    with another template."""
    found = hashlib.sha256()
    for problem in problems:
        row = (problem.id, problem.question, problem.answer, problem.prompt_ids)
        found.update(json.dumps(row).encode())
    return found.hexdigest()[:16]


def compare_problems(known: dict[str, str], data: dict[str, list[Problem]]) -> dict[str, str]:
    """Digests of problems, by name of the data. InputError unless they are those of all ranks, and
    for names that a checkpoint knows, `known`, those of then."""
    digests = {name: digest_problems(problems) for name, problems in data.items()}
    on_rank_0 = of_rank0(digests)

    def compare():
        for name, digest in digests.items():
            if digest != on_rank_0[name]:
                raise InputError(f"{name}: holds other problems than on rank 0; copy it there")
            if digest != known.get(name, digest):
                raise InputError(f"--resume: {name} held other problems at the checkpoint (or was "
                                 "used with another --split, --max-prompt-tokens, chat template); "
                                 "restore it")

    on_every_rank(compare)
    return digests


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
        holder = lock.read()
        if holder and not holder.isdecimal():
            raise InputError(f"{out}/lock: is not of this program; choose another --out")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {out}: process {holder} is running there; "
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
