"""Ways to spend a step's samples that only figures/experiment.py needs: each takes the place of gvm.draw_step.

What earns its lines in the experiment moves into the modules; what does not is tried here and said in README.
"""

import argparse

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import gvm
from allocator import allocate
from model import Policy

FORGET = 0.98  # of what was learnt, how much is left after a step: the policy moves
RIDGE = 30.0  # prior precision of the regressions' coefficients
LEFT_OUT = 4.0  # what it costs to leave a prompt out, in costs of the first sample that tells something
STRENGTHS = np.geomspace(0.25, 64, 9)  # kappa: as how many samples a prediction counts
LOG_ODDS = np.linspace(-12, 12, 97)  # the grid on which p is known
LOG_P, LOG_Q = -np.logaddexp(0, -LOG_ODDS), -np.logaddexp(0, LOG_ODDS)  # q = 1 - p


def mixed_only(problems, step, state, source, args) -> tuple:
    """Uniform; prompts with equal rewards are dropped from the update (DAPO), and what they cost is counted."""
    batch, samples, metrics = gvm.draw_step(problems, step, state, source, args)
    rewards = {problem.id: {s.reward for s in samples if s.problem == problem.id} for problem in batch}
    mixed = [problem for problem in batch if len(rewards[problem.id]) > 1]
    return mixed, [sample for sample in samples if len(rewards[sample.problem]) > 1], metrics


def oracle(problems, step, state, source, args) -> tuple:
    """The ceiling: p and G of the step's prompts from 64 more samples of each, which are neither counted nor used."""
    batch = gvm.problems_of_step(problems, step, args)
    known = source.draw(batch, np.full(len(batch), 64), step, first_index=1000, with_norms=True)
    weights = gvm.allocation_weights(gvm.estimate(known, batch, args.weighting), args)
    samples = source.draw(batch, allocate(weights, args.samples_per_prompt * len(batch)), step)
    return batch, samples, gvm.describe(batch, samples, [])


# --- p and G of a prompt that nobody has sampled yet ---------------------------------------------
@torch.no_grad()
def prompt_states(policy: Policy, problems) -> np.ndarray:
    """What the policy says of its prompts, (problems, 2 hidden): the last layer at the last token, and the mean."""
    prompts = [torch.tensor(problem.prompt_ids, device=policy.device) for problem in problems]
    hidden = policy.model.base_model(pad_sequence(prompts, batch_first=True), use_cache=False).last_hidden_state
    rows = [row[: len(prompt)].double() for row, prompt in zip(hidden, prompts)]  # padding comes last: nobody sees it
    return torch.stack([torch.cat([row[-1], row.mean(dim=0)]) for row in rows]).cpu().numpy()


def logistic(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p = 1 / (1 + e^-x), and its slope."""
    p = 0.5 * (1 + np.tanh(x / 2))  # without overflow
    return p, p * (1 - p)


def linear(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x itself, and its slope."""
    return x, np.ones_like(x)


class Regression:
    """E[target] = link(features @ coefficients), learnt online: a Gaussian belief about the coefficients."""

    def __init__(self, link, num_features: int):
        self.link, self.mean, self.precision = link, np.zeros(num_features), RIDGE * np.eye(num_features)

    def learn(self, features: np.ndarray, targets: np.ndarray, num_drawn: np.ndarray) -> None:
        """Newton's steps to the most likely coefficients; the belief before, a little faded, is the prior.

        features: (prompts, features); targets: means of num_drawn observations, (prompts,) each.
        """
        before = self.mean
        known = FORGET * self.precision + (1 - FORGET) * RIDGE * np.eye(len(before))
        for _ in range(4):
            expected, slope = self.link(features @ self.mean)
            gradient = features.T @ (num_drawn * (targets - expected)) - known @ (self.mean - before)
            self.precision = (features.T * (num_drawn * slope)) @ features + known
            self.mean = self.mean + np.linalg.solve(self.precision, gradient)

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """features @ coefficients, its mean and variance, (prompts,) each."""
        variance = np.einsum("nf,fn->n", features, np.linalg.solve(self.precision, features.T))
        return features @ self.mean, variance


class Predictor:
    """p and gradient norms of prompts from the policy's hidden states, before anybody has sampled them."""

    def __init__(self):
        self.moments = None  # of the first step's states: (means, standard deviations)
        self.log_evidence = np.zeros(len(STRENGTHS))  # of each kappa

    def features(self, states: np.ndarray) -> np.ndarray:
        """Standardised states, and a constant, (prompts, features)."""
        if self.moments is None:
            self.moments = states.mean(axis=0), states.std(axis=0) + 1e-6
            self.rate, self.log_norm_right, self.log_norm_wrong = (
                Regression(link, states.shape[1] + 1) for link in (logistic, linear, linear))
        return np.hstack([(states - self.moments[0]) / self.moments[1], np.ones((len(states), 1))])

    def predict(self, features: np.ndarray) -> tuple:
        """(mu, P(p), G+, G-): mu (prompts,); P(p) on the grid, (prompts, grid); norms (prompts,) each.

        P(p) is Beta(kappa mu, kappa (1 - mu)), averaged over kappa by how well each explained earlier steps.
        """
        mean, variance = self.rate.predict(features)
        mu = logistic(mean / np.sqrt(1 + np.pi / 8 * variance))[0].clip(0.005, 0.995)  # MacKay's approximation
        weights = np.exp(self.log_evidence - self.log_evidence.max())
        prior = np.tensordot(weights / weights.sum(), betas(mu), 1)
        norms = [np.exp(norm.predict(features)[0]) for norm in (self.log_norm_right, self.log_norm_wrong)]
        return mu, prior, *norms

    def learn(self, features: np.ndarray, mu: np.ndarray, table: dict) -> None:
        """table: of gvm.estimate; mu: what was predicted. Prompts without samples count for nothing."""
        right, drawn = table["num_right"], table["num_drawn"]
        log_likelihood = np.outer(right, LOG_P) + np.outer(drawn - right, LOG_Q)  # (prompts, grid)
        evidence = np.log((betas(mu) * np.exp(log_likelihood)).sum(axis=2)).sum(axis=1)
        self.log_evidence = FORGET * self.log_evidence + evidence
        self.rate.learn(features, right / np.maximum(drawn, 1), drawn)
        for norm, name in ((self.log_norm_right, "norm_right"), (self.log_norm_wrong, "norm_wrong")):
            seen = table[name] > 0
            norm.learn(features[seen], np.log(table[name][seen]), np.ones(seen.sum()))


def betas(mu: np.ndarray) -> np.ndarray:
    """Beta(kappa mu, kappa (1 - mu)) for each kappa, on the grid: (strengths, prompts, grid)."""
    a, b = STRENGTHS[:, None, None] * mu[:, None], STRENGTHS[:, None, None] * (1 - mu)[:, None]
    logs = a * LOG_P + b * LOG_Q
    values = np.exp(logs - logs.max(axis=2, keepdims=True))
    return values / values.sum(axis=2, keepdims=True)


def allocate_or_leave(weights: np.ndarray, budget: int, smallest: int) -> np.ndarray:
    """Counts n_i, (prompts,), each 0 or at least `smallest`: some prompts are left out, others get several samples.

    With a group baseline (smallest = 2) one sample serves the others and says nothing by itself: the variance is
    w^2 / (n - 1). Without one (smallest = 1) it is w^2 / n. A prompt left out is no infinite variance, but signal that
    is missing. Progress goes with S^2 / V, S = sum s_i the signal and V the variance, over prompts that are served. By
    its derivative, leaving out prompt i is worth a variance of 2 (V / S) s_i; and signal and variance have the same
    factor p (1 - p), so that this is 2 (1 + rho) w_i^2, where all have `smallest` samples and rho is the variance from
    prompt to prompt over that from sample to sample. LEFT_OUT stands for rho = 1. Bought is what lowers the sum most for
    each sample, until the budget is spent: the optimum but for the last purchase.
    """
    later = np.arange(1, budget)
    gains = np.outer(weights**2, [(LEFT_OUT - 1) / smallest, *1 / (later * (later + 1))])  # for each sample bought
    counts = np.zeros(len(weights), dtype=int)
    for place in np.argsort(-gains.ravel(), kind="stable"):
        i, is_later = divmod(place, budget)
        size = 1 if is_later else smallest
        if size <= budget - counts.sum() and (not is_later or counts[i]):
            counts[i] += size
    return counts


class Predicted:
    """A draw_step without a pilot: p and G are predicted, and all samples of the step are drawn at once."""

    def __init__(self, candidates: int):
        """candidates: problems looked at, for each one of --prompts-per-step; some get no samples."""
        self.candidates, self.predictor = candidates, Predictor()

    def __call__(self, problems, step, state, source, args) -> tuple:
        wider = argparse.Namespace(**vars(args) | {"prompts_per_step": self.candidates * args.prompts_per_step})
        batch, budget = gvm.problems_of_step(problems, step, wider), args.prompts_per_step * args.samples_per_prompt
        features = self.predictor.features(prompt_states(source.policy, batch))
        mu, prior, *norms = self.predictor.predict(features)
        moments = np.zeros(len(batch))  # E[w^2] over what p may be
        for p, probability in zip(np.exp(LOG_P), prior.T):
            moments += probability * gvm.RULES[args.allocator](np.full(len(batch), p), *norms, args) ** 2
        drawn = allocate_or_leave(np.sqrt(moments), budget, smallest=2 if args.objective == "grpo" else 1)
        samples = source.draw(batch, drawn, step, with_norms=True)
        table = gvm.estimate(samples, batch, args.weighting)
        self.predictor.learn(features, mu, table)
        served = drawn > 0
        error = float(np.mean((mu[served] - table["num_right"][served] / drawn[served]) ** 2))
        strength = float(STRENGTHS[self.predictor.log_evidence.argmax()])
        batch = [problem for problem, is_served in zip(batch, served) if is_served]
        return batch, samples, gvm.describe(batch, samples, []) | {"prediction_error": error, "prediction_strength": strength}
