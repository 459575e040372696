"""Prompt and completion as tokens.

The author writes ids, or it answers in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...storage.tables.spans import span_after
from ..engines.base import Completion
from ..ledger.requests import tokens_key
from ..models.chat.renderer import no_spans
from ..models.inputs.reads import too_long
from ..models.inputs.rendering import Renderer
from ..workers.job import Job


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, or a prompt and what was written."""

    token_ids: list[int]
    prompt_tokens: int
    spans: np.ndarray
    """[S, 2] what is scored; empty: all that follows the prompt."""
    completion: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The prompt's row of `prompts`."""

    @property
    def tokens_key(self) -> bytes:
        """Name of what a teacher is asked to score."""
        spans = self.spans if len(self.spans) else None
        return tokens_key(self.token_ids, self.prompt_tokens, spans)


def written(prompt: Text, completion: Completion) -> Text:
    """The prompt's ids, and then those that the author wrote."""
    token_ids, spans = prompt.token_ids + completion.token_ids, prompt.spans
    if len(spans) and completion.token_ids:
        # The turns of the prompt, and then what was written.
        after = span_after(prompt.prompt_tokens, len(token_ids))
        spans = np.concatenate([spans, after])
    return Text(token_ids, prompt.prompt_tokens, spans, completion.text)


def answered(job: Job, renderer: Renderer, prompt: Text, completion: Completion) -> Text:
    """An answer in words, tokenized together with its prompt.

    This is how text is tokenized that comes with the data.

    Raises:
        RowError: the tokens say something else, or are too many.
    """
    with job.clock.span("tokenizer"):
        row = {**prompt.row, "completion": completion.text, "completion_fields": None}
        ended = completion.finish_reason != "length"
        last = job.recipe.data.turns != "all"
        token_ids, spans = renderer.given(row, last=last, ended=ended)
        if len(token_ids) > job.context_tokens:
            raise too_long(len(token_ids), job.context_tokens, limit="the teacher reads")
        # All before the first scored token counts as the prompt.
        start = int(spans[0, 0])
        said = renderer.tokenizer.decode(token_ids[start:], skip_special_tokens=True)
    plain = np.array_equal(spans, span_after(start, len(token_ids)))
    return Text(token_ids, start, no_spans() if plain else spans, str(said))
