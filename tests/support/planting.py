"""Stores whose targets belong to other tokens, planted with the project's own writer.

Each row is valid by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TABLES
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import positions, spans_of

Fault = Literal["shifted", "shifted back", "shuffled", "another row"]
FAULTS: tuple[Fault, ...] = ("shifted", "shifted back", "shuffled", "another row")

SpanFault = Literal["one span shifted", "two spans swapped", "a span of another row"]
SPAN_FAULTS: tuple[SpanFault, ...] = (
    "one span shifted",
    "two spans swapped",
    "a span of another row",
)


def rows_of(store: Store, table: Any = "soft_targets") -> list[dict[str, Any]]:
    """Every row of a table, in commit order."""
    places: dict[str, list[int]] = {}
    for row in store.index(table, ["key"]).to_pylist():
        places.setdefault(row["shard"], []).append(row["row"])
    return list(store.rows(table, places))


def planted(store: Store, root: Path, fault: Fault, *, consistent: bool = False) -> Store:
    """A copy of a store whose every soft-target row has the fault.

    Args:
        store: Is read.
        root: Where the copy goes.
        fault: `shifted`: position n has the targets of n + 1; `shifted back`: of n - 1; `shuffled`:
            of a random one;
            `another row`: of the next row of its kind.
        consistent: The teacher's log-probability of the token that is there is looked up in the
            wrong targets, as a scorer with the fault would (where they have the token; else it
            stays as it came).
    """
    rows = rows_of(store)
    others = {}
    for kind in {row["kind"] for row in rows}:
        alike = [row for row in rows if row["kind"] == kind]
        others |= dict(zip([row["key"] for row in alike], [*alike[1:], alike[0]], strict=True))

    def change(row: dict[str, Any]) -> dict[str, Any]:
        n = row["span_tokens"]
        source = row if fault != "another row" else others[row["key"]]
        taken = np.arange(n) % source["span_tokens"]
        if fault == "shuffled":
            taken = np.random.default_rng(n).permutation(n)
        elif fault != "another row":
            taken = np.clip(taken + (1 if fault == "shifted" else -1), 0, n - 1)
        return _columns(row, source, taken, consistent=consistent)

    return copied(store, root, change)


def planted_in_spans(store: Store, root: Path, fault: SpanFault) -> Store:
    """A copy of a store of `topk` whose every row of three spans has the fault.

    Each number fits the token beside it.

    Args:
        store: Is read.
        root: Where the copy goes.
        fault: `one span shifted`: in the second span a position has the targets of the next one,
            its last its own; `two spans swapped`: the first has the last one's targets and the
            other way round; `a span of another row`: the second has that of the next such row of
            its kind.
    """
    rows = [row for row in rows_of(store) if len(spans_of(row)) == 3]
    others = {}
    for k in {row["k"] for row in rows}:
        alike = [row for row in rows if row["k"] == k]
        others |= dict(zip([row["key"] for row in alike], [*alike[1:], alike[0]], strict=True))

    def change(row: dict[str, Any]) -> dict[str, Any]:
        if row["key"] not in others:
            return row
        own, source = np.arange(row["span_tokens"]), row
        first, second, last = np.split(own, np.cumsum(spans_of(row)[:2, 1]))
        taken = [first, np.minimum(second + 1, second.max()), last]
        if fault == "two spans swapped":
            # As much of each as the other has room for.
            taken = [last[np.arange(len(first)) % len(last)], second]
            taken.append(first[np.arange(len(last)) % len(first)])
        if fault == "a span of another row":
            source = others[row["key"]]
            start, n = spans_of(source)[0, 1], spans_of(source)[1, 1]
            taken[1] = row["span_tokens"] + start + np.arange(len(second)) % n
            source = _one_after_the_other(row, source)
        return _columns(row, source, np.concatenate(taken), consistent=True)

    return copied(store, root, change)


def _one_after_the_other(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The targets of two rows of one kind as those of one."""
    lists = ("ids", "logprobs", "tail_logprob", "token_logprob", "entropy")
    both = {
        name: np.concatenate([row[name], other[name]]) for name in lists if row[name] is not None
    }
    return row | both | {"span_tokens": row["span_tokens"] + other["span_tokens"]}


def copied(
    store: Store,
    root: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    table: str = "soft_targets",
    tables: Sequence[str] = TABLES,
) -> Store:
    """A copy of a store, or of some of its tables, with the rows of one changed."""
    copy = Store.open(root, create=True)
    for file, _, _ in _files(store):
        copy.files.put_if_absent(file, store.files.read(file))
    for name in tables:
        for commit in store.commits(name):
            shard = store.shard(name, commit.shard.sha256)
            about = {
                k: v
                for k, v in shard.about.items()
                if k not in ("format_version", "table", "statistics")
            }
            with copy.writer(name, about=about) as writer:
                for row in shard.take(range(shard.rows)):
                    writer.add(change(row) if name == table else row)
    return copy


def unchecked_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the writer seals whatever it is given, as somebody else's may."""
    monkeypatch.setattr("stillroom.storage.store.writer.check_shape", lambda *_: None)
    # NaN is no NaN's equal.
    monkeypatch.setattr("stillroom.storage.tables.shard._reads_back", lambda *_: True)


def _files(store: Store) -> Iterator[Any]:
    for folder in ("teachers", "bindings", "inputs", "data/inputs"):
        yield from store.files.walk(folder)


def _columns(
    row: dict[str, Any], source: dict[str, Any], taken: np.ndarray, *, consistent: bool
) -> dict[str, Any]:
    targets = SoftTargets.from_row(source)
    names = (
        "ids",
        "logprobs",
        "tail_logprob",
        "token_logprob",
        "entropy",
        "entries",
        "counts",
        "weights",
    )
    found = {
        name: value[taken]
        for name in (*names, "tempered_tails")
        if (value := getattr(targets, name)) is not None
    }
    if targets.entries is not None:
        width = int(found["entries"].max())
        found |= {
            name: found[name][:, :width]
            for name in ("ids", "logprobs", "counts", "weights")
            if name in found
        }
    tokens = row["token_ids"][positions(spans_of(row))]
    if consistent and "logprobs" in found:
        ids = np.arange(found["logprobs"].shape[1])[None] if targets.ids is None else found["ids"]
        match = ids == tokens[:, None]
        there = found["logprobs"][np.arange(len(taken)), match.argmax(1)]
        least = found["logprobs"].min(1, where=np.isfinite(found["logprobs"]), initial=0)
        looked_up = np.where(match.any(1), there, np.minimum(found["tail_logprob"], least))
        own = (taken == np.arange(len(taken))) & (source["key"] == row["key"])
        found["token_logprob"] = np.where(own, row["token_logprob"], looked_up)
    changed = SoftTargets(
        **{"ids": None, "logprobs": None, "tail_logprob": None} | found,
        temperatures=targets.temperatures,
    )
    columns = changed.columns(row["mantissa_bits"]) | {
        "key": content_key("planted", key=row["key"])
    }
    if row["kind"] in ("topp", "sampled"):
        columns["k"] = row["k"]
    return row | columns
