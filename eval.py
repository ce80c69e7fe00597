"""Draw and grade: prompts in, scored samples out, dealt over the ranks. A pilot is an evaluation with k = N'.

A sample is a pure function of (seed, purpose, step, problem, index): not of the rank that draws it, nor of the samples
that share its batch. So one rank or eight, a resumed run or a fresh one draw the same text (up to rounding: exact in
practice in fp32 on CPU; on CUDA bf16 matrix products depend on the batch).
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor
from transformers.utils import logging as transformers_logging

from data import InputError, Problem, at_least, encode_prompt, load_problems

TOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests", "toy")
TRAINING, EVALUATION = 0, 1  # the purpose of a sample, part of its seed


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The model and how it is sampled."""
    add = parser.add_argument_group("model and sampling").add_argument
    add("--model", default=TOY, help="folder or hub name of a causal LM")
    add("--seed", type=at_least(0), default=0, help="seeds samples and the order of problems")
    add("--sampler", choices=["auto", "hf", "vllm"], default="auto", help="who generates; auto is hf, transformers")
    add("--temperature", type=at_least(1e-3), default=1.0, help="divides the logits, in sampling and in training")
    add("--max-prompt-tokens", type=at_least(1), default=64, help="longer prompts are dropped, and counted")
    add("--max-response-tokens", type=at_least(1), default=64, help="longer responses are cut, and graded as they are")
    add("--sampler-batch-size", type=at_least(1), default=256, help="sequences the hf sampler holds; a memory flag")


def run(main) -> None:
    """Run a script's main() to the end of its process group; bad input is one line from rank 0 and exit code 2."""
    try:
        main()
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup() -> torch.device:
    """Join the process group of torchrun, or be a group of one; returns this rank's device."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun has it for several ranks: threads that share a busy core only spin
    backend, patience = "cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(hours=1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def print0(*values) -> None:
    """print, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(*values, flush=True)


def gather(items: list) -> list:
    """Every rank's items, in the order of ranks, on every rank."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def on_rank0(function, *arguments):
    """Call a function on rank 0 while the others wait; its InputError is raised on every rank, so that none hangs."""
    result, complaint = None, [None]
    if dist.get_rank() == 0:
        try:
            result = function(*arguments)
        except InputError as error:
            complaint = [str(error)]
    dist.broadcast_object_list(complaint)
    if complaint[0]:
        raise InputError(complaint[0])
    return result


def load_model(args, device: torch.device, checkpoint=None):
    """(model, tokenizer) of a checkpoint or of --model, in fp32; InputError if it cannot be had or is too short."""
    source = checkpoint or args.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"--model {source}: cannot be loaded ({type(error).__name__}: {reason})") from error
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and args.max_prompt_tokens + args.max_response_tokens > window:
        raise InputError(f"--max-prompt-tokens + --max-response-tokens is above the model's context of {window} tokens")
    if tokenizer.chat_template is None:
        print0(f"{args.model} has no chat template: prompts use a plain one")
    return model, tokenizer


def load_prompts(spec: str, split: str, tokenizer, args, limit: int | None = None) -> list[Problem]:
    """The problems whose prompt fits --max-prompt-tokens: others get no budget, and are counted on screen."""
    problems = load_problems(spec, split, limit)
    fitting = [p for p in problems if len(encode_prompt(tokenizer, p)) <= args.max_prompt_tokens]
    if not fitting:
        raise InputError(f"{spec}: every prompt is longer than --max-prompt-tokens {args.max_prompt_tokens}")
    if len(fitting) < len(problems):
        print0(f"{spec}: dropped {len(problems) - len(fitting)} of {len(problems)} prompts, over --max-prompt-tokens")
    return fitting


@dataclass
class Sample:
    """One response to one problem, with everything that training asks of it. Token ids only: text is not kept."""

    problem: int  # Problem.id
    index: int  # among the samples of this problem, pilot first
    prompt_ids: np.ndarray  # int32 (prompt,)
    response_ids: np.ndarray  # int32 (response,), the end-of-sequence token included
    finished: bool  # False: cut at --max-response-tokens
    reward: float = 0.0  # 1.0 if right
    grader_failed: bool = False  # killed at the deadline: counted as wrong
    old_logprobs: np.ndarray | None = None  # float32 (response,), the trainer's, before the step's first update
    ref_logprobs: np.ndarray | None = None  # float32 (response,), the KL reference's
    grad_norm: float = 0.0  # of the token sum of -log pi, with respect to the output head
    advantage: float = 0.0  # what its reward is worth to the objective (raft.keep_right, grpo.compare_groups)
    weight: float = 0.0  # of its token sum in the loss of its update

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class HfSampler:
    """transformers' `generate` with its key-value cache, made reproducible sample by sample."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.batch_size = args.max_response_tokens, args.sampler_batch_size
        ends = model.generation_config.eos_token_id
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        if not self.ends:
            raise InputError(f"--model {args.model}: has no end-of-sequence token")
        self.pad = min(self.ends) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # The published settings may hold top-k, penalties, ...: training samples the distribution that it trains.
        model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends), pad_token_id=self.pad)

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seeds: list[tuple[int, ...]], temperature: float) -> list[tuple]:
        """One (response ids, finished) a prompt; equal prompts with unequal seeds are samples of one problem."""
        responses = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            responses += self._generate(prompts[rows], GumbelMax(seeds[rows], temperature, self.model.device))
        return responses

    def _generate(self, prompts: list[list[int]], pick: LogitsProcessor) -> list[tuple]:
        longest, device = max(map(len, prompts)), self.model.device
        padding = [longest - len(ids) for ids in prompts]  # on the left: responses begin together
        input_ids = torch.tensor([[self.pad] * n + ids for n, ids in zip(padding, prompts)], device=device)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        self.model.eval()  # gradient checkpointing would switch the cache off
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = self.model.generate(input_ids, attention_mask=mask, max_new_tokens=self.max_tokens,
                                         do_sample=False, logits_processor=[pick])
        return [self._cut(row) for row in output[:, longest:].tolist()]

    def _cut(self, ids: list[int]) -> tuple[np.ndarray, bool]:
        end = next((t for t, token in enumerate(ids) if token in self.ends), None)
        return np.array(ids if end is None else ids[: end + 1], dtype=np.int32), end is not None


class GumbelMax(LogitsProcessor):
    """Turns greedy decoding into sampling: argmax_v ln p_v + g_v draws from p, if g is Gumbel noise.

    Each row's noise comes from a generator of its own, so that a sample depends on its seed and logits alone. Inverting
    the cumulative distribution would need one uniform instead, but rounding, which differs from batch to batch, shifts
    all of its edges, one a token of the vocabulary; here a token rarely changes (tests/test_eval.py compares).
    Temperature 0 takes the most likely token.
    """

    def __init__(self, seeds: list[tuple[int, ...]], temperature: float, device: torch.device):
        self.temperature = temperature
        states = [int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) for seed in seeds]
        self.generators = [torch.Generator(device).manual_seed(state) for state in states]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return scores
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)  # (batch, vocabulary)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)  # if E is exponential, -ln E is Gumbel
        return scores.double() / self.temperature - noise.log()


def make_sampler(model, tokenizer, args):
    """The sampler that --sampler names."""
    if args.sampler == "vllm":
        installed = importlib.util.find_spec("vllm") is not None
        reason = "is not supported yet" if installed else "is not installed (GPU nodes: pip install vllm==0.32.0)"
        raise InputError(f"--sampler vllm: vllm {reason}; use --sampler hf")
    return HfSampler(model, tokenizer, args)


def draw(sampler, grader, problems: list[Problem], counts, key: tuple[int, ...], temperature: float,
         first=0) -> list[Sample]:
    """Draw counts[i] graded samples of problems[i], numbered from `first` (or first[i]); the same list on every rank.

    key: (seed, purpose, step). The samples, in the order of problems, are cut into one equal part a rank; the gathered
    order is therefore the same whatever the number of ranks.
    """
    owners = np.repeat(np.arange(len(problems)), counts)
    starts = np.broadcast_to(first, len(problems))
    indices = np.concatenate([start + np.arange(count) for start, count in zip(starts, counts)])
    mine = np.array_split(np.arange(len(owners)), dist.get_world_size())[dist.get_rank()]
    prompts = {i: encode_prompt(sampler.tokenizer, problems[i]) for i in np.unique(owners[mine])}
    seeds = [(*key, problems[owners[k]].id, int(indices[k])) for k in mine]
    responses = sampler([prompts[i] for i in owners[mine]], seeds, temperature)
    texts = sampler.tokenizer.batch_decode([ids for ids, _ in responses], skip_special_tokens=True)
    grades = grader(texts, [problems[i].answer for i in owners[mine]])
    prompts = {i: np.array(ids, dtype=np.int32) for i, ids in prompts.items()}
    return gather([
        Sample(problems[owners[k]].id, int(indices[k]), prompts[owners[k]], ids, finished, score, failed)
        for k, (ids, finished), (score, failed) in zip(mine, responses, grades)
    ])


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


def avg_at_k(rewards: np.ndarray) -> float:
    """avg@k: the mean over problems of the mean reward of their k samples. rewards: (problems, k)."""
    return float(np.mean(rewards))


def evaluate(sampler, grader, problems: list[Problem], args) -> dict:
    """avg@k over --eval-samples samples a problem, with mean response length, share of cut responses, grader failures.

    The same uniforms are used at every call, so that two evaluations of a run differ by the model alone.
    """
    k, key = args.eval_samples, (args.seed, EVALUATION, 0)
    drawn = draw(sampler, grader, problems, np.full(len(problems), k), key, args.eval_temperature)
    return {
        "eval_accuracy": avg_at_k(np.reshape([sample.reward for sample in drawn], (len(problems), k))),
        "eval_response_tokens": float(np.mean([len(sample.response_ids) for sample in drawn])),
        "eval_truncated": float(np.mean([not sample.finished for sample in drawn])),
        "eval_grader_failures": sum(sample.grader_failed for sample in drawn),
    }
