"""Samples of several teachers.

Each one's row is found by text and teacher, weighed, and learnt from.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, V, build

from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.samples import Sample, Samples
from stillroom.stages.loader.teachers import open_teachers
from stillroom.stages.losses.objective import Aim, Objective
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.targets.alignment import predicting_positions, scored_tokens
from stillroom.stages.targets.entries_and_tail import targets_of
from stillroom.stages.targets.spec import Kept
from stillroom.stages.targets.teaching import Teaching
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.partners import ITSELF, NONE, partner_places
from stillroom.storage.snapshots.snapshot import Snapshot, make_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

TEACHERS = ("one", "two")
TEXTS = 9
ALONE = {0: "two", 3: "one", 7: "two"}
"""Texts that one teacher has alone."""
AIM = Aim(soft_weight=0.5, hard_weight=0.1, objective=Objective())


def text(number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, V, 6 + number).astype(np.int32)


def distribution(teacher: str, number: int) -> torch.Tensor:
    """[N, V] log-probabilities."""
    rng = np.random.default_rng([number, TEACHERS.index(teacher)])
    return torch.from_numpy(rng.normal(size=(len(text(number)) - 2, V))).log_softmax(-1).float()


def asked(number: int) -> list[str]:
    return [ALONE[number]] if number in ALONE else [*TEACHERS]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Rows of both teachers, the second one's in another order."""
    store = Store.open(tmp_path / "store", create=True)
    for teacher in TEACHERS:
        about = {"teacher_id": teacher, "tokenizer_id": "words", "vocab_size": V, "head": "lm"}
        numbers = [n for n in range(TEXTS) if teacher in asked(n)]
        with store.writer(
            "soft_targets", about=about | {"mantissa_bits": 23}, limits=CommitLimits(rows=4)
        ) as writer:
            for number in numbers if teacher == "one" else reversed(numbers):
                writer.add(row(teacher, number))
    return store


def row(teacher: str, number: int) -> dict:
    ids = text(number)
    name = content_key("test", number=number)
    key = content_key("test", number=number, teacher=teacher)
    following = torch.from_numpy(ids[2:].astype(np.int64))
    targets = targets_of(
        distribution(teacher, number), following, kept=Kept(kind="full", k=V)
    ).columns(23)
    keys = {"key": key, "reuse_key": key, "prompt_key": name, "tokens_key": name}
    of_text = {"generation_key": name, "token_ids": ids, "span_start": 2, "spans": None}
    return targets | keys | of_text | {"teacher_id": teacher, "kind": "full", "label": None}


def split(store: Store) -> tuple[Snapshot, Snapshot]:
    """The row of each text's first teacher, and all others."""
    index = store.index("soft_targets", ["tokens_key", "teacher_id"]).to_pylist()
    first = {content_key("test", number=n): asked(n)[0] for n in range(TEXTS)}
    places: list[dict[str, list[int]]] = [{}, {}]
    for one in index:
        mine = first[one["tokens_key"]] != one["teacher_id"]
        places[mine].setdefault(one["shard"], []).append(one["row"])
    samples, partners = (make_snapshot(store, "soft_targets", found, {}) for found in places)
    return samples, partners


@pytest.fixture
def samples(store: Store, tmp_path: Path) -> list[Sample]:
    mine, partners = split(store)
    source = open_teachers(
        store, mine, partners, teachers=TEACHERS, files=LocalFiles(tmp_path / "student")
    )
    return list(Samples(store, mine, soft=True, teachers=source).read(0, TEXTS))


def number_of(sample: Sample) -> int:
    return len(sample) - 6


def test_each_teachers_row_of_each_sample_is_found(store: Store, samples: list[Sample]) -> None:
    assert sorted(map(number_of, samples)) == list(range(TEXTS))
    for sample in samples:
        found = sample.of_teachers()
        number = number_of(sample)
        assert [TEACHERS[n] for n, _ in found] == asked(number)
        for n, targets in found:
            np.testing.assert_allclose(
                targets.logprobs, distribution(TEACHERS[n], number), atol=1e-5
            )
    places = partner_places(store, *split(store), TEACHERS)
    assert [(places == mark).sum() for mark in (ITSELF, NONE)] == [TEXTS, len(ALONE)]


def test_where_the_rows_are_is_kept(store: Store, samples: list[Sample], tmp_path: Path) -> None:
    (file,) = (tmp_path / "student" / "teachers").glob("*/*/*.npy")
    before = file.stat().st_mtime_ns
    mine, partners = split(store)
    open_teachers(store, mine, partners, teachers=TEACHERS, files=LocalFiles(tmp_path / "student"))
    assert file.stat().st_mtime_ns == before


def test_rows_of_strangers_and_of_no_sample_are_refused(store: Store) -> None:
    mine, partners = split(store)
    with pytest.raises(UsageError, match="of none of the teachers one, other"):
        partner_places(store, mine, partners, ("one", "other"))
    with pytest.raises(IntegrityError, match="two rows of one text"):
        partner_places(store, mine, mine, TEACHERS)


def test_what_is_of_another_text_is_refused(store: Store, samples: list[Sample]) -> None:
    several = [sample for sample in samples if len(asked(number_of(sample))) == 2]
    source = several[0].teachers
    one, other = several[:2]
    with pytest.raises(IntegrityError, match="is of another text"):
        source.of_text(one.number, other.token_ids, other.spans, other.targets)


@pytest.mark.parametrize("each_token", ["fixed", "entropy"])
@pytest.mark.parametrize("mixture", [False, True])
def test_the_loss_of_a_pass_is_its_definition(
    samples: list[Sample], each_token: str, mixture: bool
) -> None:
    teaching = Teaching(weights=(0.25, 2.0), each_token=each_token, mixture=mixture)
    packing = Packing(tokens_per_pass=64, vocab_size=V, teaching=teaching)
    model = build(CONFIGS["llama"])
    found, hard, soft = 0.0, [], []
    for batch in packing.batches(samples):
        done = packing.losses(model, batch, aim=AIM, dtype=torch.float32)
        found += float(done.total.detach())
        hard.append(done.hard)
        soft.append(done.soft)
    expected, crosses = expected_loss(model, samples, teaching)
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(torch.cat(hard).sum()) == pytest.approx(crosses, rel=1e-5)
    assert len(torch.cat(hard)) == len(torch.cat(soft)) == sum(s.scored_tokens for s in samples)


def expected_loss(model, samples: list[Sample], teaching: Teaching) -> tuple[float, float]:
    """The loss in float64, one sample and one teacher after the other."""
    total = crosses = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids.astype(np.int64))
        with torch.no_grad():
            states = hidden_states(model, input_ids=ids[None])[0]
            logits = split_head(model).logits(states[predicting_positions(sample.spans)])
        student = logits.double().log_softmax(-1)
        following = scored_tokens(ids, sample.spans)
        hard = -student.gather(-1, following[:, None]).sum()
        shares = torch.from_numpy(teaching.shares(sample.of_teachers()))
        each = [
            distribution(TEACHERS[n], number_of(sample)).double() for n, _ in sample.of_teachers()
        ]
        if teaching.mixture:
            shares = shares / shares.sum(0)
            mixed = sum(s[:, None] * t.exp() for s, t in zip(shares, each, strict=True))
            soft = (mixed * (mixed.log() - student)).sum()
        else:
            soft = sum(
                (s[:, None] * t.exp() * (t - student)).sum()
                for s, t in zip(shares, each, strict=True)
            )
        total += float(0.5 * soft + 0.1 * hard)
        crosses += float(hard)
    return total, crosses
