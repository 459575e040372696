"""A small masked_lm in this process: texts, tiny encoders of several families, a store of both."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_classes import World, words
from tiny_llama import WORDS
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertTokenizerFast,
    DistilBertConfig,
    ModernBertConfig,
    RobertaConfig,
)

from stillroom.stages.recipe.sections import Recipe

V = 5 + len(WORDS)
_SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
_ENDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
FAMILIES = {
    "bert": BertConfig(**_SIZES),
    "roberta": RobertaConfig(**_SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=V,
        dim=16,
        hidden_dim=32,
        n_layers=2,
        n_heads=2,
        max_position_embeddings=48,
        initializer_range=0.4,
    ),
    "modernbert": ModernBertConfig(**_SIZES | _ENDS),
}


def save_tiny_masked(
    folder: Path, *, family: str = "bert", seed: int = 0, **overrides: Any
) -> Path:
    """A small random encoder with its head over hidden tokens.

    It has a WordPiece tokenizer over `WORDS`.
    """
    config = copy.deepcopy(FAMILIES[family])
    config.update(overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: i for i, token in enumerate([*special, *WORDS])}
    BertTokenizerFast(vocab=vocab, model_max_length=40).save_pretrained(folder)
    return folder


def texts(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of 3 to 30 words; every tenth is longer than a model reads."""
    rng = np.random.default_rng(seed)
    return [
        {"text": words(rng, 50, 70) if n % 10 == 9 else words(rng, 3, 30)} for n in range(count)
    ]


class Hidden(World):
    """A teacher, texts, and the stages done in this process."""

    def changed(self, **sections: Any) -> Recipe:
        """The recipe with other sections."""
        own = {
            "run": {"dir": str(self.folder / "run"), "task": "masked_lm"},
            "data": {"source": str(self.source), "format": "text", "holdout": 12},
            "score": {"targets": "topk", "k": 6, "temperatures": [2.0]},
        }
        return super().changed(**own | sections)
