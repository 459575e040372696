"""The student as a training begins: on its device, whole or sharded.

It is also said here how its samples become passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ....storage.errors import StillroomError
from ....storage.files.local import LocalFiles
from ....storage.store.store import Store
from ...loader.passes import Passes, training_passes
from ...loader.samples import Samples
from ...models.students.student import initial_student
from ...recipe.sections import Loss
from ...targets.teaching import Teaching
from ...workers.job import Job
from ..features import make_matching
from .choice import chosen, keeps_gradients
from .root import Root, sharded
from .smaller import smaller


def placed(
    job: Job, teacher_dir: Path, *, device: torch.device, dtype: torch.dtype
) -> tuple[Any, Root | None]:
    """The student as it begins, on its device.

    It is all of it, or this rank's part with what is around it.

    Args:
        job: Its recipe, and its ranks.
        teacher_dir: Folder with the teacher's config and tokenizer.
        device: Where this rank computes.
        dtype: What passes compute in.

    Raises:
        UsageError: the student cannot be made, or cannot be shared so.
    """
    ranks, sharding = job.ranks, job.recipe.compute.sharding
    model: Any = initial_student(job.recipe, teacher_dir)
    if job.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    half = dtype == torch.bfloat16
    held = chosen(model, sharding, job.train, ranks, device, half=half)
    if ranks.count > 1:
        how = "each has all of the student" if held == "ddp" else "each has a part of every weight"
        job.progress.say(f"{ranks.count} ranks train together: {how} ({held})")
    if held == "ddp":
        return model.to(device), None
    keeps = keeps_gradients(model, job.train, ranks, device, half=half)
    root = sharded(model, ranks, device, dtype, keeps=keeps)
    return root.student, root


def made_whole(job: Job, teacher_dir: Path, state: Mapping[str, Any]) -> nn.Module:
    """A sharded student as a plain one, in the memory of the machine. `state`: what trained, whole.

    Raises:
        StillroomError: the state is not that of this student.
    """
    model = initial_student(job.recipe, teacher_dir)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if wrong := [*sorted(trained - set(state)), *unknown]:
        raise StillroomError(
            "train: the gathered student has not the weights of the one that it began as "
            f"({wrong[0]}). Its checkpoint is kept. Set compute.sharding to ddp, and run again."
        )
    return model


def packed(
    model: nn.Module,
    *,
    job: Job,
    loss: Loss,
    samples: Samples,
    store: Store,
    files: LocalFiles,
    lengths: Sequence[int],
    dtype: torch.dtype,
) -> Passes:
    """How samples become passes of this student, and what of its features is matched.

    Args:
        model: The student, all of its weights at hand.
        job: Its recipe, and where to say what it cannot do.
        loss: What it minimises.
        samples: What it learns from.
        store: Where these are.
        files: The student's folder.
        lengths: Tokens of the shortest and of the longest sample that is read.
        dtype: What passes compute in.

    Raises:
        UsageError: the student is none that the task can train, or does not show what is compared.
    """
    matching = make_matching(model, job, loss, samples.features, store=store, longest=max(lengths))
    passes = training_passes(
        model, job, teacher_dir=store.teacher_dir(job.teacher_id), lengths=lengths, dtype=dtype
    )
    return replace(
        passes,
        tokens_per_pass=job.ranks.told(smaller(files, passes.tokens_per_pass)),
        matching=matching,
        group=None if matching is None else matching.group,
        teaching=Teaching.of(job.recipe) if samples.soft else None,
    )
