"""What classifiers are worth on the texts of a snapshot, by the product's measures.

Many texts share a pass.

The stage `evaluate` takes a text at a time, so that its memory is that of one; some hundred small
students need not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.stages.evaluate.metrics import Tally, measure
from stillroom.stages.loader.samples import Sample, Samples
from stillroom.stages.models.classification import Inputs, class_logits
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

MEASURES = ("accuracy", "ece", "cross_entropy", "kl_teacher")


def read_snapshot(store: Store, snapshot: str, rows: int | None = None) -> list[Sample]:
    """The texts of a snapshot with the teacher's distributions; the first `rows` in its order."""
    samples = Samples(store, load_snapshot(store, snapshot), soft=True)
    return list(samples.read(0, min(rows or len(samples), len(samples))))


@torch.no_grad()
def judge(model: Any, tokenizer_dir: Path, texts: Sequence[Sample]) -> dict[str, float]:
    """A student's measures on these texts.

    Args:
        model: The student; it is in evaluation mode afterwards.
        tokenizer_dir: Folder of the tokenizer that made the token ids.
        texts: With their teacher's distributions.
    """
    model.eval()
    inputs, tally = Inputs.of(model, tokenizer_dir), Tally()
    ordered = sorted(texts, key=len)
    for at in range(0, len(ordered), 64):
        part = ordered[at : at + 64]
        logits = class_logits(model, inputs.tensors([text.token_ids for text in part]))
        tally.add(b"", measure(logits, _labels(part), _stacked(part)))
    return _numbers(tally)


def judge_teacher(texts: Sequence[Sample]) -> dict[str, float]:
    """What the stored distributions are worth, as for a student."""
    tally = Tally()
    tally.add(b"", measure(torch.from_numpy(_stacked(texts).logprobs), _labels(texts)))
    return _numbers(tally)


def _labels(texts: Sequence[Sample]) -> torch.Tensor:
    return torch.tensor([text.label for text in texts])


def _stacked(texts: Sequence[Sample]) -> SoftTargets:
    parts = [text.targets for text in texts]
    columns = ("logprobs", "tail_logprob", "token_logprob", "entropy")
    return SoftTargets(
        ids=None,
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in columns},
    )


def _numbers(tally: Tally) -> dict[str, float]:
    found = tally.results() | {
        "accuracy": sum(b["accuracy"] * b["tokens"] for b in tally.reliability()) / tally.tokens
    }
    return {name: found[name] for name in MEASURES if name in found}
