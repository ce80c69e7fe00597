"""What a GRPO step costs here and in trl: `python tests/bench_trl.py [--model MODEL --data FILE ...]`, with trl 1.16.

`grpo.py --allocator uniform` against trl's GRPOTrainer, in turns, each in a process of its own on the same core, with
the same prompts, samples per prompt, largest lengths, grader, optimizer updates per step, and rows in a micro-batch.
Both sample with transformers. Step 1 warms up and does not count, nor do loading, evaluation and checkpoints.

Prints medians over the rounds, and the ratio of the two, median and range: samples and response tokens drawn per second
of whole steps; response tokens trained per second, which are those that a backward pass goes over (grpo.py leaves out
samples whose advantage is 0, trl does not); samples per second of processor time without the graders', for shared
machines; the most memory until the last update, and before the first step (trl imports more), in MB. Then CPU seconds.
"""

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpo  # noqa: E402 (the project's modules lie one folder up)
import raft  # noqa: E402
import run  # noqa: E402
import sampler  # noqa: E402
from data import INSTRUCTION, PLAIN_TEMPLATE, SYSTEM_PROMPT, TOY, load_prompts, problems_of_step  # noqa: E402
from grader import Grader  # noqa: E402
from model import Policy  # noqa: E402
from pretrained import load_model  # noqa: E402

SAMPLES = 8  # of each prompt
UPDATES = 2  # of each step
SIDES = ("grpo.py", "trl")
ROWS = {  # of the table: what, per second of which clock
    "samples/s": ("samples", "wall"), "drawn tokens/s": ("drawn", "wall"), "trained tokens/s": ("trained", "wall"),
    "samples per CPU second": ("samples", "cpu"), "MB at the peak": ("peak", None), "MB before": ("before", None),
}
PHASES = ("generate", "noise", "grader", "old log-probs", "forward", "backward", "optimizer")


def parse() -> argparse.Namespace:
    """The flags; --side is for the processes that this script starts."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TOY), help="folder of a causal language model")
    add("--data", default=str(TOY / "train.jsonl"), help="problems, as for grpo.py, some solved sometimes")
    add("--prompts", type=int, default=32, help="of each step")
    add("--rows", type=int, default=128, help="samples in a micro-batch, at their largest length")
    add("--lr", type=float, default=3e-4, help="of both; other models want a lower one")
    add("--steps", type=int, default=5, help="the first does not count")
    add("--rounds", type=int, default=3, help="runs of each")
    add("--max-prompt-tokens", type=int, default=64, help="longer prompts are dropped")
    add("--max-response-tokens", type=int, default=64, help="longer responses are cut")
    add("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 2 or args.prompts * SAMPLES % (UPDATES * args.rows):
        parser.error(f"--steps must be 2 or more, and --rows divide --prompts times {SAMPLES // UPDATES}")
    return args


class Meter:
    """What a run has done and used, noted before it and after each of its updates. owner.name gives log-probs."""

    def __init__(self, owner, name: str):
        self.counts, self.marks = dict.fromkeys(("samples", "drawn", "trained", "prompt", *PHASES), 0), []
        self.inner = [0.0]  # seconds of the timed calls within each timed call that is running
        self.time("old log-probs", owner, name)
        self.time("generate", transformers.GenerationMixin, "generate")
        self.time("noise", sampler, "gumbel_max")  # within generate
        self.time("grader", Grader, "__call__")  # without its workers
        self.time("backward", torch.Tensor, "backward")
        self.time("optimizer", torch.optim.AdamW, "step")

    def time(self, phase: str, owner, name: str) -> None:
        """From now on, count owner.name's processor time as that of a phase, but for the timed calls within it."""
        function = getattr(owner, name)

        def timed(*arguments, **options):
            self.inner.append(0.0)
            started, in_training = time.process_time(), torch.is_grad_enabled()
            result = function(*arguments, **options)
            seconds = time.process_time() - started
            self.counts["forward" if phase == "old log-probs" and in_training else phase] += seconds - self.inner.pop()
            self.inner[-1] += seconds
            return result

        setattr(owner, name, timed)

    def mark(self) -> None:
        """Note counts, time and processor time in seconds, and the most memory held so far, in MB."""
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        self.marks.append(self.counts | {"wall": time.perf_counter(), "cpu": time.process_time(), "peak": memory})

    def result(self) -> dict:
        """What came after step 1, but for the memory."""
        before, first, last = self.marks[0], self.marks[UPDATES], self.marks[-1]
        return {name: last[name] - first[name] for name in first} | {"peak": last["peak"], "before": before["peak"]}


def words(args, out) -> list[str]:
    """The command line of grpo.py."""
    flags = {
        "model": args.model, "data": args.data, "eval-data": f"{out}.jsonl", "eval-samples": 1, "out": out,
        "allocator": "uniform", "sampler": "hf", "steps": args.steps, "prompts-per-step": args.prompts,
        "samples-per-prompt": SAMPLES, "updates-per-step": UPDATES,
        "tokens-per-micro-batch": args.rows * (args.max_prompt_tokens + args.max_response_tokens),
        "lr": args.lr, "max-prompt-tokens": args.max_prompt_tokens, "max-response-tokens": args.max_response_tokens,
        "eval-every": args.steps, "save-every": args.steps}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def run_here(args, out: Path) -> dict:
    """The result of a run of grpo.py."""
    meter, e_step, optimizer_step = Meter(Policy, "forward"), raft.e_step, raft.optimizer_step

    def draw(*arguments):
        if not meter.marks:
            meter.mark()
        batch, samples, metrics = e_step(*arguments)
        meter.counts["samples"] += len(samples)
        meter.counts["drawn"] += sum(len(sample.response_ids) for sample in samples)
        return batch, samples, metrics

    def train(learner, optimizer, samples, *arguments):
        metrics = optimizer_step(learner, optimizer, samples, *arguments)
        meter.counts["trained"] += sum(len(sample.response_ids) for sample in samples)
        meter.mark()
        return metrics

    raft.e_step, raft.optimizer_step = draw, train
    Path(f"{out}.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')  # it evaluates at both ends
    grpo.main(words(args, out))
    return meter.result()


def run_trl(args, out: Path) -> dict:
    """The result of a run of trl's trainer."""
    import torch.distributed as dist
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    flags = run.parse_flags(words(args, out), grpo.__doc__, grpo.add_flags)
    model, tokenizer = load_model(flags, run.join_ranks())
    problems = load_prompts(args.data, flags.split, tokenizer, flags, training=True)
    dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # or trl would wrap its model for several processes
        os.environ.pop(name)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    chosen = [problem for step in range(1, args.steps + 1) for problem in problems_of_step(problems, step, flags)]
    rows = [{"prompt": [{"role": "system", "content": SYSTEM_PROMPT},
                        {"role": "user", "content": f"{problem.question}\n{INSTRUCTION}"}],
             "answer": problem.answer} for problem in chosen]
    meter = Meter(GRPOTrainer, "_get_per_token_logps_and_entropies")

    def reward(completions, completion_ids, answer, **_):
        meter.counts["samples"] += len(completions)
        meter.counts["drawn"] += sum(map(len, completion_ids))
        return [score for score, _ in grader([message["content"] for [message] in completions], answer)]

    class Counting(GRPOTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            meter.counts["trained"] += inputs["completion_mask"].sum().item()
            meter.counts["prompt"] += inputs["prompt_mask"].sum().item()
            return super().compute_loss(model, inputs, *arguments, **options)

    class Marks(TrainerCallback):
        def on_step_end(self, *_, **options):  # a step of theirs is an update
            meter.mark()

    batches = args.prompts * SAMPLES // UPDATES // args.rows  # micro-batches of an update
    config = GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=UPDATES * args.steps,
        num_generations=SAMPLES, max_completion_length=args.max_response_tokens, shuffle_dataset=False,
        per_device_train_batch_size=args.rows, gradient_accumulation_steps=batches,
        steps_per_generation=UPDATES * batches, learning_rate=flags.lr, lr_scheduler_type="constant",
        weight_decay=flags.weight_decay, max_grad_norm=flags.grad_clip, epsilon=flags.clip_low, beta=0.0,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
    with Grader() as grader:
        trainer = Counting(model, reward, args=config, train_dataset=Dataset.from_list(rows),
                           processing_class=tokenizer, callbacks=[Marks()])
        meter.mark()
        trainer.train()
    assert meter.counts["prompt"] == SAMPLES * sum(len(problem.prompt_ids) for problem in chosen), "other prompts"
    return meter.result()


def start(side: str) -> dict:
    """The result of one side, run in a process of its own with our flags."""
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], env=os.environ | fixed,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the table; or, with --side, the result of one run."""
    args = parse()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps((run_trl if args.side == "trl" else run_here)(args, Path(folder) / "run")))
        return
    if importlib.util.find_spec("trl") is None:
        sys.exit("bench_trl.py: trl is not installed: pip install trl==1.16.0, in an environment of its own")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, which the processes inherit
    rounds = [{side: start(side) for side in SIDES} for _ in range(args.rounds)]
    print(f"{args.rounds} runs of {args.steps - 1} steps of {args.prompts} x {SAMPLES} samples, {UPDATES} updates each")
    print(f"{'':24s}{'grpo.py':>10s}{'trl':>10s}    ratio")
    for heading, (what, clock) in ROWS.items():
        ours, theirs = ([each[side][what] / each[side].get(clock, 1) for each in rounds] for side in SIDES)
        ratios = [our / their for our, their in zip(ours, theirs)]
        print(f"{heading:24s}{median(ours):10.1f}{median(theirs):10.1f}"
              f"    {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for phase in (*PHASES, "cpu"):  # the last is that of the whole step
        ours, theirs = (median(each[side][phase] for each in rounds) / (args.steps - 1) for side in SIDES)
        print(f"CPU s/step {phase:13s}{ours:10.2f}{theirs:10.2f}")


if __name__ == "__main__":
    main()
