"""Targets of words that belong to other words are found before training, and by the teacher.

Those in place pass.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planting import copied, planted
from tiny_store import SilentProgress
from tiny_words import TAGS, Words, save_tiny_tagger, tagged

from stillroom.pipeline.cli.deep_verify import deep_verify, deeply, find_teacher
from stillroom.stages.audit.misplaced_targets import shifted
from stillroom.stages.train import stage as train
from stillroom.storage.errors import IntegrityError
from stillroom.storage.store.store import Store
from stillroom.storage.tables.heads import HEADS
from stillroom.storage.tables.soft_targets import SoftTargets

C = len(TAGS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Words:
    folder = tmp_path_factory.mktemp("words")
    return Words(folder, save_tiny_tagger(folder / "teacher"), tagged(60)).scored()


def knowing(row: dict[str, Any], shift: int = 0) -> dict[str, Any]:
    """A row of a teacher that knows the labels, 0.96 each, with targets `shift` words on."""
    if row["labels"] is None:
        return row
    n = row["span_tokens"]
    taken = np.clip(np.arange(n) + shift, 0, n - 1)
    labels = np.maximum(row["labels"], 0)
    probs = np.where(np.eye(C)[labels[taken]] > 0, 0.96, 0.01)
    logprobs = np.log(probs).astype(np.float32)
    there = np.where(row["labels"] < 0, logprobs.argmax(-1), row["labels"])
    targets = SoftTargets(
        ids=None,
        logprobs=logprobs,
        tail_logprob=np.full(n, -np.inf, np.float32),
        token_logprob=logprobs[np.arange(n), there],
        entropy=-(probs * np.log(probs)).sum(-1).astype(np.float32),
    )
    return row | targets.columns(23) | {"k": C}


@pytest.mark.parametrize(
    ("shift", "said"), [(0, None), (1, "position after"), (-1, "position before")]
)
def test_labels_tell_whose_targets_these_are(world: Words, shift: int, said: str | None) -> None:
    found = shifted([knowing(row, shift) for row in world.rows()], HEADS["token_classes"])
    assert (found is None) == (said is None)
    assert said is None or (said in str(found) and "-log p of the labels there" in str(found))


def trained(world: Words, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Train from a copy of the store with its rows changed."""
    store = copied(world.store, folder / "store", change)
    storage = {"dir": str(store.root), "mantissa_bits": 23}
    other = Words.__new__(Words)
    other.__dict__ |= world.__dict__ | {"store": store}
    recipe = world.changed(storage=storage)
    train.run(other.job(folder, recipe))


def test_training_refuses_targets_of_the_next_word(world: Words, tmp_path: Path) -> None:
    trained(world, tmp_path / "right", knowing)
    with pytest.raises(IntegrityError, match=r"the targets are shifted by one position"):
        trained(world, tmp_path / "wrong", lambda row: knowing(row, 1))


def read_again(world: Words, store: Store) -> Any:
    asked = deeply(str(world.teacher), dtype=None, rows=24)
    teacher = find_teacher(store, asked)
    return deep_verify(store, teacher, asked, progress=SilentProgress())


@pytest.mark.numeric
def test_the_teacher_reads_words_again(world: Words, tmp_path: Path) -> None:
    found = read_again(world, world.store)
    assert found.ok
    assert (found.rows, found.kinds, found.classes) == (24, {"full": 24}, 0)
    assert {"logprobs", "token_logprob", "entropy"} <= found.quantities.keys()
    off = read_again(world, planted(world.store, tmp_path / "store", "shifted"))
    assert len(off.off) > 12
    assert not off.ok
