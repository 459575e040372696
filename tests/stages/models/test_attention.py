"""Samples in a single row attend each to itself, or the model says no."""

import copy
from itertools import pairwise

import pytest
import torch
from tiny_models import CONFIGS, LENGTHS, V, build, make_samples
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    MistralConfig,
)

from stillroom.stages.loader.packing import Packing
from stillroom.stages.models.attention.flat import NAME, _attend, _by_kernel, attend_apart
from stillroom.stages.models.head import hidden_states
from stillroom.storage.errors import StillroomError

pytestmark = pytest.mark.numeric

SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WINDOWED = MistralConfig(**SIZES, sliding_window=8)
OTHERS = {
    "soft-capped": CONFIGS["gemma2"],
    "with sinks": GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1),
    "in chunks": Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8
    ),
    "recurrent": MambaConfig(vocab_size=V, hidden_size=16, state_size=4, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "windowed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flat_equals_separate(name, checkpointing):
    """Hidden states of every position and the gradient of every weight are the same.

    The others are of each sample alone, by the model's own attention.
    """
    model = build(WINDOWED if name == "windowed" else CONFIGS[name])
    own, samples = copy.deepcopy(model), make_samples(LENGTHS)
    assert attend_apart(model, max(LENGTHS), torch.float32) is None
    assert model.config._attn_implementation == NAME != own.config._attn_implementation
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    (batch,) = Packing(tokens_per_pass=1000, flat=True, vocab_size=V).batches(samples, None)
    assert batch.positions == sum(LENGTHS)
    together = hidden_states(model, **batch.inputs)[0]
    states, texts = [], []
    for start, stop in pairwise(batch.edges.tolist()):
        texts.append(batch.token_ids[:, start:stop])
        states.append(hidden_states(own, input_ids=texts[-1])[0])
    alone = torch.cat(states)
    assert sorted(tuple(text[0].tolist()) for text in texts) == sorted(
        tuple(s.token_ids.tolist()) for s in samples
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    for found in (together, alone):
        (found * weights).sum().backward()
    for (label, found), right in zip(model.named_parameters(), own.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(found.grad, right.grad, rtol=1e-4, atol=1e-4, msg=label)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_attends_otherwise_is_left_alone(kind):
    model = build(OTHERS[kind]).train()
    before = model.config._attn_implementation
    assert attend_apart(model, 40, torch.float32) is not None
    assert model.config._attn_implementation == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_what_only_long_samples_show_is_asked_at_their_length(monkeypatch):
    """Were the window never told to the function, no sample within it could show that."""
    monkeypatch.setattr(
        "stillroom.stages.models.attention.flat._attend",
        lambda *a, sliding_window, **more: _attend(*a, **more),
    )
    assert attend_apart(build(WINDOWED), 8, torch.float32) is None
    assert attend_apart(build(WINDOWED), 30, torch.float32) is not None


def test_it_says_why_not(monkeypatch):
    monkeypatch.setattr(
        "stillroom.stages.models.attention.flat._attend",
        lambda *a, sliding_window, **more: _attend(*a, **more),
    )
    found = attend_apart(build(WINDOWED), 30, torch.float32)
    assert found == "its hidden states differ from those of each sample alone"

    def refusing(*_, **more):
        raise NotImplementedError("variable-length attention with dropout\nframe #0: at 0x7f")

    monkeypatch.setattr("stillroom.stages.models.attention.flat._attend", refusing)
    found = attend_apart(build(WINDOWED), 30, torch.float32)
    assert found == "NotImplementedError: variable-length attention with dropout"


def test_out_of_memory_with_the_longest_sample_comes_with_advice(monkeypatch):
    def full(*_, **more):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr("stillroom.stages.models.attention.flat._attend", full)
    with pytest.raises(
        StillroomError,
        match=r"of 30 tokens, one sample alone .*20\.00.*train\.gradient_checkpointing",
    ):
        attend_apart(build(WINDOWED), 30, torch.float32)


def test_bfloat16_passes_are_near_enough():
    model = build(CONFIGS["llama"])
    assert attend_apart(model, 30, torch.bfloat16) is None


def test_a_student_that_attends_so_is_saved_as_any_other(tmp_path):
    model = build(CONFIGS["llama"])
    assert attend_apart(model, 9, torch.float32) is None
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation != NAME


@pytest.mark.parametrize(
    "asked",
    [
        {"softcap": 50.0},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1)},
        {"is_causal": False},
    ],
)
def test_what_it_does_not_do_it_refuses(asked):
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    edges = torch.tensor([0, 3], dtype=torch.int32)
    _attend(torch.nn.Identity(), *tensors, None, cu_seq_lens_q=edges)
    for mask, more in (
        (None, asked | {"cu_seq_lens_q": edges}),
        (torch.ones(1, 1, 3, 3), {"cu_seq_lens_q": edges}),
    ):
        with pytest.raises(NotImplementedError):
            _attend(torch.nn.Identity(), *tensors, mask, **more)


def test_a_model_that_was_changed_refuses_rows_with_padding():
    """Better than to let the samples of a row see each other."""
    model = build(CONFIGS["llama"])
    assert attend_apart(model, 9, torch.float32) is None
    (batch,) = Packing(tokens_per_pass=1000, vocab_size=V).batches(make_samples(LENGTHS), None)
    with pytest.raises(NotImplementedError, match="ends of samples"):
        hidden_states(model, **batch.inputs)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("version", ["2.11", "2.12"])
def test_the_kernel_is_asked_as_torch_describes_it(monkeypatch, window, version):
    """Its arguments, by a stand-in written after the documentation of `varlen_attn`."""

    def stand_in(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == max(cu_seq_q.diff())
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert {part.dtype for part in (query, key, value)} == {torch.bfloat16}
        made = []
        for start, stop in pairwise(cu_seq_q.tolist()):
            q, k, v = (part[start:stop].transpose(0, 1).float() for part in (query, key, value))
            k, v = (part.repeat_interleave(len(q) // len(part), dim=0) for part in (k, v))
            behind = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
            seen = (behind >= -window_size[1]) & ((window_size[0] < 0) | (behind <= window_size[0]))
            scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
            made.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(made).to(query.dtype)

    def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        return stand_in(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            scale=scale,
            window_size=window_size,
        )

    kernel = without_groups if version == "2.11" else stand_in
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(1, heads, 17, 8, generator=generator).bfloat16().float() for heads in (4, 2, 2)
    ]
    edges = torch.tensor([0, 5, 6, 17], dtype=torch.int32)
    asked = {"cu_seq_lens_q": edges, "scaling": 0.3, "sliding_window": window}
    expected, _ = _attend(torch.nn.Identity(), *parts, None, **asked)
    found = _by_kernel(parts, edges, 11, window, scale=0.3)
    assert found.shape == expected.shape == (1, 17, 4, 8)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "qwen3", "windowed"])
def test_on_a_gpu_the_kernel_does_it(name):
    model = build(WINDOWED if name == "windowed" else CONFIGS[name]).cuda()
    own = copy.deepcopy(model)
    assert attend_apart(model, 300, torch.bfloat16) is None
    (batch,) = Packing(tokens_per_pass=1000, flat=True, vocab_size=V).batches(
        make_samples(LENGTHS), None
    )
    batch = batch.to(torch.device("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        together = hidden_states(model, **batch.inputs)[0]
    together.float().square().sum().backward()
    ends = pairwise(batch.edges.tolist())
    alone = torch.cat([hidden_states(own, input_ids=batch.token_ids[:, a:b])[0] for a, b in ends])
    alone.square().sum().backward()
    assert float((together - alone).norm() / alone.norm()) < 2e-2
    for found, right in zip(model.parameters(), own.parameters(), strict=True):
        if right.grad is not None:
            assert float((found.grad - right.grad).norm() / right.grad.norm()) < 5e-2
