"""A model that sees the future is refused.

Its config says so, or the last token moves what stands before it.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import CONFIGS, SIZES, V, build
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    XLMConfig,
)

from stillroom.stages.models.attention.future import check_causal
from stillroom.stages.models.fit.uses import reads_ahead
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(is_causal=False), "is_causal: false"),
        (Gemma3TextConfig(use_bidirectional_attention=True), "use_bidirectional_attention: true"),
        (BertGenerationConfig(), "is_decoder: false"),
        (BertGenerationConfig(is_decoder=True), None),
        (XLMConfig(), "causal: false"),
        (XLMConfig(causal=True), None),
        (Gemma3TextConfig(), None),
        (LlamaConfig(), None),
    ],
)
def test_a_config_says_so(config, said):
    assert reads_ahead(config) == said
    wrapped = SimpleNamespace(model_type="wrapped", get_text_config=lambda: config)
    assert reads_ahead(wrapped) == said


def leaky(share, dtype=torch.float32):
    """A Llama whose first layer hands each position a share of what the whole text has."""
    model = build(CONFIGS["llama"]).to(dtype)

    def leak(module, arguments, output):
        return output + share * output.mean(1, keepdim=True)

    model.model.layers[0].register_forward_hook(leak)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_config_says_nothing_is_asked(dtype):
    with pytest.raises(UsageError, match=r"LlamaForCausalLM.*sees the future \(with another last"):
        check_causal(leaky(1.0, dtype))
    model = leaky(0.0, dtype).train()
    check_causal(model)
    assert model.training


def test_a_model_is_asked_no_more_positions_than_it_has():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = RobertaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=10, is_decoder=True
    )
    check_causal(AutoModelForCausalLM.from_config(config))


def test_a_small_share_is_seen():
    with pytest.raises(UsageError, match="sees the future"):
        check_causal(leaky(1e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_round_otherwise_are_no_future(dtype):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8)
    assert config.vocab_size == V
    check_causal(AutoModelForCausalLM.from_config(config).to(dtype))
