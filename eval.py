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

from data import BENCHMARKS, SYSTEM_PROMPT, TOY, Grader, InputError, Problem
from data import encode_prompt, extract_boxed, read_rows
from model import add_model_flags, load_model
from run import RunState, append_rows, claim_folder, deal, join_ranks, non_negative
from run import on_every_rank, on_rank0, parse_flags, positive_int, print0, read_json
from run import run_script, write_json
from sampler import EVALUATION, add_sampler_flags, as_rows, compare_problems, draw, load_prompts
from sampler import make_sampler

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

    answers: k per problem, "" for none, which is no vote. scores: (problems, k). The grader says
    which answers are the same; of two with as many votes, the first counts.
    """
    pairs = []  # (problem, one sample, another sample)
    for i, group in enumerate(answers):
        voters = [j for j, answer in enumerate(group) if answer]
        pairs += [(i, one, other) for one, other in combinations(voters, 2)]
    # Sorted, so that each pair of texts is judged once, in one direction.
    texts = [sorted((answers[i][one], answers[i][other])) for i, one, other in pairs]
    grades = deal(texts, lambda mine: grader([f"\\boxed{{{text}}}" for text, _ in mine],
                                             [text for _, text in mine]))
    votes = np.array([[float(answer != "") for answer in group] for group in answers])
    for (i, one, other), (agree, _) in zip(pairs, grades):
        votes[i, one] += agree
        votes[i, other] += agree
    return scores[np.arange(len(scores)), votes.argmax(axis=1)]


def mean_and_error(values: np.ndarray) -> dict:
    """Mean over problems and its standard error, 0 for a single problem; values: (problems,)."""
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "standard_error": float(error)}


def sampling_error(scores: np.ndarray) -> float | None:
    """The error of avg@k over samples alone, same problems; scores: (n, k); None at k = 1."""
    n, k = scores.shape
    p = scores.mean(axis=1)  # sqrt(sum_i p_i (1 - p_i) / (k - 1)) / n
    return math.sqrt((p * (1 - p)).sum() / (k - 1)) / n if k > 1 else None


def summarise(rows: list[dict], grader) -> dict[str, dict]:
    """`mean_and_error` of each metric; rows: k of each problem in turn."""
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
    summary = {name: mean_and_error(x.mean(axis=1)) for name, x in per_problem.items()}
    summary[f"avg@{k}"]["sampling_error"] = sampling_error(scores)
    return summary


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    """When and how training evaluates."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-data", default=str(TOY / "eval.jsonl"), help="given like --data")
    add("--eval-split", default="test", help="given like --split")
    add("--eval-every", type=positive_int, default=20, help="steps; first and last are always run")
    add("--eval-samples", type=positive_int, default=4, help="k of avg@k; the paper: 8")
    add("--eval-temperature", type=non_negative, default=1.0, help="0: the most likely token")


def evaluate(sampler, grader, problems: list[Problem], args: argparse.Namespace) -> dict:
    """The means of `summarise` over --eval-samples samples per problem, for the log.

    Every call has the same seeds (not with vLLM on CUDA): only the model makes a difference.
    """
    k = args.eval_samples
    samples = draw(sampler, grader, problems, np.full(len(problems), k),
                   seed_key=(args.seed, EVALUATION, 0), temperature=args.eval_temperature)
    summary = summarise(as_rows(samples, problems), grader)
    means = {name: metric["mean"] for name, metric in summary.items()}
    accuracy = means.pop(f"avg@{k}")
    return {"eval_accuracy": accuracy} | {f"eval_{name}": mean for name, mean in means.items()}


# --- the command ---------------------------------------------------------------------------
PROTOCOL = "protocol.json"
GRADER = f"math-verify {importlib.metadata.version('math-verify')}"
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


def draw_benchmark(path: Path, problems: list[Problem], sampler, grader, args) -> list[dict]:
    """--samples rows per problem, in order: what `path` holds, and new ones, appended to it."""
    rows = read_samples(path) if path.exists() else []
    held = Counter(row["problem"] for row in rows)
    left = [problem for problem in problems if held[problem.id] < args.samples]
    # Problems drawn before they are saved: four batches, so that the engine is rarely half empty.
    at_once = max(4 * dist.get_world_size() * args.sampler_batch_size // args.samples, 1)
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
    model, tokenizer = on_every_rank(load_model, args, device)
    problems, state = {}, RunState()
    for name, spec in specs.items():
        problems[name] = on_every_rank(load_prompts, spec, "test", tokenizer, args, args.limit)
    compare_problems(state, problems)
    sampler = make_sampler(model, tokenizer, args)
    protocol = describe_protocol(args, model, sampler) | {"problems": state.problems}
    on_rank0(start_folder, out, protocol)
    rows = {}
    for name in specs:
        rows[name] = draw_benchmark(out / f"{name}.jsonl", problems[name], sampler, grader, args)
    return protocol, rows


def rescore(path: Path, out: Path | None, grader) -> tuple[dict, dict]:
    """(protocol, rows by benchmark) of the samples in `path`, graded anew; kept in `out` if set."""
    rows = read_samples(path)
    if len(set(Counter(row["problem"] for row in rows).values())) != 1:
        raise InputError(f"--rescore {path}: is empty, or uneven over problems; --resume it first")
    rows.sort(key=lambda row: (row["problem"], row["index"]))
    grades = grader([row["response"] for row in rows], [row["reference"] for row in rows])
    changed = sum(row["score"] != score for row, (score, _) in zip(rows, grades))
    for row, (score, failed) in zip(rows, grades):
        row |= {"answer": extract_boxed(row["response"]), "score": score, "grader_failed": failed}
    print0(f"{path}: {changed} of {len(rows)} scores differ from the saved ones, with {GRADER}")
    record = path.parent / PROTOCOL
    protocol = read_json(record) if record.exists() else {}
    protocol |= {"grader": GRADER, "problems": {path.stem: "graded anew"}}
    if out:
        on_rank0(start_folder, out, protocol)
        on_rank0(append_rows, out / path.name, rows)
    return protocol, {path.stem: rows}


def as_table(results: dict[str, dict]) -> str:
    """Markdown, one line per benchmark: mean ± standard error; avg@k has (sampling_error), too."""
    lines = [["benchmark", *next(iter(results.values()))]]
    lines.append(["---"] * len(lines[0]))
    for name, result in results.items():
        num_problems, *metrics = result.values()
        shown = [f"{m['mean']:.4g} ± {m['standard_error']:.2g}" for m in metrics]
        if metrics[0]["sampling_error"] is not None:
            shown[0] += f" ({metrics[0]['sampling_error']:.2g})"
        lines.append([name, str(num_problems), *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv=None) -> None:
    """Draw, or grade anew; save samples and figures; print protocol and table."""
    args = parse_flags(argv, __doc__, add_model_flags, add_sampler_flags, add_command_flags)
    device = join_ranks()
    folder = args.out or (None if args.rescore else f"runs/eval-{Path(args.model).name}")
    out = Path(folder) if folder else None
    resume = args.resume and not args.rescore
    lock = claim_folder(out, PROTOCOL, resume) if out else nullcontext()
    with lock, Grader() as grader:
        if args.rescore:
            protocol, rows = rescore(Path(args.rescore), out, grader)
        else:
            protocol, rows = draw_all(args, out, grader, device)
        results = {
            name: {"problems": len({row["problem"] for row in part})} | summarise(part, grader)
            for name, part in rows.items()
        }
        if out:
            on_rank0(write_json, out / "summary.json", {"protocol": protocol, "results": results})
    print0("\n".join(f"{name}: {value}" for name, value in protocol.items()))
    print0(f"\n{as_table(results)}")


if __name__ == "__main__":
    run_script(main)
