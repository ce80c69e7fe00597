"""Who draws: transformers or vLLM; and `draw`, which shares the work out over the ranks.

A sample is a function of (seed, purpose, step, problem, index) alone, not of the rank that draws
it nor of the samples that share its batch: one rank or eight, a resumed run or a fresh one, draw
the same text. That holds on CPUs. On CUDA the random numbers are the same too, but rounding in bf16
depends on the batch: a text is the same until that tips a choice between two tokens.
"""

import argparse
import atexit
import importlib.util
import os
from contextlib import nullcontext
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from batches import cut_in_pieces, gather_tensor
from data import Problem, Sample
from run import InputError, RunError, number, positive_int, share_out


def add_sampler_flags(parser: argparse.ArgumentParser) -> None:
    """Who samples, and how much at once."""
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=["auto", *SAMPLERS], default="auto",
        help="who generates; hf: transformers; auto: vllm if it is installed and CUDA is there")
    add("--vllm-memory", type=number(float, low=0.01, high=1), default=0.4,
        help="share of each GPU's memory that vllm takes while it samples; no effect on a CPU")
    add("--sampler-batch-size", type=positive_int,
        help="sequences sampled at once; None: 1024 for vllm on CUDA, else 256")
    add("--seed", type=number(int, low=0, high=2**32 - 1), default=0, help="of samples and order")


def draw(sampler, grader, problems: list[Problem], counts, *, seed_key: tuple[int, ...],
         temperature: float, first_index=0, timer=nullcontext) -> list[Sample]:
    """Draw counts[i] graded samples of problems[i]: the same list, in their order, on every rank.

    counts: (problems,). seed_key: (seed, purpose, step). first_index: of each problem's samples,
    one for all or (problems,). timer: RunState's, or none.
    """
    firsts = np.broadcast_to(first_index, len(problems)).tolist()
    requests = [(problem, first + j) for problem, first, count in zip(problems, firsts, counts)
                for j in range(count)]
    pieces = cut_in_pieces([problem.id for problem, _ in requests], dist.get_world_size())

    def respond(my_pieces: list[list[int]]) -> list[list[Sample]]:
        mine = [requests[place] for place in chain(*my_pieces)]
        seeds = [_seed(*seed_key, problem.id, index) for problem, index in mine]
        responses = sampler([problem.prompt_ids for problem, _ in mine], seeds, temperature, timer)
        texts = [sampler.tokenizer.decode(ids, skip_special_tokens=True) for ids, *_ in responses]
        samples = [
            Sample(problem.id, index, problem.prompt_ids, response.ids, response.finished,
                   text=text, sampler_logprobs=response.logprobs)
            for (problem, index), response, text in zip(mine, responses, texts)]
        with timer("grade"):
            grader.grade(samples, [problem.answer for problem, _ in mine])
        left = iter(samples)
        return [[next(left) for _ in piece] for piece in my_pieces]

    # Back in the order of the requests.
    drawn = dict(zip(chain(*pieces), chain(*share_out(pieces, respond)), strict=True))
    return [drawn[place] for place in range(len(requests))]


def _seed(*key: int) -> int:
    """A 64-bit seed, from a hash of `key`: other keys, other random numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


class Response(NamedTuple):
    """What a sampler returns for a prompt and a seed."""

    ids: np.ndarray  # int32 (response,), the end-of-sequence token included
    logprobs: np.ndarray | None  # float32 (response,), at the temperature of the draw, if asked for
    finished: bool  # False: cut at --max-response-tokens


# --- transformers ----------------------------------------------------------------------------
class HfSampler:
    """transformers' `generate`, made reproducible sample by sample."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer = model, tokenizer
        self.end_ids = model.generation_config.eos_token_id
        self.max_tokens, self.batch_size = args.max_response_tokens, args.sampler_batch_size or 256

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]], seeds, temperature, timer=nullcontext) -> list:
        """A Response to each prompt, with the seed of the same place."""
        responses = []
        for start in range(0, len(prompts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            responses += self._generate(prompts[rows], seeds[rows], temperature)
        return responses

    def _generate(self, prompts: list[list[int]], seeds: list[int], temperature: float) -> list:
        device = self.model.device
        batch = {"input_ids": prompts}
        padded = self.tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(device)
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        drawn = []  # (token ids, log-probs), (batch,) each, for each position

        def pick_token(_, logits: torch.Tensor) -> torch.Tensor:
            """A logits processor that draws a token, and leaves it for greedy decoding to pick."""
            drawn.append(gumbel_max(logits, generators, temperature))
            return torch.zeros_like(logits).scatter(1, drawn[-1][0][:, None], 1.0)

        self.model.eval()  # gradient checkpointing would switch the key-value cache off
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            self.model.generate(**padded, max_new_tokens=self.max_tokens, do_sample=False,
                                logits_processor=[pick_token])
        token_ids, logprobs = (torch.stack(x, dim=1).tolist() for x in zip(*drawn))
        return [self._cut(*row) for row in zip(token_ids, logprobs)]

    def _cut(self, ids: list[int], logprobs: list[float]) -> Response:
        """Without what comes after the first end-of-sequence token."""
        ends = [t for t, token_id in enumerate(ids, start=1) if token_id in self.end_ids]
        length = ends[0] if ends else len(ids)
        ids, logprobs = np.array(ids[:length], np.int32), np.array(logprobs[:length], np.float32)
        return Response(ids, logprobs, finished=bool(ends))


def gumbel_max(logits: torch.Tensor, generators: list[torch.Generator], temperature: float):
    """Tokens drawn from softmax(logits / temperature), and their log-probs, (batch,) each.

    logits: (batch, vocabulary); generators: one per row. With Gumbel noise g_v, argmax_v ln p_v +
    g_v is a draw from p. Inverting the cumulative distribution would take less noise, but rounding,
    which differs from batch to batch, shifts all of its edges; here it rarely changes a token.
    Temperature 0 takes the most likely token.
    """
    noise = torch.zeros(logits.shape, dtype=torch.float64, device=logits.device)
    if temperature > 0:
        logits = logits if temperature == 1 else logits / temperature
        for row, generator in zip(noise, generators):
            row.exponential_(generator=generator)
        noise = -noise.log()  # if E is exponential, -ln E is Gumbel
    token_ids = (logits.double() + noise).argmax(dim=1)
    logprobs = logits.gather(1, token_ids[:, None]).squeeze(1) - logits.logsumexp(dim=1)
    return token_ids, logprobs


# --- vLLM ------------------------------------------------------------------------------------
class VllmSampler:
    """One vLLM engine per rank, in the trainer's process. Each sample has a seed of its own."""

    def __init__(self, model, tokenizer, args):
        self.model, self.tokenizer = model, tokenizer
        self.end_ids = model.generation_config.eos_token_id
        self.max_tokens, on_cuda = args.max_response_tokens, model.device.type == "cuda"
        # The flag that needs the log-probs of all samples; eval.py does not have it.
        self.all_logprobs = getattr(args, "truncated_is", None) is not None
        # A decoding step reads all weights, for however many sequences.
        self.batch_size = args.sampler_batch_size or (1024 if on_cuda else 256)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process
        import vllm._custom_ops  # slow to import, and the hf sampler does without it

        if on_cuda:
            torch.cuda.empty_cache()  # the engine looks at what is free
            special = {"dtype": "bfloat16", "gpu_memory_utilization": args.vllm_memory,
                       "enable_sleep_mode": True}
        else:
            vllm._custom_ops._supports_onednn = False  # it packs weights: no loading them again
            torch._dynamo.config.disable = True  # it would run a C++ compiler for longer than us
            special = {"dtype": "float32", "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True,
                       # What is shared is whole blocks: by default 128 tokens, above most prompts.
                       "block_size": 32,
                       # After a part of a prompt it would turn back a generator, which cannot.
                       "enable_chunked_prefill": False}
        self.llm = vllm.LLM(
            args.model, skip_tokenizer_init=True, generation_config="vllm",
            load_format="dummy",  # the weights come from the trainer
            distributed_executor_backend="external_launcher",
            max_model_len=args.max_prompt_tokens + args.max_response_tokens,
            max_num_seqs=self.batch_size,
            logprobs_mode="processed_logprobs",  # at the temperature, as the trainer has them
            **special)
        atexit.register(self.llm.llm_engine.engine_core.shutdown)  # before the process group
        self.llm.sleep(level=2)  # gives the memory to the trainer; keeps neither weights nor cache

    def sync(self) -> None:
        """Wake up with the trainer's weights, without keys and values of earlier ones: else
        RunError."""
        torch.cuda.empty_cache()  # what the trainer has freed; nothing on a CPU
        self.llm.wake_up(tags=["weights"])
        weights = ((name, gather_tensor(tensor)) for name, tensor in self.model.named_parameters())
        self.llm.apply_model(lambda engine: engine.load_weights(weights))
        self.llm.wake_up(tags=["kv_cache"])
        if not self.llm.reset_prefix_cache():
            raise RunError("vllm: cannot forget the keys and values of earlier weights; --resume "
                           "goes on from the newest whole checkpoint")

    def __call__(self, prompts: list[list[int]], seeds, temperature, timer=nullcontext) -> list:
        """As HfSampler's. The prefix cache spares the engine reading a prompt more than once."""
        from vllm import SamplingParams

        with timer("sync"):
            self.sync()
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        params = [SamplingParams(
            temperature=temperature, max_tokens=self.max_tokens, detokenize=False,
            seed=seed // 2,  # vLLM's are signed
            stop_token_ids=self.end_ids, ignore_eos=True,  # EOS is among the stop tokens
            # Of the sampled token only: 0 others. They are a quarter of vLLM's Python for a token.
            # One sample in eight will do for sampler_gap; its seed says which, on any rank.
            logprobs=0 if self.all_logprobs or seed % 8 == 0 else None,
        ) for seed in seeds]
        shows_bar = dist.get_rank() == 0 and len(requests) > 1000  # it takes long
        results = self.llm.generate(requests, params, use_tqdm=shows_bar)
        self.llm.sleep(level=2)
        return [_response(result.outputs[0]) for result in results]


def _response(output) -> Response:
    """From one of vLLM's outputs."""
    ids, logprobs = np.array(output.token_ids, np.int32), None
    if output.logprobs is not None:
        rows = zip(output.token_ids, output.logprobs)
        logprobs = np.array([entry[token].logprob for token, entry in rows], np.float32)
    return Response(ids, logprobs, finished=output.finish_reason == "stop")


# --- which of them -----------------------------------------------------------------------------
SAMPLERS = {"hf": HfSampler, "vllm": VllmSampler}  # --sampler


def make_sampler(model, tokenizer, args):
    """The sampler that --sampler names; raises InputError if it cannot start."""
    name = args.sampler
    if name == "auto":
        vllm_is_there = importlib.util.find_spec("vllm") is not None
        name = "vllm" if vllm_is_there and model.device.type == "cuda" else "hf"
    if name == "hf" and vars(args).get("fsdp"):  # the evaluation has no such flag
        raise InputError("--fsdp: transformers wants the whole model at once; add --sampler vllm")
    try:
        return SAMPLERS[name](model, tokenizer, args)
    except ImportError as error:
        raise InputError(f"--sampler {args.sampler}: {error}; on GPU nodes pip install "
                         "vllm==0.32.0, elsewhere use --sampler hf") from error
    except (ValueError, RuntimeError) as error:
        if model.device.type == "cuda":  # memory, a driver, a kernel: all of its report is needed
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--sampler {args.sampler}: {reason}; use --sampler hf") from error
