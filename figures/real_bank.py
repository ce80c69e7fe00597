"""A bank of samples of a real model, each with its gradient, for figures/real_gradient.py.

    python tests/make_real.py REAL                                    # the model and its problems
    python figures/real_bank.py --model REAL/model --data REAL/train.jsonl --max-prompt-tokens 256 \
        --sampler vllm --out bank.npz                                 # 256 prompts x 32 samples

The file is written anew after every few prompts, and a second call goes on where one has ended.
For each prompt, (prompts, ...): its row in --data, its task, and its hidden states, those of the
last token beside the mean over tokens, in the middle layer and in the last. For each sample,
(prompts, samples, ...): reward, length in tokens, whether it ended by itself, its tokens and their
log-probs, padded, and of the gradient of the negative log-likelihood with respect to the output
head its norm, and a sketch.

The sketch. That gradient is sum_t delta_t h_t^T, vocabulary x hidden. Its entry (v, j) is added,
with the random sign s(v) s'(j), to the place b(v) + b'(j), modulo 1,024, of the sketch. So inner
products of sketches are right on average. No such matrix is ever made: the sketch of a product
delta h^T is the circular convolution of a sketch of delta with one of h (Pham and Pagh, 2013).
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (the project's modules lie one folder up)
import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import run  # noqa: E402
from allocator import summarise_samples  # noqa: E402
from data import TRAINING, Problem, Sample, add_data_flags, load_prompts  # noqa: E402
from files import read_rows  # noqa: E402
from grader import Grader  # noqa: E402
from model import summarise_states  # noqa: E402
from pretrained import add_model_flags, load_model  # noqa: E402
from run import InputError, positive_int, print0  # noqa: E402
from sampler import add_sampler_flags, draw, make_sampler  # noqa: E402

SIZE = 1024  # of a sketch
PIECE = 8  # prompts between two writes
SCORES = ("logprobs", "norms", "sketches")  # of each sample, by the policy


def add_flags(parser: argparse.ArgumentParser) -> None:
    """How much is drawn, and where to."""
    add = parser.add_argument
    add("--prompts", type=positive_int, default=256, help="drawn at random from --data")
    add("--samples", type=positive_int, default=32, help="of each")
    add("--out", type=Path, required=True, help="a .npz file, which may be there in part")


class Sketch:
    """Sketches of sum_t delta_t h_t^T, (SIZE,), from delta (time, vocabulary), h (time, hidden)."""

    def __init__(self, vocabulary: int, hidden: int):
        generator = torch.Generator().manual_seed(0)
        self.places, self.signs = [], []
        for size in (vocabulary, hidden):
            self.places.append(torch.randint(SIZE, (size,), generator=generator))
            self.signs.append(2.0 * torch.randint(2, (size,), generator=generator) - 1)

    def __call__(self, delta: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        product = 1.0
        for rows, places, signs in zip((delta, h), self.places, self.signs):
            sums = torch.zeros(len(rows), SIZE).index_add_(1, places, rows * signs)
            product = product * torch.fft.rfft(sums)  # of a convolution, the product of both
        return torch.fft.irfft(product.sum(dim=0), n=SIZE)


@torch.no_grad()
def score(model, sketch: Sketch, prompt_ids: list[int], responses: list[np.ndarray],
          width: int) -> dict:
    """States of a prompt, and SCORES of responses to it, by name. The prompt is read once, for all
    of them. width: to which log-probs are padded."""
    ids = torch.tensor([prompt_ids])
    prompt = model.base_model(ids, use_cache=True, output_hidden_states=True)
    layers = prompt.hidden_states  # the embeddings, then one for each layer
    kept = {name: summarise_states(layer[0]).numpy()
            for name, layer in (("middle", layers[len(layers) // 2]), ("last", layers[-1]))}

    rows = pad_sequence([torch.from_numpy(ids).long() for ids in responses], batch_first=True)
    cache = prompt.past_key_values
    cache.batch_repeat_interleave(len(rows))
    hidden = model.base_model(rows, past_key_values=cache, use_cache=True).last_hidden_state
    first = prompt.last_hidden_state[:, -1:].expand(len(rows), -1, -1)
    hidden = torch.cat([first, hidden[:, :-1]], dim=1)  # position t predicts token t

    found = []
    for h, y, response in zip(hidden, rows, responses):
        h, y = h[: len(response)], y[: len(response)]
        log_softmax = torch.log_softmax(model.get_output_embeddings()(h), dim=-1)
        logprobs = padded(log_softmax.gather(1, y[:, None]).squeeze(1).numpy(), width)
        delta = log_softmax.exp()
        delta[torch.arange(len(y)), y] -= 1
        # |sum_t delta_t h_t^T|^2 = sum_{t, s} (delta_t delta_s) (h_t h_s)
        norm = ((delta @ delta.T) * (h @ h.T)).sum().clamp(min=0).sqrt()
        found.append((logprobs, norm.item(), sketch(delta, h).numpy()))
    return kept | dict(zip(SCORES, map(np.array, zip(*found))))


def padded(row: np.ndarray, width: int) -> np.ndarray:
    """A row with zeros behind it."""
    return np.pad(row, (0, width - len(row)))


def entry(model, sketch: Sketch, problem: Problem, samples: list[Sample], task: str,
          width: int) -> dict:
    """All that the bank holds of a problem. Equal responses are scored once."""
    places: dict[bytes, int] = {}
    rows = [places.setdefault(s.response_ids.tobytes(), len(places)) for s in samples]
    responses = [np.frombuffer(ids, np.int32).copy() for ids in places]
    scored = score(model, sketch, problem.prompt_ids, responses, width)
    for name in SCORES:
        scored[name] = scored[name][rows].astype(np.float32)
    return scored | {
        "row": problem.id, "task": task, "prompt_tokens": len(problem.prompt_ids),
        "rewards": np.array([s.reward for s in samples], np.float32),
        "lengths": np.array([len(s.response_ids) for s in samples]),
        "response_ids": np.array([padded(s.response_ids, width) for s in samples]),
        "finished": np.array([s.finished for s in samples]),
    }


def write(path: Path, entries: list[dict]) -> None:
    """All entries so far, (entries, ...) of each name: the file is whole at any time."""
    aside = path.with_suffix(".partial.npz")
    np.savez(aside, **{name: np.array([each[name] for each in entries]) for name in entries[0]})
    aside.rename(path)


def read(path: Path) -> list[dict]:
    """What `write` wrote; nothing if there is no file yet."""
    if not path.exists():
        return []
    with np.load(path) as bank:
        columns = {name: bank[name] for name in bank.files}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def check_same(path: Path, entries: list[dict], ids: list[int], samples: int) -> None:
    """InputError if what is there is not a beginning of what is asked for."""
    rows = [int(each["row"]) for each in entries]
    if rows != ids[: len(rows)] or any(len(each["rewards"]) != samples for each in entries):
        raise InputError(f"--out {path}: holds a bank of other prompts, or of another number of "
                         "samples; name another")


# --- reading it ----------------------------------------------------------------------------------
class Bank:
    """What `write` wrote, and what follows from it for each prompt."""

    def __init__(self, path: Path):
        with np.load(path) as columns:
            self.columns = {name: columns[name] for name in columns.files}
        self.right = self.columns["rewards"] > 0  # (prompts, samples), as the next two
        self.lengths, self.norms = self.columns["lengths"], self.columns["norms"].astype(float)
        self.sketches = self.columns["sketches"].astype(float)  # (prompts, samples, size)
        self.p = self.right.mean(axis=1)
        everyone = np.arange(len(self.p))
        whole = np.indices(self.right.shape).reshape(2, -1)
        self.known = self.summarise(everyone, *whole)
        self.exact = {objective: self._exact(objective) for objective in ("raft", "grpo")}

    def _exact(self, objective: str) -> np.ndarray:
        """Each prompt's gradient, as infinitely many samples would give it, (prompts, size)."""
        r = self.right.astype(float)
        if objective == "raft":  # E[-grad ln pi | right], and 0 for prompts never solved
            weights = r / np.maximum(r.sum(axis=1, keepdims=True), 1)
        else:
            centred = r - r.mean(axis=1, keepdims=True)
            weights = centred / (r.std(axis=1, keepdims=True) + 1e-6) / r.shape[1]
        return np.einsum("ij,ijk->ik", weights, self.sketches)

    def summarise(self, prompts, rows, samples) -> dict[str, np.ndarray]:
        """What drawn samples say of p and G, (prompts,) each: see real_ways.draw."""
        places = prompts[rows], samples
        return summarise_samples(rows, self.right[places], self.norms[places], len(prompts))


def facts(bank: Bank) -> list[dict]:
    """What the bank says by itself: sketches, norms, and how long the responses are."""
    known = bank.norms > 0
    ratios = np.linalg.norm(bank.sketches, axis=2)[known] / bank.norms[known]
    rows = [{"fact": "sketched over true norm", "mean": ratios.mean(), "std": ratios.std()}]
    logprobs = bank.columns["logprobs"]  # 0 beyond the response
    estimates = {"-ln pi": -logprobs.sum(axis=2),
                 "sqrt(sum (1 - pi)^2)": np.sqrt(((1 - np.exp(logprobs)) ** 2).sum(axis=2))}
    kinds = {"all": known, "right": known & bank.right, "wrong": known & ~bank.right}
    for (estimate, values), (kind, chosen) in product(estimates.items(), kinds.items()):
        logs = np.log([values[chosen].clip(1e-6), bank.norms[chosen]])
        rows.append({"fact": f"norms and {estimate}, {kind}: log correlation",
                     "mean": np.corrcoef(logs)[0, 1], "slope": np.polyfit(*logs, 1)[0]})
    mixed = (bank.p > 0) & (bank.p < 1)
    kinds = {"never": bank.p == 0, "sometimes": mixed, "always": bank.p == 1}
    for name, chosen in kinds.items():
        if not chosen.any():
            continue
        error = bank.lengths[chosen].mean(axis=1).std() / np.sqrt(max(chosen.sum() - 1, 1))
        rows.append({"fact": f"tokens of those right {name}", "prompts": int(chosen.sum()),
                     "mean": bank.lengths[chosen].mean(), "standard_error": error,
                     "cut": 1 - bank.columns["finished"][chosen].mean()})
    whole = bank.exact["grpo"].sum(axis=0)
    shares = bank.exact["grpo"] @ whole / (whole @ whole)  # of each prompt; their sum is 1
    for task in sorted(set(bank.columns["task"])):
        chosen = bank.columns["task"] == task
        rows.append({"fact": f"task {task}", "prompts": int(chosen.sum()),
                     "p": bank.p[chosen].mean(), "mean": bank.lengths[chosen].mean(),
                     "share_of_grpo_gradient": shares[chosen].sum()})
    return rows


def main(argv=None) -> None:
    """Draw, grade and score what the file lacks."""
    args = run.parse_flags(argv, __doc__, add_data_flags, add_model_flags, add_sampler_flags,
                           add_flags)
    if args.out.suffix != ".npz":
        raise InputError(f"--out {args.out}: must end in .npz; name another")
    model, tokenizer = load_model(args, run.join_ranks())
    problems = load_prompts(args.data, args.split, tokenizer, args, training=True)
    order = np.random.default_rng(args.seed).permutation(len(problems))[: args.prompts]
    tasks = [row.get("task", "") for row in read_rows(Path(args.data))]
    sampler, entries = make_sampler(model, tokenizer, args), read(args.out)
    check_same(args.out, entries, [problems[i].id for i in order], args.samples)
    sketch = Sketch(*model.get_output_embeddings().weight.shape)
    with Grader() as grader:
        while len(entries) < len(order):
            start = time.time()
            chosen = [problems[i] for i in order[len(entries):][:PIECE]]
            samples = draw(sampler, grader, chosen, [args.samples] * len(chosen),
                           seed_key=(args.seed, TRAINING, 0), temperature=args.temperature)
            drawn = time.time()
            for k, problem in enumerate(chosen):
                mine = samples[k * args.samples :][: args.samples]
                entries.append(entry(model, sketch, problem, mine, tasks[problem.id],
                                     args.max_response_tokens))
            write(args.out, entries)
            print0(f"{len(entries)} prompts  drawn in {drawn - start:.0f} s  scored in "
                   f"{time.time() - drawn:.0f} s")


if __name__ == "__main__":
    run.run_script(main)
