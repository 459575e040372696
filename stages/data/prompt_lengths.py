"""Prompts that `generate` goes on from: those longer than the recipe allows are rejected."""

from typing import Any

from ...storage.store.store import Store
from ..models.inputs.rendering import Renderer
from ..workers.job import Job
from .lengths import Lengths


class PromptLengths:
    """Counts the tokens of prompts as their author will read them; writes nothing."""

    bytes = tokens = 0

    def __init__(self, job: Job, store: Store) -> None:
        data, folder = job.recipe.data, store.teacher_dir(job.author_id)
        self._clock = job.clock
        self._renderer = Renderer(folder, data.chat_template_kwargs, day=job.day)
        self.lengths = Lengths.of(data, job.context_tokens)

    def add(self, row: dict[str, Any]) -> int:
        """A prompt is one row.

        Raises:
            RowError: it is too long, or cannot be rendered.
        """
        with self._clock.span("tokenizer"):
            tokens = len(self._renderer.prompt_ids(row))
        if tokens > self.lengths.most:
            raise self.lengths.reject(tokens)
        return 1

    def notes(self) -> list[str]:
        """What is to be said of all prompts; what their rendering has to say, `generate` says."""
        return self.lengths.notes()
