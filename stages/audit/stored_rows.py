"""Stored rows to read again: which shards have any, which rows are chosen, and what they hold."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.store.store import Store
from ...storage.tables.heads import Head, head_of
from ...storage.tables.kinds import STRUCTURES
from ...storage.tables.soft_targets import SoftTargets
from ...storage.tables.spans import positions, spans_of
from ..recipe.kinds import HF
from ..targets.alignment import parts_of, scored_tokens, target_positions


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetShard:
    """What a shard of soft targets says of itself."""

    sha256: str
    name: str
    teacher_id: str
    head: Head
    rows: dict[str, int]
    """Kind -> rows."""
    imported: bool
    """Whether the rows come from a foreign table."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredRow:
    """A stored row that is read again."""

    key: bytes
    shard: str
    number: int
    """Index in the shard."""
    columns: dict[str, Any]
    targets: SoftTargets
    head: Head
    imported: bool
    """Of a foreign table: the entropy, the tail and a token that is no entry are bounds."""

    @property
    def kind(self) -> str:
        """Of its targets."""
        return str(self.columns["kind"])

    @property
    def entropy_is_bound(self) -> bool:
        """Whether its entropies are the least that they can be."""
        return bool(self.columns.get("entropy_is_bound"))

    @property
    def engine(self) -> str:
        """What ran the teacher."""
        return str(self.columns.get("engine") or HF)

    @property
    def token_ids(self) -> np.ndarray:
        """[T] the text."""
        ids: np.ndarray = self.columns["token_ids"]
        return ids

    @property
    def span_tokens(self) -> int:
        """N, the scored tokens."""
        return int(self.columns["span_tokens"])

    @property
    def spans(self) -> np.ndarray:
        """[S, 2] start and tokens of each."""
        return spans_of(self.columns)

    @property
    def parts(self) -> list[slice]:
        """Which of the N targets belong to each span."""
        return parts_of(self.spans)

    def index(self, part: slice) -> int:
        """Where the span of these targets starts in the row."""
        return int(positions(self.spans)[part.start])

    @property
    def predicting(self) -> np.ndarray:
        """[N] the positions that predict the scored tokens."""
        return target_positions(self.spans, self.head)

    @property
    def scored(self) -> np.ndarray:
        """[N] what `token_logprob` speaks of: scored or hidden tokens, or classes.

        Where no class is known it is the best one.
        """
        if self.head.masked:
            return np.asarray(self.columns["labels"])
        if not self.head.classes:
            tokens: np.ndarray = scored_tokens(self.token_ids, self.spans)
            return tokens
        best = self.targets.probabilities.argmax(axis=1)
        labels = self.columns["labels"]
        return best if labels is None else np.where(labels < 0, best, labels)

    @property
    def draw(self) -> dict[str, float] | None:
        """How sampled targets were drawn; None for other kinds."""
        if not STRUCTURES[self.kind].drawn:
            return None
        return {"rounds": self.columns["k"], "proposal": self.columns["proposal"]}


def target_shards(store: Store, *, damaged: Collection[str] = ()) -> list[TargetShard]:
    """The live shards of soft targets that can be opened and are not known as damaged."""
    found = []
    for commit in store.commits("soft_targets"):
        sha256, name = commit.shard.sha256, commit.shard.name
        if name in damaged:
            continue
        try:
            about = store.shard("soft_targets", sha256).about
            head = head_of(about)
        except IntegrityError:
            continue
        statistics = about["statistics"]
        shard = TargetShard(
            sha256=sha256,
            name=name,
            teacher_id=str(about["teacher_id"]),
            head=head,
            rows={kind: int(counts["rows"]) for kind, counts in statistics.items()},
            imported=about.get("stage") == "import",
        )
        found.append(shard)
    return found


def choose_rows(
    store: Store, shards: Sequence[TargetShard], *, rows: int, seed: int
) -> list[StoredRow]:
    """Random rows of some shards, `rows` at most, in shard order.

    Each kind has as many as the others, or all that it has.
    """
    rng = np.random.default_rng(seed)
    totals: Counter[str] = Counter()
    for shard in shards:
        totals.update(shard.rows)
    chosen: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for kind, count in _shares(totals, rows).items():
        # The rows of this kind, counted through all shards: a shard's are those up to its end.
        ends = np.cumsum([shard.rows.get(kind, 0) for shard in shards])
        for number in rng.choice(totals[kind], count, replace=False).tolist():
            at = int(np.searchsorted(ends, number, side="right"))
            before = int(ends[at]) - shards[at].rows[kind]
            chosen[shards[at].sha256].append((kind, number - before))
    return [row for shard in shards for row in _read(store, shard, chosen[shard.sha256])]


def _shares(totals: Mapping[str, int], rows: int) -> dict[str, int]:
    """Kind -> how many rows of it are chosen: one of each in turn, until there are enough."""
    shares = dict.fromkeys(sorted(totals), 0)
    for kind in cycle(shares):
        if sum(shares.values()) >= min(rows, sum(totals.values())):
            break
        shares[kind] += shares[kind] < totals[kind]
    return shares


def _read(store: Store, shard: TargetShard, places: Sequence[tuple[str, int]]) -> list[StoredRow]:
    """Rows of a shard, ascending; a place (kind, n) is its n-th row of a kind."""
    if not places:
        return []
    column = store.shard("soft_targets", shard.sha256).read_all(["kind"])["kind"]
    kinds = np.array(column.to_pylist())
    numbers = sorted(int(np.flatnonzero(kinds == kind)[n]) for kind, n in places)
    read = store.rows("soft_targets", {shard.sha256: numbers})
    return [
        StoredRow(
            key=columns["key"],
            shard=shard.name,
            number=number,
            columns=columns,
            targets=SoftTargets.from_row(columns),
            head=shard.head,
            imported=shard.imported,
        )
        for number, columns in zip(numbers, read, strict=True)
    ]
