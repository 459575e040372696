"""One of several ranks that judge students together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tiny_store import SilentProgress

from stillroom.stages.workers.job import Job, StopFlag
from stillroom.stages.workers.ranks import Ranks

_OWN = ("progress", "stop", "clock", "ranks", "journal")
"""What of a job is a process's own."""


def shared(job: Job) -> dict[str, Any]:
    """What another process can be handed of it."""
    return {f.name: getattr(job, f.name) for f in fields(job) if f.name not in _OWN}


def judge(ranks: Ranks, job: Mapping[str, Any], at_once: int) -> dict[str, Any]:
    """What the stage answers on this rank."""
    from stillroom.stages.evaluate import measure, stage

    measure.ROWS_AT_ONCE = at_once
    progress = SilentProgress()
    result = stage.run(Job(progress=progress, stop=StopFlag(), ranks=ranks, **job))
    return {"rows": result.rows, "tokens": result.tokens, "details": result.details} | (
        {"done": progress.done} if ranks.first else {}
    )
