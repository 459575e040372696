"""The student as a training begins: on its device, whole or sharded.

It is also said here how its samples become passes.
"""

import gc
from collections.abc import Sequence
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
from ...models.students.student import initial_student, refuse_norms
from ...recipe.sections import Loss
from ...targets.teaching import Teaching
from ...workers.job import Job
from ..features import make_matching
from .choice import asked_for, chosen, keeps_gradients, least_free
from .root import Root, gather, sharded
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
    ranks, half = job.ranks, dtype == torch.bfloat16
    ranks.meet()  # one may have had files to fetch before
    free = least_free(ranks, device)
    held = asked_for(job.recipe.compute.sharding, ranks, free)
    model: Any = None

    def load() -> None:
        nonlocal model
        model = _made(job, teacher_dir) if model is None else model

    if held is None:  # its size tells

        def choose() -> str:
            load()
            return chosen(model, job.train, ranks, free, half=half)

        held = ranks.by_first(choose)

    def part() -> Root:
        load()
        keeps = keeps_gradients(model, job.train, ranks, free, half=half)
        root = sharded(model, ranks, device, dtype, keeps=keeps)
        gc.collect()  # the next rank needs the memory of what was cut
        return root

    root, how = None, "each has all of the student"
    if held == "fsdp2":
        root, how = ranks.in_turn(part), "each has a part of every weight"
    else:
        ranks.each(load)
        model = model.to(device)
    if ranks.count > 1:
        job.progress.say(f"{ranks.count} ranks train together: {how} ({held})")
    return model, root


def _made(job: Job, teacher_dir: Path) -> Any:
    """All of the student, in the memory of the machine."""
    model: Any = initial_student(job.recipe, teacher_dir)
    if job.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if job.ranks.count > 1:
        refuse_norms(model)
    return model


def made_whole(job: Job, teacher_dir: Path, student: nn.Module) -> nn.Module | None:
    """A sharded student as a plain one, in the memory of the machine of the first rank alone.

    All ranks call it.

    Raises:
        StillroomError: it is not the student that it began as.
    """
    plain: nn.Module | None = None

    def make() -> None:
        nonlocal plain
        plain = initial_student(job.recipe, teacher_dir)

    job.ranks.by_first(make)
    unlike = gather(student, plain, job.ranks.come)

    def check() -> None:
        if unlike:
            raise StillroomError(
                "train: the gathered student has not the weights of the one that it began as "
                f"({unlike[0]}). Its checkpoint is kept. Set compute.sharding to ddp, and run "
                "again."
            )

    job.ranks.by_first(check)
    return plain


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
