"""How much sooner does a method reach an accuracy? The runs, on the toy and on a real model.

    python figures/speed.py tune --minutes 60     # what is missing in speed.jsonl to tune rates
    python figures/speed.py run --minutes 60      # the same, and then what is reported
    python figures/speed.py time                  # seconds of a step, with nothing else running
    python figures/speed.py run --on real --folder REAL     # on what tests/make_real.py made in
                                                            # REAL, into real_speed.jsonl
    python figures/speed_table.py                 # the tables of figures/README.md

measure.py says what is measured, tuning.py how learning rates are tuned, for each method by itself
and on seeds that are not reported, SETTINGS where and how often. A step draws 64 samples and makes
one update. *Uniform* has 16 prompts x 4; *most prompts* has equal counts, too, but the smallest
from which the objective learns, 64 x 1 or 32 x 2: it shows what prompts are worth by their number.
Seconds are steps times the seconds of a step, which `time` measures at the start of a run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import read_rows  # noqa: E402 (the project's modules lie one folder up)
from measure import mixed_pairs  # noqa: E402
from tuning import Setting, missing_runs, runs_to_time  # noqa: E402

FIGURES = ROOT / "figures"
METHODS = ("uniform", "most prompts", "published", "predicted", "wider pool")  # see flags
PROMPTS, SAMPLES_EACH, PILOT = 16, 4, 2  # prompts a step; samples, and of these pilot, of each
POOL = 4 * PROMPTS  # of which the best are served
SMALLEST = {"raft": 1, "grpo": 2}  # samples of a prompt that teach something, by objective
PUBLISHED_ALPHA, PREDICTED_ALPHA = 0.001, 0.01
OF_A_STEP = ("step", "prompts_sometimes", "accept_rate", "predicted_accept_rate",
             "prediction_correlation")  # of log.jsonl
# vLLM sets torch's precision in the trainer's process: factors of matrix products are rounded to
# bf16, as on a GPU. On a CPU that has AMX a run takes two thirds of the time. No effect on the toy.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_FLOAT32_MATMUL_PRECISION": "medium"}

SETTINGS = {
    "toy": Setting(
        FIGURES / "speed.jsonl",
        ("--model", "{}", "--data", "{}/train.jsonl", "--eval-data", "{}/eval.jsonl"),
        first_rates=(1.5e-4, 3e-4), search_seeds=(100, 101), final_seeds=(102, 103),
        seeds=range(400, 420),
        parts=((40, 5), (120, 20)),  # evaluated more often where curves are steep
        eval_samples=5, timed_steps=60, keep_steps=False,
        accuracies=(0.55, 0.58, 0.60), budget=(120, 7680, 160_000)),
    "real": Setting(
        FIGURES / "real_speed.jsonl",
        ("--model", "{}/model", "--data", "{}/train.jsonl", "--eval-data", "{}/eval.jsonl",
         "--max-prompt-tokens", "256", "--sampler", "vllm",
         "--tokens-per-micro-batch", "1024"),  # less padding
        first_rates=(2e-5, 4e-5), search_seeds=(100,), final_seeds=(),
        seeds=range(400, 405),
        parts=((40, 20), (60, 20), (80, 20)), eval_samples=2, timed_steps=8, keep_steps=True,
        accuracies=(0.19, 0.21), budget=(40, 2560, 40_000)),
}


def flags(setting: Setting, spec: dict, folder: Path) -> list[str]:
    """The command line of a run, but for its length and folder: the model, and all in which methods
    differ. The rest are the script's defaults."""
    prompts, each = PROMPTS, SAMPLES_EACH
    if spec["method"] == "most prompts":
        each = SMALLEST[spec["objective"]]
        prompts = PROMPTS * SAMPLES_EACH // each
    rule = {"raft": "gvm", "grpo": "reward"}[spec["objective"]]  # that fits
    fitting = ["--allocator", rule, "--alpha", PREDICTED_ALPHA]
    of_method = {
        "uniform": ["--allocator", "uniform"],
        "most prompts": ["--allocator", "uniform"],
        "published": ["--allocator", "gvm", "--alpha", PUBLISHED_ALPHA, "--pilot-samples", PILOT],
        "predicted": ["--candidates-per-step", PROMPTS, *fitting],
        "wider pool": ["--candidates-per-step", POOL, *fitting],
    }
    words = [*(word.format(folder) for word in setting.model_flags),
             "--prompts-per-step", prompts, "--samples-per-prompt", each,
             "--updates-per-step", 1, "--lr", spec["rate"], "--seed", spec["seed"],
             *of_method[spec["method"]]]
    return [str(word) for word in words]


def run(setting: Setting, spec: dict, folder: Path) -> dict:
    """The record of a run: spec, its curve, and for the stage `time` the seconds of a step."""
    timed = spec["stage"] == "time"
    parts = ((setting.timed_steps, setting.timed_steps),) if timed else setting.parts
    with tempfile.TemporaryDirectory() as out:
        log = Path(out) / "run" / "log.jsonl"
        for steps, eval_every in parts:  # a second part resumes the first
            if is_done(setting, spec["stage"], curve_of(log)):
                break
            words = [sys.executable, ROOT / f"{spec['objective']}.py",
                     *flags(setting, spec, folder), "--out", log.parent, "--resume",
                     "--steps", steps, "--eval-every", eval_every, "--save-every", steps,
                     "--eval-samples", 1 if timed else setting.eval_samples,
                     "--keep-samples", POOL if setting.keep_steps else 0]
            done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                                  check=False, env=os.environ | ENVIRONMENT)
            if done.returncode:
                sys.exit(f"{spec}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        record, lines = spec | {"curve": curve_of(log)}, read_rows(log)
        if setting.keep_steps:
            record["steps"] = steps_of(lines, read_rows(log.with_name("samples.jsonl")))
    if timed:
        seconds = lines[-1]["seconds"] - lines[-1]["seconds_eval"] - lines[-1]["seconds_save"]
        return record | {"seconds_a_step": round(seconds / lines[-1]["step"], 4)}
    return record


def curve_of(log: Path) -> list[list]:
    """[step, samples, tokens, accuracy] at each evaluation of a run so far."""
    return [[line["step"], line["samples"], line["tokens"], line["eval_accuracy"]]
            for line in (read_rows(log) if log.exists() else []) if "eval_accuracy" in line]


def steps_of(lines: list[dict], samples: list[dict]) -> list[dict]:
    """OF_A_STEP and the share of mixed pairs, for each step. samples: rows of samples.jsonl."""
    return [{name: line.get(name) for name in OF_A_STEP}
            | {"mixed_pairs": mixed_pairs([x for x in samples if x["step"] == line["step"]])}
            for line in lines if line["step"] > 0]


def is_done(setting: Setting, stage: str, curve: list[list]) -> bool:
    """Whether more steps would change nothing that is said of a run: the whole budget is spent, or,
    of a run to tune by, the highest accuracy is reached."""
    if not curve:
        return False
    is_spent = all(cost >= budget for cost, budget in zip(curve[-1], setting.budget))
    is_reached = max(accuracy for *_, accuracy in curve) >= setting.accuracies[-1]
    return is_spent or (stage == "tune" and is_reached)


def read_records(path: Path) -> list[dict]:
    """Of a file that may not be there yet."""
    return read_rows(path) if path.exists() else []


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("tune", "run", "time"))
    add("--on", choices=SETTINGS, default="toy")
    add("--folder", type=Path, help="of the model and its problems (default: the toy's)")
    add("--minutes", type=float, default=60.0, help="no run is begun after them")
    add("--jobs", type=int, default=2, help="runs at a time, one core each; `time` takes one")
    add("--records", type=Path, help="where runs are kept, if not where they are looked for")
    add("--objectives", nargs="+", choices=("raft", "grpo"), default=("raft", "grpo"))
    add("--methods", nargs="+", choices=METHODS, default=METHODS,
        help="RAFT's wider pool is not run: on the toy its runs are those of most prompts")
    args = parser.parse_args()
    setting, deadline = SETTINGS[args.on], time.monotonic() + 60 * args.minutes
    path = args.records or setting.records_path
    if args.on == "real" and args.folder is None:
        parser.error("--on real needs --folder, in which tests/make_real.py has made the model")
    folder = args.folder or ROOT / "tests" / "toy"

    def run_and_keep(spec: dict) -> None:
        if time.monotonic() < deadline:
            record = run(setting, spec, folder)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(*spec.values(), record["curve"][-1], flush=True)

    chosen = args.objectives, args.methods
    if args.what == "time":
        for spec in runs_to_time(setting, read_records(path), *chosen):
            run_and_keep(spec)
    while args.what != "time" and time.monotonic() < deadline:
        specs = missing_runs(setting, read_records(path), *chosen, only_tune=args.what == "tune")
        if not specs:
            break
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(run_and_keep, specs))


if __name__ == "__main__":
    main()
