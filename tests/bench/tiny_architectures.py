"""Tiny configs of the causal architectures of the installed transformers.

There are models with random weights of them.

A config of a type is its class's defaults, made small wherever it has a field of `SMALL`; what must
fit together besides is in `BESIDES`. `CASES` adds what a type has in several ways: kinds of
frequencies, caps, attention that sees the future.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 331
LENGTHS = (9, 14, 23, 31, 40, 64)
WINDOW = 16
ORIGINAL = 32
"""Tokens beyond which frequencies change, where they do: samples are on both sides."""

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 128,
    "max_target_positions": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "dff": 48,
    "dim_ff": 48,
    "d_inner": 48,
    "d_head": 8,
    "dim_head": 8,
    "rotary_dim": 4,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "window_size": WINDOW,
    "local_attention": WINDOW,
    "attention_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "query_pre_attn_scalar": 8,
    # experts
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    # narrow queries, keys and values
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    # states that are carried on
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 16,
    "mamba_n_groups": 1,
    "chunk_size": 16,
    "n_groups": 1,
    "time_step_rank": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "attention_hidden_size": 32,
    "lru_width": 32,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "adapter_rank": 8,
    "keep_window_size": 128,
}

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}

NO_TEXT_MODEL = (
    "blt cohere_compass_text cpmant emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant "
    "gemma4_unified gemma4_unified_assistant git got_ocr2 gpt-sw3 llama4 mllama moshi musicgen "
    "musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe qwen4_exp trocr whisper"
).split()
"""Types that read images, sounds or bytes too, with configs inside of configs, and a second name of
GPT-2."""

_NARROW = {"head_dim": 4, "num_key_value_heads": 4}  # head_dim is that of the part that is turned
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_HYBRID = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
BESIDES: dict[str, dict[str, Any]] = {
    "axk1": _NARROW,
    "axk2": _NARROW,
    "deepseek_v2": _NARROW,
    "deepseek_v3": _NARROW,
    "deepseek_v32": _NARROW,
    "glm4_moe_lite": _NARROW,
    "glm_moe_dsa": _NARROW,
    "longcat_flash": _NARROW,
    "minicpm3": _NARROW,
    "youtu": _NARROW,
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": _LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LINEAR | _NARROW,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "gemma3n_text": _SLIDING | {"num_kv_shared_layers": 0},
    "gemma4_text": _SLIDING,
    "gemma4_unified_text": _SLIDING,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    # A hybrid layer uses the attention of the first again, so there must be two.
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}

_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 4.0, 16.0, 32.0],
    "original_max_position_embeddings": ORIGINAL,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama, yarn rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
    ),
    "llama, dynamic rope": (
        "llama",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": dict(_LONG), "original_max_position_embeddings": ORIGINAL},
    ),
    "phimoe, longrope": (
        "phimoe",
        {"rope_parameters": _LONG | {"short_mscale": 1.0, "long_mscale": 1.2}},
    ),
    "llama, is_causal: false": ("llama", {"is_causal": False}),
    "gemma2, cap 2": ("gemma2", {"attn_logit_softcapping": 2.0}),
    "gemma2, cap 50": ("gemma2", {"attn_logit_softcapping": 50.0}),
    "vaultgemma, cap 2": ("vaultgemma", {"attn_logit_softcapping": 2.0}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "xlm, causal": ("xlm", {"causal": True}),
    "bert, decoder": ("bert", {"is_decoder": True}),
    "bert-generation, decoder": ("bert-generation", {"is_decoder": True}),
    "electra, decoder, narrow": ("electra", {"is_decoder": True, "embedding_size": 16}),
    "qwen2, sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "gpt2, reorder and scale": (
        "gpt2",
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    ),
    "falcon, alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "opt, projected": ("opt", {"word_embed_proj_dim": 16}),
    "granite, scaled": ("granite", {"logits_scaling": 4.0}),
    "cohere, scaled": ("cohere", {"logit_scale": 0.25}),
    "falcon_h1, scaled": ("falcon_h1", {"lm_head_multiplier": 0.25}),
}

TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NO_TEXT_MODEL)
CASES = {name: (name, {}) for name in TYPES} | VARIANTS


def config_of(case: str) -> PreTrainedConfig:
    """The small config of a case."""
    model_type, changes = CASES[case]
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    known = default.to_dict()
    fields = {name: value for name, value in (SMALL | SPECIAL).items() if name in known}
    dropout = {n: 0.0 for n in known if "dropout" in n or n.endswith(("pdrop", "jitter_noise"))}
    found: PreTrainedConfig = kind(**dropout | fields | BESIDES.get(model_type, {}) | changes)
    return found


def save(config: PreTrainedConfig, folder: Path) -> None:
    """Save a model with random weights.

    They are wide enough that attention, caps and frequencies show in its logits.
    """
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=1.0)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=1.5 * module.in_features**-0.5)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 and "expert" in name:
                parameter.normal_(std=1.5 * min(parameter.shape[1:]) ** -0.5)
    model.save_pretrained(folder)
