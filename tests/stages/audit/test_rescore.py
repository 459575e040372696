"""Deep verification: the teacher agrees with what it said, and nothing else does."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planting import (
    FAULTS,
    SPAN_FAULTS,
    Fault,
    SpanFault,
    copied,
    planted,
    planted_in_spans,
    rows_of,
)
from tiny_jobs import scored_in_spans, scored_store
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress

from stillroom.stages.audit.numbers import measured_numbers, stored_numbers
from stillroom.stages.audit.rescore import Rescored, rescore
from stillroom.stages.audit.stored_rows import choose_rows, target_shards
from stillroom.stages.models.head import Head
from stillroom.stages.models.identity import Identity
from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import spans_of

pytestmark = pytest.mark.numeric

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4, "temperatures": [2.0, 0.5]},
    "topp": {"targets": "topp", "p": 0.9, "k": 16, "k_min": 2},
    "sampled": {"targets": "sampled", "rounds": 50},
    "weighted": {
        "targets": "sampled",
        "draw": "systematic",
        "rounds": 50,
        "proposal": 0.7,
        "temperatures": [2.0],
    },
}


@dataclass(frozen=True)
class World:
    store: Store
    teacher: Identity
    folder: Path

    def read(
        self, store: Store | None = None, *, teacher: Identity | None = None, rows: int = 64
    ) -> Rescored:
        store = store or self.store
        chosen = choose_rows(store, target_shards(store), rows=rows, seed=0)
        return rescore(teacher or self.teacher, chosen, device_map=None, progress=SilentProgress())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """A store of each kind, of which the held-out rows are `full`; ten mantissa bits."""
    found = {}
    for name, settings in KINDS.items():
        folder = tmp_path_factory.mktemp(name)
        teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
        _, store, identity = scored_store(folder, teacher, rows=16, score=settings)
        found[name] = World(store, identity, folder)
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_teacher_agrees_with_itself_to_the_rounding(worlds: dict[str, World], name: str) -> None:
    found = worlds[name].read()
    assert (found.rows, found.off) == (16, [])
    assert found.kinds == {
        "full": 4,
        worlds[name].store.index("soft_targets", ["kind"])["kind"].to_pylist()[-1]: 12,
    }
    expected = {"entropy", "logprobs", "token_logprob"} | {
        "topk": {"tail_logprob", "tempered_tails"},
        "topp": {"tail_logprob"},
        "sampled": {"draws"},
        "weighted": {"draws", "tempered_tails"},
    }[name]
    assert found.quantities.keys() == expected
    for difference in found.quantities.values():
        assert (
            difference.mean
            <= difference.worst
            <= difference.tolerance_worst + difference.slack_worst
        )
        assert 0 <= difference.noise_mean <= difference.noise_worst < 1e-4, "float32, a small model"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["topk", "sampled"])
def test_targets_of_other_tokens_are_found_and_named(
    worlds: dict[str, World], tmp_path: Path, name: str, fault: Fault
) -> None:
    """The log-probability of the token may have been looked up in the wrong targets, too."""
    store = planted(worlds[name].store, tmp_path / "store", fault, consistent=True)
    found = worlds[name].read(store)
    # The teacher drew its text, which is another one on another processor. A row of a few positions
    # may be as it was with the fault, or leave open which fault it is; so may the one row that got
    # its targets.
    rows = rows_of(store)
    clear = {row["key"].hex() for row in rows if row["span_tokens"] > 4}
    named = 2 * len(clear) - len(rows)
    assert named >= 10
    off = {row.key: row for row in found.off if row.key in clear}
    assert off.keys() == clear
    expected = "shifted by one position" if fault.startswith("shifted") else "other tokens'"
    assert sum(row.fault == expected for row in off.values()) >= named
    side = {
        "shifted": "position after",
        "shifted back": "position before",
        "shuffled": "in another order",
    }
    assert sum(side.get(fault, "those of row") in row.message for row in off.values()) >= named


@pytest.fixture(scope="module")
def in_spans(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Rows of three spans."""
    folder = tmp_path_factory.mktemp("spans")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5, eos_token_id=None)
    _, store, identity = scored_in_spans(folder, teacher, rows=12, score={"k": 4})
    return World(store, identity, folder)


@pytest.mark.parametrize("fault", SPAN_FAULTS)
def test_of_several_spans_those_that_are_off_are_named(
    in_spans: World, tmp_path: Path, fault: SpanFault
) -> None:
    assert in_spans.read().off == []
    found = in_spans.read(planted_in_spans(in_spans.store, tmp_path / "store", fault))
    rows = {content_key("planted", key=row["key"]).hex(): row for row in rows_of(in_spans.store)}
    assert {row.key for row in found.off} == rows.keys()
    off = [1] if fault != "two spans swapped" else [0, 2]
    said = {
        "one span shifted": "the position after their own: shifted by one position",
        "two spans swapped": "of this row, in another order: they belong to other tokens",
        "a span of another row": "of row ",
    }[fault]
    for row in found.off:
        starts = spans_of(rows[row.key])[off, 0]
        named = f"(the spans from index {', '.join(map(str, starts))}; the others are right)"
        assert said in row.message
        assert row.message.endswith(named)


def test_another_seeds_teacher_under_the_same_id_is_found(
    worlds: dict[str, World], tmp_path: Path
) -> None:
    world = worlds["topk"]
    other = save_tiny_llama(tmp_path / "other", initializer_range=0.5, seed=1)
    found = world.read(teacher=replace(world.teacher, folder=other))
    assert {row.fault for row in found.off} == {"other numbers"}
    assert len(found.off) == 16


def test_one_number_that_is_off_is_found(worlds: dict[str, World], tmp_path: Path) -> None:
    """In one row this quantity, in another row that."""
    keys = worlds["topk"].store.index("soft_targets", ["key", "kind"]).to_pylist()
    columns = ["logprobs", "tail_logprob", "token_logprob", "entropy", "tempered_tails"]
    off = dict(zip([row["key"] for row in keys if row["kind"] == "topk"], columns, strict=False))

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["key"] not in off:
            return row
        values = row[off[row["key"]]].copy()
        values[0] -= 0.1
        return row | {off[row["key"]]: values}

    found = worlds["topk"].read(copied(worlds["topk"].store, tmp_path / "store", change))
    assert {row.key: list(row.quantities) for row in found.off} == {
        key.hex(): [name] for key, name in off.items()
    }
    assert {row.fault for row in found.off} == {"other numbers"}


def test_rows_are_chosen_over_shards_and_kinds(worlds: dict[str, World]) -> None:
    store = worlds["topk"].store
    found = target_shards(store)
    few = choose_rows(store, found, rows=6, seed=0)
    assert sorted(row.columns["kind"] for row in few) == ["full"] * 3 + ["topk"] * 3
    assert [row.key for row in choose_rows(store, found, rows=6, seed=0)] == [
        row.key for row in few
    ]
    assert {row.key for row in choose_rows(store, found, rows=6, seed=1)} != {
        row.key for row in few
    }
    all_of_them = choose_rows(store, found, rows=1000, seed=0)
    assert len({row.key for row in all_of_them}) == 16
    assert choose_rows(store, [], rows=6, seed=0) == []


def test_nothing_is_written_to_the_store(worlds: dict[str, World]) -> None:
    def files(root: Path) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}

    root = Path(str(worlds["topk"].store.root))
    before = files(root)
    worlds["topk"].read(rows=3)
    assert files(root) == before


def test_the_measure_of_drawn_ids_has_the_mean_and_variance_it_says() -> None:
    """By hand: t over five ids, drawn through q = t^0.5, 400 positions of the same distribution."""
    rng = np.random.default_rng(0)
    t = np.array([0.5, 0.25, 0.15, 0.08, 0.02])
    q = t**0.5 / (t**0.5).sum()
    rounds, positions = 20, 400
    counts = rng.multinomial(rounds, q, size=positions)
    weights = counts / rounds * t / q
    entropy = -(t * np.log(t)).sum()
    ids = np.where(counts > 0, np.arange(5), -1)
    order = np.argsort(ids < 0, axis=1, kind="stable")
    entries = (counts > 0).sum(1)
    targets = SoftTargets(
        ids=np.take_along_axis(ids, order, 1).astype(np.int32),
        logprobs=None,
        tail_logprob=None,
        token_logprob=np.full(positions, np.log(0.5), np.float32),
        entropy=np.full(positions, entropy, np.float32),
        entries=entries.astype(np.int32),
        weights=np.take_along_axis(weights, order, 1).astype(np.float32),
    )
    head = Head(weight=torch.from_numpy(np.log(t))[:, None].float())
    states, following = torch.ones(positions, 1), torch.zeros(positions, dtype=torch.long)
    found = measured_numbers(
        states,
        head,
        targets=targets,
        following=following,
        draw={"rounds": rounds, "proposal": 0.5},
    )
    np.testing.assert_allclose(found["draws"], (weights * np.log(t)).sum(1) + entropy, atol=1e-5)
    spread = ((t * np.log(t)) ** 2 / q).sum() - entropy**2
    np.testing.assert_allclose(found["draws_variance"], spread / rounds, rtol=1e-5)
    assert abs(found["draws"].mean()) < 4 * np.sqrt(spread / rounds / positions)
    np.testing.assert_allclose(found["entropy"], stored_numbers(targets)["entropy"], atol=1e-5)
