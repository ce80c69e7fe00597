"""Evaluate a model on benchmarks: samples as JSON lines, avg@k, pass@k, maj@k, a table in Markdown.

    torchrun eval.py --model Qwen/Qwen2.5-Math-1.5B --data math500,aime24         # the paper's way
    torchrun --nproc-per-node 8 eval.py --model ... --data ...                    # the same, sooner
    torchrun eval.py --model ... --data ... --resume                              # draws the rest
    python eval.py --rescore runs/eval-Qwen2.5-Math-1.5B/math500.jsonl            # without a model

OUT holds NAME.jsonl for each benchmark, one line per sample; protocol.json, what has to be known
to repeat the figures; and summary.json, the figures. Training calls `evaluate` for its log.
"""

import argparse
import hashlib
import importlib.metadata
import os
import re
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import cached_file

from answers import extract_boxed
from data import BENCHMARKS, EVALUATION, SYSTEM_PROMPT, TOY, Problem, Sample, check_prompts
from data import encode_prompt, load_prompts, sample_rows
from files import append_rows, read_json, read_rows, write_json
from folder import claim_folder, compare_problems
from grader import REWARDS, Grader, add_reward_flags
from metrics import as_table, summarise
from pretrained import add_model_flags, load_model
from run import InputError, join_ranks, number, on_every_rank, on_rank0, parse_flags
from run import positive_int, print0, run_script, share_out
from sampler import add_sampler_flags, draw, make_sampler


# --- during training -------------------------------------------------------------------------
def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """When and how training evaluates."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-data", default=str(TOY / "eval.jsonl"), help="given like --data")
    add("--eval-split", default="test", help="given like --split")
    add("--eval-every", type=positive_int, default=20, help="steps; first and last are always run")
    add("--eval-samples", type=positive_int, default=4, help="k of avg@k; the paper: 8")
    add("--eval-temperature", type=number(float, 0, 100), default=1.0,
        help="0: the most likely token")


def evaluate(sampler, grader, problems: list[Problem], args, timer=nullcontext) -> dict:
    """The means of `summarise` over --eval-samples samples per problem, for the log.

    Every call has the same seeds: only the model makes a difference. timer: RunState's, for "eval",
    or none.
    """
    k = args.eval_samples
    with timer("eval"):
        samples = draw(sampler, grader, problems, np.full(len(problems), k),
                       seed_key=(args.seed, EVALUATION, 0), temperature=args.eval_temperature)
        summary = summarise(sample_rows(samples, problems), same_answers(grader))
    means = {name: metric["mean"] for name, metric in summary.items()}
    accuracy = means.pop(f"avg@{k}")
    return {"eval_accuracy": accuracy} | {f"eval_{name}": mean for name, mean in means.items()}


def same_answers(grader):
    """From pairs of answers to booleans, whether they are equivalent; the ranks share the work."""

    def judge(pairs: list[tuple[str, str]]) -> list[bool]:
        boxes, others = [f"\\boxed{{{one}}}" for one, _ in pairs], [other for _, other in pairs]
        return [is_equal for is_equal, _ in grader(boxes, others)]

    return lambda pairs: share_out(pairs, judge)


# --- the command ---------------------------------------------------------------------------
PROTOCOL = "protocol.json"
COLUMNS = {"problem": int, "index": int, "response": str, "reference": str, "score": float,
           "grader_failed": bool, "finish_reason": str, "tokens": int}  # beside "answer"


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, and where it is kept; with the paper's protocol as defaults."""
    group = parser.add_argument_group("evaluation")
    what, add = group.add_mutually_exclusive_group(required=True), group.add_argument
    what.add_argument(
        "--data", help=f"benchmarks, with commas between them: {', '.join(BENCHMARKS)}, or files, "
        "or hub data sets name[:config[:split]]")
    what.add_argument("--rescore", metavar="FILE", help="grade the samples of FILE, a NAME.jsonl, "
        "anew: no model is needed")
    add("--samples", type=positive_int, default=8, help="k, the samples of each problem")
    add("--limit", type=positive_int, help="use the first problems of each benchmark only")
    add("--out", default=None,
        help="folder of the evaluation; None: runs/eval-MODEL, or with --rescore nothing is kept")
    add("--resume", action="store_true",
        help="draw only what --out does not hold yet; start if it holds nothing")
    parser.set_defaults(max_prompt_tokens=1024, max_response_tokens=3072)


def graded_by(args: argparse.Namespace) -> str:
    """The reward, and the version of the reader that it stands on."""
    return f"{args.reward}, math-verify {importlib.metadata.version('math-verify')}"


def describe_protocol(args: argparse.Namespace, model, sampler) -> dict:
    """What one has to know to repeat the figures; only figures of one protocol compare."""
    flags = ("model", "samples", "temperature", "max_prompt_tokens", "max_response_tokens")
    prompt_ids = encode_prompt(sampler.tokenizer, Problem(0, "What is 1 + 1?", "2"))
    weights = hashlib.sha256()
    for parameter in model.parameters():  # the first entries of each are enough to tell models
        weights.update(parameter.detach().flatten()[:64].cpu().numpy().tobytes())
    config = cached_file(args.model, "config.json")
    commit = re.search(r"/snapshots/(\w+)/", config)  # as the hub's cache lays it out
    return {
        **{name: getattr(args, name) for name in (*flags, "seed", "limit")},
        "system_prompt": SYSTEM_PROMPT,
        "template": hashlib.sha256(str(prompt_ids).encode()).hexdigest()[:12],
        "revision": commit.group(1) if commit else None,  # none: the model is a folder
        "weights": weights.hexdigest()[:12],
        "sampler": type(sampler).__name__,
        "grader": graded_by(args),
    }


def start_folder(out: Path, protocol: dict) -> None:
    """Write protocol.json, or compare with it; cut torn last lines of the files in "problems"."""
    record = out / PROTOCOL
    before = read_json(record) if record.exists() else protocol | {"problems": {}}
    changed = {name for name in protocol if protocol[name] != before.get(name)} - {"problems"}
    if changed:
        raise InputError(f"--out {out}: was made with another {', '.join(sorted(changed))}; choose "
                         "another --out")
    held = [path for path in out.glob("*.jsonl") if path.stem in protocol["problems"]]
    for path in held:
        if before["problems"].get(path.stem) != protocol["problems"][path.stem]:
            raise InputError(f"{path}: is not of these problems; choose another --out")
    write_json(record, protocol | {"problems": before["problems"] | protocol["problems"]})
    for path in held:
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def read_samples(path: Path) -> list[dict]:
    """The rows of a NAME.jsonl; raises InputError if this command did not write it."""
    rows = read_rows(path)
    for line, row in enumerate(rows, start=1):
        is_whole = isinstance(row, dict) and all(type(row.get(n)) is t for n, t in COLUMNS.items())
        if not is_whole or row["score"] not in (0, 1):
            raise InputError(f"{path}: line {line} is no sample; give a NAME.jsonl of eval.py")
    if len({(row["problem"], row["index"]) for row in rows}) < len(rows):
        raise InputError(f"{path}: holds a sample twice; choose another file")
    return rows


def complete_benchmark(path: Path, problems: list[Problem], sampler, grader, args) -> list[dict]:
    """--samples rows per problem, in order: what `path` holds, and new ones, appended to it."""
    rows = read_samples(path) if path.exists() else []
    held = {(row["problem"], row["index"]) for row in rows}
    wanted = {(problem.id, index): (problem, index) for problem in problems
              for index in range(args.samples)}
    if not held <= wanted.keys():
        raise InputError(f"{path}: holds samples of problem {min(held - wanted.keys())[0]} that "
                         "were not asked for; choose another --out")
    missing = [wanted[key] for key in wanted if key not in held]
    # Samples drawn before they are saved: four batches, so that the engine is rarely half empty.
    at_once = 4 * dist.get_world_size() * sampler.batch_size
    bar = tqdm(desc=path.stem, total=len(problems) * args.samples, initial=len(rows), unit="sample",
               disable=dist.get_rank() > 0)
    for start in range(0, len(missing), at_once):
        asked, indices = zip(*missing[start : start + at_once])
        samples = draw(sampler, grader, asked, [1] * len(asked), first_index=indices,
                       seed_key=(args.seed, EVALUATION, 0), temperature=args.temperature)
        new = sample_rows(samples, asked)
        on_rank0(append_rows, path, new)
        rows += new
        bar.update(len(samples))
    bar.close()
    return sorted(rows, key=lambda row: (row["problem"], row["index"]))


def evaluate_benchmarks(args: argparse.Namespace, out: Path, grader, device) -> tuple[dict, dict]:
    """(protocol, rows by benchmark) of all that --data names."""
    specs = {Path(spec).stem: spec for spec in args.data.split(",")}
    if len(specs) < len(args.data.split(",")):
        raise InputError(f"--data {args.data}: two end alike, and would be one file; rename one")
    model, tokenizer = on_every_rank(load_model, args, device)
    load = partial(load_prompts, tokenizer=tokenizer, args=args, limit=args.limit, training=False)
    problems = {name: on_every_rank(load, spec, "test") for name, spec in specs.items()}
    on_every_rank(check_prompts, model, sum(problems.values(), []))
    digests = compare_problems({}, problems)
    sampler = make_sampler(model, tokenizer, args)
    protocol = describe_protocol(args, model, sampler) | {"problems": digests}
    on_rank0(start_folder, out, protocol)
    rows = {}
    for name, asked in problems.items():
        rows[name] = complete_benchmark(out / f"{name}.jsonl", asked, sampler, grader, args)
    return protocol, rows


def rescore(path: Path, out: Path | None, grader, judge: str) -> tuple[dict, dict]:
    """(protocol, rows by benchmark) of the samples in `path`, graded anew; kept in `out` if set."""
    rows = read_samples(path)
    if len(set(Counter(row["problem"] for row in rows).values())) != 1:
        raise InputError(f"--rescore {path}: is empty, or uneven over problems; --resume it first")
    rows.sort(key=lambda row: (row["problem"], row["index"]))
    samples = [Sample(row["problem"], row["index"], [], np.zeros(row["tokens"], np.int32),
                      row["finish_reason"] == "stop", row["response"]) for row in rows]
    grader.grade(samples, [row["reference"] for row in rows])
    changed = sum(row["score"] != sample.reward for row, sample in zip(rows, samples))
    for row, sample in zip(rows, samples):
        row |= {"answer": extract_boxed(sample.text), "score": sample.reward,
                "grader_failed": sample.grader_failed}
    print0(f"{path}: {changed} of {len(rows)} scores differ from the saved ones, with {judge}")
    record = path.parent / PROTOCOL
    protocol = read_json(record) if record.exists() else {}
    protocol |= {"grader": judge, "problems": {path.stem: "graded anew"}}
    if out:
        on_rank0(start_folder, out, protocol)
        on_rank0(append_rows, out / path.name, rows)
    return protocol, {path.stem: rows}


def main(argv=None) -> None:
    """Draw, or grade anew; save samples and figures; print protocol and table."""
    args = parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_reward_flags,
                       add_command_flags)
    device = join_ranks()
    folder = args.out or (None if args.rescore else f"runs/eval-{Path(args.model).name}")
    out = Path(folder) if folder else None
    resume = args.resume and not args.rescore
    lock = claim_folder(out, (PROTOCOL,), resume) if out else nullcontext()
    with lock, Grader(REWARDS[args.reward]) as grader:
        if args.rescore:
            protocol, rows = rescore(Path(args.rescore), out, grader, graded_by(args))
        else:
            protocol, rows = evaluate_benchmarks(args, out, grader, device)
        results = {}
        for name, part in rows.items():
            results[name] = {"problems": len({row["problem"] for row in part})}
            results[name] |= summarise(part, same_answers(grader))
        if out:
            on_rank0(write_json, out / "summary.json", {"protocol": protocol, "results": results})
    print0("\n".join(f"{name}: {value}" for name, value in protocol.items()))
    print0(f"\n{as_table(results)}")


if __name__ == "__main__":
    run_script(main)
