"""Texts that an engine reads and transformers reads: the same rows by either.

It also has what a row says in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_store import SilentProgress

from stillroom.stages.engines.base import Said, Text
from stillroom.stages.ledger.requests import TargetRequest
from stillroom.stages.models.causal_lm import load_causal_lm
from stillroom.stages.models.identity import FileHashes, Identity, identify
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.targets.spec import Kept
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.tables.spans import span_after


def teacher_at(folder: Path, cache: Path, *, adapter: Path | None = None) -> Identity:
    """A model in float32."""
    hashes = FileHashes(cache, remember=False)
    return identify(folder, dtype="float32", hashes=hashes, adapter=adapter)


def read_job(folder: Path, teacher: Path) -> Job:
    """The job of a teacher that is asked request by request; its store and data are not there."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "storage": {"dir": str(folder / "store")},
        "teacher": {"model": str(teacher)},
        "data": {"source": "none.jsonl", "format": "text"},
        "score": {},
    }
    recipe = Recipe.model_validate(tree)
    return Job(recipe=recipe, progress=SilentProgress(), stop=StopFlag(), teacher_id="0" * 32)


def requests_of(
    texts: Sequence[Sequence[int]], kept: Kept, *, prompt_tokens: int = 1
) -> list[TargetRequest]:
    """Each text with one span, from behind its prompt on."""
    return [
        TargetRequest(
            reuse_key=n.to_bytes(16),
            tokens_key=n.to_bytes(16),
            generation_key=bytes(16),
            prompt_key=bytes(16),
            token_ids=np.array(text, np.int32),
            spans=span_after(prompt_tokens, len(text)),
            kept=kept,
        )
        for n, text in enumerate(texts)
    ]


def log_softmax(model: Any, token_ids: Sequence[int]) -> np.ndarray:
    """[T, V] float64, of transformers' float32 logits; row t is about token t + 1."""
    with torch.inference_mode():
        logits = model(torch.tensor([list(token_ids)])).logits[0]
    found: np.ndarray = logits.double().log_softmax(-1).numpy()
    return found


class ReadByHf:
    """A stand-in for vLLM: transformers says the same in the form of an engine.

    Texts are whole, entries best first.
    """

    def __init__(self, teacher: Identity) -> None:
        self._model = load_causal_lm(teacher)
        self.reads = 0

    def read(
        self, texts: Sequence[Text], entries: int | None, look: Callable[[], None]
    ) -> Iterator[Said]:
        for text in texts:
            look()
            self.reads += 1
            said = log_softmax(self._model, text.token_ids).astype(np.float32)[text.positions]
            ids = np.argsort(-said, axis=1, kind="stable")[:, :entries].astype(np.int32)
            there = np.array(text.token_ids)[text.positions + 1]
            own = said[np.arange(len(there)), there]
            yield Said(text.number, ids, np.take_along_axis(said, ids, axis=1), own)


def in_place_of_vllm(monkeypatch: Any) -> list[ReadByHf]:
    """Let `vllm` be installed and read by transformers; the readers that were opened."""
    opened: list[ReadByHf] = []

    def open_reader(name: str, teacher: Identity, *_: Any, longest: int, **__: Any) -> ReadByHf:
        assert longest <= teacher.context_tokens, "room for texts that it does not read"
        opened.append(ReadByHf(teacher))
        return opened[-1]

    monkeypatch.setattr("stillroom.stages.score.by_engine.open_reader", open_reader)
    monkeypatch.setattr("stillroom.stages.score.opening.is_installed", lambda name: True)
    return opened


Asking = Callable[[Sequence[Text], int | None, Callable[[], None]], Iterator[Said]]


def shifted_by_one(read: Asking) -> Asking:
    """A reader whose positions are off by one.

    It says of each token what follows behind it, and looks it up there.
    """

    def wrong(
        texts: Sequence[Text], entries: int | None, look: Callable[[], None]
    ) -> Iterator[Said]:
        moved = [Text(t.number, [*t.token_ids[1:], t.token_ids[0]], t.positions) for t in texts]
        yield from read(moved, entries, look)

    return wrong
