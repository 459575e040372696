"""Text that came with the data and is not generated: written into rows of `generations`."""

from contextlib import ExitStack
from typing import Any

import numpy as np

from ...storage.store.index import Index
from ...storage.store.store import Store
from ...storage.store.writer import CommitLimits
from ...storage.tables.row_builders import given_row
from ..recipe.sections import Recipe
from ..targets.masks import masks_of
from ..workers.job import Job
from ..workers.shard_about import about
from .lengths import Lengths
from .tokenizing import Given, OneToken, Tokenizing, window_tokens


def given_text(recipe: Recipe) -> bool:
    """Whether the data brings the text that is scored and trained on."""
    return recipe.generate is None


class GivenText:
    """Tokenizes the text that came with the data into generations rows."""

    def __init__(self, job: Job, store: Store, stack: ExitStack, limits: CommitLimits) -> None:
        data, folder = job.recipe.data, store.teacher_dir(job.teacher_id)
        self._clock = job.clock
        self._tokenizing: OneToken | Tokenizing = (
            OneToken(data)
            if data.records.image
            else Tokenizing(
                folder,
                data,
                context_tokens=job.context_tokens,
                day=job.day,
                masks=masks_of(job.recipe, folder),
            )
        )
        self._author = job.author_id
        self._earlier = tokens_of(store, job.earlier_author_id) if job.earlier_author_id else {}
        settings = {
            "window_tokens": window_tokens(data, job.context_tokens),
            "chat_template_kwargs": data.chat_template_kwargs,
        }
        if job.recipe.masks is not None:
            settings["masks"] = job.recipe.masks
        shard_about = about("data", job.recipe, settings, author_id=job.author_id)
        writer = store.writer("generations", about=shard_about, limits=limits)
        self._writer = stack.enter_context(writer)
        self.tokens = 0

    @property
    def lengths(self) -> Lengths:
        """How long the rows were; of documents, which are cut into windows, nothing is counted."""
        return self._tokenizing.lengths

    @property
    def bytes(self) -> int:
        """Of what is committed."""
        return self._writer.bytes

    def add(self, row: dict[str, Any]) -> int:
        """Write a prompt's rows; returns how many it has.

        Raises:
            RowError: nothing to predict, or too long.
        """
        with self._clock.span("tokenizer"):
            texts = self._tokenizing.texts(row)
        for window, text in enumerate(texts):
            # An equal row of an earlier rule serves, and is not written again.
            if self._earlier.get(row["key"]) != text.tokens_key:
                self._write(row, window, text)
        return len(texts)

    def notes(self) -> list[str]:
        """What is to be said of all texts, a sentence each."""
        return self._tokenizing.notes() + self.lengths.notes()

    def _write(self, row: dict[str, Any], window: int, given: Given) -> None:
        self.tokens += given.scored
        start = given.prompt_tokens
        with self._clock.span("tokenizer"):
            text = self._tokenizing.text_of(np.asarray(given.token_ids[start:]))
        generation = given_row(
            author_id=self._author,
            source_key=row["key"],
            prompt_key=row["prompt_key"],
            window=window,
            tokens_key=given.tokens_key,
            token_ids=given.token_ids,
            prompt_tokens=start,
            text=text,
            spans=given.spans,
        )
        with self._clock.span("disk"):
            self._writer.add(generation)


def tokens_of(store: Store, author_id: str) -> dict[bytes, bytes]:
    """Source key -> tokens key of what an author wrote that has one row for each record."""
    index = Index(store)
    try:
        rows = index.rows(f"""
            SELECT source_key::BLOB, tokens_key::BLOB FROM generations
            WHERE author_id = '{author_id}'""")
        return dict(rows)
    finally:
        index.close()
