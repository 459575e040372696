"""Forward passes of text that is continued, in training: how this student's samples are packed."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..models.attention.flat import SHORT, attend_apart
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.device import uses_triton
from ..models.head import check_head, split_head
from ..models.inputs.reads import context_of
from ..targets.spec import wanted
from ..workers.job import Job
from .packing import Packing, mixes_packed


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, lengths: Sequence[int], dtype: torch.dtype
) -> Packing:
    """A single row a pass where the student can attend within samples; else rows with padding."""
    recipe, train = job.recipe, job.train
    check_causal(model)
    check_head(model)
    head = split_head(model)
    uses_triton(train.kernel, head.weight.device, setting="train.kernel")
    company = Company(model)
    alone = not company.may_share(lengths)
    even = alone or train.row_tokens is not None
    obstacle = None if even else attend_apart(model, max(lengths), dtype)
    flat = not even and obstacle is None
    mixed = None if flat or alone else mixes_packed(model, (*SHORT, *lengths))
    shared = not alone and mixed is None
    if alone:
        job.progress.say(f"each sample gets a pass of its own in this student: {company.apart}")
    elif mixed is not None:
        job.progress.say(f"each sample gets a row of its own in this student: {mixed}")
    elif obstacle is not None:
        job.progress.say(
            f"this student cannot attend within samples of one row ({obstacle}): rows get padding"
        )
    return Packing(
        tokens_per_pass=train.tokens_per_pass,
        alone=alone,
        flat=flat,
        row_tokens=train.row_tokens,
        shared_rows=shared,
        context=context_of(model),
        kept=wanted(recipe.score, head.vocab_size) if recipe.score is not None else None,
        unstored_temperature=recipe.loss.unstored_temperature,
        vocab_size=head.vocab_size,
        kernel=train.kernel,
    )
