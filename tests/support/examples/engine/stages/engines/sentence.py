"""The `sentence` engine: answers every prompt with one fixed sentence."""

from collections.abc import Callable, Iterable, Iterator

from ..models.identity import Identity
from ..models.inputs.rendering import Renderer
from ..recipe.engines import Generate
from ..workers.clock import Clock
from .base import Completion, Request

SENTENCE = "the dog sat on the mat"


class SentenceEngine:
    """Needs the author's tokenizer, not its weights."""

    def __init__(self, author: Identity, settings: Generate, clock: Clock) -> None:
        tokenizer = Renderer(author.folder, {}).tokenizer
        ids = tokenizer.encode(SENTENCE, add_special_tokens=False)
        self._finish_reason = "length" if len(ids) >= settings.max_tokens else "stop"
        self._ids = ids[: settings.max_tokens]
        self._text = tokenizer.decode(self._ids)

    def generate(
        self, requests: Iterable[Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """A completion for each request, as it is drawn."""
        for request in requests:
            heartbeat()
            yield Completion(request.number, self._ids, self._text, self._finish_reason)
