"""The toy's training files: what is in them, and that the model solves what their mixes say."""

import json
import random

import numpy as np
import pytest
from conftest import TOY, flags

from data import EVALUATION, load_prompts
from pretrained import load_model
from sampler import HfSampler, draw

# Problems, and the shares that none and all of 16 samples solve: means of (1 - p)^16 and p^16, with p by 64 others.
MIXES = {"train": (1000, 0.25, 0.36), "spared": (2000, 0.19, 0.09), "hard": (1000, 0.57, 0.12)}


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_has_its_size_and_nothing_twice_nor_of_the_evaluation(mix):
    rows, exam = ([json.loads(line) for line in (TOY / f"{name}.jsonl").read_text().splitlines()]
                  for name in (mix, "eval"))
    asked = {row["problem"] for row in rows}
    assert len(rows) == len(asked) == MIXES[mix][0]
    assert not asked & {row["problem"] for row in exam}


@pytest.mark.parametrize("mix", ["train", "hard"])
def test_four_references_in_a_hundred_are_wrong(mix):
    rows = [json.loads(line) for line in (TOY / f"{mix}.jsonl").read_text().splitlines()]
    assert sum(eval(row["problem"]) != int(row["answer"]) for row in rows) == 40


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_the_model_solves_what_a_mix_promises(mix, device, grader):
    _, never, always = MIXES[mix]
    args = flags("--sampler-batch-size", 64)
    model, tokenizer = load_model(args, device)
    problems = random.Random(0).sample(load_prompts(str(TOY / f"{mix}.jsonl"), "train", tokenizer, args, training=True), 60)
    samples = draw(HfSampler(model, tokenizer, args), grader, problems, [16] * 60, seed_key=(0, EVALUATION, 0),
                   temperature=1.0)
    right = np.array([sample.reward for sample in samples]).reshape(60, 16).mean(axis=1)
    for share, expected in [((right == 0).mean(), never), ((right == 1).mean(), always)]:
        assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / 60)
