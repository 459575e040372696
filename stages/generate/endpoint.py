"""What `generate` does for an endpoint beside its rows.

Answers are kept on disk, one process spends a budget, and it is noted who answered.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from ...storage.credentials import as_written
from ...storage.store.served import note_served, served_by
from ...storage.store.store import Store
from ..recipe.engines import Generate
from ..workers.answers import Answers, answers_dir
from ..workers.budget import limited, note_reached
from ..workers.job import Job
from ..workers.locks import only_one


@contextmanager
def asking(job: Job) -> Iterator[Answers | None]:
    """The answers of this run folder, while the stage works; None: the author is no endpoint.

    Within a budget one process asks at a time: what two have in flight neither could tell.
    """
    if not job.generate.remote:
        yield None
        return
    folder = answers_dir(Path(job.recipe.run.dir), job.generate)

    def waiting(who: str) -> None:
        job.progress.say(f"{who} asks this endpoint within the same budget: waiting for it")

    with ExitStack() as stack:
        if limited(job.generate):
            lock = folder / ".asking"
            stack.enter_context(only_one(lock, waiting=waiting, look=job.stop.check))
        yield stack.enter_context(Answers(folder))


def endpoint_facts(generate: Generate) -> dict[str, Any]:
    """What shards say of an endpoint, for cards; nothing of another author."""
    if not generate.remote:
        return {}
    at = as_written(str(generate.base_url))
    return {"author_name": f"{generate.model} at {at}", "author_license": generate.license}


def budget_reached(job: Job) -> None:
    """Write down that nothing more can be asked for within these limits."""
    note_reached(answers_dir(Path(job.recipe.run.dir), job.generate), job.generate)


def hear(job: Job, store: Store, served: str) -> None:
    """Write down in the store who answered for the author; say so if it is another than before."""
    before = served_by(store.files, job.author_id)
    new = note_served(store.files, job.author_id, served, day=date.today().isoformat())
    if new and before:
        job.progress.say(
            f"the endpoint answers as {served} now, and answered as {', '.join(before)} before: "
            "the store holds rows of both under one author"
        )
