"""How good the gradient estimates of raft.py and grpo.py are, with each allocator, at the same number of samples.

    python tests/bench_variance.py                 # the toy at the start of training; over half an hour
    python tests/bench_variance.py --alpha 0.1     # with flags of raft.py and grpo.py

Measured, not predicted: for each estimator and each way to spend 8 samples a prompt (pilot included, unsolved prompts
included), many independent estimates of one update's gradient are made by the project's own code, at fixed weights, and
compared with the exact gradient. Their mean squared error is the sum of their variance and of their squared bias; all
three are given relative to the mean squared error with uniform counts. A prediction has learnt from other problems, and
leaves out some of these, which makes it biased. The last tables are the bias of `loo` by p, and what
leaving prompts out does.

The damped log-likelihood is the target that Eq. 7 stands for: a prompt's gradient times (1 + alpha / p^beta)^(-1/2), in
the estimate and in the exact gradient. Undamped, prompts that are solved in under 1 % of samples make up most of the
error, which no allocation of so few samples can repair.

How. Many samples of each problem are drawn once, and these are the population: estimates draw from them, with
replacement, and the exact gradient, p and G are theirs, without an error of their own. (An independent set for the
exact gradient would blur the comparison: problems that are solved once in hundreds of samples make two sets differ
by a good part of the errors that are to be compared. By how much the two halves of the population differ is printed.)
Gradients are those of all parameters, kept as a count sketch: each coordinate is added with a random sign to one of
1,024 sums, which leaves inner products right on average; the error that it makes in a gradient's length is printed.
"""

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "figures")]

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
import torch  # noqa: E402
import conftest  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

import grpo  # noqa: E402
import gvm  # noqa: E402
import methods  # noqa: E402 (in figures/)
from allocator import allocate, reward_weights  # noqa: E402
from batches import collate, fill_norms, prompt_states  # noqa: E402
from folder import RunState  # noqa: E402
from data import Sample, load_prompts, problems_of_step  # noqa: E402
from grader import Grader  # noqa: E402
from gvm import SampleSource, e_step, estimate, predicted_step  # noqa: E402
from losses import OBJECTIVES, loss_weights  # noqa: E402
from model import Policy  # noqa: E402
from pretrained import load_model  # noqa: E402
from predictor import Predictor, allocate_or_leave  # noqa: E402
from run import join_ranks  # noqa: E402
from sampler import HfSampler, draw  # noqa: E402

flags = partial(conftest.settled, add_flags=grpo.add_flags)  # which are raft.py's as well

PROBLEMS, POPULATION, SKETCH, ESTIMATES = 64, 1024, 1024, 600
TAUGHT_STEPS = 40  # of 64 samples, before predictions are asked for

DAMPED = ["--alpha", 0.01]  # in all of the table
POOL = ["--data", ROOT / "tests" / "toy" / "spared.jsonl", "--prompts-per-step", PROBLEMS, "--samples-per-prompt", 8]
LIKELIHOODS = ("log-likelihood", "... damped")
ESTIMATORS = {  # the objective, and the rule that fits it
    "log-likelihood": ["--objective", "raft", "--allocator", "gvm"],
    "... damped": ["--objective", "raft", "--allocator", "gvm"],
    "reward, loo": ["--objective", "grpo", "--allocator", "reward", "--advantage", "loo"],
    "reward, dr": ["--objective", "grpo", "--allocator", "reward", "--advantage", "dr"],
    "reward, grpo": ["--objective", "grpo", "--allocator", "reward", "--advantage", "grpo"],
}
PILOT = ["--pilot-samples", 4]
RULES = {
    "uniform": ["--allocator", "uniform"],
    "gvm plug-in": ["--allocator", "gvm", *PILOT],
    "gvm rounds": ["--allocator", "gvm"],  # by figures/methods.py
    "gvm predicted": ["--allocator", "gvm"],
    "reward plug-in": ["--allocator", "reward", *PILOT],
    "reward rounds": ["--allocator", "reward"],
    "reward predicted": ["--allocator", "reward"],
    "oracle": [],  # the rule that fits, with p and G known
}


def divided_rule(group_size: int):
    """A rule for advantages that are divided by the standard deviation of their group, see allocator.reward_weights."""
    def rule(p, norm_right, norm_wrong, args) -> np.ndarray:
        return np.sqrt((1 - p - (1 - p) ** group_size) * norm_right**2 + (p - p**group_size) * norm_wrong**2)
    return rule


gvm.RULES |= {"groups of 8": gvm.Rule(divided_rule(8)), "large groups": gvm.Rule(divided_rule(1_000_000))}
DIVIDED = {"uniform": RULES["uniform"], "reward rounds": RULES["reward rounds"]} | {
    f"{name} rounds": ["--allocator", name] for name in ("groups of 8", "large groups")}


class Pool:
    """All samples of some problems, their gradients, and where each problem's population is among them."""

    def __init__(self, policy: Policy, sampler, grader, problems, foretold: dict[str, np.ndarray]):
        self.problems, self.foretold = problems, foretold
        drawn = draw(sampler, grader, problems, np.full(len(problems), POPULATION), seed_key=(0, 0, 0), temperature=1.0)
        texts: dict[tuple, int] = {}  # equal responses have equal gradients
        places = [texts.setdefault((s.problem, s.response_ids.tobytes()), len(texts)) for s in drawn]
        self.samples: list[Sample] = [None] * len(texts)
        for place, sample in zip(places, drawn):
            self.samples[place] = sample
            sample.index = place
        self.places = np.reshape(places, (len(problems), POPULATION))
        fill_norms(policy, self.samples, 16384)
        self.right = np.array([sample.reward > 0 for sample in self.samples])
        self.gradients, lengths = sketch(policy, self.samples)  # of -sum_t ln pi: (samples, SKETCH)
        ratios = np.linalg.norm(self.gradients, axis=1) / lengths
        print(f"{len(drawn)} samples, {len(texts)} different ones; sketched length over true length: "
              f"{ratios.mean():.4f}, standard deviation {ratios.std():.4f}")

    def exact(self, problems: np.ndarray, estimator: str, part=slice(None)) -> np.ndarray:
        """The gradient that infinitely many samples of (part of) these problems' populations would give, (SKETCH,)."""
        total = np.zeros(SKETCH)
        for places, damping in zip(self.places[problems, part], self.damping(problems)):
            g, r = self.gradients[places], self.right[places].astype(float)
            if estimator in LIKELIHOODS:  # E[-grad ln pi | right]; none for a problem that is never solved
                total += r @ g / max(r.sum(), 1) * (damping if estimator == "... damped" else 1.0)
            else:  # -grad p, with the rewards divided by their standard deviation in `grpo`
                scale = r.std() + 1e-6 if estimator == "reward, grpo" else 1.0
                total += (r - r.mean()) / scale @ g / len(r)
        return total / len(problems)

    def rates(self, problems: np.ndarray) -> np.ndarray:
        """p, (problems,)."""
        return self.right[self.places[problems]].mean(axis=1)

    def damping(self, problems: np.ndarray) -> np.ndarray:
        """(1 + alpha / p^beta)^(-1/2), (problems,), with --alpha and --beta as they come."""
        args = flags(*DAMPED, *sys.argv[1:])
        return 1 / np.sqrt(1 + args.alpha / np.maximum(self.rates(problems), 1e-9) ** args.beta)


def sketch(policy: Policy, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Count sketches of the gradients of -sum_t ln pi, (samples, SKETCH), and the gradients' lengths, (samples,)."""
    parameters = list(policy.parameters())
    generator = torch.Generator().manual_seed(0)
    size = sum(parameter.numel() for parameter in parameters)
    bucket = torch.randint(SKETCH, (size,), generator=generator)
    sign = 2.0 * torch.randint(2, (size,), generator=generator) - 1
    sketches, lengths = torch.zeros(len(samples), SKETCH), torch.zeros(len(samples))
    for j, sample in enumerate(tqdm(samples, desc="gradients")):
        logprobs = policy(**collate([sample], torch.device("cpu")))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(-logprobs.sum(), parameters)])
        sketches[j].index_add_(0, bucket, gradient * sign)
        lengths[j] = gradient.norm()
    return sketches.double().numpy(), lengths.numpy()


def known_counts(pool: Pool, chosen: np.ndarray, args) -> np.ndarray:
    """The counts of the rule that --allocator names if p and G are those of the population, (problems,)."""
    samples = [pool.samples[place] for place in pool.places[chosen].ravel()]
    known = estimate(samples, [pool.problems[i] for i in chosen], args.weighting)
    weights = gvm.RULES[args.allocator].weights(pool.rates(chosen), known["norm_right"], known["norm_wrong"], args)
    return allocate(weights, len(chosen) * args.samples_per_prompt)


def foretell(policy: Policy, sampler, grader, problems, others) -> dict[str, np.ndarray]:
    """By rule: weights, (problems,), of a predictor that has learnt from TAUGHT_STEPS of 64 samples of other problems."""
    found = {}
    for rule, objective in (("gvm", "raft"), ("reward", "grpo")):
        words = ["--allocator", rule, "--objective", objective, "--prompts-per-step", 16, "--samples-per-prompt", 4,
                 "--candidates-per-step", 16]
        args, state = flags(*DAMPED, *words), RunState()
        source = SampleSource(policy, sampler, grader, args)
        for step in range(1, TAUGHT_STEPS + 1):
            predicted_step(problems_of_step(others, step, args), step, state, source, args)
        predictor = Predictor(state.predictor)
        features = predictor.features(prompt_states(policy, problems, args.tokens_per_micro_batch))
        ones = np.ones(len(problems))
        found[rule] = gvm.RULES[rule].weights(predictor.predict(features), ones, ones, args)
    return found


def estimates(pool: Pool, chosen: np.ndarray, estimator: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Independent estimates of the gradient over the chosen problems, as the scripts make them, (ESTIMATES, SKETCH).

    Also what they say in the mean of each problem's E[A r], (problems,): with the baseline p it is p (1 - p).
    """
    args = flags(*DAMPED, *POOL, *ESTIMATORS[estimator], *(RULES | DIVIDED)[rule], *sys.argv[1:])
    problems, generator = [pool.problems[i] for i in chosen], np.random.default_rng(1)

    class FromPool(SampleSource):
        def sample_and_grade(self, problems, counts, step, first_index=0, with_norms=False) -> list[Sample]:
            places = [generator.choice(pool.places[chosen[row_of[problem.id]]], count)
                      for problem, count in zip(problems, counts)]
            return [pool.samples[place] for place in np.concatenate(places)]

    smallest = OBJECTIVES[args.objective].smallest_group
    source, args.prompts_per_step = FromPool(None, None, None, args), len(problems)
    row_of = {problem.id: row for row, problem in enumerate(problems)}

    fixed = known_counts(pool, chosen, args) if rule == "oracle" else np.full(len(chosen), args.samples_per_prompt)
    if rule.endswith("predicted"):
        fixed = allocate_or_leave(pool.foretold[args.allocator][chosen], fixed.sum(), smallest)
    found, signal = np.zeros((ESTIMATES, SKETCH)), np.zeros(len(chosen))
    damping = pool.damping(chosen)
    for row in found:
        if rule in ("uniform", "oracle") or rule.endswith("predicted"):
            samples = source.sample_and_grade(problems, fixed, step=1)
        elif rule.endswith("rounds"):
            samples = methods.draw_in_rounds(problems, 1, source, args)
        else:
            _, samples, _ = e_step(problems, 1, RunState(), source, args)
        advantages, used = OBJECTIVES[args.objective].advantages(samples, args)
        weights = loss_weights(samples, used, len(problems), args.weighting)
        mean_length = np.mean([len(sample.response_ids) for sample in samples])  # a common scale: taken out again
        terms, owners = advantages * weights * mean_length, [row_of[sample.problem] for sample in samples]
        signal += np.bincount(owners, terms * [sample.reward for sample in samples], len(chosen))
        if estimator == "... damped":
            terms = terms * damping[owners]
        row += terms @ pool.gradients[[sample.index for sample in samples]]
    return found, signal * len(chosen) / ESTIMATES


def measure(pool: Pool, prompts: int, estimator: str, rule: str) -> np.ndarray:
    """(mean squared error, its standard error, squared bias), the sum over groups of `prompts` problems; (3,)."""
    groups = np.arange(PROBLEMS).reshape(-1, prompts)
    totals = np.zeros(3)
    for chosen in groups:
        (found, _), exact = estimates(pool, chosen, estimator, rule), pool.exact(chosen, estimator)
        errors = ((found - exact) ** 2).sum(axis=1)
        # The squared distance of the mean of the estimates has their variance over their number in it.
        bias = ((found.mean(axis=0) - exact) ** 2).sum() - found.var(axis=0, ddof=1).sum() / ESTIMATES
        totals += errors.mean(), errors.var() / ESTIMATES, bias
    return np.array([totals[0], np.sqrt(totals[1]), totals[2]]) / len(groups)


def table(pool: Pool, prompts: int, estimators, rules) -> None:
    """Print one table: uniform's mean squared error over each rule's, with both parts of the latter."""
    print(f"\n{prompts} prompts an update, 8 samples a prompt: gain in mean squared error over uniform, +- 95 %;"
          "\nin brackets variance + squared bias, over uniform's mean squared error")
    print(f"{'':16s}" + "".join(f"{rule:^28s}" for rule in rules))
    for estimator in estimators:
        base, line = None, f"{estimator:16s}"
        for rule in rules:
            mse, error, bias = measure(pool, prompts, estimator, rule)
            base = base or (mse, error)
            gain = base[0] / mse
            half = 1.96 * gain * np.hypot(error / mse, base[1] / base[0]) if rule != "uniform" else 0.0
            line += f"{f'{gain:.2f} +- {half:.2f} ({(mse - bias) / base[0]:.2f} + {bias / base[0]:.2f})':^28s}"
        groups = np.arange(PROBLEMS).reshape(-1, prompts)
        halves = slice(POPULATION // 2), slice(POPULATION // 2, None)
        gaps = [pool.exact(i, estimator, halves[0]) - pool.exact(i, estimator, halves[1]) for i in groups]
        print(f"{line}  halves differ by {np.mean([(gap**2).sum() for gap in gaps]) / base[0]:.2f}", flush=True)


def rarely_solved(pool: Pool) -> None:
    """Print whose the bias of the log-likelihood estimate is: without a right sample, problem i is missing."""
    rates = pool.rates(np.arange(PROBLEMS))
    gradients = np.array([pool.exact(np.array([i]), "log-likelihood") for i in range(PROBLEMS)])
    missing = (1 - rates[:, None]) ** 8 * gradients  # in expectation, of 8 samples
    rare = rates < 0.01
    share = (missing[rare].sum(axis=0) ** 2).sum() / (missing.sum(axis=0) ** 2).sum()
    print(f"{rare.sum()} of {PROBLEMS} problems are right in under 1 % of their samples; with uniform counts, "
          f"{share:.0%} of the log-likelihood's squared bias is theirs")


def loo_by_p(pool: Pool) -> None:
    """Print E[A r] over p (1 - p), by p: 1 if the estimate is unbiased. The pilot is trained on, so its luck counts."""
    everyone, rules = np.arange(PROBLEMS), ("uniform", "reward plug-in", "reward rounds", "reward predicted")
    rates, edges = pool.rates(everyone), np.array([0.005, 0.05, 0.2, 0.4, 0.6, 0.8, 0.995])
    print("\nloo: the estimate over the truth, for p in" + "".join(f"{f'{a:g} to {b:g}':>14s}" for a, b in
                                                                zip(edges, edges[1:])))
    for rule in rules:
        signal = np.concatenate([estimates(pool, chosen, "reward, loo", rule)[1] for chosen in everyone.reshape(2, -1)])
        served = signal > 0  # of prompts that are left out, nothing is estimated
        inside = [served & (rates >= a) & (rates < b) for a, b in zip(edges, edges[1:])]
        ratios = [signal[i].sum() / (rates[i] * (1 - rates[i])).sum() for i in inside]
        print(f"{rule:43s}" + "".join(f"{ratio:14.2f}" for ratio in ratios), flush=True)


def left_out(pool: Pool) -> None:
    """Print what 64 samples say of the gradient over all 64 prompts, if they are spent on some of them; by `loo`.

    The estimate is the mean over the prompts that are served. Its direction is what counts. Bias: the cosine between its
    mean and the exact gradient. Signal: the share of its mean squared length that points along the exact gradient.
    """
    generator, exact = np.random.default_rng(1), pool.exact(np.arange(PROBLEMS), "reward, loo")
    args = flags(*ESTIMATORS["reward, loo"])

    def spread(prompts: int) -> np.ndarray:
        counts = np.zeros(PROBLEMS, dtype=int)
        counts[generator.choice(PROBLEMS, prompts, replace=False)] = 64 // prompts
        return counts

    ways = {f"{m} at random x {64 // m}": partial(spread, m) for m in (8, 16, 32)}
    known = reward_weights(pool.rates(np.arange(PROBLEMS)), *np.ones((2, PROBLEMS)))
    for how, weights in (("known", known), ("predicted", pool.foretold["reward"])):
        counts = allocate_or_leave(weights, 64, 2)
        ways[f"p {how}: {(counts > 0).sum()} served, up to {counts.max()}"] = counts.copy  # the same each time
    print("\n64 samples for 64 prompts          cosine of the mean    signal")
    for name, counts_of in ways.items():
        found = np.zeros((4 * ESTIMATES, SKETCH))
        for row in found:
            counts = counts_of()
            places = np.concatenate([generator.choice(pool.places[i], counts[i]) for i in range(PROBLEMS)])
            samples = [pool.samples[place] for place in places]
            advantages, used = OBJECTIVES["grpo"].advantages(samples, args)
            weights = loss_weights(samples, used, (counts > 0).sum(), args.weighting)
            row += advantages * weights @ pool.gradients[places]
        squares, total = (found**2).sum(axis=1), found.sum(axis=0)
        mean_square = ((total**2).sum() - squares.sum()) / (len(found) * (len(found) - 1))  # without its own variance
        along = found @ exact / np.linalg.norm(exact)
        cosine, signal = along.mean() / np.sqrt(mean_square), along.mean() ** 2 / squares.mean()
        print(f"{name:36s}{cosine:18.2f}{signal:10.4f}", flush=True)


def make_pool(*words) -> Pool:
    """The population of a step's problems."""
    args = flags(*POOL, *words)
    model, tokenizer = load_model(args, join_ranks())
    everyone = load_prompts(args.data, args.split, tokenizer, args, training=True)
    problems = problems_of_step(everyone, 1, args)
    tools = Policy(model), HfSampler(model, tokenizer, args)
    with Grader() as grader:
        foretold = foretell(*tools, grader, problems, [problem for problem in everyone if problem not in problems])
        return Pool(*tools, grader, problems, foretold)


def main() -> None:
    """Make the pools and print the tables."""
    pool = make_pool()
    rarely_solved(pool)
    table(pool, 32, ESTIMATORS, RULES)
    for prompts in (16, 64):
        table(pool, prompts, ["log-likelihood", "reward, grpo"], [rule for rule in RULES if rule != "oracle"])
    table(pool, 32, ["reward, grpo"], DIVIDED)
    loo_by_p(pool)
    left_out(make_pool("--data", ROOT / "tests" / "toy" / "train.jsonl"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
