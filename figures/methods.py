"""Ways to spend a step's samples that only figures/experiment.py needs: each takes the place of gvm.e_step.

They are what the modules are compared with; `rounds` is what they did before prediction did better.
"""

from functools import partial

import numpy as np

import gvm
from allocator import allocate
from data import problems_of_step
from losses import OBJECTIVES
from metrics import describe_step
from predictor import allocate_or_leave

LOG_ODDS = np.linspace(-12, 12, 97)  # ln p/q: a grid of what p may be
LOG_P, LOG_Q = -np.logaddexp(0, -LOG_ODDS), -np.logaddexp(0, LOG_ODDS)


def mixed_only(problems, step, state, source, args) -> tuple:
    """Uniform; prompts with equal rewards are dropped from the update (DAPO), and what they cost is counted."""
    batch, samples, metrics = gvm.e_step(problems, step, state, source, args)
    rewards = {problem.id: {s.reward for s in samples if s.problem == problem.id} for problem in batch}
    mixed = [problem for problem in batch if len(rewards[problem.id]) > 1]
    return mixed, [sample for sample in samples if len(rewards[sample.problem]) > 1], metrics


def shrunk_weights(table: dict, args) -> np.ndarray:
    """What --allocator's rule makes of a table, averaged over what p may be: weights, (problems,)."""
    rule = partial(gvm.RULES[args.allocator].weights, args=args)
    return posterior_weights(rule, *(table[name] for name in ("num_right", "num_drawn", "norm_right", "norm_wrong")))


def oracle(problems, step, state, source, args) -> tuple:
    """The ceiling of prediction: p and G of all candidates, from 2048 more samples, neither counted nor used."""
    batch = problems_of_step(problems, step, args)
    many = np.full(len(batch), 2048 // len(batch))
    known = source.sample_and_grade(batch, many, step, first_index=1000, with_norms=True)
    weights = shrunk_weights(gvm.estimate(known, batch, args.weighting), args)
    counts = allocate_or_leave(weights, args.prompts_per_step * args.samples_per_prompt,
                               smallest=OBJECTIVES[args.objective].smallest_group)
    samples = source.sample_and_grade(batch, counts, step)
    served = [batch[i] for i in np.flatnonzero(counts)]
    return served, samples, describe_step(served, samples, drawn=samples)


def rounds(problems, step, state, source, args) -> tuple:
    """No prediction: see draw_in_rounds."""
    batch = problems_of_step(problems, step, args)
    samples = draw_in_rounds(batch, step, source, args)
    return batch, samples, describe_step(batch, samples, drawn=samples)


def draw_in_rounds(batch, step, source, args) -> list:
    """A pilot of two, or of half of the budget; the rest in three equal rounds, each of which knows more."""
    pilot = np.full(len(batch), min(args.samples_per_prompt // 2, 2))
    samples = source.sample_and_grade(batch, pilot, step, with_norms=True)
    for rounds_left in (3, 2, 1):
        table = gvm.estimate(samples, batch, args.weighting)
        drawn, left = table["num_drawn"], args.samples_per_prompt * len(batch) - len(samples)
        counts = allocate(shrunk_weights(table, args), len(samples) + left // rounds_left, drawn)
        samples += source.sample_and_grade(
            batch, counts - drawn, step, first_index=drawn, with_norms=rounds_left > 1)
    return samples


def posterior_weights(rule, num_right, num_drawn, norm_right, norm_wrong) -> np.ndarray:
    """sqrt(E[w_i^2]), (prompts,): the weights of `rule` averaged over what p_i may be.

    What is known of p_i: num_right_i of num_drawn_i samples were right; and a prior, fitted to
    all prompts. No weight is 0 by bad luck alone. A prompt without a right (wrong) sample is
    given the root mean square over the others as its G+ (G-).
    rule: (p, G+, G-) to weights, called with one p for all prompts at a time. All arrays are
    (prompts,).
    """
    known = (num_right, num_drawn, norm_right, norm_wrong)
    num_right, num_drawn, norm_right, norm_wrong = (np.asarray(column, dtype=float) for column in known)
    num_wrong = num_drawn - num_right
    norm_right = fill_unknown(norm_right, known=num_right > 0)
    norm_wrong = fill_unknown(norm_wrong, known=num_wrong > 0)

    # 1. Likelihood on the grid: P(counts_i | p) ~ p^right q^wrong, q = 1 - p.
    log_likelihood = np.outer(num_right, LOG_P) + np.outer(num_wrong, LOG_Q)  # (prompts, grid)
    log_likelihood -= log_likelihood.max(axis=1, keepdims=True)  # or exp would underflow
    likelihood = np.exp(log_likelihood)

    # 2. Prior: Beta(a, b), averaged over a and b by how well they explain all counts:
    #    P(p) = sum_ab Beta(p | a, b) prod_i P(counts_i | a, b). Per log-odds it is p^a q^b.
    #    Small a and b: nearly all prompts are hopeless or mastered; large ones: all are alike.
    shapes_tried = np.geomspace(0.05, 20, 16)
    a, b = np.meshgrid(shapes_tried, shapes_tried)  # (16, 16) each
    priors = np.exp(np.outer(a, LOG_P) + np.outer(b, LOG_Q))  # (256, grid), one for each a, b
    priors /= priors.sum(axis=1, keepdims=True)
    log_evidence = np.log(priors @ likelihood.T).sum(axis=1)  # (256,)
    prior = np.exp(log_evidence - log_evidence.max()) @ priors  # (grid,)

    # 3. Expectation over the posterior: E[w_i^2] = sum_p P(p | counts_i) w_i(p)^2.
    posterior = prior * likelihood  # (prompts, grid)
    posterior /= posterior.sum(axis=1, keepdims=True)
    second_moments = np.zeros(len(num_right))
    for p, probability in zip(np.exp(LOG_P), posterior.T):
        weights = rule(np.full(len(num_right), p), norm_right, norm_wrong)
        second_moments += probability * weights**2
    return np.sqrt(second_moments)


def fill_unknown(norms: np.ndarray, known: np.ndarray) -> np.ndarray:
    typical = np.sqrt(np.mean(norms[known] ** 2)) if known.any() else 0.0
    return np.where(known, norms, typical)
