"""The toy's mixes: problems grouped by how often the model solves them. For make_toy.py.

A problem's p is measured by the project's own sampler and grader at temperature 1. Some samples
depend on rounding, and so a few of the problems on the processor; on one machine they are the same.
"""

import json
import os
import random
import sys
import zlib
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what a GPU samples is not reproducible
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)

import run  # noqa: E402
from data import TRAINING, Problem, encode_prompt  # noqa: E402
from grader import Grader  # noqa: E402
from pretrained import add_model_flags, load_model  # noqa: E402
from sampler import add_sampler_flags, draw, make_sampler  # noqa: E402

MIXES = {
    "train.jsonl": {"wrong reference": 40, "middle": 300, "mastered": 450, "hopeless": 210},
    "hard.jsonl": {"wrong reference": 40, "middle": 250, "mastered": 150, "hopeless": 560},
}
BELONGS = {  # between 0.01 and 0.03 a problem is in no group
    "wrong reference": lambda p: p < 0.01,
    "middle": lambda p: 0.03 <= p <= 0.95,
    "mastered": lambda p: p > 0.95,
    "hopeless": lambda p: p < 0.01,
}
SEED = 2505  # of the samples; one that runs are unlikely to have
SAMPLES = 64
CHUNK = 50  # problems that are measured at once


def accept_rates(rows: list[dict[str, str]], sampler, grader: Grader) -> np.ndarray:
    """p of each problem, (rows,): by SAMPLES, or by twice as many where that is near a border."""
    problems = []
    for row in rows:
        seed = zlib.crc32(row["problem"].encode())  # not by place: the same in any order
        problem = Problem(seed, row["problem"], row["answer"])
        problems.append(replace(problem, prompt_ids=encode_prompt(sampler.tokenizer, problem)))

    def measure(problems: list[Problem], first_index: int) -> np.ndarray:
        samples = draw(sampler, grader, problems, [SAMPLES] * len(problems), temperature=1.0,
                       seed_key=(SEED, TRAINING, 0), first_index=first_index)
        rewards = np.array([sample.reward for sample in samples])
        return rewards.reshape(-1, SAMPLES).mean(axis=1)

    p = measure(problems, first_index=0)
    near = np.flatnonzero((p < 0.06) | (p > 0.9))
    p[near] = (p[near] + measure([problems[i] for i in near], first_index=SAMPLES)) / 2
    return p


def find_groups(candidates: dict[str, list], sampler, grader: Grader) -> dict[str, list]:
    """The first candidates of each group that belong to it, as many as the largest mix takes."""
    groups, used = {}, set()
    for name, rows in candidates.items():
        rows = [row for row in rows if row["problem"] not in used]
        wanted, found, tried = max(mix[name] for mix in MIXES.values()), [], 0
        while len(found) < wanted and tried < len(rows):
            chunk = rows[tried : tried + CHUNK]
            tried += len(chunk)
            p = accept_rates(chunk, sampler, grader)
            found += [row for row, rate in zip(chunk, p) if BELONGS[name](rate)]
            print(f"{name}: {len(found)} of {tried}, {wanted} wanted", flush=True)
        if len(found) < wanted:
            sys.exit(f"{name}: too few candidates")
        groups[name] = found[:wanted]
        used |= {row["problem"] for row in groups[name]}
    return groups


def write_mixes(out: Path, candidates: dict[str, list], rng: random.Random) -> None:
    """Write MIXES for the model in the folder `out`; candidates: rows for each group."""
    # Larger batches than this do not fit a core's caches.
    words = ["--model", str(out), "--sampler", "hf", "--sampler-batch-size", "64"]
    args = run.parse_flags(words, __doc__, add_model_flags, add_sampler_flags)
    sampler = make_sampler(*load_model(args, run.join_ranks()), args)
    with Grader() as grader:
        groups = find_groups(candidates, sampler, grader)
    for file, mix in MIXES.items():
        rows = [row for name, count in mix.items() for row in groups[name][:count]]
        rng.shuffle(rows)
        write_rows(out / file, rows)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """One problem a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
