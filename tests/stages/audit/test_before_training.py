"""The audit before training: rows that belong together pass.

Others are refused before any step, in words that help.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planting import FAULTS, Fault, copied, planted, planted_in_spans, rows_of
from tiny_jobs import scored_in_spans, scored_store
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress, snapshot_of

from stillroom.stages.audit.before_training import Fit, audit_rows, fit_of
from stillroom.stages.audit.misplaced_targets import shifted, surprise, unknowing
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import spans_of

TOGETHER = "audit: 24 rows looked at, their text, tokens and targets belong together"


class World:
    """A store whose teacher drew the text; 24 rows, 4 of them held out."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
        self.recipe, self.store, identity = scored_store(folder, teacher, rows=24, score=settings)
        self.teacher_id = identity.id
        self.fit = fit_of(
            self.recipe, self.store.teacher_dir(identity.id), vocab_size=32, soft=True
        )

    def audit(
        self, store: Store | None = None, fit: Fit | None = None, table: str = "soft_targets"
    ) -> list[str]:
        store = store or self.store
        return audit_rows(store, snapshot_of(store, table), fit or self.fit)


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("topk"), k=4)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("sampled"), targets="sampled", rounds=50)


def test_rows_that_belong_together_pass(topk: World, sampled: World) -> None:
    for world in (topk, sampled):
        assert world.fit.own_text
        assert world.audit() == [TOGETHER]
        assert world.audit(table="generations", fit=replace(world.fit, soft=False)) == [TOGETHER]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("kind", "consistent"), [("topk", False), ("topk", True), ("sampled", True)]
)
def test_targets_of_other_tokens_are_refused(
    kind: str, fault: Fault, consistent: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`consistent`: the scorer that was off looked the log-probability up in what it had."""
    world: World = request.getfixturevalue(kind)
    store = planted(world.store, tmp_path / "store", fault, consistent=consistent)
    with pytest.raises(
        IntegrityError, match=r"(?s)row [0-9a-f]{32} of data/.*[Ee]xpected.*Score the prompts"
    ):
        world.audit(store)


def test_a_shift_is_refused_before_any_step(topk: World, tmp_path: Path) -> None:
    store = planted(topk.store, tmp_path / "store", "shifted", consistent=True)
    tree = topk.recipe.model_dump(mode="json", exclude_none=True)
    recipe = Recipe.model_validate(tree | {"storage": {"dir": str(store.root)}})
    snapshots = {"train": snapshot_of(store).id}
    folders = {"student": tmp_path / "run"}
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        teacher_id=topk.teacher_id,
        train_dirs=folders,  # type: ignore[arg-type]
        snapshots=snapshots,  # type: ignore[arg-type]
    )
    with pytest.raises(
        IntegrityError, match="shifted by one position, those of the position after"
    ):
        train.run(job)
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not (tmp_path / "run" / "student").exists()
    warned = Recipe.model_validate(
        recipe.model_dump() | {"train": recipe.train.model_dump() | {"audit": "warn"}}
    )
    assert train.run(replace(job, recipe=warned, train_dirs={"student": tmp_path / "warned"})).rows
    said = job.progress.said  # type: ignore[attr-defined]
    assert any("shifted by one position" in line for line in said)
    baseline = replace(job, arm="baseline", train_dirs={"baseline": tmp_path / "baseline"})
    assert train.run(baseline).rows, "cross-entropy alone learns nothing from the targets"
    assert any(line.startswith("audit: 24 rows") for line in said)


def with_text(
    store: Store, root: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Store:
    return copied(store, root, change, table="generations")


def test_a_completion_that_is_not_the_text_written_down_is_refused(
    topk: World, tmp_path: Path
) -> None:
    store = with_text(topk.store, tmp_path / "a", lambda row: row | {"text": "red " + row["text"]})
    with pytest.raises(
        IntegrityError, match="expected the completion that was written down, 'red "
    ):
        topk.audit(store)
    with pytest.raises(IntegrityError, match="expected the completion that was written down"):
        topk.audit(store, table="generations", fit=replace(topk.fit, soft=False))
    # What a stop string or half a character takes from the text, and blanks, are no fault.
    store = with_text(
        topk.store, tmp_path / "b", lambda row: row | {"text": f" {row['text'][:9]}\ufffd"}
    )
    assert topk.audit(store) == [TOGETHER]


def test_a_span_that_starts_elsewhere_is_refused(topk: World, tmp_path: Path) -> None:
    def late(row: dict[str, Any]) -> dict[str, Any]:
        if row["span_tokens"] < 2:
            return row
        inner = SoftTargets.from_row(row).positions(slice(1, None))
        return (
            row
            | inner.columns(row["mantissa_bits"])
            | {"span_start": row["span_start"] + 1, "k": row["k"]}
        )

    with pytest.raises(
        IntegrityError,
        match=r"scores the spans \[\[\d+, \d+\]\] \(start, tokens\), expected \[\[\d+, \d+\]\]",
    ):
        topk.audit(copied(topk.store, tmp_path / "store", late))


def test_rows_of_several_spans_pass_and_faults_of_some_are_refused(tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", initializer_range=0.5, eos_token_id=None)
    recipe, store, identity = scored_in_spans(tmp_path, teacher, rows=24, score={"k": 4})
    fit = fit_of(recipe, store.teacher_dir(identity.id), vocab_size=32, soft=True)
    assert {len(spans_of(row)) for row in rows_of(store)} == {3}
    assert audit_rows(store, snapshot_of(store), fit) == [TOGETHER]
    swapped = planted_in_spans(store, tmp_path / "swapped", "two spans swapped")
    with pytest.raises(IntegrityError, match="The targets are other tokens'"):
        audit_rows(swapped, snapshot_of(swapped), fit)

    def later(row: dict[str, Any]) -> dict[str, Any]:
        """The last span begins a token earlier than what its generation says, and ends earlier."""
        return row | {"spans": row["spans"] - np.array([0, 0, 0, 0, 1, 0], np.int32)}

    moved = copied(store, tmp_path / "moved", later)
    with pytest.raises(IntegrityError, match=r"scores the spans .*, expected .*of its generation"):
        audit_rows(moved, snapshot_of(moved), fit)
    for fault, what in (("shifted", "targets are"), ("another row", "shifted by one row")):
        wrong = planted(store, tmp_path / fault, fault, consistent=True)  # type: ignore[arg-type]
        with pytest.raises(IntegrityError, match=what):
            audit_rows(wrong, snapshot_of(wrong), fit)


def test_the_end_of_one_span_is_no_neighbour_of_the_next() -> None:
    """Between two spans of a row are other tokens, so a shift is looked for within a span."""
    known = chain(0, sharp=3.0, vocab=150)
    rows = markov_rows(known, known, rows=20, n=60)
    spans = np.array([[1, 2], [3, 1], [4, 20], [24, 37]], np.int32).reshape(-1)
    assert shifted([row | {"spans": spans} for row in rows]) is None
    back = [row | {"spans": spans, "token_ids": np.roll(row["token_ids"], 1)} for row in rows]
    found = shifted(back)
    assert found is not None
    assert found.startswith("shifted by one position, those of the position after")
    # Of one or two tokens nothing can be said.
    short = np.stack([np.arange(1, 60, 2), np.full(30, 2)], 1).reshape(-1)
    assert shifted([row | {"spans": short} for row in back]) is None


def test_a_student_that_reads_other_text_is_refused(topk: World) -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    spec = (topk.fit.teacher_dir / "tokenizer.json").read_text()
    swapped = spec.replace('"the":', '"@":').replace('"a":', '"the":').replace('"@":', '"a":')
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(swapped))
    with pytest.raises(
        UsageError,
        match=r"student: its tokenizer reads row .* as '.*', the teacher's as '.*'. Choose",
    ):
        topk.audit(fit=replace(topk.fit, tokenizer=other))
    with pytest.raises(
        UsageError, match=r"student: its vocabulary has 9 ids, but the text has token \d+ \(row "
    ):
        topk.audit(fit=replace(topk.fit, vocab_size=9))


def test_a_student_with_more_special_tokens_reads_the_same_text(topk: World) -> None:
    from transformers import AutoTokenizer

    student = AutoTokenizer.from_pretrained(
        topk.fit.teacher_dir, additional_special_tokens=["the", "a"]
    )
    assert topk.audit(fit=replace(topk.fit, tokenizer=student)) == [TOGETHER]


@pytest.mark.parametrize(
    "chosen",
    [{"select": {"where": "text LIKE 'a%'"}}, {"generate": {"engine": "hf", "samples": 2}}],
)
def test_text_that_was_chosen_among_what_the_teacher_drew_need_not_be_likely(
    topk: World, chosen: Any
) -> None:
    recipe = Recipe.model_validate(topk.recipe.model_dump() | chosen)
    assert not fit_of(recipe, topk.fit.teacher_dir, vocab_size=32, soft=True).own_text


def markov_rows(
    teacher: np.ndarray, text: np.ndarray, *, rows: int, n: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Text drawn from one Markov chain [V, V], targets of another (in place, K = V).

    These are what the statistics are about.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(rows):
        tokens = [0]
        for _ in range(n):
            tokens.append(int(rng.choice(len(text), p=text[tokens[-1]])))
        logprobs = np.log(teacher[tokens[:-1]]).astype(np.float32)
        token = logprobs[np.arange(n), tokens[1:]]
        entropy = -(np.exp(logprobs) * logprobs).sum(1)
        targets = SoftTargets(None, logprobs, np.full(n, -np.inf, np.float32), token, entropy)
        row = {"token_ids": np.array(tokens, np.int32), "span_start": 1, "kind": "full"}
        found.append(row | targets.columns(23))
    return found


def chain(seed: int, *, sharp: float, vocab: int = 40) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(size=(vocab, vocab)) * sharp
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_a_teacher_that_knows_the_text_or_claims_nothing_passes() -> None:
    known, half, vague = (
        chain(0, sharp=3.0),
        0.5 * chain(0, sharp=3.0) + 0.5 * chain(1, sharp=3.0),
        chain(1, sharp=0.1),
    )
    for teacher in (known, half, vague):
        rows = markov_rows(teacher, known, rows=20, n=60)
        assert (shifted(rows), unknowing(rows)) == (None, None)
    assert surprise(markov_rows(known, known, rows=20, n=60)) is None
    assert surprise(markov_rows(chain(1, sharp=3.0), known, rows=20, n=60)) > 1


def test_a_shift_and_other_tokens_are_told_apart() -> None:
    """Of a teacher that knows the text by half: by its entropy alone nothing would be amiss."""
    known = chain(0, sharp=3.0, vocab=150)
    rows = markov_rows(0.5 * known + 0.5 * chain(1, sharp=3.0, vocab=150), known, rows=20, n=60)

    def moved(order: np.ndarray) -> list[dict[str, Any]]:
        targets = [SoftTargets.from_row(row) for row in rows]
        return [row | t.positions(order).columns(23) for row, t in zip(rows, targets, strict=True)]

    there = np.arange(60)
    assert "those of the position after" in str(shifted(moved(np.minimum(there + 1, 59))))
    assert "those of the position before" in str(shifted(moved(np.maximum(there - 1, 0))))
    anywhere = moved(np.random.default_rng(0).permutation(60))
    assert shifted(anywhere) is None
    assert "nats, of the neighbouring ones" in str(unknowing(anywhere))
    targets = [SoftTargets.from_row(row).columns(23) for row in rows]
    assert "those of the row after" in str(
        shifted([r | t for r, t in zip(rows, targets[1:], strict=False)])
    )
    assert "those of the row before" in str(
        shifted([r | t for r, t in zip(rows[1:], targets, strict=False)])
    )


def test_chance_is_counted_over_what_predicts() -> None:
    """A teacher that knows nothing, and one short text over and over, are an accident.

    So they are however many rows repeat the text.
    """
    clear = 0
    for seed in range(20):
        few = markov_rows(chain(seed + 100, sharp=3.0), chain(seed, sharp=8.0), rows=1, n=12) * 30
        clear += shifted(few) is None
    assert clear >= 19
