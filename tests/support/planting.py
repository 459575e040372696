"""Stores whose targets belong to other tokens, planted with the project's own writer: each row is valid by itself."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TABLES
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import positions, spans_of

Fault = Literal["shifted", "shifted back", "shuffled", "another row"]
FAULTS: tuple[Fault, ...] = ("shifted", "shifted back", "shuffled", "another row")


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


def copied(
    store: Store,
    root: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    table: str = "soft_targets",
) -> Store:
    """A copy of a store with the rows of a table changed."""
    copy = Store.open(root, create=True)
    for file, _, _ in _files(store):
        copy.files.put_if_absent(file, store.files.read(file))
    for name in TABLES:
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


def _files(store: Store) -> Iterator[Any]:
    for folder in ("teachers", "bindings"):
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
        own = taken == np.arange(len(taken)) if source is row else np.zeros(len(taken), bool)
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
