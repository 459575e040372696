"""Models of the task classification: a head over classes, one text a row, logits [B, C].

It is the counterpart of `causal_lm.py` and `head.py`. Nothing is packed and nothing is shifted: a
row is one text (or pair) with padding at its end.

Letters: B texts, T tokens of the longest, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ...storage.errors import UsageError, answered
from .attention.longest import Company, made_up
from .fit.adapter import PREFIX
from .fit.classes import names_in
from .identity import Identity
from .inputs.rendering import segments
from .loading import ModelKind, adapter_on, placed, with_its_adapter


def student_kind(teacher_dir: Path) -> ModelKind:
    """A student has its teacher's classes."""
    return of_classes(names_in(teacher_dir))


def of_classes(names: Sequence[str]) -> ModelKind:
    """Models with a head over these classes."""
    return ModelKind(auto=AutoModelForSequenceClassification, adapter="SEQ_CLS", classes=names)


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one; a head that transformers would have to make up is
            none.
    """
    return trained(of_classes(()), identity, device_map=device_map)


def trained(
    kind: ModelKind, identity: Identity, *, device_map: str | None = None
) -> PreTrainedModel:
    """`load_teacher` of any kind with a head over classes."""
    model, missing = kind.teacher(identity, device_map=device_map, **_class_fields(identity))
    if identity.adapter is not None:
        with adapter_on(model, identity) as adapted:
            _refuse_unlike(adapted, identity, missing)
            model = with_its_adapter(adapted)
    elif missing:
        raise UsageError(
            f"teacher.model: {identity.folder} lacks weights of its classification head "
            f"({', '.join(missing)}). Fine-tune it on labelled rows, and save it whole."
        )
    return placed(model, device_map)


def _class_fields(identity: Identity) -> dict[str, Any]:
    """What an adapter says of the classes, as a loaded config has it."""
    fields = {
        name: value for name, value in identity.class_fields.items() if name != "architectures"
    }
    if "id2label" in fields:
        fields["id2label"] = {int(index): name for index, name in fields["id2label"].items()}
    return fields


def _refuse_unlike(adapted: Any, identity: Identity, missing: Sequence[str]) -> None:
    """Refuse an adapter whose tensors do not fit their places.

    It may have others than there are places for, or not all that the base lacks.

    PEFT leaves out without an error what it has no place for, and draws at random what is not
    there.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    places = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    found = {*load_peft_weights(str(identity.adapter), device="cpu")}
    where = f"teacher.adapter: {identity.adapter}"
    if unlike := sorted(places ^ found):
        what = "lacks" if unlike[0] in places else f"is no adapter of {identity.folder}: it has"
        raise UsageError(
            f"{where} {what} {unlike[0]}. Name an adapter of this model, or the model of this "
            "adapter."
        )
    lacking = [name for name in missing if PREFIX + name not in found]
    if lacking:
        raise UsageError(
            f"{where}: {', '.join(lacking)} are in neither the adapter nor {identity.folder}, and "
            "transformers would draw them at random. Train the adapter with modules_to_save that "
            "names them too."
        )


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
        with answered(f"{tokenizer_dir}: the tokenizer does not load", "Save the model again."):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False)
        segments_known = getattr(config, "type_vocab_size", 0) > 1
        told_apart = segments_known and "token_type_ids" in tokenizer.model_input_names
        separator = tokenizer.sep_token_id if told_apart else None
        return cls(padding=config.pad_token_id, separator=separator)

    def tensors(self, texts: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and maybe `token_type_ids`, each [B, T] int64."""
        shape = len(texts), max(len(text) for text in texts)
        ids = torch.full(shape, self.padding, dtype=torch.long)
        mask, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, text in enumerate(texts):
            there = slice(0, len(text))
            ids[row, there] = torch.from_numpy(np.asarray(text, np.int64))
            mask[row, there] = 1
            kinds[row, there] = torch.from_numpy(segments(text, self.separator))
        made = {"input_ids": ids, "attention_mask": mask}
        return made if self.separator is None else made | {"token_type_ids": kinds}


def class_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C] float32; of a model with classes for each token [B, T, C]."""
    logits: Tensor = model(**inputs).logits
    return logits.float()


def class_company(
    model: Any,
    inputs: Inputs,
    parted: Callable[[Tensor, Sequence[int]], list[Tensor]] = lambda logits, _: list(
        logits.split(1)
    ),
    said: Callable[[Any, dict[str, Tensor]], Tensor] = class_logits,
) -> Company:
    """Which texts may share a pass, asked of a model's logits.

    Args:
        model: The model.
        inputs: How texts become its inputs.
        parted: From the logits of a pass and the tokens of its texts to those of each text [n, C].
        said: What it is asked for, of such inputs.
    """
    vocab_size = model.get_input_embeddings().num_embeddings

    def read(lengths: Sequence[int]) -> list[Tensor]:
        texts = [ids.numpy() for ids in made_up(lengths, vocab_size)]
        # A decoder takes the last token that is no padding for a text's end.
        other = (inputs.padding + 1) % vocab_size
        made = inputs.tensors([np.where(ids == inputs.padding, other, ids) for ids in texts])
        there = {name: tensor.to(model.device) for name, tensor in made.items()}
        return parted(said(model, there), lengths)

    return Company(model, read)


def of_each(said: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """[n, C] of each text, without the padding."""
    return [row[:n] for row, n in zip(said, lengths, strict=True)]
