"""Ways to spend a step's samples that only figures/experiment.py needs: each takes the place of gvm.draw_step.

What earns its lines in the experiment moves into the modules; what does not is tried here and said in README.
"""

import argparse

import numpy as np
import torch

import gvm
from allocator import allocate
from model import Policy

FORGET = 0.98  # of what was learnt, how much is left after a step: the policy moves
RIDGE = 30.0  # prior precision of the regression's coefficients
STRENGTHS = np.geomspace(0.25, 64, 9)  # kappa: as how many samples a prediction counts
LOG_ODDS = np.linspace(-12, 12, 97)  # the grid on which p is known
LOG_P, LOG_Q = -np.logaddexp(0, -LOG_ODDS), -np.logaddexp(0, LOG_ODDS)  # q = 1 - p


def mixed_only(problems, step, state, source, args) -> tuple:
    """Uniform; prompts with equal rewards are dropped from the update (DAPO), and what they cost is counted."""
    batch, samples, metrics = gvm.draw_step(problems, step, state, source, args)
    rewards = {problem.id: {s.reward for s in samples if s.problem == problem.id} for problem in batch}
    mixed = [problem for problem in batch if len(rewards[problem.id]) > 1]
    return mixed, [sample for sample in samples if len(rewards[sample.problem]) > 1], metrics


# --- p of a prompt that nobody has sampled yet ---------------------------------------------------
@torch.no_grad()
def prompt_states(policy: Policy, problems) -> np.ndarray:
    """What the policy says of its prompts, (problems, 2 hidden): the last layer at the last token, and the mean."""
    rows = []
    for problem in problems:  # toys are small: one at a time
        ids = torch.tensor([problem.prompt_ids], device=policy.device)
        hidden = policy.model.base_model(ids, use_cache=False).last_hidden_state[0].float()
        rows.append(torch.cat([hidden[-1], hidden.mean(dim=0)]).cpu().numpy())
    return np.stack(rows).astype(np.float64)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


class Predictor:
    """p of a prompt from its states, by logistic regression learnt online; and how far to believe it."""

    def __init__(self):
        self.moments = self.mean = self.precision = None
        self.log_strength = np.zeros(len(STRENGTHS))  # log-evidence of each kappa

    def features(self, states: np.ndarray) -> np.ndarray:
        """Standardised as the first step's prompts were, and a constant: (problems, features)."""
        if self.moments is None:
            self.moments = states.mean(axis=0), states.std(axis=0) + 1e-6
            size = states.shape[1] + 1
            self.mean, self.precision = np.zeros(size), RIDGE * np.eye(size)
        scaled = (states - self.moments[0]) / self.moments[1]
        return np.hstack([scaled, np.ones((len(states), 1))])

    def predict(self, features: np.ndarray) -> np.ndarray:
        """mu, (problems,), not quite 0 nor 1; the mean over what the coefficients may be."""
        variance = np.einsum("nf,fn->n", features, np.linalg.solve(self.precision, features.T))
        mu = sigmoid(features @ self.mean / np.sqrt(1 + np.pi / 8 * variance))  # MacKay's approximation
        return mu.clip(0.005, 0.995)

    def learn(self, features: np.ndarray, mu, num_right, num_drawn) -> None:
        """Four Newton steps towards the most likely coefficients; what was known before is the prior."""
        before, known = self.mean, FORGET * self.precision + (1 - FORGET) * RIDGE * np.eye(len(self.mean))
        for _ in range(4):
            p = sigmoid(features @ self.mean)
            gradient = features.T @ (num_right - num_drawn * p) - known @ (self.mean - before)
            self.precision = (features.T * (num_drawn * p * (1 - p))) @ features + known
            self.mean = self.mean + np.linalg.solve(self.precision, gradient)
        evidence = np.log((priors(mu) * likelihood(num_right, num_drawn)).sum(axis=2)).sum(axis=1)
        self.log_strength = FORGET * self.log_strength + evidence

    def posterior(self, mu, num_right, num_drawn) -> np.ndarray:
        """P(p) of each prompt on the grid, (problems, grid): Beta(kappa mu, kappa (1 - mu)), averaged over kappa."""
        joint = priors(mu) * likelihood(num_right, num_drawn)  # (strengths, problems, grid)
        log_weight = self.log_strength + np.log(joint.sum(axis=2)).sum(axis=1)
        joint = np.tensordot(np.exp(log_weight - log_weight.max()), joint / joint.sum(axis=2, keepdims=True), 1)
        return joint / joint.sum(axis=1, keepdims=True)


def priors(mu: np.ndarray) -> np.ndarray:
    """(strengths, problems, grid)."""
    a, b = STRENGTHS[:, None, None] * mu[:, None], STRENGTHS[:, None, None] * (1 - mu)[:, None]
    logs = a * LOG_P + b * LOG_Q
    values = np.exp(logs - logs.max(axis=2, keepdims=True))
    return values / values.sum(axis=2, keepdims=True)


def likelihood(num_right, num_drawn) -> np.ndarray:
    """(problems, grid), up to a factor for each problem."""
    logs = np.outer(num_right, LOG_P) + np.outer(num_drawn - num_right, LOG_Q)
    return np.exp(logs - logs.max(axis=1, keepdims=True))


class Predicted:
    """A draw_step without a pilot: p is predicted, and all samples of the step are drawn at once."""

    def __init__(self, candidates: int, in_pairs: bool):
        """candidates: problems looked at, for each one of --prompts-per-step. in_pairs: see `counts`."""
        self.candidates, self.in_pairs = candidates, in_pairs
        self.predictor = Predictor()

    def weights(self, posterior: np.ndarray, args) -> np.ndarray:
        """sqrt(E[w^2]), (problems,), over what p may be; all gradient norms count as equal."""
        ones, moments = np.ones(len(posterior)), np.zeros(len(posterior))
        for p, probability in zip(sigmoid(LOG_ODDS), posterior.T):
            moments += probability * gvm.RULES[args.allocator](p * ones, ones, ones, args) ** 2
        return np.sqrt(moments)

    def counts(self, weights: np.ndarray, budget: int) -> np.ndarray:
        """Samples of each problem. in_pairs: two for each of the largest weights, none for the others."""
        if not self.in_pairs:
            return allocate(weights, budget)
        counts = np.zeros(len(weights), dtype=int)
        counts[np.argsort(-weights, kind="stable")[: budget // 2]] = 2
        return counts

    def __call__(self, problems, step, state, source, args) -> tuple:
        wider = argparse.Namespace(**vars(args) | {"prompts_per_step": self.candidates * args.prompts_per_step})
        batch = gvm.problems_of_step(problems, step, wider)
        features = self.predictor.features(prompt_states(source.policy, batch))
        mu, nothing = self.predictor.predict(features), np.zeros(len(batch), dtype=int)
        weights = self.weights(self.predictor.posterior(mu, nothing, nothing), args)
        drawn = self.counts(weights, args.prompts_per_step * args.samples_per_prompt)
        samples = source.draw(batch, drawn, step)
        seen = drawn > 0
        served = [problem for problem, is_seen in zip(batch, seen) if is_seen]
        right = np.array([sum(s.reward for s in samples if s.problem == problem.id) for problem in served])
        self.predictor.learn(features[seen], mu[seen], right, drawn[seen])
        error = float(np.mean((mu[seen] - right / drawn[seen]) ** 2))
        strength = float(STRENGTHS[self.predictor.log_strength.argmax()])
        metrics = {"prediction_error": error, "prediction_strength": strength}
        return served, samples, gvm.describe(served, samples, []) | metrics
