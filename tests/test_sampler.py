"""sampler.py: samples that depend on nothing but their seed, drawn from the model's own distribution."""

import atexit
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, flags, make_sample, run_script

from files import read_rows
from data import Problem, encode_prompt, load_prompts, problems_of_step
from metrics import describe_step, is_finite
from pretrained import load_model
from run import InputError, RunError
from batches import cut_in_pieces
from sampler import SAMPLERS, HfSampler, VllmSampler, _seed, draw, gumbel_max, make_sampler


def generators(number: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_max_draws_from_the_distribution(temperature):
    probabilities = torch.tensor([0.2, 0.0, 0.3, 0.5])
    drawn, logprobs = gumbel_max(probabilities.log().repeat(4000, 1), generators(4000), temperature)
    expected = probabilities ** (1 / temperature) / (probabilities ** (1 / temperature)).sum()
    torch.testing.assert_close(logprobs, expected[drawn].log())
    assert (torch.bincount(drawn, minlength=4) / 4000 - expected).abs().max() < 0.03 and 1 not in drawn


def test_gumbel_max_hardly_notices_rounding():
    scores = torch.randn(4000, 1000, generator=torch.Generator().manual_seed(0))
    rounded = scores + 1e-5 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    first, second = (gumbel_max(s, generators(4000), 1.0)[0] for s in (scores, rounded))
    assert (first != second).sum() <= 1
    assert gumbel_max(scores[:1], generators(1), 0.0)[0] == scores[0].argmax()


def test_gumbel_max_changes_fewer_tokens_than_inverting_the_cumulative():
    scores = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    rounded = scores + 1e-3 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))  # rough, to see it
    uniforms = torch.rand(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def gumbel(logits):
        return gumbel_max(logits, generators(2000), 1.0)[0]

    def inverse(logits):
        return torch.searchsorted(torch.softmax(logits.double(), dim=1).cumsum(dim=1), uniforms, right=True)

    changed = [(pick(scores) != pick(rounded)).sum().item() for pick in (gumbel, inverse)]
    assert 5 * changed[0] < changed[1]


@pytest.fixture
def requests(model_and_tokenizer, problems):
    prompts = [encode_prompt(model_and_tokenizer[1], problem) for problem in problems[:12] for _ in range(3)]
    return prompts, list(range(36))


def sample(model_and_tokenizer, requests, *words, temperature=1.0):
    responses = HfSampler(*model_and_tokenizer, flags(*words))(*requests, temperature)
    return [(ids.tolist(), finished) for ids, _, finished in responses]


def test_samples_do_not_depend_on_the_batch(model_and_tokenizer, requests):
    whole = sample(model_and_tokenizer, requests)
    for size in (1, 5):
        assert sample(model_and_tokenizer, requests, "--sampler-batch-size", size) == whole
    backwards = [part[::-1] for part in requests]
    assert sample(model_and_tokenizer, backwards)[::-1] == whole
    assert len({tuple(ids) for ids, _ in whole}) > 12  # and differ among the samples of a prompt


def test_the_end_token_is_kept_and_cut_responses_are_marked(model_and_tokenizer, requests):
    tokenizer = model_and_tokenizer[1]
    whole = sample(model_and_tokenizer, requests)
    cut = sample(model_and_tokenizer, requests, "--max-response-tokens", 12)
    assert any(finished for _, finished in whole) and any(not finished for _, finished in cut)
    for (ids, finished), (short, short_finished) in zip(whole, cut):
        assert finished == (ids[-1] == tokenizer.eos_token_id) and tokenizer.eos_token_id not in ids[:-1]
        assert short == ids[:12] and short_finished == (finished and len(ids) <= 12)


def test_samples_follow_the_model_s_distribution(device, problems, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    published = {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.1, "do_sample": False, "eos_token_id": [1, 5]}
    (tmp_path / "toy" / "generation_config.json").write_text(json.dumps(published))  # ignored, all but the last
    model_and_tokenizer = model, tokenizer = load_model(flags("--model", tmp_path / "toy"), device)
    assert HfSampler(*model_and_tokenizer, flags()).end_ids == [1, 5]
    model.save_pretrained(tmp_path / "saved")  # transformers refuses to save what is published there
    prompt = encode_prompt(tokenizer, problems[0])
    drawn = sample(model_and_tokenizer, ([prompt] * 1000, list(range(1000))), "--max-response-tokens", 1)
    expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1).detach().numpy()
    found = np.bincount([ids[0] for ids, _ in drawn], minlength=len(expected)) / 1000
    assert np.abs(found - expected).sum() / 2 < 0.05  # total variation
    greedy = sample(model_and_tokenizer, ([prompt], [1]), "--max-response-tokens", 1, temperature=0.0)
    assert greedy[0][0] == [int(expected.argmax())]


def test_draw_gives_every_problem_its_count(device, model_and_tokenizer, grader, problems):
    sampler, counts = HfSampler(*model_and_tokenizer, flags()), [2, 0, 3, 1]
    samples = draw(sampler, grader, problems[:4], counts, seed_key=(0, 0, 1), temperature=1.0, first_index=4)
    assert [(s.problem, s.index) for s in samples] == [(0, 4), (0, 5), (2, 4), (2, 5), (2, 6), (3, 4)]
    for s in samples:
        text = sampler.tokenizer.decode(s.response_ids, skip_special_tokens=True)
        assert s.reward == float(text.endswith(f"\\boxed{{{problems[s.problem].answer}}}"))
        assert list(s.prompt_ids) == encode_prompt(sampler.tokenizer, problems[s.problem])
    again = draw(sampler, grader, problems[2:3], [1], seed_key=(0, 0, 1), temperature=1.0, first_index=5)
    assert again[0].response_ids.tolist() == samples[3].response_ids.tolist()


def test_long_prompts_are_dropped_and_counted(device, model_and_tokenizer, tmp_path, capsys):
    rows = [{"problem": "1+1", "answer": "2"}, {"problem": "1+" * 40 + "1", "answer": "41"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = load_prompts(str(path), "train", model_and_tokenizer[1], flags(), training=True)
    assert [problem.id for problem in kept] == [0] and "dropped 1 of 2" in capsys.readouterr().out
    with pytest.raises(InputError, match="every prompt is longer than --max-prompt-tokens 2"):
        load_prompts(str(path), "train", model_and_tokenizer[1], flags("--max-prompt-tokens", 2), training=True)


def test_several_data_sets_are_one(device, model_and_tokenizer, tmp_path):
    for name, text in (("a", "1+1"), ("b", "2+2")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": text, "answer": "1"}) + "\n")
    both = load_prompts(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", "train", model_and_tokenizer[1], flags(), training=True)
    assert [(problem.id, problem.question) for problem in both] == [(0, "1+1"), (1, "2+2")]


@pytest.mark.parametrize(("ranks", "mean"), [(1, 8), (8, 8), (16, 32)])
def test_a_prompt_s_samples_stay_together_in_pieces_and_no_rank_gets_many_more(ranks, mean):
    rng = np.random.default_rng(0)
    counts = rng.geometric(1 / (mean + 1), 1024) - 1  # of a prompt: from none to ten times the mean
    ids = np.repeat(rng.permutation(1024), counts).tolist()
    lengths = rng.lognormal(6, 0.4, 1024)[ids] * rng.lognormal(0, 0.4, len(ids))  # of prompts, and samples of one
    pieces = cut_in_pieces(ids, ranks)
    assert sorted(place for piece in pieces for place in piece) == list(range(len(ids)))
    assert all(len({ids[place] for place in piece}) == 1 and len(piece) <= 4 for piece in pieces)
    assert len(pieces) == sum(-(-counts // 4))
    shares = [[place for piece in pieces[rank::ranks] for place in piece] for rank in range(ranks)]
    sizes, tokens = list(map(len, shares)), [lengths[share].sum() for share in shares]
    assert max(sizes) - min(sizes) <= 4 and max(tokens) < 1.08 * np.mean(tokens)


def test_where_a_rank_gets_few_samples_pieces_are_small():
    assert cut_in_pieces([7, 7, 7, 8, 8, 7], 1) == [[0], [1], [2], [3], [4], [5]] and cut_in_pieces([], 2) == []
    assert {len(piece) for piece in cut_in_pieces([7] * 768, 2)} == {3}


@pytest.mark.parametrize(("prompts", "each", "ranks", "worst", "mean"), [
    (1024, 8, 8, 0.15, 0.08), (256, 4, 8, 0.15, 0.08), (64, 4, 2, 0.05, 0.01)])
def test_ranks_are_even_on_recorded_lengths(prompts, each, ranks, worst, mean):
    """Those of a small real model, hard to share out: all samples of a prompt are nearly equally long. Which draw is the worst
    depends on the prompts, so that is bounded for 512 of them, and the mean over draws for all. Whole prompts would have
    0.13, 0.29 and 0.09 in the mean."""
    recorded = np.array([row["tokens"] for row in read_rows(ROOT / "figures" / "real_samples.jsonl")])

    def excess(recorded) -> list[float]:
        """Of the longest share of tokens over the mean one, in each of twenty draws."""
        found = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            lengths = rng.permuted(recorded[rng.integers(len(recorded), size=prompts)], axis=1)[:, :each].ravel()
            pieces = cut_in_pieces(np.repeat(np.arange(prompts), each).tolist(), ranks)
            tokens = [lengths[np.concatenate(pieces[rank::ranks])].sum() for rank in range(ranks)]
            found.append(max(tokens) / np.mean(tokens) - 1)
        return found

    assert max(excess(recorded[:512])) < worst and np.mean(excess(recorded)) < mean


class EngineOnCuda:
    """Stands in for vllm.LLM, whose CUDA branch cannot run here: notes what is asked of it, in order."""

    can_reset = True

    def __init__(self, model, **settings):
        self.settings, self.calls, self.llm_engine = settings, [], SimpleNamespace(engine_core=self)

    def __getattr__(self, name: str):
        def call(*args, tags=(), **_):
            self.calls.append((name, *tags))
            return self.can_reset
        return call

    def generate(self, requests, params, use_tqdm):
        """One end token to each."""
        self.params = params
        self.calls.append([(request["prompt_token_ids"], param.seed) for request, param in zip(requests, params)])
        told = [{1: SimpleNamespace(logprob=-0.5)}]
        outputs = [SimpleNamespace(token_ids=[1], logprobs=None if param.logprobs is None else told, finish_reason="stop")
                   for param in params]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


def sampler_on_cuda(model, tokenizer, monkeypatch, *words) -> VllmSampler:
    """One that takes itself to be on CUDA."""
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    known = SimpleNamespace(generation_config=model.generation_config, named_parameters=model.named_parameters,
                            device=torch.device("cuda"))
    return VllmSampler(known, tokenizer, flags(*words))


@pytest.fixture
def on_cuda(device, model_and_tokenizer, monkeypatch):
    """Such a sampler, where vLLM is installed or not, with --truncated-is."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=EngineOnCuda, SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", SimpleNamespace())
    return sampler_on_cuda(*model_and_tokenizer, monkeypatch, "--truncated-is", 2)


def test_on_cuda_too_each_request_has_its_own_seed(on_cuda):
    prompts, seeds = [[5, 6], [5, 6], [7]], [3, 2**64 - 1, 8]
    responses = on_cuda(prompts, seeds, 1.0)
    assert [(r.ids.tolist(), r.logprobs.tolist(), r.finished) for r in responses] == [([1], [-0.5], True)] * 3
    assert on_cuda.llm.calls == [
        ("sleep",), ("wake_up", "weights"), ("apply_model",), ("wake_up", "kv_cache"), ("reset_prefix_cache",),
        [([5, 6], 1), ([5, 6], 2**63 - 1), ([7], 4)], ("sleep",)]
    settings = on_cuda.llm.settings  # none of them differs from rank to rank
    assert settings["max_num_seqs"] == 1024 and settings["enable_sleep_mode"] and "seed" not in settings


def test_one_sample_in_eight_has_log_probs_by_its_seed_or_all_where_they_are_used(on_cuda, model_and_tokenizer, monkeypatch):
    seeds = [_seed(0, 0, 1, problem, index) for problem in range(100) for index in range(8)]
    assert all(response.logprobs == [-0.5] for response in on_cuda([[5]] * 800, seeds, 1.0))  # --truncated-is
    sampler = sampler_on_cuda(*model_and_tokenizer, monkeypatch)
    told = [response.logprobs == [-0.5] for response in sampler([[5]] * 800, seeds, 1.0) if response.logprobs is not None]
    assert all(told) and 70 < len(told) < 130
    one, other = sampler([[5]] * 800, seeds, 1.0), sampler([[5]] * 400, seeds[400:], 1.0)  # whoever draws them
    assert [r.logprobs is None for r in one[400:]] == [r.logprobs is None for r in other]


def test_an_engine_that_keeps_old_keys_and_values_ends_the_run(on_cuda, monkeypatch):
    monkeypatch.setattr(EngineOnCuda, "can_reset", False)
    with pytest.raises(RunError, match="vllm: cannot forget the keys and values of earlier weights; --resume"):
        on_cuda([[5, 6]], [3], 1.0)


@pytest.mark.parametrize("error", [ImportError("No module named 'vllm'"), ValueError("not\nsupported " + "x" * 999)])
def test_without_a_vllm_that_starts_there_is_one_line(model_and_tokenizer, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setitem(SAMPLERS, "vllm", fail)
    assert isinstance(make_sampler(*model_and_tokenizer, flags()), HfSampler)  # auto, on a CPU
    with pytest.raises(InputError, match="--sampler vllm: (No module|not supported).*--sampler hf") as raised:
        make_sampler(*model_and_tokenizer, flags("--sampler", "vllm"))
    assert len(str(raised.value)) < 400 and ("pip install" in str(raised.value)) == isinstance(error, ImportError)


def test_an_engine_that_fails_on_cuda_shows_its_own_error(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image")

    monkeypatch.setitem(SAMPLERS, "vllm", fail)
    with pytest.raises(RuntimeError, match="^CUDA error: no kernel image$"):
        make_sampler(SimpleNamespace(device=torch.device("cuda")), None, flags("--sampler", "vllm"))


def test_a_rank_may_have_nothing_to_draw(device, model_and_tokenizer, grader, problems):
    assert draw(HfSampler(*model_and_tokenizer, flags()), grader, problems[:2], [0, 0], seed_key=(0, 0, 1),
                temperature=1.0) == []


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(device, model_and_tokenizer, grader, problems, tmp_path):
    """Enough samples for pieces of four."""
    run_script("tests/ranks.py", "draw", tmp_path / "two.json", ranks=2)
    sampler = HfSampler(*model_and_tokenizer, flags())
    one = draw(sampler, grader, problems[:9], [40, 0, 12, 50, 12, 11, 25, 85, 21], seed_key=(0, 0, 1),
               temperature=1.0)
    two = json.loads((tmp_path / "two.json").read_text())
    assert len(two) == 256 and [row[:2] for row in two] == sorted(row[:2] for row in two)  # in order, though drawn in pieces
    assert two == [[s.problem, s.index, s.response_ids.tolist(), s.reward] for s in one]


def test_an_epoch_visits_every_problem_once():
    problems = [Problem(i, "q", "1") for i in range(14)]

    def ids(step: int, seed: int = 0) -> list[int]:
        args = flags("--prompts-per-step", 4, "--seed", seed)
        return [problem.id for problem in problems_of_step(problems, step, args)]

    epochs = [ids(1) + ids(2) + ids(3), ids(4) + ids(5) + ids(6)]
    assert all(len(set(epoch)) == 12 for epoch in epochs) and epochs[0] != epochs[1]
    assert ids(5) == ids(5) != ids(5, seed=1)
    from_one_set = sum(i < 7 for i in ids(1) + ids(2))  # ids count rows of all sets of --data, one after the other
    assert 1 < from_one_set < 7  # they are shuffled together


def test_describe_by_hand():
    rewards, problems = {0: [1, 1], 1: [0, 1, 0], 2: [0]}, [Problem(i, "", "") for i in range(4)]  # 3 gets no samples
    samples = [make_sample(i, reward, [1, 2, 3]) for i, group in rewards.items() for reward in group]
    for order in (samples, samples[::-1]):
        metrics = describe_step(problems, order, drawn=[*order, make_sample(9, 1.0, [1])])  # a pilot's, apart
        assert metrics["samples"] == 7 and metrics["tokens"] == 19 and metrics["accept_rate"] == 0.5
        names = ("never", "sometimes", "always")
        assert [metrics[f"budget_{name}"] for name in names] == pytest.approx([1 / 6, 3 / 6, 2 / 6])
        assert [metrics[f"prompts_{name}"] for name in names] == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_a_sample_without_the_sampler_s_log_probs_is_finite_if_its_norm_is():
    samples = [make_sample(0, 1.0, [1], sampler_logprobs=told, head_grad_norm=norm)
               for told in (None, np.array([-1.0]), np.array([np.nan])) for norm in (1.0, np.inf)]
    assert [is_finite(sample) for sample in samples] == [True, False, True, False, False, False]


def test_a_step_of_a_plan_may_get_no_samples():
    metrics = describe_step([Problem(0, "", ""), Problem(1, "", "")], [], [])
    assert (metrics["samples"], metrics["accept_rate"], metrics["prompts_never"]) == (0, None, 0.0)
