"""Texts that are classified as a whole: one text a row, logits over the classes, targets and losses of them.

The counterpart of `head.py` and `loader/packing.py` for models with a classification head. Nothing is packed and
nothing is shifted: a row is one text (or pair) with padding at its end, and it has one target.

Letters: B texts, T tokens of the longest, C classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ...storage.errors import UsageError
from ...storage.tables.soft_targets import SoftTargets
from ..loader.samples import Sample
from ..losses.definition import Aim, Distilled, TargetBatch, logits_distillation
from .classes import NO_LABEL
from .identity import Identity
from .rendering import segments


def load_teacher(identity: Identity, *, device_map: str | None = None) -> PreTrainedModel:
    """A model with a trained classification head, in evaluation mode, on the GPU if there is one.

    Raises:
        UsageError: the folder does not hold one; a head that transformers would have to make up is none.
    """
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            identity.folder, dtype=getattr(torch, identity.dtype), device_map=device_map, output_loading_info=True
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what transformers and safetensors raise for a bad folder has no common type
        raise UsageError(f"{identity.folder}: the model does not load ({error}). Check the folder.") from error
    if loading["missing_keys"]:
        raise UsageError(
            f"teacher.model: {identity.folder} lacks weights of its classification head "
            f"({', '.join(sorted(loading['missing_keys']))}). Fine-tune it on labelled rows, and save it whole."
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
    """Token after which the second text of a pair begins, for a model that tells the two apart; else None."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer_dir: Path) -> Self:
        """Of a model, and the folder of the tokenizer that made the token ids.

        Raises:
            UsageError: the model names no padding token.
        """
        config: Any = model.config
        if config.pad_token_id is None:
            raise UsageError(
                f"{config.name_or_path or type(model).__name__}: its config.json names no pad_token_id, so texts of "
                "different lengths cannot share a pass. Set one there (for a decoder the end-of-sequence id will do)."
            )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        told_apart = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1
        return cls(padding=config.pad_token_id, separator=tokenizer.sep_token_id if told_apart else None)

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
                made["token_type_ids"][row, : len(text)] = torch.from_numpy(segments(text, self.separator))
        return made


def class_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, C] float32."""
    logits: Tensor = model(**inputs).logits
    return logits.float()


def class_targets(logits: Tensor, labels: Sequence[int | None]) -> list[SoftTargets]:
    """The teacher's distribution over the classes, a text at a time: all of it, at temperature 1.

    `token_logprob` is that of the gold label, of the best class where there is none.

    Args:
        logits: [B, C] float32.
        labels: [B] gold classes.

    Returns:
        B targets of one position each: logprobs [1, C], tail_logprob [1] (-inf), token_logprob [1], entropy [1] (nats).
    """
    logprobs = logits.log_softmax(-1)
    entropy = -torch.where(logprobs == -torch.inf, 0.0, logprobs.exp() * logprobs).sum(-1)
    best = logprobs.argmax(-1).tolist()
    found = []
    for row, label in enumerate(labels):
        one = logprobs[row : row + 1].cpu().numpy()
        found.append(
            SoftTargets(
                ids=None,
                logprobs=one,
                tail_logprob=np.full(1, -np.inf, np.float32),
                token_logprob=one[:, best[row] if label is None else label],
                entropy=entropy[row : row + 1].cpu().numpy(),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClassBatch:
    """One forward pass: B texts and what they are asked for."""

    inputs: dict[str, Tensor]
    """What the model takes, each [B, T]."""
    targets: TargetBatch
    """B targets over C classes; a label of `NO_LABEL` is none."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.inputs["input_ids"].numel()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.inputs.values()) + self.targets.nbytes

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassPasses:
    """How the texts of a step become forward passes: those of like length together, for little padding."""

    tokens_per_pass: int
    """Positions of a pass, padding included; a longer text is a pass of its own."""
    inputs: Inputs
    vocab_size: int
    """Of the student."""

    def batches(self, samples: Sequence[Sample], temperature: float | None = 1.0) -> Iterator[ClassBatch]:
        """The forward passes of a step, targets at `temperature`; None leaves them out.

        Raises:
            UsageError: a text has a token that the student does not know.
        """
        group: list[Sample] = []
        for sample in sorted(samples, key=len, reverse=True):
            if group and (len(group) + 1) * len(group[0]) > self.tokens_per_pass:
                yield self._batch(group, temperature)
                group = []
            group.append(sample)
        yield self._batch(group, temperature)

    def _batch(self, samples: Sequence[Sample], temperature: float | None) -> ClassBatch:
        highest = max(int(sample.token_ids.max()) for sample in samples)
        if highest >= self.vocab_size:
            raise UsageError(
                f"student: its vocabulary has {self.vocab_size} ids, but a text has token {highest}. "
                "Choose a student with the teacher's tokenizer and at least its vocabulary."
            )
        labels = torch.tensor([NO_LABEL if sample.label is None else sample.label for sample in samples])
        targets = TargetBatch(labels=labels)
        known = [sample.targets for sample in samples if sample.targets is not None]
        if known and temperature is not None:
            # All of the distribution is there, so any temperature is exact: softmax(log t / T) = softmax(z / T).
            stored = torch.from_numpy(np.concatenate([one.logprobs for one in known]))
            tempered = (stored / temperature).log_softmax(-1)
            nothing = torch.full((len(known),), -torch.inf)
            targets = replace(targets, logprobs=tempered, tail_logprob=nothing)
        return ClassBatch(inputs=self.inputs.tensors([sample.token_ids for sample in samples]), targets=targets)

    def losses(self, model: nn.Module, batch: ClassBatch, *, aim: Aim, dtype: torch.dtype) -> Distilled:
        """Summed loss of the texts, weighted as `aim` says; a text without a gold label has cross-entropy 0."""
        labels = batch.targets.labels
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = class_logits(model, batch.inputs)
        asked = replace(batch.targets, labels=labels.clamp_min(0))
        parts = logits_distillation(logits, asked, objective=aim.objective)
        return replace(parts, hard=parts.hard.masked_fill(labels == NO_LABEL, 0.0)).summed(aim)
