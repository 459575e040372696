"""Forward passes of text that is continued, in training: how this student's samples are packed."""

from pathlib import Path

import torch
from torch import nn

from ..models.attention import attend_apart
from ..models.device import uses_triton
from ..models.head import check_head, split_head
from ..targets.spec import wanted
from ..workers.job import Job
from .packing import Packing, packs_apart


def training_passes(
    model: nn.Module, job: Job, *, teacher_dir: Path, longest: int, dtype: torch.dtype
) -> Packing:
    """A single row a pass where the student can attend within samples; else rows with padding."""
    recipe, train = job.recipe, job.train
    check_head(model)
    head = split_head(model)
    uses_triton(train.kernel, head.weight.device, setting="train.kernel")
    even = train.row_tokens is not None
    obstacle = None if even else attend_apart(model, longest, dtype)
    flat = not even and obstacle is None
    shared = flat or packs_apart(model)
    if not shared:
        job.progress.say("this architecture mixes packed samples: each gets a row of its own")
    elif obstacle is not None:
        job.progress.say(
            f"this student cannot attend within samples of one row ({obstacle}): rows get padding"
        )
    return Packing(
        tokens_per_pass=train.tokens_per_pass,
        flat=flat,
        row_tokens=train.row_tokens,
        shared_rows=shared,
        kept=wanted(recipe.score, head.vocab_size) if recipe.score is not None else None,
        unstored_temperature=recipe.loss.unstored_temperature,
        vocab_size=head.vocab_size,
        kernel=train.kernel,
    )
