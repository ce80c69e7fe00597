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
import json
import math
import os
import re
from collections import Counter
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm
from transformers.utils import cached_file

from data import BENCHMARKS, SYSTEM_PROMPT, TOY, Grader, InputError, Problem, Sample
from data import encode_prompt, extract_boxed, read_rows
from model import add_model_flags, load_model
from run import append_rows, claim_folder, join_ranks, non_negative, on_rank0, parse_flags
from run import positive_int, print0, run_script
from sampler import EVALUATION, add_sampler_flags, as_rows, draw, load_prompts, make_sampler

# --- metrics -------------------------------------------------------------------------------
def pass_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each problem, (problems,): the chance that one of k samples is right.

    1 - C(n - c, k) / C(n, k), where c of the n are right: unbiased (arXiv 2107.03374, Eq. 1).
    scores: 0 or 1, (problems, n), n >= k.
    """
    n = scores.shape[1]
    num_right = scores.sum(axis=1).astype(int)
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in num_right.tolist()])


def majority_scores(answers: list[list[str]], scores: np.ndarray, grader) -> np.ndarray:
    """maj@k of each problem, (problems,): the score of the answer that most of its samples give.

    answers: k per problem, "" for none, which is no vote. scores: (problems, k). Two answers are
    the same if the grader says so; of two with as many votes, the first counts.
    """
    pairs = []  # (problem, one sample, another sample)
    for i, group in enumerate(answers):
        voters = [j for j, answer in enumerate(group) if answer]
        pairs += [(i, one, other) for one, other in combinations(voters, 2)]
    # Sorted, so that each pair of texts is judged once, in one direction.
    texts = [sorted((answers[i][one], answers[i][other])) for i, one, other in pairs]
    grades = grader([f"\\boxed{{{text}}}" for text, _ in texts], [text for _, text in texts])
    votes = np.array([[float(answer != "") for answer in group] for group in answers])
    for (i, one, other), (agree, _) in zip(pairs, grades):
        votes[i, one] += agree
        votes[i, other] += agree
    return scores[np.arange(len(scores)), votes.argmax(axis=1)]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over problems and its standard error, 0 for a single problem; values: (problems,)."""
    if len(values) == 1:
        return float(values[0]), 0.0
    return values.mean().item(), values.std(ddof=1).item() / math.sqrt(len(values))


def summarise(rows: list[dict], grader) -> dict[str, tuple[float, float]]:
    """(mean, standard error) over problems of each metric; rows: k of each problem in turn."""
    num_problems = len({row["problem"] for row in rows})
    k = len(rows) // num_problems
    scores = np.reshape([row["score"] for row in rows], (num_problems, k))
    answers = [row["answer"] or "" for row in rows]
    groups = [answers[start : start + k] for start in range(0, len(answers), k)]
    metrics = {f"avg@{k}": scores}  # (problems,) or (problems, k) each
    for j in sorted({k} | {2**i for i in range(1, k.bit_length())}):  # 2, 4, 8, ..., and k
        metrics[f"pass@{j}"] = pass_at_k(scores, j)
    metrics[f"maj@{k}"] = majority_scores(groups, scores, grader)
    metrics["response_tokens"] = [row["tokens"] for row in rows]
    metrics["no_answer"] = [not answer for answer in answers]
    metrics["truncated"] = [row["finish_reason"] == "length" for row in rows]
    metrics["grader_failures"] = [row["grader_failed"] for row in rows]
    per_problem = {name: np.reshape(x, (num_problems, -1)) for name, x in metrics.items()}
    return {name: mean_and_error(x.mean(axis=1)) for name, x in per_problem.items()}


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """When and how training evaluates."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-data", default=str(TOY / "eval.jsonl"), help="given like --data")
    add("--eval-split", default="test", help="given like --split")
    add("--eval-every", type=positive_int, default=5, help="steps; first and last are always run")
    add("--eval-samples", type=positive_int, default=4, help="k of avg@k; the paper: 8")
    add("--eval-temperature", type=non_negative, default=1.0, help="0: the most likely token")


def evaluate(sampler, grader, problems: list[Problem], args: argparse.Namespace) -> dict:
    """The means of `summarise` over --eval-samples samples per problem, for the log.

    Every call uses the same seeds: two evaluations of a run differ by the model alone (but for
    vLLM on CUDA, whose seeds go on).
    """
    k = args.eval_samples
    counts, key = np.full(len(problems), k), (args.seed, EVALUATION, 0)
    samples = draw(sampler, grader, problems, counts, seed_key=key,
                   temperature=args.eval_temperature)
    means = {name: m for name, (m, _) in summarise(as_rows(samples, problems), grader).items()}
    accuracy = means.pop(f"avg@{k}")
    return {"eval_accuracy": accuracy} | {f"eval_{name}": mean for name, mean in means.items()}


# --- the command ---------------------------------------------------------------------------

GRADER = f"math-verify {importlib.metadata.version('math-verify')}"
PROTOCOL = "protocol.json"
NEEDED = {"problem", "index", "response", "reference", "score", "finish_reason", "tokens"}


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, and where it is kept; with the paper's protocol as defaults."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--data", default=None,
        help=f"benchmarks, with commas between them: {', '.join(BENCHMARKS)}, or files, or hub "
        "data sets name[:config[:split]]")
    add("--samples", type=positive_int, default=8, help="k, the samples of each problem")
    add("--limit", type=positive_int, default=None,
        help="use the first problems of each benchmark only")
    add("--out", default=None,
        help="folder of the evaluation; None: runs/eval-MODEL, or with --rescore nothing is kept")
    add("--resume", action="store_true",
        help="draw only what --out does not hold yet; start if it holds nothing")
    add("--rescore", metavar="FILE", default=None,
        help="grade the samples of FILE, a NAME.jsonl, anew: no model is needed")
    parser.set_defaults(max_prompt_tokens=1024, max_response_tokens=3072)


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
        "grader": GRADER,
    }


def start_folder(out: Path, protocol: dict, names: list[str]) -> None:
    """Write protocol.json, or compare with it; cut lines that a killed process left unfinished."""
    record = out / PROTOCOL
    if record.exists():
        before = json.loads(record.read_text())
        changed = [name for name in protocol if protocol[name] != before.get(name)]
        if changed:
            raise InputError(
                f"--out {out}: was made with another {', '.join(changed)}; choose another --out"
            )
    record.write_text(json.dumps(protocol, indent=1))
    for path in (out / f"{name}.jsonl" for name in names):
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def draw_benchmark(path: Path, problems: list[Problem], sampler, grader, args) -> list[dict]:
    """--samples rows per problem, in order: what `path` holds, and new ones, appended to it."""
    rows = read_rows(path) if path.exists() else []
    references = {problem.id: problem.answer for problem in problems}
    if any(references.get(row["problem"]) != row["reference"] for row in rows):
        raise InputError(f"--resume: {path} holds answers to other problems; choose another --out")
    held = Counter(row["problem"] for row in rows)
    left = [problem for problem in problems if held[problem.id] < args.samples]
    # So many problems are drawn before they are saved.
    at_once = max(dist.get_world_size() * args.sampler_batch_size // args.samples, 1)
    bar = tqdm(desc=path.stem, total=len(problems) * args.samples, initial=len(rows), unit="sample",
               disable=dist.get_rank() > 0)
    for start in range(0, len(left), at_once):
        part = left[start : start + at_once]
        first = np.array([held[problem.id] for problem in part])
        samples = draw(sampler, grader, part, counts=args.samples - first, first_index=first,
                       seed_key=(args.seed, EVALUATION, 0), temperature=args.temperature)
        on_rank0(append_rows, path, as_rows(samples, part))
        rows += as_rows(samples, part)
        bar.update(len(samples))
    bar.close()
    return sorted(rows, key=lambda row: (row["problem"], row["index"]))


def draw_all(args: argparse.Namespace, out: Path, grader, device) -> tuple[dict, dict]:
    """(protocol, rows by benchmark) of all that --data names."""
    specs = {Path(spec).stem: spec for spec in args.data.split(",")}
    if len(specs) < len(args.data.split(",")):
        raise InputError(f"--data {args.data}: two end alike, and would be one file; rename one")
    model, tokenizer = load_model(args, device)
    problems = {}
    for name, spec in specs.items():
        problems[name] = load_prompts(spec, "test", tokenizer, args, args.limit)
    sampler = make_sampler(model, tokenizer, args)
    protocol = describe_protocol(args, model, sampler)
    on_rank0(start_folder, out, protocol, list(specs))
    rows = {}
    for name in specs:
        rows[name] = draw_benchmark(out / f"{name}.jsonl", problems[name], sampler, grader, args)
    return protocol, rows


def rescore(path: Path, out: Path | None, grader) -> tuple[dict, dict]:
    """(protocol, rows by benchmark) of the samples in `path`, graded anew; kept in `out` if set."""
    rows = read_rows(path)
    if not rows or not all(isinstance(row, dict) and NEEDED <= row.keys() for row in rows):
        raise InputError(f"--rescore {path}: holds no samples; give a NAME.jsonl of eval.py")
    if len(set(Counter(row["problem"] for row in rows).values())) > 1:
        raise InputError(
            f"--rescore {path}: problems differ in their number of samples; --resume it first"
        )
    rows.sort(key=lambda row: (row["problem"], row["index"]))
    scores = [row["score"] for row in rows]
    grades = grader([row["response"] for row in rows], [row["reference"] for row in rows])
    for row, (score, failed) in zip(rows, grades):
        row |= {"answer": extract_boxed(row["response"]), "score": score, "grader_failed": failed}
    changed = sum(row["score"] != before for row, before in zip(rows, scores))
    print0(f"{path}: {changed} of {len(rows)} scores differ from the saved ones, with {GRADER}")
    record = path.parent / PROTOCOL
    protocol = json.loads(record.read_text()) if record.exists() else {}
    protocol["grader"] = GRADER
    if out:
        on_rank0(start_folder, out, protocol, [])
        on_rank0(append_rows, out / path.name, rows)
    return protocol, {path.stem: rows}


def as_table(results: dict[str, dict]) -> str:
    """Markdown, one line per benchmark: mean ± standard error of each metric."""
    lines = [["benchmark", *next(iter(results.values()))]]
    lines.append(["---"] * len(lines[0]))
    for name, result in results.items():
        num_problems, *metrics = result.values()
        shown = [f"{m['mean']:.4g} ± {m['standard_error']:.2g}" for m in metrics]
        lines.append([name, str(num_problems), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None) -> None:
    """Draw, or grade anew; save samples and figures; print protocol and table."""
    args = parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_command_flags)
    if bool(args.data) == bool(args.rescore) or (args.rescore and args.resume):
        raise InputError("give either --data, to draw samples, or --rescore FILE (see --help)")
    device = join_ranks()
    folder = args.out or (f"runs/eval-{Path(args.model).name}" if args.data else None)
    out = Path(folder) if folder else None
    lock = claim_folder(out, PROTOCOL, args.resume) if out else nullcontext()
    with lock, Grader() as grader:
        if args.rescore:
            protocol, rows = rescore(Path(args.rescore), out, grader)
        else:
            protocol, rows = draw_all(args, out, grader, device)
        results = {}
        for name, benchmark_rows in rows.items():
            results[name] = {"problems": len({row["problem"] for row in benchmark_rows})}
            for metric, (mean, error) in summarise(benchmark_rows, grader).items():
                results[name][metric] = {"mean": mean, "standard_error": error}
        if out:
            summary = json.dumps({"protocol": protocol, "results": results}, indent=1)
            on_rank0((out / "summary.json").write_text, summary)
    print0("\n".join(f"{name}: {value}" for name, value in protocol.items()))
    print0(f"\n{as_table(results)}")


if __name__ == "__main__":
    run_script(main)
