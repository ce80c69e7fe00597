"""What figures say of samples: avg@k, pass@k, maj@k with their errors, and a training step's log.

All are pure functions. Rows are those of data.sample_rows.
"""

import math
from itertools import combinations

import numpy as np

from data import Problem, Sample


# --- of an evaluation: k samples of each problem -----------------------------------------------
def pass_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each problem, (problems,): the chance that one of k samples is right.

    1 - C(n - c, k) / C(n, k), where c of the n are right: unbiased (arXiv 2107.03374, Eq. 1).
    scores: 0 or 1, (problems, n), n >= k.
    """
    n = scores.shape[1]
    num_right = scores.sum(axis=1).astype(int)
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in num_right.tolist()])


def majority_scores(answers: list[list[str]], scores: np.ndarray, are_same) -> np.ndarray:
    """maj@k of each problem, (problems,): the score of the answer that most of its samples give.

    answers: k per problem, "" for none, which is no vote. scores: (problems, k). are_same: from
    pairs of answers to booleans, so that 1/2 and 0.5 vote together. Of two answers with as many
    votes, the first counts.
    """
    pairs = []  # (problem, one sample, another sample)
    for i, group in enumerate(answers):
        voters = [j for j, answer in enumerate(group) if answer]
        pairs += [(i, one, other) for one, other in combinations(voters, 2)]
    # Sorted, so that each pair of texts is judged once, in one direction.
    texts = [tuple(sorted((answers[i][one], answers[i][other]))) for i, one, other in pairs]
    votes = np.array([[float(answer != "") for answer in group] for group in answers])
    for (i, one, other), same in zip(pairs, are_same(texts)):
        votes[i, one] += same
        votes[i, other] += same
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


def summarise(rows: list[dict], are_same) -> dict[str, dict]:
    """`mean_and_error` of each metric. rows: k of each problem in turn. are_same: see above."""
    num_problems = len({row["problem"] for row in rows})
    k = len(rows) // num_problems
    scores = np.reshape([row["score"] for row in rows], (num_problems, k))
    answers = [row["answer"] or "" for row in rows]
    groups = [answers[start : start + k] for start in range(0, len(answers), k)]
    metrics = {f"avg@{k}": scores}  # (problems,) or (problems, k) each
    for j in sorted({k} | {2**i for i in range(1, k.bit_length())}):  # 2, 4, 8, ..., and k
        metrics[f"pass@{j}"] = pass_at_k(scores, j)
    metrics[f"maj@{k}"] = majority_scores(groups, scores, are_same)
    metrics["response_tokens"] = [row["tokens"] for row in rows]
    metrics["no_answer"] = [not answer for answer in answers]
    metrics["truncated"] = [row["finish_reason"] == "length" for row in rows]
    metrics["grader_failures"] = [row["grader_failed"] for row in rows]
    per_problem = {name: np.reshape(x, (num_problems, -1)) for name, x in metrics.items()}
    summary = {name: mean_and_error(x.mean(axis=1)) for name, x in per_problem.items()}
    summary[f"avg@{k}"]["sampling_error"] = sampling_error(scores)
    return summary


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


# --- of a training step -----------------------------------------------------------------------
def describe_step(problems: list[Problem], samples: list[Sample], drawn: list[Sample]) -> dict:
    """What was drawn in a step, and where it went.

    problems: those of the step. samples: what it trains on. drawn: all that it cost, with a pilot
    that only informs. accept_rate: the share of right ones among `samples`, of which hard prompts
    may have more than their share. "never", "sometimes", "always": prompts that got samples, by how
    many of these are right; their share of those prompts, and of the samples.
    samples_not_finite: those whose log-probs, or gradient norm, hold NaN or infinity.
    """
    metrics = {
        "samples": len(drawn),
        "samples_not_finite": sum(not is_finite(sample) for sample in drawn),
        "tokens": sum(len(sample.response_ids) for sample in drawn),
        "grader_failures": sum(sample.grader_failed for sample in drawn),
        "accept_rate": np.mean([sample.reward for sample in samples]) if samples else None,
        "truncated": np.mean([not sample.finished for sample in drawn]) if drawn else None,
    }
    rewards = {problem.id: [] for problem in problems}
    for sample in samples:
        rewards[sample.problem].append(sample.reward)
    served = [r for r in rewards.values() if r]
    groups = {
        "never": [r for r in served if not any(r)],
        "sometimes": [r for r in served if any(r) and not all(r)],
        "always": [r for r in served if all(r)],
    }
    for name, group in groups.items():
        metrics[f"prompts_{name}"] = len(group) / max(len(served), 1)
        metrics[f"budget_{name}"] = sum(map(len, group)) / max(len(samples), 1)
    return metrics


def is_finite(sample: Sample) -> bool:
    """Whether the policy that drew a sample was not NaN or infinite there."""
    logprobs = sample.sampler_logprobs
    return np.isfinite(sample.head_grad_norm) and (logprobs is None or np.isfinite(logprobs).all())


def describe_pilot(table: dict, even: int, is_variance: bool) -> dict:
    """What a pilot promises. table: "weights", "counts", "num_right", (prompts,) each.

    predicted_variance: sum_i w_i^2 / n_i, over the same with `even` samples of each prompt. It is
    optimistic: it believes the very samples that may have misled the weights, and where they say
    that a prompt has no gradient, what is taken from it is a gain. None if it is infinite, or if
    the rule's w_i^2 / n_i is nobody's variance (is_variance).
    """
    moments, counts = np.square(table["weights"]), np.array(table["counts"])  # c_i, n_i
    unsolved, ratio = np.equal(table["num_right"], 0), None
    some = moments > 0
    if is_variance and some.any() and counts[some].all():
        ratio = float((moments[some] / counts[some]).sum() / (moments.sum() / even))
    return {"predicted_variance": ratio, "pilot_unsolved": float(np.mean(unsolved))}


def describe_prediction(p: np.ndarray, num_right: np.ndarray, num_drawn: np.ndarray) -> dict:
    """How well p was predicted, over the problems that were drawn; (problems,) each. The first is
    to be compared with accept_rate."""
    was_drawn = num_drawn > 0
    p, num_right, num_drawn = p[was_drawn], num_right[was_drawn], num_drawn[was_drawn]
    shares = num_right / num_drawn
    varies = len(p) > 1 and p.std() > 0 and shares.std() > 0
    return {
        "predicted_accept_rate": float(p @ num_drawn / max(num_drawn.sum(), 1)),
        "prediction_correlation": float(np.corrcoef(p, shares)[0, 1]) if varies else None,
    }
