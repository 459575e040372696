"""The arithmetic of a step, against what torch counts; and the rate it is measured against."""

from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import make_sample
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

from stillroom.stages.loader.samples import Cursor, Sample, Step
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.train import flops
from stillroom.stages.train.flops import ModelFlops, Peak

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "wide heads": LlamaConfig(**SIZES, head_dim=32),
    "gpt2": GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4),
}


def build(config):
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    )  # torch does not count its CPU kernel


def one(lengths, start=2):
    samples = [make_sample(n, start=start, k=0) for n in lengths]
    return Step(samples=samples, after=Cursor())


def counted(model, step, *, checkpointed=False):
    """What torch counts of forward and backward.

    Each sample is alone, and the head runs at its scored positions.
    """
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    with FlopCounterMode(display=False) as counter:
        for sample in step.samples:
            ids = torch.from_numpy(sample.token_ids[None]).long()
            states = hidden_states(model, input_ids=ids)[0, sample.spans[0, 0] - 1 : -1]
            split_head(model).logits(states).sum().backward()
    return counter.get_total_flops()


def of(model):
    return ModelFlops.of(model, head=split_head(model).weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_costs_what_torch_counts(name):
    model, step = build(CONFIGS[name]), one([30, 70, 11], start=9)
    assert of(model).step(step) == pytest.approx(counted(model, step), rel=0.01)


def test_what_is_computed_again_is_not_counted():
    model, step = build(CONFIGS["llama"]), one([30])
    usual = of(model).step(step)
    assert counted(model, step, checkpointed=True) > 1.15 * usual
    assert of(model).step(step) == usual


def test_weights_that_do_not_train_need_no_gradient():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model, step = get_peft_model(build(CONFIGS["llama"]), config), one([30, 70])
    # torch leaves out the gradients of the first layer's inputs, which nothing needs.
    assert of(model).step(step) == pytest.approx(counted(model, step), rel=0.06)


def test_a_token_meets_some_experts_only():
    sizes = SIZES | {"moe_intermediate_size": 24, "num_experts": 8, "decoder_sparse_step": 1}
    costs = [of(build(Qwen3MoeConfig(**sizes, num_experts_per_tok=n))).token for n in (1, 2, 8)]
    expert = 6 * 3 * 3 * 48 * 24  # three layers of three matrices
    assert costs[1] - costs[0] == pytest.approx(expert)
    assert costs[2] - costs[0] == pytest.approx(7 * expert)


def test_a_window_limits_what_a_position_sees():
    def pairs(config, n):
        model = build(config)
        return of(model).step(one([n])) - of(model).token * n - of(model).scored_token * (n - 2)

    windowed, whole = (
        MistralConfig(**SIZES, sliding_window=10),
        MistralConfig(**SIZES, sliding_window=None),
    )
    assert pairs(whole, 40) == 3 * 12 * 48 * 40 * 40
    assert pairs(windowed, 40) == pairs(whole, 40) * 10 / 40
    assert pairs(windowed, 8) == pairs(whole, 8)


def test_padding_and_prompts_cost_what_they_need():
    model = build(CONFIGS["llama"])
    text = Sample(token_ids=np.zeros(50, np.int32), spans=np.array([[40, 10]]), targets=None)
    whole = Sample(token_ids=np.zeros(50, np.int32), spans=np.array([[1, 49]]), targets=None)
    costs = [of(model).step(Step(samples=[s], after=Cursor())) for s in (text, whole)]
    assert costs[1] - costs[0] == 39 * 6 * 96 * 48  # the head alone


def test_the_peak_is_the_vendors_where_the_gpu_is_known(monkeypatch):
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA GH200 480GB": 989e12,
    }
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        peak = Peak.at(torch.device("cuda"), torch.bfloat16)
        assert (peak.flops_per_second, peak.vendor) == (rate, True)
        assert name in peak.of


@pytest.mark.parametrize(
    "name", ["NVIDIA A10G", "NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA RTX A1000"]
)
def test_a_gpu_whose_name_begins_alike_is_another_one(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr("stillroom.stages.train.flops._product_rate", lambda *_: 1e12)
    assert not Peak.at(torch.device("cuda"), torch.bfloat16).vendor


def test_elsewhere_it_is_measured_and_says_so():
    peak = Peak.at(torch.device("cpu"), torch.float32)
    assert not peak.vendor
    assert peak.of == "a float32 matrix product's rate on this CPU, 1024 x 1024"
    assert 1e8 < peak.flops_per_second < 1e14


def test_a_product_that_takes_long_is_timed_once(monkeypatch):
    """One is bfloat16 on a CPU that has none: a training would begin ten seconds later."""
    seconds = count(step=2)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(flops, "time", clock)
    rate = flops._product_rate.__wrapped__(torch.device("cpu"), torch.float32)
    assert rate == 2 * 1024**3 / 2
    assert next(seconds) == 6
