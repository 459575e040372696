"""The ledger behind plan, generate and score.

It holds what a recipe asks of its store, joined with what the store can serve. planned = committed
+ rejected + pending. Requests and rows are joined in DuckDB by what was asked for, never by
position: prompts that are reordered, extended or repeated find their rows, and ten million need no
Python objects.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...storage.errors import StillroomError
from ...storage.joined import FIRST, Joined
from ...storage.published.folder import Published
from ...storage.store.commits import numbers
from ...storage.store.index import Index, as_uuid
from ...storage.store.inputs import read_inputs
from ...storage.store.segments import place_of
from ...storage.store.store import Store
from ...storage.tables.schema import TableName
from ..recipe.engines import Generate
from ..recipe.kinds import Score
from ..recipe.sections import Recipe
from ..recipe.stages import needed

T = TypeVar("T")
SMALLEST_BLOCK = 8
"""Requests that a worker takes at once, at least."""
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
    equal: int = 0
    """Texts beside the requests, whose tokens are those of one: it stands for them."""
    sources: dict[str, int] = field(default_factory=dict)
    """Of the committed rows, those that a read-only source serves, by its name."""

    def enter(
        self, count: int, tokens: int | None, *, served: bool, rejected: str | None, why: str
    ) -> bool:
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
    """Requests still to do, in blocks, which are slices of what was planned.

    They are in an order that every worker computes alike.
    """

    def __init__(self, rows: pa.Table, planned: int, make: Callable[[pa.Table], list[T]]) -> None:
        """`rows` are in the order of a `number`, their place among the `planned` requests."""
        # Small jobs are cut small, so that workers can share them.
        size = max(SMALLEST_BLOCK, min(512, planned // 64))
        self._rows, self._make = rows, make
        self._slices: dict[int, tuple[int, int]] = {}
        begin = 0
        for chunk in rows["number"].chunks:
            found = np.unique(chunk.to_numpy() // size, return_counts=True)
            for block, count in zip(*(array.tolist() for array in found), strict=True):
                start, before = self._slices.get(block, (begin, 0))
                self._slices[block] = start, before + count
                begin += count

    def __len__(self) -> int:
        rows: int = self._rows.num_rows
        return rows

    @property
    def longest(self) -> int:
        """Tokens of the longest text, of requests whose `rows` have them."""
        return int(pc.max(self._rows["tokens"]).as_py() or 0)

    @property
    def blocks(self) -> list[int]:
        """Blocks that hold a request still to do, ascending."""
        return list(self._slices)

    def count(self, blocks: Iterable[int]) -> int:
        """How many requests some blocks hold."""
        return sum(self._slices[block][1] for block in blocks if block in self._slices)

    def read(self, block: int) -> list[T]:
        """The requests of a block."""
        start, count = self._slices[block]
        return self._make(self._rows.slice(start, count))


class Books:
    """A recipe's prompts beside a store's rows: the views `inputs` and those of `Index`.

    A context manager.
    """

    def __init__(
        self,
        store: Store,
        recipe: Recipe,
        *,
        data_id: str,
        surveyed: pa.Table | Published | None = None,
        write: bool = False,
    ) -> None:
        """Begin with what the data are.

        Args:
            store: The store, with its sources.
            recipe: The recipe.
            data_id: Name of the record of its prompts.
            surveyed: What the source holds, where it was not recorded under `data_id` yet; or the
                published folder whose rows are the data.
            write: Keep index segments.
        """
        self.store, self.recipe, self.data_id = store, recipe, data_id
        self.index = Index(store, write=write)
        self.published = surveyed if isinstance(surveyed, Published) else None
        """The folder whose rows are the data, as they are: prompts and text are not asked for."""
        taught = recipe.generate is not None and recipe.generate.teaches
        self.lenient = self.published is not None or taught
        """Held-out rows that have no reference targets are judged on those that they have: nobody
        can make others."""
        if self.published is None:
            self._view_inputs(data_id, surveyed if isinstance(surveyed, pa.Table) else None)
        else:
            first = next(first for part, first in store.parts if part is self.published)
            samples = self.published.samples()
            places = pc.add(samples["place"], place_of(first, 0))
            self.index.register(
                "published",
                samples.set_column(samples.column_names.index("place"), "place", places),
            )

    @property
    def generate(self) -> Generate:
        """The recipe's section; whoever asks for the books of `generate` has one."""
        return needed(self.recipe.generate, "generate")

    @property
    def score(self) -> Score:
        """The recipe's section; whoever asks for the books of `score` has one."""
        return needed(self.recipe.score, "score")

    def _view_inputs(self, data_id: str, surveyed: pa.Table | None) -> None:
        if surveyed is not None:
            count = pa.array(np.arange(surveyed.num_rows, dtype=np.int64))
            self.index.register("surveyed", surveyed.append_column("file_row_number", count))
            source = "surveyed"
        else:
            source = self._recorded(data_id)
        self.index.execute(
            f"CREATE VIEW inputs AS SELECT {as_uuid('key')}, {as_uuid('prompt_key')}, windows, "
            f"first, split = 'test' AS held_out, file_row_number AS number FROM {source}"
        )

    def _recorded(self, data_id: str) -> str:
        """The record of the inputs, from the first part of the store that has it."""
        for part, _ in self.store.parts:
            recorded = read_inputs(part.files, data_id)
            if recorded is not None:
                return self.index.inputs(part.files, recorded)
        raise StillroomError(
            f"inputs: the store has no record {data_id[:8]} of the prompts, which the stage `data` "
            "writes. Run that stage first."
        )

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, *_: object) -> None:
        self.index.close()

    def given(self, author_id: str) -> str:
        """SQL: the rows of given text that serve, by their columns of `generations g`.

        Where the record of the inputs names an author of an earlier rule, a row of that one serves
        if this one has none of its source: then it has the same tokens.
        """
        of = f"g.author_id = '{author_id}'"
        earlier = (self.store.inputs_about(self.data_id) or {}).get("earlier_author")
        if earlier is None:
            return of
        here = f"SELECT source_key FROM generations WHERE author_id = '{author_id}'"
        return f"({of} OR g.author_id = '{earlier}' AND g.source_key NOT IN ({here}))"

    def labels(self) -> int:
        """How many of the rows to train on have a gold label.

        Their inputs are recorded, or published.
        """
        if self.published is not None:
            return self.published.labels()
        ((labels,),) = self.index.rows(
            "SELECT count(*) FROM inputs JOIN prompts USING (key) "
            "WHERE NOT held_out AND (label IS NOT NULL OR labels IS NOT NULL)"
        )
        return int(labels)

    def lost(self, given_author: str | None) -> int:
        """Inputs whose prompts row, or whose rows of given text, the store has no more.

        There are some only if rows were withdrawn.
        """
        lost = 0
        if self._withdrew("prompts"):
            ((lost,),) = self.index.rows(
                "SELECT count(*) FROM inputs WHERE key NOT IN (SELECT key FROM prompts)"
            )
        if given_author is not None and self._withdrew("generations"):
            ((windows,),) = self.index.rows(f"""
                SELECT count(*) FROM inputs LEFT JOIN (
                    SELECT source_key AS key, count(*) AS had FROM generations g
                    WHERE {self.given(given_author)} GROUP BY ALL
                ) USING (key) WHERE coalesce(had, 0) < windows""")
            lost = max(lost, windows)
        return int(lost)

    def _withdrew(self, table: TableName) -> bool:
        return any(numbers(part.files, table, folder="retired") for part, _ in self.store.parts)

    def sources(self, view: str, column: str) -> dict[str, int]:
        """Rows of each read-only source among the places in a column, by the source's name."""
        if not isinstance(self.store, Joined):
            return {}
        names = ["", *self.store.sources]
        found = self.index.rows(f"""
            SELECT {column} // {place_of(FIRST, 0)}, count(*) FROM {view}
            WHERE {column} IS NOT NULL GROUP BY ALL""")
        return {names[part]: count for part, count in sorted(found) if part}

    def place(self, table: TableName, number: int) -> Place:
        """The shard and row behind a `place` of the index."""
        return self.index.commit(table, number >> 32).shard.sha256, number & 0xFFFFFFFF


def different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Names under which two descriptions differ, for people."""
    names = [
        name.replace("_", " ")
        for name in sorted({*mine, *theirs})
        if mine.get(name) != theirs.get(name)
    ]
    return ", ".join(names)
