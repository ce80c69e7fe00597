"""memory.py: its formulas by hand, and what it predicts against what torch's CPU allocator reports."""

import memory
import pytest
import torch
from conftest import make_sample, run_script
from test_model import TINY
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import model as model_module
import raft
import run
from batches import collate
from data import TOY
from model import Policy

# 40 tokens x 16 numbers in embedding and in head, two layers of 4 x 16² + 3 x 16 x 32 + 2 x 16, a norm of 16
ROOT, LAYER = 2 * 40 * 16 + 16, 2592
P = ROOT + 2 * LAYER
# In bytes, of the reference: linear layers in bf16, the embedding and the norms in fp32
REFERENCE_ROOT = 40 * 16 * (4 + 2) + 4 * 16
REFERENCE = REFERENCE_ROOT + 2 * (2 * LAYER + 2 * 2 * 16)


def flags(*words):
    return run.parse_flags(list(map(str, words)), memory.__doc__, raft.add_flags, memory.add_flags)


def config_of(**changes):
    return LlamaConfig(**TINY | {"tie_word_embeddings": False} | changes)


def prediction(config, rows: int, time: int, **how) -> int:
    return memory.activation_bytes(config.to_json_string(use_diff=False), rows, time, **how)


def real_peak(function) -> int:
    """The most bytes that torch's CPU allocator holds for what `function` makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative if it was freed
        peak = max(peak, now)
    return peak


def batch_of(rows: int, time: int, vocabulary: int) -> dict:
    """Padded rows, nearly all response; the second row is shorter."""
    torch.manual_seed(0)
    lengths = [time - 3 * (row == 1) - 1 for row in range(rows)]
    samples = [make_sample(0, 1.0, torch.randint(3, vocabulary, (length,)).tolist(), [3]) for length in lengths]
    return collate(samples, torch.device("cpu"))


def policy_of(config, checkpointing: bool = False) -> Policy:
    """A policy with gradients, as DDP's buckets hold them from the first update on."""
    policy = Policy(AutoModelForCausalLM.from_config(config), gradient_checkpointing=checkpointing).train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return policy


def test_parameters_and_their_states_by_hand():
    assert memory.parameter_counts(config_of()) == (P, LAYER, ROOT)
    assert memory.parameter_counts(config_of(tie_word_embeddings=True)) == (P - 40 * 16, LAYER, ROOT - 40 * 16)
    ddp = memory.phases(config_of(), 4, False, flags("--kl-coef", 0.1))
    for kinds in ddp.values():
        assert [kinds[name] for name in list(kinds)[:4]] == [4 * P, 4 * P, 8 * P, REFERENCE]
        assert not any(kinds[name] for name in kinds if name.startswith("FSDP2"))
    fsdp = memory.phases(config_of(), 4, True, flags("--kl-coef", 0.1))
    for phase, kinds in fsdp.items():
        gradients = P if phase in ("training", "optimizer") else 0
        assert [kinds[name] for name in list(kinds)[:4]] == [P, gradients, 2 * P, REFERENCE / 4]
    assert memory.phases(config_of(), 4, True, flags())["sampling"]["reference, bf16 and fp32"] == 0
    # A tied head is the embedding: in fp32.
    tied = config_of(tie_word_embeddings=True)
    assert memory.reference_bytes(tied) == (REFERENCE - 2 * 40 * 16, REFERENCE_ROOT - 2 * 40 * 16)


def test_what_fsdp_gathers_by_hand():
    found = memory.phases(config_of(), 4, True, flags("--kl-coef", 0.1))
    gathered = [kinds["FSDP2's gathered weights"] for kinds in found.values()]
    both = 4 * ROOT + REFERENCE_ROOT
    assert gathered == [both, both + 8 * LAYER, both + 8 * LAYER, REFERENCE_ROOT]
    assert found["training"]["FSDP2's whole gradients"] == 4 * ROOT + 8 * LAYER
    without = memory.phases(config_of(), 4, True, flags())
    assert [kinds["FSDP2's gathered weights"] for kinds in without.values()][::3] == [4 * ROOT, 0]


def test_the_chunk_of_logits_ends_at_a_gibibyte():
    large = memory.phases(config_of(vocab_size=151_936), 1, False, flags())
    assert large["training"]["chunk of logits"] == 3 << 30


def test_head_and_engine_by_hand():
    found = memory.phases(config_of(), 1, False, flags("--vllm-memory", 0.5, "--gpu-gigabytes", 3))
    for phase, tensors in (("scoring", 2), ("training", 3)):
        assert found[phase]["chunk of logits"] == tensors * 128 * 128 * 40 * 4  # 16,384 tokens: far from a gibibyte
    assert found["scoring"]["norm's buffers"] == 40 * 16 * (4 + 2)
    assert found["training"]["head's gradient"] == 40 * 16 * (4 + 2)
    assert found["sampling"]["engine's weights, bf16"] == 2 * P
    assert found["sampling"]["engine's logits"] == 1024 * 40 * 10
    assert found["sampling"]["key-value cache"] == 1.5e9 - 2 * P - 1024 * 40 * 10
    assert [kinds["engine's CUDA graphs"] for kinds in found.values()] == [2e9] * 4  # asleep, too
    fewer = memory.phases(config_of(), 1, False, flags("--sampler-batch-size", 128))
    assert fewer["sampling"]["engine's logits"] == 128 * 40 * 10


def test_adamw_s_state_is_what_is_said():
    policy = policy_of(config_of())
    optimizer = torch.optim.AdamW(policy.parameters())
    optimizer.step()
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    kinds = memory.phases(config_of(), 1, False, flags())["optimizer"]
    assert sum(moment.nbytes for moment in moments) == kinds["AdamW's state, fp32"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_toy_s_training_takes_what_is_predicted(checkpointing):
    config, rows, time = AutoConfig.from_pretrained(TOY), 16, 100
    policy, batch = policy_of(config, checkpointing), batch_of(rows, time, 262)
    activations = prediction(config, rows, time, training=True, checkpointing=checkpointing, bf16=False)
    peak = real_peak(lambda: policy(**batch).sum().backward())
    assert activations == pytest.approx(peak, rel=0.05)
    assert activations + 3 * 512 * 262 * 4 + 2 * 262 * 96 * 4 > 0.99 * peak  # with the head: a bound


def test_the_toy_s_saved_tensors_are_most_of_it():
    config, rows, time = AutoConfig.from_pretrained(TOY), 16, 100
    policy, saved = policy_of(config), {}
    weights = {parameter.data_ptr() for parameter in policy.parameters()}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = policy(**batch_of(rows, time, 262))
    size = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in weights)
    assert logprobs.requires_grad
    assert size < prediction(config, rows, time, training=True, bf16=False) < 1.1 * size


@pytest.mark.parametrize("training", [False, True])
def test_autocast_s_copies_are_counted(training):
    """The body alone, with more weights than activations: Policy turns autocast off on CPUs."""
    config = AutoConfig.from_pretrained(TOY)
    policy, batch = policy_of(config), batch_of(2, 30, 262)
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}

    def body():
        with (torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
              torch.backends.mkldnn.flags(enabled=False)):  # on some CPUs it has buffers of its own
            loss = policy.model.base_model(**inputs).last_hidden_state.square().sum()
        if training:
            loss.backward()

    predicted = prediction(config, 2, 30, training=training)
    assert predicted == pytest.approx(real_peak(body), rel=0.05)
    all_copies = 2 * 3 * (4 * 96**2 + 3 * 96 * 256)  # of the matrices of three layers
    assert (predicted > all_copies) == training  # the backward pass needs them; without one they go at once


def test_chunks_of_logits_take_what_is_predicted(monkeypatch):
    monkeypatch.setattr(model_module, "HEAD_BYTES", 512 * 4 * 8000)
    config = config_of(vocab_size=8000)
    policy, batch = policy_of(config), batch_of(2, 300, 8000)
    kinds = memory.phases(config, 1, False, flags())["training"]
    peak = real_peak(lambda: policy(**batch).sum().backward())
    assert kinds["chunk of logits"] + prediction(config, 2, 300, training=True) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_takes_what_is_predicted_in_bf16(monkeypatch, tied):
    """With a body so small that what it keeps is little."""
    monkeypatch.setattr(model_module, "HEAD_BYTES", 32 * 4 * 20_000)
    monkeypatch.setattr(Policy, "_autocast", lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    config = config_of(vocab_size=20_000, hidden_size=32, tie_word_embeddings=tied)
    policy, batch = policy_of(config), batch_of(2, 50, 20_000)
    kinds = memory.phases(config, 1, False, flags())["training"]
    known = [*policy.parameters(), *policy.buffers(), *(p.grad for p in policy.parameters()), *batch.values()]
    with memory.LiveBytes(known) as live:
        policy(**batch).sum().backward()
    assert kinds["head's gradient"] + kinds["chunk of logits"] == pytest.approx(live.peak, rel=0.05)


def test_the_norm_s_buffers_take_what_is_predicted(monkeypatch):
    monkeypatch.setattr(model_module, "HEAD_BYTES", 4 * 4 * 4000)
    config = config_of(vocab_size=4000, hidden_size=256)
    policy, batch = policy_of(config), batch_of(2, 12, 4000)
    kinds = memory.phases(config, 1, False, flags())["scoring"]
    with torch.no_grad():
        peak = real_peak(lambda: policy.logprobs_and_norms(**batch))
    on_a_cpu = kinds["norm's buffers"] + 2 * 4000 * 256  # what is added is in fp32 there
    assert on_a_cpu + kinds["chunk of logits"] / 2 == pytest.approx(peak, rel=0.1)


def test_activations_and_logits_grow_with_the_micro_batch_and_nothing_else_does():
    found = [memory.phases(config_of(), 1, False, flags("--tokens-per-micro-batch", tokens))
             for tokens in (1, 128, 255, 256, 512)]  # rows of 128 tokens
    for phase in ("scoring", "training"):
        sizes = [kinds[phase].pop("activations") for kinds in found]
        assert sizes[0] == sizes[1] == sizes[2] < sizes[3] < sizes[4]
        logits = [kinds[phase].pop("chunk of logits") for kinds in found]
        tensors = 3 if phase == "training" else 2
        assert logits == [tensors * tokens * 40 * 4 for tokens in (128, 128, 128, 256, 512)]
    assert all(kinds == found[0] for kinds in found)


def test_checkpointing_takes_less_for_training_alone():
    config = config_of(num_hidden_layers=6)
    saving, plain = (memory.phases(config, 1, False, flags(*words)) for words in (["--gradient-checkpointing"], []))
    assert saving["training"].pop("activations") < 0.6 * plain["training"].pop("activations")
    assert saving == plain


@pytest.mark.parametrize(("name", "parameters"), [("qwen2.5-1.5b", 1.54e9), ("qwen2.5-7b", 7.6e9)])
def test_the_shapes_have_the_published_sizes(name, parameters):
    assert memory.parameter_counts(memory.SHAPES[name])[0] == pytest.approx(parameters, rel=0.01)


def test_where_a_phase_does_not_fit_the_flags_that_help_are_shown(capsys, monkeypatch):
    monkeypatch.setitem(memory.SHAPES, "tiny", config_of(num_hidden_layers=6))
    monkeypatch.setattr(memory, "CUDA_GRAPHS", 0)  # of a GPU so small
    words = ["--model", "tiny", "--gpus", "2", "--tokens-per-micro-batch", "1024"]
    memory.main([*words, "--gpu-gigabytes", "0.005"])
    lines = capsys.readouterr().out.replace("no: ", "no:").splitlines()
    rows = {line[:36].strip(): line[36:].split() for line in lines}
    assert rows["GB on each of 2 GPUs, DDP"] == ["sampling", "scoring", "training", "optimizer"]
    fitting = {name: [not cell.startswith("no:") for cell in cells] for name, cells in rows.items()}
    assert fitting["sum"] == fitting["with --fsdp"] == fitting["with --vllm-memory 0.2"] == [True, True, False, True]
    assert all(fitting["with --tokens-per-micro-batch 128"] + fitting["with --gradient-checkpointing"])
    assert all(fitting["with all four"])
    memory.main([*words, "--gpu-gigabytes", "1"])
    assert "with" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_as_users_run_it():
    done = run_script("tests/memory.py", "--gpus", 2, "--fsdp", "--kl-coef", 0.1, "--vllm-memory", 0.3)
    assert "FSDP2's whole gradients" in done.stdout and "reference, bf16 and fp32" in done.stdout
    # 0.3 x 80e9 bytes without 2 x 358,464 and 10 x 1024 x 262, by 2 x 3 layers x 96 numbers x 2 bytes
    assert done.stdout.splitlines()[-1] == "358,464 parameters; the cache holds 20,830,382 tokens"


def test_an_engine_without_room_for_its_weights_does_not_fit():
    args = flags("--gpu-gigabytes", 1, "--vllm-memory", 0.01)
    kinds = {"engine's weights, bf16": 2e7, "key-value cache": -1e7}
    assert memory.sums({"sampling": kinds}, args) == ["no: 0.01"]
    assert memory.sums({"sampling": kinds | {"key-value cache": 1e7}}, args) == ["0.03"]
