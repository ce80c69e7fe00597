"""What predictions of p would know on the way through a run with equal counts, by layer and prior.

    python tests/bench_prediction.py                   # the toy, 60 steps of 32 x 4: minutes
    python tests/bench_prediction.py --model ... --data ...          # with flags of grpo.py

In each step, of twelve or more, every predictor is asked first, and then learns from the step's
samples. Shown are means over steps, without the first: the correlation of the predicted p with the
shares of right samples, whose own noise bounds it, and the log-likelihood of a sample, in nats.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
import torch  # noqa: E402

import grpo  # noqa: E402
import predictor  # noqa: E402
import raft  # noqa: E402
from data import problems_of_step  # noqa: E402
from gvm import e_step, estimate  # noqa: E402
from model import summarise_states  # noqa: E402
from predictor import Predictor  # noqa: E402

SPREADS = (1.0, 1.6, 2.9)
FLAGS = ["--allocator", "uniform", "--prompts-per-step", "32", "--steps", "60", "--lr", "1.5e-4",
         "--eval-every", "1000", "--eval-samples", "1", "--save-every", "1000"]


@torch.no_grad()
def states_by_layer(model, problems) -> np.ndarray:
    """What Policy.prompt_states says of each problem, after each layer: (layers, problems, ...)."""
    found = []
    for problem in problems:
        ids = torch.tensor([problem.prompt_ids], device=model.device)
        hidden = model.base_model(ids, output_hidden_states=True, use_cache=False).hidden_states
        found.append([summarise_states(layer[0].double()).cpu().numpy()
                      for layer in hidden[1:]])  # the first are the embeddings
    return np.array(found).swapaxes(0, 1)


class Observer:
    """Takes the place of e_step, and asks and teaches predictors beside it."""

    def __init__(self):
        self.predictors: dict[tuple, Predictor] = {}  # by layer and SPREAD
        self.rows: dict[tuple, list] = {}  # (correlation, log-likelihood) of each step

    def __call__(self, problems, step, state, source, args) -> tuple:
        batch = problems_of_step(problems, step, args)
        layers = states_by_layer(source.policy.model, batch)
        result = e_step(problems, step, state, source, args)
        table = estimate(result[1], batch, args.weighting)
        right, wrong = table["num_right"], table["num_drawn"] - table["num_right"]
        for layer, states in enumerate(layers, start=1):
            for spread in SPREADS:
                predictor.SPREAD, key = spread, (layer, spread)
                mine = self.predictors.setdefault(key, Predictor({}))
                features = mine.features(states)
                predicted = mine.predict(features)
                mine.learn(features, right, table["num_drawn"])
                predicted = predicted.clip(0.005, 0.995)
                nats = (right @ np.log(predicted) + wrong @ np.log(1 - predicted)) / (right + wrong).sum()
                correlation = np.corrcoef(predicted, table["accept_rate"])[0, 1]
                self.rows.setdefault(key, []).append((correlation, nats))
        return result


def main() -> None:
    """Run, and print the table."""
    observer = Observer()
    raft.e_step = observer
    with tempfile.TemporaryDirectory() as folder:
        grpo.main([*FLAGS, "--out", f"{folder}/run", *sys.argv[1:]])
    steps = len(next(iter(observer.rows.values())))
    parts = [(1, steps // 6), (steps // 6, steps // 2), (steps // 2, steps)]
    heads = [f"steps {first + 1} to {last}" for first, last in parts]
    print("| layer | spread | " + " | ".join(heads) + " |\n" + "|---" * (2 + len(parts)) + "|")
    for (layer, spread), rows in observer.rows.items():
        means = [np.nanmean(rows[first:last], axis=0) for first, last in parts]
        cells = [f"{correlation:.2f}, {nats:.3f}" for correlation, nats in means]
        print(f"| {layer} | {spread} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
