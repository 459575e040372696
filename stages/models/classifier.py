"""Texts that are classified as a whole: one text a row, logits over the classes, targets and losses of them.

The counterpart of `head.py` and `loader/packing.py` for models with a classification head. Nothing
is packed and nothing is shifted: a row is one text (or pair) with padding at its end, and it has
one target.

Letters: B texts, T tokens of the longest, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ...storage.errors import UsageError
from .identity import Identity
from .rendering import segments


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained classification head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one; a head that transformers would have to make up is
            none.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            identity.folder,
            dtype=getattr(torch, identity.dtype),
            device_map=device_map,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # what transformers and safetensors raise for a bad folder has no common type
        raise UsageError(
            f"{identity.folder}: the model does not load ({error}). Check the folder."
        ) from error
    if loading["missing_keys"]:
        raise UsageError(
            f"teacher.model: {identity.folder} lacks weights of its classification head "
            f"({', '.join(sorted(loading['missing_keys']))}). Fine-tune it on labelled rows, and "
            "save it whole."
        )
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval()


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """How texts become the inputs of one model."""

    padding: int
    """Token id that fills a row up; a decoder finds a text's last token by it."""
    separator: int | None
    """Token after which the second text of a pair begins, for a model that tells the two apart;
    else None."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer_dir: Path) -> Self:
        """Of a model, and the folder of the tokenizer that made the token ids.

        Raises:
            UsageError: the model names no padding token.
        """
        config: Any = model.config
        if config.pad_token_id is None:
            raise UsageError(
                f"{config.name_or_path or type(model).__name__}: its config.json names no "
                "pad_token_id, so texts of different lengths cannot share a pass. Set one there "
                "(for a decoder the end-of-sequence id will do)."
            )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        told_apart = (
            "token_type_ids" in tokenizer.model_input_names
            and getattr(config, "type_vocab_size", 0) > 1
        )
        return cls(
            padding=config.pad_token_id, separator=tokenizer.sep_token_id if told_apart else None
        )

    def tensors(self, texts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and maybe `token_type_ids`, each [B, T] int64."""
        longest = max(len(text) for text in texts)
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (self.separator is not None)
        made = {name: torch.zeros(len(texts), longest, dtype=torch.long) for name in names}
        made["input_ids"].fill_(self.padding)
        for row, text in enumerate(texts):
            made["input_ids"][row, : len(text)] = torch.from_numpy(np.asarray(text, np.int64))
            made["attention_mask"][row, : len(text)] = 1
            if self.separator is not None:
                made["token_type_ids"][row, : len(text)] = torch.from_numpy(
                    segments(text, self.separator)
                )
        return made


def class_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C] float32."""
    logits: Tensor = model(**inputs).logits
    return logits.float()
