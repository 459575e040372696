"""Stage score.

What is stored is the teacher's own distribution at the right positions, whatever the batch.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import prompts, recipe_tree, write_jsonl
from tiny_jobs import teacher_job
from tiny_store import SilentProgress

from stillroom.stages.data import stage as data
from stillroom.stages.ledger.requests import TargetRequest
from stillroom.stages.models import causal_lm as teacher
from stillroom.stages.models.identity import FileHashes, Identity
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import causal_lm, scorer
from stillroom.stages.score import stage as score
from stillroom.stages.targets import spec
from stillroom.stages.targets.spec import Kept
from stillroom.stages.workers.job import Job, StageResult
from stillroom.stages.workers.journal import Journal
from stillroom.stages.workers.share import DoneByOthers, Share
from stillroom.storage.errors import Stopped
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric


FORWARD = 1e-4
"""A forward pass in float32 against float64: some hundred roundings of eps = 1.2e-7, of logits of
up to 8.

Targets of the position before or after are off by more than 0.1.
"""


def prepared(tmp_path: Path, folder: Path, **sections: Any) -> tuple[Store, Job, Identity]:
    """A store with given completions, and the stage's job."""
    records = [
        r | {"completion": "the dog sat on the mat and ran"[: 7 + 4 * (i % 6)]}
        for i, r in enumerate(prompts(20))
    ]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    tree = recipe_tree(tmp_path, folder, source, generate=None, **sections)
    recipe = Recipe.model_validate(
        tree | {"data": {"source": str(source), "format": "completion", "holdout": 3}}
    )
    store, job, teacher = teacher_job(recipe)
    data.run(job)
    return store, job, teacher


def scored(
    tmp_path: Path, folder: Path, **sections: Any
) -> tuple[Store, StageResult, SilentProgress]:
    """`data` and `score` in this process, on given completions."""
    store, job, identity = prepared(tmp_path, folder, **sections)
    return store, score.run(job, identity), job.progress


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
    store, result, _ = scored(
        tmp_path, folder, storage={"dir": str(tmp_path / "store"), "mantissa_bits": 23}
    )
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    rows = rows_of(store)
    assert result.rows == len(rows) == 20
    assert {row["kind"] for row in rows} == {"topk", "full"}
    for row in rows:
        with torch.no_grad():
            logits = model(torch.as_tensor(row["token_ids"])[None].long()).logits[0]
        truth = logits.log_softmax(-1).numpy()[
            row["span_start"] - 1 : row["span_start"] - 1 + row["span_tokens"]
        ]
        targets = SoftTargets.from_row(row)
        following = row["token_ids"][row["span_start"] :]
        np.testing.assert_allclose(
            targets.token_logprob, truth[np.arange(len(following)), following], atol=FORWARD
        )
        if row["kind"] == "full":
            np.testing.assert_allclose(targets.logprobs, truth, atol=FORWARD)
        else:
            np.testing.assert_allclose(
                np.take_along_axis(truth, targets.ids, 1), targets.logprobs, atol=FORWARD
            )
            np.testing.assert_allclose(targets.logprobs, -np.sort(-truth)[:, :4], atol=FORWARD)
        total = np.exp(targets.logprobs.astype(float)).sum(-1) + np.exp(
            targets.tail_logprob.astype(float)
        )
        np.testing.assert_allclose(total, 1.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "full", "sampled"])
def test_a_row_of_three_spans_has_the_targets_of_three_rows(
    tmp_path: Path, tiny_llama: Callable[..., Path], kind: str
) -> None:
    """Each span is scored as if what precedes it were a prompt of its own.

    What stands between is scored in neither.
    """
    _, job, identity = prepared(tmp_path, tiny_llama(initializer_range=0.5))
    rounds = 4000
    kept = {
        "topk": Kept(kind="topk", k=4),
        "full": Kept(kind="full", k=32),
        "sampled": Kept(kind="sampled", k=rounds, draw="multinomial", proposal=1.0),
    }[kind]
    ids = np.random.default_rng(0).integers(4, 25, 20).astype(np.int32)
    spans = np.array([[2, 3], [7, 1], [12, 8]])

    def request(token_ids: np.ndarray, of: np.ndarray) -> TargetRequest:
        names = dict.fromkeys(("reuse_key", "tokens_key", "generation_key", "prompt_key"), b"row")
        return TargetRequest(**names, token_ids=token_ids, spans=of, kept=kept)

    teacher = causal_lm.Teacher(job, identity)
    alone = [request(ids[: start + n], np.array([[start, n]])) for start, n in spans]
    with torch.inference_mode():
        whole, *parts = (teacher.begin([one])()[0].targets for one in (request(ids, spans), *alone))
        together = [read.targets for read in teacher.begin([request(ids, spans), *alone])()]
        everything = replace(request(ids, spans), kept=Kept(kind="full", k=32))
        p = np.exp(teacher.begin([everything])()[0].targets.logprobs)
    # Rows in one pass do not see one another either.
    for one, other in zip(together, [whole, *parts], strict=True):
        np.testing.assert_allclose(one.entropy, other.entropy, atol=1e-5)
    for number, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 12))):
        mine, truth = whole.positions(part), parts[number]
        names = ("logprobs", "tail_logprob", "token_logprob", "entropy")
        for name in names if kind != "sampled" else names[2:]:
            found, expected = getattr(mine, name), getattr(truth, name)
            np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
        if kind == "topk":
            np.testing.assert_array_equal(mine.ids, truth.ids)
        if kind == "sampled":
            assert mine.counts is not None
            assert (mine.counts.sum(1) == rounds).all()
            deviation = np.sqrt(np.maximum(p * (1 - p), 1 / rounds) / rounds)[part]
            assert (np.abs(_dense(mine) - p[part]) < 6 * deviation).all()
            # The first span's positions have the same draws, but for points at the edge of an id.
            moved = np.abs(_dense(mine) - _dense(truth)).sum(1).mean() * rounds
            assert (moved < 10) == (number == 0)


def _dense(targets: SoftTargets) -> np.ndarray:
    """[N, V] what drawn ids estimate."""
    dense = np.zeros((len(targets.entropy), 32))
    assert targets.ids is not None
    rows, columns = np.nonzero(targets.ids >= 0)
    dense[rows, targets.ids[rows, columns]] = targets.probabilities[rows, columns]
    return dense


def test_every_row_sums_to_one_as_stored_by_default(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    store, _, _ = scored(tmp_path, tiny_llama(initializer_range=0.5))
    for row in rows_of(store):
        targets = SoftTargets.from_row(row)
        total = np.exp(targets.logprobs.astype(float)).sum(-1) + np.exp(
            targets.tail_logprob.astype(float)
        )
        np.testing.assert_allclose(total, 1.0, atol=2e-3)


def test_more_entries_than_the_teacher_has_are_all_of_them(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    store, _, _ = scored(tmp_path, tiny_llama(), score={"k": 33, "batch_tokens": 256})
    assert {(row["kind"], row["k"]) for row in rows_of(store)} == {("topk", 32), ("full", 32)}


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama()
    begin = causal_lm.Teacher.begin
    hopeless: list[bytes] = []

    def small_memory(self: Any, batch: list[TargetRequest]) -> Callable[[], list[SoftTargets]]:
        hopeless[:] = hopeless or [batch[0].reuse_key]
        if len(batch) > 2 or batch[0].reuse_key in hopeless:
            raise torch.OutOfMemoryError("fault injected by the test")
        return begin(self, batch)

    monkeypatch.setattr(causal_lm.Teacher, "begin", small_memory)
    store, result, line = scored(tmp_path, folder)
    assert (result.rows, result.rejected) == (19, 1)
    assert any("halving" in text for text in line.said)
    assert store.index("rejects", ["reason"])["reason"].to_pylist() == ["out_of_memory"]


def test_rows_on_which_the_teacher_is_not_a_number_are_rejected(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillroom.stages.targets.draws import Span
    from stillroom.stages.targets.entries_and_tail import Reducer

    launch, broken = Reducer.launch, list[list[int]]()

    def overflowing(
        self: Any, states: torch.Tensor, following: torch.Tensor, *, spans: list[Span], **kind: Any
    ) -> Any:
        """Every text with the completion that is scored first: three or four of the twenty."""
        sizes = [span.positions for span in spans]
        texts = [text.tolist() for text in following.split(sizes)]
        broken[:] = broken or texts[:1]
        parts = [
            s * torch.nan if text in broken else s
            for s, text in zip(states.split(sizes), texts, strict=True)
        ]
        return launch(self, torch.cat(parts), following, spans=spans, **kind)

    monkeypatch.setattr(Reducer, "launch", overflowing)
    store, result, _ = scored(tmp_path, tiny_llama(), score={"k": 4, "batch_tokens": 64})
    assert result.rejected in (3, 4)
    assert result.rows == 20 - result.rejected
    for reject in store.index("rejects", ["reason", "message"]).to_pylist():
        assert (reject["reason"], reject["message"]) == (
            "engine",
            "FloatingPointError: the teacher's numbers are NaN",
        )


def test_held_out_rows_of_a_large_vocabulary_have_more_entries_than_the_others(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are `topk` like the others, with another k, and all would fit into one batch."""
    monkeypatch.setattr(spec, "FULL_VOCABULARY", 16)
    monkeypatch.setattr(spec, "REFERENCE_K", 8)
    store, result, _ = scored(tmp_path, tiny_llama(), score={"k": 4, "batch_tokens": 4096})
    assert result.rejected == 0
    assert sorted(row["k"] for row in rows_of(store)) == [4] * 17 + [8] * 3


@pytest.mark.parametrize("budget", [32, 100, 10_000])
def test_batches_keep_the_same_within_the_budget_and_every_row_once(budget: int) -> None:
    made = np.random.default_rng(0)
    requests = [
        TargetRequest(
            reuse_key=bytes([i]) * 16,
            tokens_key=b"",
            generation_key=b"",
            prompt_key=b"",
            token_ids=np.zeros(made.integers(2, 30), np.int32),
            spans=np.array([[1, 1]]),
            kept=Kept(kind=made.choice(["topk", "full"]), k=int(made.choice([4, 8]))),
        )
        for i in range(60)
    ]
    cut = list(score.batches(requests, budget))
    assert sorted(r.reuse_key for batch in cut for r in batch) == [r.reuse_key for r in requests]
    for batch in cut:
        assert len({r.kept for r in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(len(r.token_ids) for r in batch) <= budget
    assert cut == list(score.batches(requests[::-1], budget))


def test_an_adapter_on_the_teacher_changes_identity_and_distribution(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tiny_llama()
    hashes = FileHashes(tmp_path / "s", remember=False)
    from stillroom.stages.models.identity import identify

    model = teacher.load_causal_lm(identify(folder, dtype="auto", hashes=hashes))
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(torch.tensor([[1, 5, 6]])).logits
    plain = identify(folder, dtype="auto", hashes=hashes)
    identity = identify(folder, dtype="auto", hashes=hashes, adapter=tmp_path / "adapter")
    assert identity.id != plain.id
    torch.testing.assert_close(
        teacher.load_causal_lm(identity)(torch.tensor([[1, 5, 6]])).logits, expected
    )


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Passes as on a GPU: one begins before the one before is collected.

    What was done, with its first request.
    """
    log: list[tuple[str, int]] = []
    numbers: dict[bytes, int] = {}

    def noted(owner: Any, name: str, requests: Callable[..., Any]) -> None:
        whole = getattr(owner, name)

        def note(self: Any, *args: Any, **more: Any) -> Any:
            keys = requests(*args)
            log.extend([(name, numbers.setdefault(keys[0], len(numbers)))] if keys else [])
            return whole(self, *args, **more)

        monkeypatch.setattr(owner, name, note)

    monkeypatch.setattr(scorer.Scorer, "_on_gpu", True)
    noted(causal_lm.Teacher, "begin", lambda batch: [r.reuse_key for r in batch])
    noted(Journal, "done", lambda keys: keys)
    return log


SMALL = {"k": 4, "batch_tokens": 64}


def test_a_pass_begins_before_the_one_before_is_collected_and_gives_the_same_rows(
    tmp_path: Path, tiny_llama: Callable[..., Path], overlapping: list[tuple[str, int]]
) -> None:
    folder = tiny_llama(initializer_range=0.5)
    store, result, _ = scored(tmp_path, folder, score=SMALL)
    batches = 1 + max(number for _, number in overlapping)
    assert batches > 3
    assert overlapping[:1] == [("begin", 0)]
    for number in range(
        1, batches
    ):  # a row is done in the journal when its pass came back, not before
        assert overlapping[2 * number - 1 : 2 * number + 1] == [
            ("begin", number),
            ("done", number - 1),
        ]
    assert overlapping[-1] == ("done", batches - 1)
    assert result.rows == 20
    (tmp_path / "alone").mkdir()
    other, _, _ = scored(tmp_path / "alone", folder, score=SMALL | {"batch_tokens": 1})
    alone = {row["key"]: row for row in rows_of(other)}
    for row in rows_of(store):
        expected = SoftTargets.from_row(alone.pop(row["key"]))
        found = SoftTargets.from_row(row)
        np.testing.assert_allclose(
            found.logprobs, expected.logprobs, rtol=2e-3, atol=1e-4
        )  # rounded to ten bits
        np.testing.assert_allclose(found.entropy, expected.entropy, rtol=2e-3, atol=1e-4)
    assert not alone


@pytest.mark.parametrize("error", [Stopped, DoneByOthers])
def test_a_pass_that_nobody_waits_for_leaves_its_rows_to_the_next_run(
    tmp_path: Path,
    tiny_llama: Callable[..., Path],
    overlapping: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
) -> None:
    store, job, identity = prepared(tmp_path, tiny_llama(), score=SMALL)
    heartbeat, beats = Share.heartbeat, list[int]()

    def third(self: Any) -> None:
        beats.append(1)
        if len(beats) == 3:
            raise error()
        heartbeat(self)

    monkeypatch.setattr(Share, "heartbeat", third)
    if error is Stopped:
        with pytest.raises(Stopped):
            score.run(job, identity)
        assert [name for name, _ in overlapping] == [
            "begin",
            "begin",
            "done",
        ]  # the second is not waited for
    else:
        score.run(job, identity)
    first = len(rows_of(store))
    assert 0 < first < 20
    again = score.run(job, identity)
    assert (first + again.rows, len(rows_of(store)), again.rejected) == (20, 20, 0)
    assert verify(store).ok


def test_who_makes_the_sums_is_no_part_of_a_row_or_of_a_claim(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    folder = tiny_llama()
    store, _, _ = scored(tmp_path, folder)
    claims = store.files.names("claims/score")
    before = sorted(name for name, _, _ in store.files.walk("claims"))
    again, job, identity = prepared(
        tmp_path, folder, score={"k": 4, "batch_tokens": 256, "kernel": "torch"}
    )
    assert score._claims(job, identity, again)._folder in {
        Path(name).parent.as_posix() for name in before
    }
    assert score.run(job, identity).rows == 0
    assert store.files.names("claims/score") == claims
