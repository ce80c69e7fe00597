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
RIDGE = 30.0  # prior precision of the regression's coefficients
NORMS_KEPT = 1000  # prompts from which norms are predicted
LEFT_OUT = 4.0  # of w^2: what it costs to leave a prompt out
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
    prompts = [torch.tensor(problem.prompt_ids, device=policy.device) for problem in problems]
    hidden = policy.model.base_model(pad_sequence(prompts, batch_first=True), use_cache=False).last_hidden_state
    rows = [row[: len(prompt)].double() for row, prompt in zip(hidden, prompts)]  # padding comes last: nobody sees it
    return torch.stack([torch.cat([row[-1], row.mean(dim=0)]) for row in rows]).cpu().numpy()


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


class NormPredictor:
    """The gradient norm of a prompt's right (or wrong) samples, by ridge regression of its logarithm."""

    def __init__(self):
        self.features, self.logs = [], []  # of the prompts that had such samples, newest last

    def learn(self, features: np.ndarray, norms: np.ndarray) -> None:
        """features: (prompts, features); norms: (prompts,), 0 where there was no such sample."""
        self.features = [*self.features, *features[norms > 0]][-NORMS_KEPT:]
        self.logs = [*self.logs, *np.log(norms[norms > 0])][-NORMS_KEPT:]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(prompts,); all equal before anything was learnt."""
        if not self.logs:
            return np.ones(len(features))
        known, logs = np.array(self.features), np.array(self.logs)
        slopes = np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ (logs - logs.mean()))
        return np.exp(logs.mean() + features @ slopes)


def buy_groups(weights: np.ndarray, budget: int, smallest: int) -> np.ndarray:
    """Counts, each 0 or at least `smallest`: the best of a prompt's samples first, until the budget is spent.

    With n samples a prompt costs w^2 / (n - smallest + 1): with a group baseline (smallest = 2) one of them serves
    the others. Left out it costs LEFT_OUT w^2: a bias, and not infinite. Every purchase is the one that lowers the
    sum most for each of its samples.
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
    """A draw_step without a pilot: half of the budget by predictions, the rest by what those samples add to them."""

    def __init__(self, candidates: int):
        """candidates: problems looked at, for each one of --prompts-per-step; above 1 some get no samples."""
        self.candidates = candidates
        self.predictor, self.norm_right, self.norm_wrong = Predictor(), NormPredictor(), NormPredictor()

    def weights(self, posterior: np.ndarray, norms, args) -> np.ndarray:
        """sqrt(E[w^2]), (problems,), over what p may be."""
        moments = np.zeros(len(posterior))
        for p, probability in zip(sigmoid(LOG_ODDS), posterior.T):
            moments += probability * gvm.RULES[args.allocator](np.full(len(posterior), p), *norms, args) ** 2
        return np.sqrt(moments)

    def __call__(self, problems, step, state, source, args) -> tuple:
        wider = argparse.Namespace(**vars(args) | {"prompts_per_step": self.candidates * args.prompts_per_step})
        batch, budget = gvm.problems_of_step(problems, step, wider), args.prompts_per_step * args.samples_per_prompt
        features = self.predictor.features(prompt_states(source.policy, batch))
        mu, nothing = self.predictor.predict(features), np.zeros(len(batch), dtype=int)
        norms = self.norm_right.predict(features), self.norm_wrong.predict(features)
        weights = self.weights(self.predictor.posterior(mu, nothing, nothing), norms, args)
        if self.candidates > 1:
            drawn = buy_groups(weights, budget, smallest=2 if args.objective == "grpo" else 1)
            samples = source.draw(batch, drawn, step, with_norms=True)
        else:
            first = allocate(weights, budget // 2)
            samples = source.draw(batch, first, step, with_norms=True)
            table = gvm.estimate(samples, batch, args.weighting)
            seen = [np.where(table[name] > 0, table[name], norm)
                    for name, norm in zip(("norm_right", "norm_wrong"), norms)]
            posterior = self.predictor.posterior(mu, table["num_right"], table["num_drawn"])
            drawn = allocate(self.weights(posterior, seen, args), budget, min_samples=first)
            samples += source.draw(batch, drawn - first, step, first_index=first, with_norms=True)
        table, served = gvm.estimate(samples, batch, args.weighting), drawn > 0
        self.predictor.learn(features[served], mu[served], table["num_right"][served], drawn[served])
        self.norm_right.learn(features, table["norm_right"])
        self.norm_wrong.learn(features, table["norm_wrong"])
        shares = table["num_right"][served] / drawn[served]
        metrics = {"prediction_error": float(np.mean((mu[served] - shares) ** 2)),
                   "prediction_strength": float(STRENGTHS[self.predictor.log_strength.argmax()])}
        batch = [problem for problem, is_served in zip(batch, served) if is_served]
        return batch, samples, gvm.describe(batch, samples, []) | metrics
