"""How far each block of a model sees, as its config says before there is a weight.

The model itself does the same.
"""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModel

from stillroom.stages.models.attention.by_config import attention_facts
from stillroom.stages.targets.features.shown import glimpse

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = {"num_key_value_heads": 1, "sliding_window": 5}
# Model type -> fields of its own, and the window of each block.
KINDS: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "bert": ({}, [None] * 4),
    "llama": (WINDOW, [None] * 4),  # which has no such field
    "mistral": (WINDOW, [5] * 4),
    "phi3": (WINDOW, [5] * 4),
    "starcoder2": (WINDOW, [5] * 4),
    "qwen2": (WINDOW | {"use_sliding_window": True, "max_window_layers": 2}, [None, None, 5, 5]),
    "qwen3": (WINDOW | {"use_sliding_window": False}, [None] * 4),
    "gemma3_text": (WINDOW | {"head_dim": 8, "sliding_window_pattern": 2}, [5, None, 5, None]),
    "modernbert": ({"local_attention": 10}, [None, 6, 6, None]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_says_what_the_model_does(kind: str) -> None:
    fields, expected = KINDS[kind]
    config = CONFIG_MAPPING[kind](**SMALL | fields)
    facts = attention_facts(config)
    assert [facts.window(block) for block in range(4)] == expected
    shown = glimpse(AutoModel.from_config(config), [("attention", block) for block in range(4)])
    assert [shown.attention(block).window for block in range(4)] == expected
