"""model.py: log-probs and gradient norms against autograd, and micro-batches that cover every sample."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import flags, make_sample, run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

import model as model_module
from batches import collate, fill_logprobs, fill_norms, micro_batches
from checkpoint import newest_checkpoint, save_checkpoint
from folder import RunState
from data import Problem, check_prompts, encode_prompt
from losses import kl_k3
from model import Policy
from pretrained import load_model
from run import InputError
from sampler import HfSampler, draw

TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_policy(tied: bool, temperature: float = 1.0) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(**TINY, tie_word_embeddings=tied, initializer_range=0.5)
    return Policy(AutoModelForCausalLM.from_config(config), temperature)


def tiny_samples(number: int = 5) -> list:
    rng = np.random.default_rng(0)
    return [make_sample(i, 1.0, rng.integers(3, 40, 2 + 3 * i).tolist(), rng.integers(3, 40, 1 + i).tolist())
            for i in range(number)]


def plain_logprobs(policy: Policy, sample, detach: bool = False) -> torch.Tensor:
    """Log-probs of one unpadded response, (response,), the obvious way."""
    ids = torch.tensor(np.concatenate([sample.prompt_ids, sample.response_ids])).long()[None]
    if detach:
        hidden = policy.model.base_model(ids).last_hidden_state.detach()
        logits = policy.model.lm_head(hidden)
    else:
        logits = policy.model(ids).logits
    logprobs = torch.log_softmax(logits[0, :-1] / policy.temperature, dim=-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(sample.prompt_ids) - 1 :]


@pytest.fixture
def in_bf16(monkeypatch):
    """Autocast to bf16, as on CUDA."""
    monkeypatch.setattr(Policy, "_autocast", lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_norms_equal_autograd_s(monkeypatch, tied, temperature):
    monkeypatch.setattr(model_module, "HEAD_BYTES", 3 * 4 * 40)  # three tokens of a vocabulary of 40
    policy, samples = tiny_policy(tied, temperature), tiny_samples()
    logprobs, norms = policy.logprobs_and_norms(**collate(samples, torch.device("cpu")))
    plain = [plain_logprobs(policy, sample) for sample in samples]
    assert torch.allclose(logprobs, torch.cat(plain), atol=1e-5)
    for sample, norm in zip(samples, norms):
        loss = -plain_logprobs(policy, sample, detach=True).sum()
        gradient, = torch.autograd.grad(loss, policy.model.lm_head.weight)
        assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-4)


def test_gradients_equal_autograd_s_with_and_without_gradient_checkpointing(monkeypatch):
    monkeypatch.setattr(model_module, "HEAD_BYTES", 3 * 4 * 40)  # three tokens of a vocabulary of 40
    samples, gradients = tiny_samples(), []
    for checkpointing in (False, True):
        policy = Policy(tiny_policy(tied=True).model, 0.7, gradient_checkpointing=checkpointing).train()
        policy(**collate(samples, torch.device("cpu"))).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    policy.zero_grad()
    torch.cat([plain_logprobs(policy, sample) for sample in samples]).square().sum().backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for gradient in gradients:
        assert (gradient - expected).norm() < 1e-5 * expected.norm()


def test_logits_of_all_tokens_are_never_held(monkeypatch):
    monkeypatch.setattr(model_module, "HEAD_BYTES", 8 * 4 * 40)
    policy, samples, saved = tiny_policy(tied=False), tiny_samples(), []
    tokens = sum(len(sample.response_ids) for sample in samples)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        logprobs = policy(**collate(samples, torch.device("cpu")))
    assert tokens > 30 and saved and not [shape for shape in saved if shape[-1:] == (40,)]  # 40: the vocabulary
    logprobs.sum().backward()


@pytest.mark.parametrize("tied", [True, False])
def test_of_the_policy_against_itself_k3_is_0(in_bf16, tied):
    reference, policy = tiny_policy(tied), tiny_policy(tied)
    assert reference.requires_grad_(False) and model_module.linears_to_bf16(reference.model) is None
    batch = collate([make_sample(0, 1.0, [3 + i % 37 for i in range(500)])], torch.device("cpu"))  # far rotations
    logprobs = policy(**batch)
    assert torch.equal(kl_k3(logprobs, reference(**batch)), torch.zeros(500)) and logprobs.requires_grad
    in_fp32 = {name for name, tensor in [*reference.named_parameters(), *reference.named_buffers()]
               if tensor.dtype == torch.float32}
    assert in_fp32 == {name for name, _ in [*policy.named_parameters(), *policy.named_buffers()]
                       if "proj" not in name and (tied or "lm_head" not in name)}
    reference.bfloat16()  # with norms, embedding and the frequencies of rotations
    assert kl_k3(logprobs, reference(**batch)).mean() > 1e-5


@pytest.mark.slow
def test_of_the_policy_against_itself_k3_is_0_on_two_ranks_with_fsdp(tmp_path):
    run_script("tests/ranks.py", "k3", tmp_path / "k3.json", "--fsdp", ranks=2)
    assert json.loads((tmp_path / "k3.json").read_text()) == {"tokens": 303, "largest": 0.0, "in bf16": 30}


@pytest.mark.parametrize("config", [
    Gemma2Config(**TINY, final_logit_softcapping=30.0),
    CohereConfig(**TINY, logit_scale=0.0625),
    GraniteConfig(**TINY, logits_scaling=8.0),
])
def test_scaled_or_capped_logits_are_refused(config):
    with pytest.raises(InputError, match="scales or caps its logits"):
        Policy(AutoModelForCausalLM.from_config(config))


def test_a_head_that_is_not_linear_is_refused():
    model = tiny_policy(tied=False).model
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(InputError, match="no linear head"):
        Policy(model)


def test_the_check_leaves_every_weight_as_it_was():
    for tied in (True, False):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, tie_word_embeddings=tied))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        Policy(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_is_off_in_training():
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(LlamaConfig(**TINY, attention_dropout=0.5))).train()
    first, second = (policy(**collate(tiny_samples(), torch.device("cpu"))) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("ranks", "budget"), [(1, 10_000), (1, 25), (2, 25), (3, 1), (8, 40)])
def test_micro_batches_cover_every_sample_once_within_the_budget(ranks, budget):
    samples = [list(range(length)) for length in (5, 9, 1, 9, 30, 7, 2)]
    shares = micro_batches(list(map(len, samples)), ranks, budget)
    assert len({len(share) for share in shares}) == 1 and len(shares) == ranks  # as many on every rank
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(7))
    for batch in (batch for share in shares for batch in share):
        assert len(batch) <= 1 or len(batch) * max(len(samples[i]) for i in batch) <= budget
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert micro_batches([], ranks, budget) == [[]] * ranks


def test_logprobs_do_not_depend_on_micro_batches(device, model_and_tokenizer):
    policy = Policy(model_and_tokenizer[0])
    once, twice = tiny_samples(), tiny_samples()
    fill_norms(policy, once, 10_000)
    fill_logprobs(policy, twice, 1, into="old_logprobs")
    for a, b in zip(once, twice):
        difference = np.linalg.norm(a.old_logprobs - b.old_logprobs)
        assert difference < 1e-5 * np.linalg.norm(a.old_logprobs) and a.head_grad_norm > 0 == b.head_grad_norm


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_hf_sampler_s_log_probs_are_the_trainer_s(device, model_and_tokenizer, grader, problems, temperature):
    policy, sampler = Policy(model_and_tokenizer[0], temperature), HfSampler(*model_and_tokenizer, flags())
    samples = draw(sampler, grader, problems[:6], [3] * 6, seed_key=(0, 0, 1), temperature=temperature)
    fill_logprobs(policy, samples, 10_000, into="old_logprobs")
    for sample in samples:
        assert len(sample.sampler_logprobs) == len(sample.response_ids) > 3
        assert np.abs(sample.sampler_logprobs - sample.old_logprobs).max() < 1e-4


def test_a_tokenizer_without_a_chat_template_is_said(device, toy, tmp_path, capsys):
    load_model(flags(), device)
    assert "chat template" not in capsys.readouterr().out
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "toy" / "chat_template.jinja").unlink()
    load_model(flags("--model", tmp_path / "toy"), device)
    assert "has no chat template: prompts use a plain one" in capsys.readouterr().out


def test_of_several_chat_templates_the_default_one_is_used_and_saved(device, toy, tmp_path):
    shutil.copytree(toy, tmp_path / "toy")
    (tmp_path / "toy" / "additional_chat_templates").mkdir()
    (tmp_path / "toy" / "additional_chat_templates" / "rag.jinja").write_text("another one")
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "toy").chat_template, dict)
    model, tokenizer = load_model(flags("--model", tmp_path / "toy"), device)
    prompt = encode_prompt(tokenizer, Problem(0, "7+15-4", "18"))
    assert tokenizer.decode(prompt) == "<|user|>7+15-4<|assistant|>"
    save_checkpoint(tmp_path / "run", RunState(step=1), model, torch.optim.AdamW(model.parameters()), tokenizer, 1)
    path, _ = newest_checkpoint(tmp_path / "run")
    assert encode_prompt(load_model(flags(), device, path)[1], Problem(0, "7+15-4", "18")) == prompt


@pytest.mark.parametrize("padding", [False, True])
def test_a_special_token_that_the_model_lacks_is_no_fault_until_a_prompt_has_it(
        device, toy, tmp_path, grader, padding):
    """As Gemma 3's for images; or one for padding, which is masked."""
    tokenizer = AutoTokenizer.from_pretrained(toy)
    far = {"pad_token": "<|far|>"} if padding else {"additional_special_tokens": ["<|far|>"]}
    tokenizer.add_special_tokens(far, replace_extra_special_tokens=False)
    shutil.copytree(toy, tmp_path / "toy")
    tokenizer.save_pretrained(tmp_path / "toy")
    model, tokenizer = load_model(flags("--model", tmp_path / "toy"), device)
    vocabulary = model.get_input_embeddings().num_embeddings
    assert tokenizer.convert_tokens_to_ids("<|far|>") == vocabulary > tokenizer.pad_token_id
    problems = [Problem(i, text, "2", encode_prompt(tokenizer, Problem(i, text, "2"))) for i, text in enumerate(["1+1", "2"])]
    check_prompts(model, problems)
    assert len(draw(HfSampler(model, tokenizer, flags()), grader, problems, [1, 1], seed_key=(0,), temperature=1.0)) == 2
    problems.append(Problem(2, "1<|far|>", "2", encode_prompt(tokenizer, Problem(2, "1<|far|>", "2"))))
    with pytest.raises(InputError, match=f"knows no token {vocabulary}, which is in the question '1<.far.>'"):
        check_prompts(model, problems)


def test_models_that_cannot_be_had_are_named(device, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    for name in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="--model .*cannot be loaded"):
            load_model(flags("--model", name), device)
    with pytest.raises(InputError, match="--max-response-tokens"):
        load_model(flags("--max-response-tokens", 10_000), device)
