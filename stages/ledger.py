"""The ledger behind plan, generate and score: what a recipe asks of its store, joined with what the store can serve.

planned = committed + rejected + pending. Requests and rows are joined in DuckDB by what was asked for, never by
position: prompts that are reordered, extended or repeated find their rows, and ten million need no Python objects.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from ..storage.commits import numbers
from ..storage.index import Index, as_uuid
from ..storage.inputs import read_inputs
from ..storage.schema import TableName
from ..storage.store import Store
from .sections import Recipe

T = TypeVar("T")
Place = tuple[str, int]
"""Shard sha256, and row within the shard."""


@dataclass(kw_only=True, slots=True)
class Ledger:
    """One stage's books."""

    committed: int = 0
    """Requests that a row serves."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> requests that cannot be done."""
    why: Counter[str] = field(default_factory=Counter)
    """Reason -> requests still to do: why what is stored does not serve them."""
    tokens: int = 0
    """Completion or scored tokens of the committed rows."""
    tokens_to_do: int = 0
    """Of the pending ones; an upper bound where they are still to be written."""
    bytes_to_do: int = 0
    """About what they will take on disk."""

    def enter(self, count: int, tokens: int | None, *, served: bool, rejected: str | None, why: str) -> bool:
        """Count requests of one fate; whether they are still to do."""
        if served:
            self.committed += count
            self.tokens += int(tokens or 0)
        elif rejected is not None:
            self.rejected[rejected] += count
        else:
            self.why[why] += count
        return not served and rejected is None

    @property
    def pending(self) -> int:
        """Requests still to do."""
        return self.why.total()

    @property
    def planned(self) -> int:
        """All requests."""
        return self.committed + self.rejected.total() + self.pending


class Pending(Generic[T]):
    """Requests still to do, in blocks: slices of what was planned, in an order that every worker computes alike."""

    def __init__(self, rows: pa.Table, planned: int, make: Callable[[pa.Table], list[T]]) -> None:
        """`rows` have a `number`, their place among the `planned` requests."""
        size = max(8, min(512, planned // 64))  # small jobs are cut small, so that workers can share them
        self._rows, self._make = rows.sort_by("number"), make
        of = self._rows["number"].to_numpy() // size
        blocks, starts, counts = np.unique(of, return_index=True, return_counts=True)
        self._slices = {b: (s, n) for b, s, n in zip(blocks.tolist(), starts.tolist(), counts.tolist(), strict=True)}

    def __len__(self) -> int:
        return self._rows.num_rows

    @property
    def blocks(self) -> list[int]:
        """Blocks that hold a request still to do, ascending."""
        return list(self._slices)

    def read(self, block: int) -> list[T]:
        """The requests of a block."""
        start, count = self._slices[block]
        return self._make(self._rows.slice(start, count))


class Books:
    """A recipe's prompts beside a store's rows: the views `inputs` and those of `Index`. A context manager."""

    def __init__(
        self, store: Store, recipe: Recipe, *, data_id: str, surveyed: pa.Table | None = None, write: bool = False
    ) -> None:
        """`surveyed`: what the source holds, where it was not recorded under `data_id` yet. `write`: keep segments."""
        self.store, self.recipe = store, recipe
        recorded = read_inputs(store.files, data_id)
        self.index = Index(store, write=write)
        if surveyed is not None:
            count = pa.array(np.arange(surveyed.num_rows, dtype=np.int64))
            self.index.register("surveyed", surveyed.append_column("file_row_number", count))
            source = "surveyed"
        else:
            assert recorded is not None, "the data stage comes first"
            source = self.index.parquet(store.files, recorded.shard)
        self.index.execute(
            f"CREATE VIEW inputs AS SELECT {as_uuid('key')}, {as_uuid('prompt_key')}, windows, first, "
            f"split = 'test' AS held_out, file_row_number AS number FROM {source}"
        )

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, *_: object) -> None:
        self.index.close()

    def lost(self, given_author: str | None) -> int:
        """Inputs whose prompts row, or whose rows of given text, the store has no more: only if some were withdrawn."""
        lost = 0
        if numbers(self.store.files, "prompts", folder="retired"):
            ((lost,),) = self.index.rows("SELECT count(*) FROM inputs WHERE key NOT IN (SELECT key FROM prompts)")
        if given_author is not None and numbers(self.store.files, "generations", folder="retired"):
            ((windows,),) = self.index.rows(f"""
                SELECT count(*) FROM inputs LEFT JOIN (
                    SELECT source_key AS key, count(*) AS had FROM generations
                    WHERE author_id = '{given_author}' GROUP BY ALL
                ) USING (key) WHERE coalesce(had, 0) < windows""")
            lost = max(lost, windows)
        return int(lost)

    def place(self, table: TableName, number: int) -> Place:
        """The shard and row behind a `place` of the index."""
        return self.index.commits[table][number >> 32].shard.sha256, number & 0xFFFFFFFF

    def places(self, table: TableName, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Shard sha256 -> its rows among these places."""
        numbers = np.sort(numbers)
        seqs = numbers >> 32
        starts = np.flatnonzero(np.diff(seqs, prepend=-1))
        rows = np.split(numbers & 0xFFFFFFFF, starts[1:])
        commits = self.index.commits[table]
        return {commits[int(seqs[s])].shard.sha256: part for s, part in zip(starts, rows, strict=False)}


def different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Names under which two descriptions differ, for people."""
    names = [name.replace("_", " ") for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return ", ".join(names)
