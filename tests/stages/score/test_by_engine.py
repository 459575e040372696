"""Soft targets by vLLM's reading.

They are those of transformers, with tails and entropies within what is said of them.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from read_texts import log_softmax, read_job, requests_of, shifted_by_one, teacher_at
from tiny_adapter import save_random_adapter

from stillroom.stages.engines import vllm as engine
from stillroom.stages.score import causal_lm
from stillroom.stages.score.by_engine import Teacher
from stillroom.stages.score.scorer import Read
from stillroom.stages.targets.spec import Kept

pytestmark = [
    pytest.mark.assets,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
STORIES = "models/stories260k-llama-hd32"
VOCABULARY = 512
ENTRIES = 1e-3
"""Nats; set before it was measured. Found: 2e-5."""
LENGTHS = (512, 2, 131, 40, 300)
"""The whole context; the least; and lengths beyond vLLM's blocks of 128, which its cache of prompts
is made of."""


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    # Two of them begin alike, over a whole block.
    begin = rng.integers(3, VOCABULARY, 512).tolist()
    found = [rng.integers(3, VOCABULARY, n).tolist() for n in LENGTHS]
    return [*found, begin[:260], begin[:200]]


class Models:
    """The stories by both, opened once."""

    def __init__(self, folder: Path, at: Path, *, adapter: Path | None = None) -> None:
        self.job = read_job(at, folder)
        self.identity = teacher_at(folder, at, adapter=adapter)
        self.hf = causal_lm.Teacher(self.job, self.identity)
        self.vllm = Teacher(self.job, self.identity, longest=512)

    def read(self, texts: list[list[int]], kept: Kept, *, prompt_tokens: int = 1) -> list[Read]:
        return self.vllm.begin(requests_of(texts, kept, prompt_tokens=prompt_tokens))()

    def alone(self, texts: list[list[int]], kept: Kept, *, prompt_tokens: int = 1) -> list[Read]:
        asked = requests_of(texts, kept, prompt_tokens=prompt_tokens)
        with torch.inference_mode():
            return [self.hf.begin([one])()[0] for one in asked]


@pytest.fixture(scope="module")
def models(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Models]:
    yield Models(assets / STORIES, tmp_path_factory.mktemp("models"))
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def assert_entries_alike(found: list[Read], right: list[Read], truths: list[np.ndarray]) -> None:
    """The same ids, ties aside, have the same log-probabilities.

    It is compared what is there, and what is outside.
    """
    for one, other, truth in zip(found, right, truths, strict=True):
        mine, theirs = one.targets, other.targets
        n = len(mine.entropy)
        assert mine.ids is not None
        assert mine.logprobs is not None
        assert mine.tail_logprob is not None
        assert theirs.logprobs is not None
        said = truth[-n - 1 : -1]
        used = mine.ids >= 0
        at = np.take_along_axis(said, np.maximum(mine.ids, 0), axis=1)
        # An id that another takes the place of is as likely as that one.
        np.testing.assert_allclose(mine.logprobs[used], at[used], atol=ENTRIES)
        np.testing.assert_allclose(mine.logprobs[used], theirs.logprobs[used], atol=ENTRIES)
        np.testing.assert_allclose(mine.token_logprob, theirs.token_logprob, atol=ENTRIES)
        outside = np.where(used.any(1, keepdims=True), said, 0.0)
        np.put_along_axis(outside, np.where(used, mine.ids, mine.ids[:, :1]), -np.inf, axis=1)
        tail = np.log(np.exp(outside).sum(axis=1))
        slack = ENTRIES if one.tail_bound is None else ENTRIES + one.tail_bound
        assert (np.abs(mine.tail_logprob - tail) <= slack).all()
        entropy = -(np.exp(said) * said).sum(axis=1)
        assert (mine.entropy <= entropy + ENTRIES).all()


@pytest.mark.parametrize(
    "kept",
    [Kept(kind="topk", k=16), Kept(kind="topp", k=64, p=0.9, k_min=2)],
    ids=["topk", "topp"],
)
def test_the_best_entries_are_those_of_transformers(
    models: Models, texts: list[list[int]], kept: Kept
) -> None:
    found, right = models.read(texts, kept), models.alone(texts, kept)
    truths = [log_softmax(models.hf.model, text) for text in texts]
    assert_entries_alike(found, right, truths)
    for one in found:  # a bound that says nothing would pass too
        assert one.tail_bound is not None
        assert np.median(one.tail_bound) < 1e-2


@pytest.mark.parametrize(
    "kept",
    [
        Kept(kind="full", k=VOCABULARY),
        Kept(kind="topk", k=500),
        Kept(kind="topk", k=16, temperatures=(2.0,)),
        Kept(kind="sampled", k=50, draw="systematic", proposal=1.0),
        Kept(kind="sampled", k=50, draw="multinomial", proposal=1.0, temperatures=(2.0,)),
    ],
    ids=["full", "nearly all", "temperatures", "sampled", "sampled at 2"],
)
@pytest.mark.parametrize("at_once", [engine.ENTRIES_AT_ONCE, 7 * VOCABULARY])
def test_every_id_is_exact_by_whole_texts_and_by_positions(
    models: Models, texts: list[list[int]], kept: Kept, at_once: int, monkeypatch: Any
) -> None:
    """With little room each position is asked for alone; draws are those of transformers' row."""
    monkeypatch.setattr(engine, "ENTRIES_AT_ONCE", at_once)
    few = [text[:150] for text in texts[:4]]
    for one, other in zip(models.read(few, kept), models.alone(few, kept), strict=True):
        assert one.tail_bound is None
        for name in ("logprobs", "token_logprob", "entropy", "tail_logprob", "tempered_tails"):
            mine, theirs = getattr(one.targets, name), getattr(other.targets, name)
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                np.testing.assert_allclose(mine, theirs, atol=ENTRIES, err_msg=name)
        if kept.structure.drawn:
            same = (one.targets.ids == other.targets.ids).all(axis=1).mean()
            assert same > 0.98  # a point between two ids may fall to the other


def test_only_what_is_asked_for_is_said(models: Models, texts: list[list[int]]) -> None:
    kept = Kept(kind="topk", k=4)
    whole, end = (models.read(texts[4:5], kept, prompt_tokens=p)[0].targets for p in (1, 250))
    assert len(end.entropy) == 50
    np.testing.assert_array_equal(end.logprobs, whole.logprobs[-50:])


def test_a_shift_by_one_position_fails(
    models: Models, texts: list[list[int]], monkeypatch: Any
) -> None:
    kept = Kept(kind="topk", k=16)
    right = models.alone(texts, kept)
    truths = [log_softmax(models.hf.model, text) for text in texts]
    reader = models.vllm._reader
    monkeypatch.setattr(reader, "read", shifted_by_one(reader.read))
    with pytest.raises(AssertionError):
        assert_entries_alike(models.read(texts, kept), right, truths)


def test_a_stale_prefix_fails(models: Models, texts: list[list[int]], monkeypatch: Any) -> None:
    """Told to read its cache under prompt log-probabilities, vLLM gives unwritten memory.

    Nothing was written to it.
    """
    kept = Kept(kind="topk", k=16)
    right = models.alone(texts, kept)
    truths = [log_softmax(models.hf.model, text) for text in texts]
    assert_entries_alike(models.read(texts, kept), right, truths)  # the cache is full now
    assert_entries_alike(models.read(texts, kept), right, truths)
    reader = models.vllm._reader
    stale = {"skip_reading_prefix_cache": False}
    monkeypatch.setattr(reader, "_cached", lambda asked: asked | stale)
    with pytest.raises((AssertionError, FloatingPointError, engine.EngineDied)):
        assert_entries_alike(models.read(texts, kept), right, truths)


def test_rows_with_an_adapter_are_its_own_and_those_without_the_bases(
    models: Models, texts: list[list[int]], tmp_path: Path
) -> None:
    """In one batch vLLM on a CPU would mix them up.

    Several prompts with an adapter would end it.

    This is the last test: the second engine, as it goes, takes along what the first one needs.
    """
    folder = models.identity.folder
    adapter = save_random_adapter(tmp_path / "adapter", folder, rank=32)
    adapted = Models(folder, tmp_path, adapter=adapter)
    kept = Kept(kind="topk", k=16)
    found, right = adapted.read(texts, kept), adapted.alone(texts, kept)
    truths = [log_softmax(adapted.hf.model, text) for text in texts]
    assert_entries_alike(found, right, truths)
    with pytest.raises(AssertionError):  # the adapter does something
        assert_entries_alike(found, models.alone(texts, kept), truths)
    bases = [log_softmax(models.hf.model, text) for text in texts]
    assert_entries_alike(models.read(texts, kept), models.alone(texts, kept), bases)
