"""The head seam on real architectures: tied, untied, biased, capped, scaled, LoRA.

Others are refused.
"""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from stillroom.stages.models.head import Head, check_head, hidden_states, split_head
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS = {
    "llama_tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama_untied": LlamaConfig(**COMMON, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**COMMON, tie_word_embeddings=False),
    "gemma2_softcap": Gemma2Config(**COMMON, final_logit_softcapping=3.0, query_pre_attn_scalar=8),
    "granite_divides": GraniteConfig(**COMMON, logits_scaling=4.0),
    "cohere_multiplies": CohereConfig(**COMMON, logit_scale=0.0625),
    "phi_bias": PhiConfig(**COMMON),
    "gpt2": GPT2Config(
        vocab_size=40,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():  # fresh weights are so small that a cap or a scale would hardly show
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=2.0)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own(name):
    model = build(CONFIGS[name])
    ids = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = split_head(model).logits(hidden_states(model, input_ids=ids).flatten(0, 1))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    check_head(model)


def test_what_each_head_holds():
    capped = split_head(build(CONFIGS["gemma2_softcap"]))
    assert (capped.softcap, capped.scale, capped.bias) == (3.0, 1.0, None)
    assert split_head(build(CONFIGS["granite_divides"])).scale == 0.25
    assert split_head(build(CONFIGS["cohere_multiplies"])).scale == 0.0625
    assert split_head(build(CONFIGS["phi_bias"])).bias.shape == (40,)
    tied = build(CONFIGS["llama_tied"])
    assert split_head(tied).weight is tied.get_input_embeddings().weight


def test_an_unknown_head_is_refused():
    # HyperCLOVA X multiplies by what Granite divides by: same name in the config, another meaning.
    config = HyperCLOVAXConfig(**COMMON, logits_scaling=4.0)
    with pytest.raises(UsageError, match="they differ by up to"):
        check_head(build(config))


def with_lora(name="llama_untied", *, modules=("q_proj", "lm_head"), **more):
    """A model with an adapter that changes its logits."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        build(CONFIGS[name]), LoraConfig(target_modules=list(modules), r=3, **more)
    )
    make_visible(model)
    return model.eval()


def make_visible(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


def assert_logits_are_the_models_own(model):
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0]
        torch.testing.assert_close(
            split_head(model).logits(hidden_states(model, input_ids=ids)[0]), expected
        )
    check_head(model)


@pytest.mark.parametrize("name", ["llama_untied", "llama_tied", "gemma2_softcap", "phi_bias"])
@pytest.mark.parametrize(
    "settings", [{}, {"lora_alpha": 5}, {"use_rslora": True}], ids=["plain", "scaled", "rs"]
)
def test_a_lora_on_the_output_layer(name, settings):
    model = with_lora(name, **settings)
    head, layer = split_head(model), model.get_base_model().get_output_embeddings()
    assert head.low_rank.down is layer.lora_A["default"].weight
    assert head.low_rank.up is layer.lora_B["default"].weight
    assert head.weight is layer.get_base_layer().weight
    assert_logits_are_the_models_own(model)


def test_the_dropout_of_a_lora_is_on_in_training_only():
    model = with_lora(lora_dropout=0.5)
    hidden = torch.randn(4, 16)
    head = split_head(model)
    assert torch.equal(head.logits(hidden), head.logits(hidden))
    model.train()
    assert not torch.equal(head.logits(hidden), head.logits(hidden))


def test_an_adapter_that_is_off_or_merged_adds_nothing():
    model = with_lora()
    plain = split_head(model).logits(torch.eye(16))
    with model.disable_adapter():
        assert split_head(model).low_rank is None
        assert not torch.allclose(split_head(model).logits(torch.eye(16)), plain)
        assert_logits_are_the_models_own(model)
    model.merge_adapter()
    assert split_head(model).low_rank is None
    torch.testing.assert_close(split_head(model).logits(torch.eye(16)), plain)
    assert_logits_are_the_models_own(model)


def test_of_several_adapters_one_may_be_active():
    from peft import LoraConfig

    model = with_lora()
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], r=2))
    make_visible(model)
    assert split_head(model).low_rank.down.shape == (3, 16)
    model.set_adapter("other")
    assert split_head(model).low_rank.down.shape == (2, 16)
    assert_logits_are_the_models_own(model)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UsageError, match=r"2 active adapters \(default, other\), expected one"):
        split_head(model)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_a_low_rank_product_is_refused(settings):
    modules = ["lm_head"]
    model = with_lora(
        "phi_bias" if "lora_bias" in settings else "llama_untied", modules=modules, **settings
    )
    with pytest.raises(
        UsageError, match="'default' of the output layer is more than a low-rank product"
    ):
        split_head(model)


def test_other_adapters_on_the_output_layer_are_refused():
    from peft import IA3Config, LoraConfig, get_peft_model

    whole = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    other = IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    for config in (whole, other):
        with pytest.raises(
            UsageError, match=r"the output layer is .*, expected a plain linear layer, or one with"
        ):
            split_head(get_peft_model(build(CONFIGS["llama_untied"]), config))


def test_a_lora_model_is_seen_through_its_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(CONFIGS["llama_untied"]), LoraConfig(target_modules="all-linear"))
    make_visible(model)
    assert_logits_are_the_models_own(model)


def test_half_precision_in_float32_out():
    model = build(CONFIGS["llama_untied"]).bfloat16()
    check_head(model)
    assert split_head(model).logits(torch.zeros(3, 16, dtype=torch.bfloat16)).dtype == torch.float32


def test_autocast_does_not_reach_the_product():
    head = Head(weight=torch.randn(7, 5))
    hidden = torch.randn(4, 5)
    expected = head.logits(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head.logits(hidden), expected)
