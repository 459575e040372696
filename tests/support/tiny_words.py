"""A small token classification in this process.

It has tagged records, a tiny BERT with tags, and a store of both.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_classes import World
from tiny_llama import WORDS
from tiny_models import save_tiny_bert
from transformers import BertConfig, BertForTokenClassification, BertTokenizerFast

from stillroom.stages.recipe.sections import Recipe

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PIECES = ("##s", "##ed")


def tagged(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Words with tags, by name and by index.

    Some words have several tokens, some texts have no tags.
    """
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        n = int(rng.integers(2, 9))
        words = [
            str(rng.choice(WORDS)) + "".join(p[2:] for p in PIECES if rng.random() < 0.3)
            for _ in range(n)
        ]
        tags: list[Any] = rng.integers(0, len(TAGS), n).tolist()
        record: dict[str, Any] = {"words": words, "labels": tags}
        if number % 2:
            record["labels"] = [TAGS[tag] for tag in tags]
        if number % 7 == 6:
            del record["labels"]
        if number % 11 == 10:
            record["labels"] = [-100, *tags[1:]]
        found.append(record)
    return found


def save_tiny_tagger(
    folder: Path, *, tags: tuple[str, ...] = TAGS, seed: int = 0, **overrides: Any
) -> Path:
    """A small random BERT that classifies words, with a tokenizer that cuts some of them."""
    save_tiny_bert(folder, seed=seed, classes=tags, **overrides)
    config = BertConfig.from_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForTokenClassification(config).save_pretrained(folder)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: i for i, token in enumerate([*special, *WORDS, *PIECES])}
    longest = config.max_position_embeddings
    BertTokenizerFast(vocab=vocab, model_max_length=longest).save_pretrained(folder)
    return folder


class Words(World):
    """A teacher, tagged records, and the stages done in this process."""

    def changed(self, **sections: Any) -> Recipe:
        """The recipe with other sections."""
        own = {
            "run": {"dir": str(self.folder / "run"), "task": "token_classification"},
            "data": {"source": str(self.source), "format": "tagged", "holdout": 12},
        }
        return super().changed(**own | sections)
