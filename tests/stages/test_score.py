"""Stage score: what is stored is the teacher's own distribution at the right positions, whatever the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import prompts, recipe_tree, write_jsonl

from stillroom.pipeline.binding import bind
from stillroom.stages import data, score, teacher
from stillroom.stages.identity import FileHashes
from stillroom.stages.job import Job, StageResult, StopFlag
from stillroom.stages.kept import Kept
from stillroom.stages.requests import TargetRequest
from stillroom.stages.sections import Recipe
from stillroom.storage.codec import SoftTargets
from stillroom.storage.store import Store


class Silent:
    """A progress line that nobody sees; keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, **_: Any) -> None: ...

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None: ...

    def say(self, text: str) -> None:
        self.said.append(text)


def scored(tmp_path: Path, folder: Path, **sections: Any) -> tuple[Store, StageResult, Silent]:
    """`data` and `score` in this process, on given completions."""
    records = [
        r | {"completion": "the dog sat on the mat and ran"[: 7 + 4 * (i % 6)]} for i, r in enumerate(prompts(20))
    ]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    tree = recipe_tree(tmp_path, folder, source, generate=None, **sections)
    recipe = Recipe.model_validate(tree | {"data": {"source": str(source), "format": "completion", "holdout": 3}})
    store = Store.open(recipe.storage.dir, create=True)
    bound = bind(recipe, write=True)
    assert bound.teacher is not None
    store.put_teacher(bound.teacher.id, bound.teacher.files_to_keep())
    line = Silent()
    b = bound.binding
    ids = {"data_id": b.data_id, "teacher_id": b.teacher_id, "author_id": b.author_id}
    job = Job(recipe=recipe, progress=line, stop=StopFlag(), context_tokens=b.context_tokens, **ids)
    data.run(job)
    return store, score.run(job, bound.teacher), line


def rows_of(store: Store) -> list[dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for row in store.index("soft_targets", ["key"]).to_pylist():
        places.setdefault(row["shard"], []).append(row["row"])
    return list(store.rows("soft_targets", places))


def test_targets_are_the_teachers_distribution_one_position_before_each_token(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(initializer_range=0.5)
    store, result, _ = scored(tmp_path, folder, storage={"dir": str(tmp_path / "store"), "mantissa_bits": 23})
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    rows = rows_of(store)
    assert result.rows == len(rows) == 20
    assert {row["kind"] for row in rows} == {"topk", "full"}
    for row in rows:
        with torch.no_grad():
            logits = model(torch.as_tensor(row["token_ids"])[None].long()).logits[0]
        truth = logits.log_softmax(-1).numpy()[row["span_start"] - 1 : row["span_start"] - 1 + row["span_tokens"]]
        targets = SoftTargets.from_row(row)
        following = row["token_ids"][row["span_start"] :]
        np.testing.assert_allclose(targets.token_logprob, truth[np.arange(len(following)), following], atol=3e-5)
        if row["kind"] == "full":
            np.testing.assert_allclose(targets.logprobs, truth, atol=3e-5)
        else:
            np.testing.assert_allclose(np.take_along_axis(truth, targets.ids, 1), targets.logprobs, atol=3e-5)
            np.testing.assert_allclose(targets.logprobs, -np.sort(-truth)[:, :4], atol=3e-5)
        total = np.exp(targets.logprobs.astype(float)).sum(-1) + np.exp(targets.tail_logprob.astype(float))
        np.testing.assert_allclose(total, 1.0, atol=1e-5)


def test_every_row_sums_to_one_as_stored_by_default(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    store, _, _ = scored(tmp_path, tiny_llama(initializer_range=0.5))
    for row in rows_of(store):
        targets = SoftTargets.from_row(row)
        total = np.exp(targets.logprobs.astype(float)).sum(-1) + np.exp(targets.tail_logprob.astype(float))
        np.testing.assert_allclose(total, 1.0, atol=2e-3)


def test_more_entries_than_the_teacher_has_are_all_of_them_and_that_is_said(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    store, _, line = scored(tmp_path, tiny_llama(), score={"k": 33, "batch_tokens": 256})
    assert {(row["kind"], row["k"]) for row in rows_of(store)} == {("topk", 32), ("full", 32)}
    assert "score.k: 33 is above the teacher's vocabulary, all 32 entries are kept" in line.said


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama()
    forward = score._Scorer._forward
    hopeless: list[bytes] = []

    def small_memory(self: Any, batch: list[TargetRequest]) -> list[dict[str, Any]]:
        hopeless[:] = hopeless or [batch[0].reuse_key]
        if len(batch) > 2 or batch[0].reuse_key in hopeless:
            raise torch.OutOfMemoryError("fault injected by the test")
        return forward(self, batch)

    monkeypatch.setattr(score._Scorer, "_forward", small_memory)
    store, result, line = scored(tmp_path, folder)
    assert (result.rows, result.rejected) == (19, 1)
    assert any("halving" in text for text in line.said)
    assert store.index("rejects", ["reason"])["reason"].to_pylist() == ["out_of_memory"]


def test_rows_on_which_the_teacher_is_not_a_number_are_rejected(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillroom.stages import targets

    whole, broken = targets.soft_targets, list[list[int]]()

    def overflowing(states: Any, head: Any, following: torch.Tensor, **kind: Any) -> SoftTargets:
        """Every text with the completion that is scored first: three or four of the twenty."""
        broken[:] = broken or [following.tolist()]
        return whole(states * torch.nan if following.tolist() in broken else states, head, following, **kind)

    monkeypatch.setattr(targets, "soft_targets", overflowing)
    store, result, _ = scored(tmp_path, tiny_llama(), score={"k": 4, "batch_tokens": 64})
    assert result.rejected in (3, 4)
    assert result.rows == 20 - result.rejected
    for reject in store.index("rejects", ["reason", "message"]).to_pylist():
        assert (reject["reason"], reject["message"]) == ("engine", "FloatingPointError: the teacher's numbers are NaN")


@pytest.mark.parametrize("budget", [32, 100, 10_000])
def test_batches_hold_one_kind_within_the_budget_and_every_row_once(budget: int) -> None:
    made = np.random.default_rng(0)
    requests = [
        TargetRequest(
            reuse_key=bytes([i]) * 16,
            tokens_key=b"",
            generation_key=b"",
            prompt_key=b"",
            token_ids=np.zeros(made.integers(2, 30), np.int32),
            span_start=1,
            kept=Kept(kind=made.choice(["topk", "full"]), k=4),
        )
        for i in range(60)
    ]
    cut = list(score.batches(requests, budget))
    assert sorted(r.reuse_key for batch in cut for r in batch) == [r.reuse_key for r in requests]
    for batch in cut:
        assert len({r.kept.kind for r in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(len(r.token_ids) for r in batch) <= budget
    assert cut == list(score.batches(requests[::-1], budget))


def test_an_adapter_on_the_teacher_changes_identity_and_distribution(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tiny_llama()
    hashes = FileHashes(tmp_path / "s", remember=False)
    from stillroom.stages.identity import identify

    model = teacher.load_causal_lm(identify(folder, dtype="auto", hashes=hashes))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(torch.tensor([[1, 5, 6]])).logits
    plain = identify(folder, dtype="auto", hashes=hashes)
    identity = identify(folder, dtype="auto", hashes=hashes, adapter=tmp_path / "adapter")
    assert identity.id != plain.id
    torch.testing.assert_close(teacher.load_causal_lm(identity)(torch.tensor([[1, 5, 6]])).logits, expected)
