"""The E-step: a pilot tells each prompt's acceptance rate p and gradient norm G, and GVM spends the budget on them.

`collect` is one step's sampling in training. Alone, this script writes the allocation table of a data set:

    python gvm.py --out table.jsonl                                                          # the toy, on a CPU
    torchrun --nproc-per-node 8 gvm.py --model Qwen/Qwen2.5-Math-1.5B --data ScaleML-RLHF/numina_math_1 \\
        --max-prompt-tokens 1024 --max-response-tokens 3072 --pilot-samples 8 --limit 1024 --out table.jsonl
"""

import argparse
import json
import os

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from allocator import allocate, gvm_weights, variance_ratio
from data import Grader, InputError, Problem, problems_of_step
from eval import TOY, TRAINING, Sample, at_least, draw, gather, load_model, load_prompts, make_sampler
from eval import add_flags as add_model_flags
from eval import on_rank0, parse, print0, run, setup

HEAD_CHUNK = 512  # tokens whose logits, (tokens, vocabulary) in fp32, are held at once


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The problems and how the samples are spread over them."""
    add = parser.add_argument_group("problems and budget").add_argument
    add("--data", default=os.path.join(TOY, "train.jsonl"), help="problems: a file, or a hub data set, name[:config]")
    add("--split", default="train", help="split of --data, if it is a hub data set")
    add("--samples-per-prompt", type=at_least(1), default=8, help="the budget, on average; includes a reused pilot")
    add("--pilot-samples", type=at_least(1), default=4, help="N': samples of each prompt to estimate p and G from")
    add("--e-step-every", type=at_least(1), default=1, metavar="K",
        help="steps that one pilot serves; 1 reuses it for training, above 1 it only informs, and is counted")
    add("--alpha", type=at_least(0.0), default=1e-3, help="Eq. 7: weight of the penalty on prompts of small p")
    add("--beta", type=at_least(2.0), default=2.0, help="Eq. 7: its power")
    add("--weighting", choices=["prompt", "token", "sequence"], default="prompt",
        help="a sample's weight in the loss (raft.sample_weights); G is measured to match")
    add("--tokens-per-micro-batch", type=at_least(1), default=16384, help="padded tokens at once; a memory flag")


def check_budget(args) -> None:
    """Raise InputError for a budget that cannot hold the pilot that it includes."""
    if args.e_step_every == 1 and args.samples_per_prompt < args.pilot_samples:
        raise InputError("--samples-per-prompt is below --pilot-samples, which it includes: raise it, or lower those")


# --- log-probabilities and gradient norms ----------------------------------------------------------------------------


class Policy(nn.Module):
    """A transformers causal LM that scores responses: pi(y | x) = softmax(W h / T), W the output head, T temperature.

    Raises InputError for a model whose logits are not W h: scaled, soft-capped, or from a head that is not linear.
    """

    def __init__(self, model, temperature: float = 1.0, gradient_checkpointing: bool = False):
        super().__init__()
        self.model, self.temperature = model, temperature
        for module in model.modules():  # the samples came from the model without dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        self._refuse_modified_logits()
        if gradient_checkpointing:  # the reentrant kind crashes DDP
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids, attention_mask, response_mask, norms: bool = False):
        """Log-probs of the response tokens, row after row, (response tokens,), and norms (batch,) or None.

        input_ids, attention_mask, response_mask: (batch, time), padded on the right. With `norms`, also
        ||grad_W -sum_t ln pi(y_t)|| of each row, from the same forward pass, and the log-probs carry no gradient.
        """
        device_type = input_ids.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
            output = self.model.base_model(input_ids, attention_mask=attention_mask, use_cache=False)
            predicted = response_mask[:, 1:]  # position t predicts token t + 1
            hidden = output.last_hidden_state[:, :-1][predicted]  # (tokens, hidden)
            tokens = input_ids[:, 1:][predicted]  # (tokens,)
            if norms:
                lengths = predicted.sum(dim=1).tolist()
                rows = [self._row(h, y) for h, y in zip(hidden.split(lengths), tokens.split(lengths))]
                return torch.cat([logprobs for logprobs, _ in rows]), torch.stack([norm for _, norm in rows])
            # Logits are recomputed in the backward pass, chunk by chunk, instead of kept.
            chunks = zip(hidden.split(HEAD_CHUNK), tokens.split(HEAD_CHUNK))
            return torch.cat([checkpoint(self._logprobs, h, y, use_reentrant=False) for h, y in chunks]), None

    def _log_softmax(self, hidden):
        logits = self.model.get_output_embeddings()(hidden).float() / self.temperature
        return torch.log_softmax(logits, dim=-1)  # (tokens, vocabulary)

    def _logprobs(self, hidden, tokens):
        return self._log_softmax(hidden).gather(1, tokens[:, None]).squeeze(1)

    @torch.no_grad()
    def _row(self, hidden, tokens):
        """(log-probs, gradient norm) of one response, without a backward pass.

        With the hidden states h_t held fixed, grad_W -sum_t ln pi(y_t) = sum_t delta_t h_t^T / T, where
        delta_t = softmax_t - onehot(y_t). The sum is exact for the head; a tied embedding's input path is left out.
        """
        gradient, logprobs = 0.0, []  # (vocabulary, hidden)
        for h, y in zip(hidden.split(HEAD_CHUNK), tokens.split(HEAD_CHUNK)):
            log_softmax = self._log_softmax(h)
            logprobs.append(log_softmax.gather(1, y[:, None]).squeeze(1))
            delta = log_softmax.exp_()
            delta[torch.arange(len(y), device=y.device), y] -= 1
            gradient = gradient + (delta.T @ h.to(delta.dtype)).float()
        return torch.cat(logprobs), torch.linalg.norm(gradient) / self.temperature

    @torch.no_grad()
    def _refuse_modified_logits(self) -> None:
        """Compare the model's logits with its head's output, blown up so that a soft cap cannot hide."""
        head, ids, seen = self.model.get_output_embeddings(), torch.arange(4, device=self.model.device)[None], {}

        def enlarge(module, inputs, output):
            seen.update(hidden=inputs[0], logits=output * (1000 / output.abs().max()))
            return seen["logits"]

        hook = head.register_forward_hook(enlarge)
        logits = self.model(input_ids=ids).logits
        hook.remove()
        hidden = self.model.base_model(input_ids=ids).last_hidden_state
        same = [torch.allclose(hidden, seen["hidden"], rtol=1e-3, atol=1e-4), torch.allclose(logits, seen["logits"])]
        if not (isinstance(head, nn.Linear) and all(same)):
            raise InputError(f"--model: {type(self.model).__name__} scales or caps its logits, or its head is not "
                             "linear; gradient norms would be wrong for it: choose another model")


def deal(samples: list, ranks: int, tokens_per_micro_batch: int) -> list[list[list[int]]]:
    """Micro-batches of every rank, as indices: dealt by length, so that ranks have equal work and rows little padding.

    samples: anything with a length in tokens. A micro-batch is padded to its longest row, its first, and holds at most
    tokens_per_micro_batch tokens, or one row.
    """
    by_length = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    shares = []
    for rank in range(ranks):
        batches: list[list[int]] = []
        for i in by_length[rank::ranks]:
            if batches and (len(batches[-1]) + 1) * len(samples[batches[-1][0]]) <= tokens_per_micro_batch:
                batches[-1].append(i)
            else:
                batches.append([i])
        shares.append(batches)
    return shares


def collate(samples: list[Sample], device: torch.device) -> dict[str, torch.Tensor]:
    """Policy's inputs for these samples: input_ids, attention_mask, response_mask, each (batch, time)."""
    rows = [torch.from_numpy(np.concatenate([s.prompt_ids, s.response_ids])).long() for s in samples]
    in_response = [torch.arange(len(row)) >= len(s.prompt_ids) for row, s in zip(rows, samples)]
    columns = {
        "input_ids": rows,
        "attention_mask": [torch.ones_like(row) for row in rows],
        "response_mask": in_response,
    }
    return {name: pad_sequence(column, batch_first=True).to(device) for name, column in columns.items()}


@torch.no_grad()
def score(policy: Policy, samples: list[Sample], tokens_per_micro_batch: int, norms: bool = False,
          into: str = "old_logprobs") -> None:
    """Fill in each sample's log-probs under `policy`, and its grad_norm on request. Work is shared by the ranks."""
    device = next(policy.parameters()).device
    scored = []
    for rows in deal(samples, dist.get_world_size(), tokens_per_micro_batch)[dist.get_rank()]:
        batch = [samples[i] for i in rows]
        logprobs, grad_norms = policy(**collate(batch, device), norms=norms)
        logprobs = logprobs.cpu().split([len(sample.response_ids) for sample in batch])
        grad_norms = grad_norms.tolist() if norms else [sample.grad_norm for sample in batch]
        scored += [(i, values.numpy().copy(), norm) for i, values, norm in zip(rows, logprobs, grad_norms)]
    for i, values, norm in gather(scored):
        setattr(samples[i], into, values)
        samples[i].grad_norm = norm


# --- the E-step ------------------------------------------------------------------------------------------------------


def e_step(policy: Policy, sampler, grader, problems: list[Problem], step: int, args) -> tuple[dict, list[Sample]]:
    """Algorithm 2: N' pilot samples a prompt, graded; one forward pass over the right ones gives G; the allocation.

    Returns the table {"accept_rates": p, "grad_norms": G, "counts": n}, (prompts,) each, and the pilot's samples, N' of
    each problem in turn. p = right / N'. G is the root mean square of the right samples' norms, as in the derivation
    (Algorithm 2 writes the mean), and 0 where there are none.
    """
    shape = (len(problems), args.pilot_samples)
    key = (args.seed, TRAINING, step)
    pilot = draw(sampler, grader, problems, np.full(*shape), key, args.temperature)
    score(policy, [s for s in pilot if s.reward > 0], args.tokens_per_micro_batch, norms=True)
    # `sequence` weights divide the loss of a response, and so its gradient, by its length.
    norms = [s.grad_norm / (len(s.response_ids) if args.weighting == "sequence" else 1) for s in pilot]
    right = np.reshape([s.reward > 0 for s in pilot], shape)
    squares = (np.reshape(norms, shape) ** 2 * right).sum(axis=1)
    table = {"accept_rates": right.mean(axis=1), "grad_norms": np.sqrt(squares / np.maximum(right.sum(axis=1), 1))}
    weights = gvm_weights(**table, alpha=args.alpha, beta=args.beta)
    reused = args.pilot_samples if args.e_step_every == 1 else 0
    table["counts"] = allocate(weights, len(problems) * args.samples_per_prompt, min_samples=reused)
    return table, pilot


def collect(policy: Policy, sampler, grader, problems: list[Problem], step: int, args,
            window: dict | None) -> tuple[list[Sample], dict, dict | None]:
    """Everything one step samples: (samples to train on, figures for the log, the window to hand to the next step).

    --e-step-every K = 1: the pilot is part of the budget and is trained on. K > 1: a pilot over the prompts of K steps
    informs the allocation among them. The window holds the table of e_step, a row a step, JSON-ready for a checkpoint.
    """
    batch, K = problems_of_step(problems, step, args), args.e_step_every
    counts, pilot, figures = np.full(len(batch), args.samples_per_prompt), [], {}
    if args.allocator == "gvm":
        if window is None or step >= window["first_step"] + K:
            ahead = [problem for later in range(step, step + K) for problem in problems_of_step(problems, later, args)]
            table, pilot = e_step(policy, sampler, grader, ahead, step, args)
            window = {"first_step": step, **{name: column.reshape(K, -1).tolist() for name, column in table.items()}}
        row = step - window["first_step"]
        p, G, counts = (np.array(window[name][row]) for name in ("accept_rates", "grad_norms", "counts"))
        even = args.samples_per_prompt + (args.pilot_samples if K > 1 else 0)  # what uniform could spend for the same
        figures["predicted_variance"] = variance_ratio(p, G, counts, even)
        figures["pilot_unsolved"] = float(np.mean(p == 0))
    reused, first = (pilot if K == 1 else []), (args.pilot_samples if args.allocator == "gvm" else 0)
    rest = draw(sampler, grader, batch, counts - first if reused else counts, (args.seed, TRAINING, step),
                args.temperature, first)
    position = {problem.id: i for i, problem in enumerate(batch)}
    samples = sorted(reused + rest, key=lambda sample: (position[sample.problem], sample.index))
    return samples, describe(samples, pilot if K > 1 else [], counts) | figures, window


def describe(samples: list[Sample], extra: list[Sample], counts: np.ndarray) -> dict:
    """Log figures of a step's samples and of an `extra` pilot: how many, how right, and where the budget went."""
    def mean(values) -> float | None:
        return float(np.mean(values)) if len(values) else None  # a step of a window may get no samples at all

    rewards, drawn = np.array([sample.reward for sample in samples]), samples + extra
    solved = [group.mean() if len(group) else 0.0 for group in np.split(rewards, np.cumsum(counts)[:-1])]
    groups = {"never": np.equal(solved, 0), "always": np.equal(solved, 1)}
    groups["sometimes"] = ~(groups["never"] | groups["always"])
    return {
        "samples": len(drawn),
        "tokens": sum(len(sample.response_ids) for sample in drawn),
        "accept_rate": mean(rewards),
        "truncated": mean([not sample.finished for sample in drawn]),
        "grader_failures": sum(sample.grader_failed for sample in drawn),
        **{f"prompts_{name}": mean(members) for name, members in groups.items()},
        **{f"budget_{name}": float(counts[members].sum() / max(counts.sum(), 1)) for name, members in groups.items()},
    }


# --- the script ------------------------------------------------------------------------------------------------------


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this script alone."""
    add = parser.add_argument_group("table").add_argument
    add("--limit", type=at_least(1), default=None, help="use the first problems of --data only")
    add("--out", required=True, help="the table to write, JSON lines; must not exist")


def write_table(path: str, columns: dict) -> None:
    """Write columns as JSON lines; raises InputError rather than overwrite."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            for row in zip(*(np.asarray(column).tolist() for column in columns.values())):
                file.write(json.dumps(dict(zip(columns, row))) + "\n")
    except OSError as error:
        raise InputError(f"--out {path}: {error.strerror}; choose another name") from error


def main(args) -> None:
    """Write one line a problem: id, p, G, n and the mean tokens of its pilot samples; print what it would gain."""
    check_budget(args)
    device = setup()
    if os.path.exists(args.out):
        raise InputError(f"--out {args.out}: exists already; choose another name")
    model, tokenizer = load_model(args, device)
    problems = load_prompts(args.data, args.split, tokenizer, args, args.limit)
    with Grader() as grader:
        sampler, policy = make_sampler(model, tokenizer, args), Policy(model, args.temperature)
        table, pilot = e_step(policy, sampler, grader, problems, 1, args)
    p, G, counts = table.values()
    lengths = np.reshape([len(sample.response_ids) for sample in pilot], (len(problems), -1)).mean(axis=1)
    ids = [problem.id for problem in problems]
    on_rank0(write_table, args.out, {"id": ids, "p": p, "G": G, "n": counts, "tokens": lengths})
    print0(f"pilot: {len(pilot)} samples, {p.mean():.3f} right; {np.mean(p == 0):.0%} of the problems unsolved")
    print0(f"budget: {counts.sum()} samples, {counts.min()} to {counts.max()} a problem")
    ratio = variance_ratio(p, G, counts, args.samples_per_prompt)
    print0("predicted variance against uniform:", "unknown" if ratio is None else f"{ratio:.3f} (the pilot's estimate)")


if __name__ == "__main__":
    run(lambda: main(parse(__doc__, add_model_flags, add_flags, add_table_flags)))
