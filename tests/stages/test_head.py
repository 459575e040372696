"""The head seam on real architectures: tied, untied, biased, capped, scaled, LoRA; others are refused."""

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

from stillroom.stages.head import Head, check_head, hidden_states, split_head
from stillroom.storage.errors import UsageError

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
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
}


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
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


def test_an_adapter_on_the_output_layer_is_refused():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(CONFIGS["llama_untied"]), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="output layer is"):
        split_head(model)


def test_a_lora_model_is_seen_through_its_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(CONFIGS["llama_untied"]), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        ids = torch.randint(0, 40, (1, 9))
        expected = model(input_ids=ids).logits[0]
        torch.testing.assert_close(split_head(model).logits(hidden_states(model, input_ids=ids)[0]), expected)
    check_head(model)


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
