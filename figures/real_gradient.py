"""How good a step's gradient is on a real model, by how its samples are spent; how p is predicted.

    python figures/real_gradient.py run --bank bank.npz     # minutes; figures/real_bank.py makes it
    python figures/real_gradient.py table                   # the tables, from real_gradient.jsonl

A step draws 64 samples from the bank, with replacement. So the bank's samples are the population,
whose p, G and exact gradients are known. Each repetition resamples, too, for the intervals:
- the last prompts of the bank, --tested of them, chosen with replacement, are what steps are made
  of, and it is their mean gradient that is estimated;
- some of the others teach a predictor: 8 steps of 16, 4 samples of each. (All choices about the
  predictor were made on these others: see README.md.)

Signal: the mean of the estimates along the exact gradient, S; noise: the root of their variance V;
both over the exact gradient's length. Cosine: between the mean estimate and the exact gradient, 1
if there is no bias but a shrinking. Error: the mean squared error over the squared length. What an
update gains, at the step size that suits it, grows with S^2 / V as long as noise is the larger, and
V falls as 1 / samples. So the efficiency of a way, over that of uniform counts, is S^2 / V for each
sample, or, since users pay tokens, for each token. Bias across the gradient is not charged for.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
from real_bank import Bank, facts  # noqa: E402
from real_ways import BUDGET, WAYS, Step, draw  # noqa: E402
from speed import PROMPTS, SAMPLES_EACH, SMALLEST  # noqa: E402
from tqdm import tqdm  # noqa: E402

from files import read_rows  # noqa: E402
from grpo import grpo_advantage  # noqa: E402
from predictor import Predictor  # noqa: E402
from run import InputError, run_script  # noqa: E402

RECORDS = Path(__file__).with_suffix(".jsonl")
DRAWN = Path(__file__).with_name("real_samples.jsonl")  # rewards and lengths of each prompt

LAYERS = ("middle", "last")
TEACHERS = 8 * PROMPTS
SHOWN_AFTER = (2, 4, 8)  # steps of teaching, of 64 samples each


# --- one repetition -----------------------------------------------------------------------------
def estimate(step: Step, prompts, rows, samples) -> tuple[np.ndarray, dict]:
    """(a step's gradient, (size,); what the step was), with --weighting prompt, but not divided by
    the step's mean length."""
    places = prompts[rows], samples
    right = step.bank.right[places].astype(float)
    drawn, solved = (np.bincount(rows, x, len(prompts)) for x in (np.ones(len(rows)), right))
    served, is_mixed = (drawn > 0).sum(), (solved > 0) & (solved < drawn)
    if step.objective == "raft":
        weights = right / np.maximum(solved[rows], 1)
    else:
        weights = np.zeros(len(rows))
        for i in np.flatnonzero(is_mixed):
            weights[rows == i] = grpo_advantage(right[rows == i]) / drawn[i]
    return weights / served @ step.bank.sketches[places], {
        "samples": len(rows), "tokens_per_sample": step.bank.lengths[places].mean(),
        "served": served, "mixed": is_mixed.sum() / served}


def measure(step: Step, way, estimates: int) -> dict[str, float]:
    """What many steps of one way say of the prompts' mean gradient."""
    exact = step.bank.exact[step.objective][step.prompts].mean(axis=0)
    length = np.linalg.norm(exact)
    found, described = zip(*(estimate(step, *way(step)) for _ in range(estimates)))
    found = np.array(found) / length
    mean, along = found.mean(axis=0), found @ exact / length
    variance = ((found - mean) ** 2).sum() / (estimates - 1)
    known = {name: np.mean([each[name] for each in described]) for name in described[0]}
    # The square of a mean of so few has a part of their variance in it, which is taken out.
    square = np.sign(along.mean()) * along.mean() ** 2 - along.var(ddof=1) / estimates
    gain = square / variance / known["samples"]
    mean_length = np.sqrt(max((mean**2).sum() - variance / estimates, 1e-12))
    return known | {
        "signal": along.mean(), "noise": np.sqrt(variance),
        "cosine_of_mean": along.mean() / mean_length,
        "error": ((found - exact / length) ** 2).sum(axis=1).mean(),
        "gain_per_sample": gain, "gain_per_token": gain / known["tokens_per_sample"]}


def teach(bank: Bank, layer: str, teachers, tested, rng) -> tuple[Predictor, list[dict]]:
    """(a predictor that has learnt from some prompts, how it predicts p of others on the way)."""
    predictor, states = Predictor({}), bank.columns[layer].astype(float)
    features, rows = predictor.features(states[teachers]), []
    for number in range(1, len(teachers) // PROMPTS + 1):
        mine = np.arange((number - 1) * PROMPTS, number * PROMPTS)
        drawn = draw(bank, np.full(PROMPTS, SAMPLES_EACH), rng)
        table = bank.summarise(teachers[mine], *drawn)
        predictor.learn(features[mine], table["num_right"], table["num_drawn"])
        if number in SHOWN_AFTER:
            p = predictor.predict(predictor.features(states[tested]))
            rows.append({"layer": layer, "samples": number * BUDGET, "mean_predicted": p.mean(),
                         "mean": bank.p[tested].mean(),
                         "correlation": np.corrcoef(p, bank.p[tested])[0, 1]})
    return predictor, rows


def repeat(bank: Bank, seed: int, args) -> tuple[list[dict], list[dict]]:
    """(rows about the ways, rows about the predictions) of one repetition."""
    rng = np.random.default_rng(seed)
    others, last = np.split(np.arange(len(bank.p)), [-args.tested])
    teachers = rng.permutation(others)[:TEACHERS]
    tested, rows = rng.choice(last, len(last)), []
    taught = {layer: teach(bank, layer, teachers, tested, rng) for layer in LAYERS}
    predictor = taught[args.layer][0]
    predicted_p = predictor.predict(predictor.features(bank.columns[args.layer].astype(float)))
    for objective in SMALLEST:
        step = Step(bank, tested, objective, predicted_p, rng)
        found = {name: measure(step, way, args.estimates) for name, way in WAYS.items()}
        for name, row in found.items():
            for unit in ("sample", "token"):  # against uniform in the same repetition
                row[f"efficiency_per_{unit}"] = (row[f"gain_per_{unit}"]
                                                 / found["uniform"][f"gain_per_{unit}"])
            rows.append({"objective": objective, "way": name, **row})
    return rows, [row for _, shown in taught.values() for row in shown]


# --- the records --------------------------------------------------------------------------------
def summary(rows: list[dict], *keys: str) -> list[dict]:
    """One record for each value of the keys: median, 2.5 % and 97.5 % of every number."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    records = []
    for key, group in groups.items():
        numbers = {name: np.array([row[name] for row in group]) for name in group[0]}
        records.append(dict(zip(keys, key)) | {
            name: np.quantile(values, [0.5, 0.025, 0.975]).tolist()
            for name, values in numbers.items() if name not in keys})
    return records


def run_all(args) -> None:
    """Measure, write the records, and what was drawn of each prompt."""
    bank, ways, predictions = Bank(args.bank), [], []
    if not 0 < args.tested < len(bank.p):
        raise InputError(f"--tested {args.tested}: must be at least 1, and fewer than the "
                         f"{len(bank.p)} prompts of --bank; name another")
    for seed in tqdm(range(args.repetitions)):
        rows, shown = repeat(bank, seed, args)
        ways, predictions = ways + rows, predictions + shown
    records = facts(bank) + summary(predictions, "layer", "samples")
    write(args.records, records + summary(ways, "objective", "way"))
    write(args.drawn, [
        {"row": int(row), "task": str(task), "rewards": "".join(map(str, right.astype(int))),
         "tokens": lengths.tolist()} for row, task, right, lengths in zip(
             bank.columns["row"], bank.columns["task"], bank.right, bank.lengths)])


def rounded(value):
    """Numbers, alone or in a list, to four digits."""
    if isinstance(value, list):
        return [rounded(number) for number in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(path: Path, rows: list[dict]) -> None:
    """JSON lines, without spaces."""
    rows = [{name: rounded(value) for name, value in row.items()} for row in rows]
    lines = [json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def with_range(values: list[float]) -> str:
    """A median and its range, (3,), as a cell."""
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def table(args) -> None:
    """Print the records as tables."""
    records = read_rows(args.records)
    for row in records:
        if "fact" in row:
            print(row["fact"], *(f"{name} {x}" for name, x in row.items() if name != "fact"))
    print("\n| hidden states of | samples | correlation | mean predicted p | mean p |")
    print("|---|---|---|---|---|")
    for row in records:
        if "layer" in row:
            print(f"| {row['layer']} layer | {row['samples']} | "
                  f"{with_range(row['correlation'])} | {with_range(row['mean_predicted'])} | "
                  f"{row['mean'][0]:.2f} |")
    print("\n| objective | way | prompts | mixed groups | tokens a sample | signal | noise | "
          "cosine | error | efficiency per sample | efficiency per token |\n|" + "---|" * 11)
    for row in records:
        if "way" in row:
            print(f"| {row['objective']} | {row['way']} | {row['served'][0]:.1f} | "
                  f"{row['mixed'][0]:.2f} | {row['tokens_per_sample'][0]:.1f} | "
                  f"{row['signal'][0]:.2f} | {row['noise'][0]:.2f} | "
                  f"{row['cosine_of_mean'][0]:.2f} | {row['error'][0]:.1f} | "
                  f"{with_range(row['efficiency_per_sample'])} | "
                  f"{with_range(row['efficiency_per_token'])} |")


def main(argv=None) -> None:
    """Parse the flags, and run or print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run_all), ("table", table)):
        command = commands.add_parser(name)
        command.add_argument("--records", type=Path, default=RECORDS)
        command.set_defaults(function=function)
    add = commands.choices["run"].add_argument
    add("--bank", type=Path, required=True)
    add("--drawn", type=Path, default=DRAWN, help="rewards and lengths go there")
    add("--layer", choices=LAYERS, default="middle", help="whose states the ways' predictor gets")
    add("--tested", type=int, default=256, help="of the bank's prompts, the last; others teach")
    add("--repetitions", type=int, default=100)
    add("--estimates", type=int, default=1000, help="steps for each number")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    run_script(main)
