"""The teachers of a store side by side: what each one's rows hold, and how far apart two are.

The distance is on the same texts.

Rows are joined by the hash of their tokens, spans and labels, of each teacher the row that tells
most apart. They are read a few at a time, so memory does not grow with the store.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from ....stages.ledger.coverage import OF_ENGINE
from ....stages.models.fit.quantized import quantized_words
from ....stages.recipe.kinds import HF
from ....stages.targets.between import between
from ....storage.bounds import mapping
from ....storage.errors import UsageError
from ....storage.store.index import Index
from ....storage.store.sql import query
from ....storage.store.store import Store
from ....storage.tables.soft_targets import LISTS, SoftTargets

_COLUMNS = [*LISTS, "k", "span_tokens", "mantissa_bits", "entropy_is_bound"]
_ROWS = 256
_ENTRIES = 1 << 18
"""Of a position times the rows that are read together."""

_SUMMARY = """
SELECT teacher_id, kind, k, count(*)::BIGINT AS rows, sum(span_tokens)::BIGINT AS tokens,
    sum(kept_mass * span_tokens) / sum(span_tokens) AS kept_mass,
    sum(list_sum(entropy)) / sum(span_tokens) AS entropy,
    -sum(list_sum(token_logprob)) / sum(span_tokens) AS cross_entropy,
    coalesce(bool_or(entropy_is_bound), false) AS entropy_is_bound
FROM soft_targets GROUP BY ALL ORDER BY ALL"""

# Of a teacher's rows of one text the best: all outcomes, else the most entries, of as many those
# whose tail is exact. Draws tell no probability.
_BEST = f"""
CREATE TABLE best AS
SELECT teacher_id, tokens_key, max(whole) AS whole,
    arg_max(place, (whole, {OF_ENGINE} = '{HF}')) AS place
FROM (SELECT *, CASE WHEN kind = 'full' THEN 2000000000 + k ELSE k END AS whole FROM soft_targets
    WHERE kind <> 'sampled')
GROUP BY ALL"""

_PAIRS = """
CREATE OR REPLACE TABLE pairs AS
SELECT a.place AS a, b.place AS b, greatest(a.whole, b.whole) % 2000000000 AS width,
    row_number() OVER (ORDER BY width, a.place) - 1 AS number
FROM best a JOIN best b USING (tokens_key) WHERE a.teacher_id = '{}' AND b.teacher_id = '{}'"""


@dataclass(kw_only=True, slots=True)
class Pair:
    """Two teachers, by their ids, on the texts that both have scored; sums over tokens, in nats."""

    a: str
    b: str
    rows: int = 0
    tokens: int = 0
    bounded: int = 0
    """Of the tokens, those whose distance is a lower bound."""
    bounded_tails: int = 0
    """Tokens of which a tail is known within a bound alone: the distance may be off by as much."""
    other_classes: int = 0
    """Rows that are not compared: classes of the same texts, by other names or in another order."""
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("ab", "ba", "rounding"), 0.0)
    )
    """KL(a || b), KL(b || a), and about what rounding alone adds to either."""

    def mean(self, name: str) -> float | None:
        """One of the sums over the tokens; None: no token is compared."""
        return self.sums[name] / self.tokens if self.tokens else None

    def add(self, p: "_Row", q: "_Row") -> None:
        """Compare two rows of the same tokens."""
        if p.classes != q.classes:
            self.other_classes += 1
            return
        found = between(p.targets, q.targets)
        tokens = len(found.forward)
        self.rows, self.tokens = self.rows + 1, self.tokens + tokens
        self.bounded += 0 if found.exact else tokens
        self.bounded_tails += tokens if p.tail_is_bounded or q.tail_is_bounded else 0
        self.sums["ab"] += float(found.forward.sum())
        self.sums["ba"] += float(found.backward.sum())
        self.sums["rounding"] += p.rounding + q.rounding


@dataclass(frozen=True, slots=True)
class _Row:
    targets: SoftTargets
    bits: int
    classes: tuple[str, ...]
    tail_is_bounded: bool

    @property
    def rounding(self) -> float:
        """About what the rounding of its entries adds to a KL: 1/2 sum_i p_i e_i^2.

        The errors e_i are uniform within half a last bit.
        """
        logprobs = self.targets.logprobs
        assert logprobs is not None
        logs = np.where(np.isneginf(logprobs), 0.0, logprobs)
        return float((np.exp(logprobs) * np.square(logs * 2.0 ** -(self.bits + 1))).sum() / 6)


def teachers_of(store: Store) -> list[dict[str, Any]]:
    """What each teacher's rows of one kind hold, as a store's own numbers.

    Raises:
        UsageError: there are no rows.
    """
    found: list[dict[str, Any]] = query(store, _SUMMARY).to_pylist()
    if not found:
        raise UsageError(
            f"{store.root}: no soft targets, so there are no teachers to lay side by side. Run a "
            "recipe's score first."
        )
    return [_known(store, row["teacher_id"]) | row for row in found]


def _known(store: Store, teacher_id: str) -> dict[str, Any]:
    """What the store keeps of a teacher: no name, which is no part of who it is."""
    parts = store.teacher_parts(teacher_id)
    named = mapping(parts.get("config") or {}).get("architectures")
    kind = named[0] if isinstance(named, list) and named else None
    return {
        "model": parts.get("unseen") or (parts.get("model") if "endpoint" in parts else kind),
        "dtype": parts.get("dtype"),
        "quantized": quantized_words(parts),
        "adapter": parts.get("adapter") is not None,
    }


def pairs_of(store: Store, teachers: Sequence[str]) -> list[Pair]:
    """Every two of these teachers that have scored the same texts."""
    with closing(Index(store)) as index:
        index.execute(_BEST)
        found = [_compared(store, index, Pair(a=a, b=b)) for a, b in combinations(teachers, 2)]
    return [pair for pair in found if pair.rows or pair.other_classes]


def _compared(store: Store, index: Index, pair: Pair) -> Pair:
    index.execute(_PAIRS.format(*(one.replace("'", "''") for one in (pair.a, pair.b))))
    for places in _chunks(index):
        rows = [_read(store, index, places[:, side]) for side in (0, 1)]
        for a, b in places.tolist():
            pair.add(rows[0][a], rows[1][b])
    return pair


def _chunks(index: Index) -> Iterator[np.ndarray]:
    """[rows, 2] places of pairs, as few at a time as their entries allow."""
    start, ((total,),) = 0, index.rows("SELECT count(*) FROM pairs")
    while start < total:
        ((width,),) = index.rows(f"SELECT width FROM pairs WHERE number = {start}")
        most = max(1, min(_ROWS, _ENTRIES // max(1, width)))
        where = f"number >= {start} AND number < {start + most} AND width <= {max(width, 1) * 2}"
        found = index.rows(f"SELECT a, b FROM pairs WHERE {where} ORDER BY number")
        yield np.array(found, np.int64)
        start += len(found)


def _read(store: Store, index: Index, places: np.ndarray) -> dict[int, _Row]:
    """Rows by place."""
    found: dict[int, _Row] = {}
    ordered = np.sort(places)
    taken = iter(ordered.tolist())
    for sha256, rows in index.places("soft_targets", ordered).items():
        shard = store.shard("soft_targets", sha256)
        classes = tuple(shard.about.get("class_names") or ())
        for row in shard.take(rows, _COLUMNS):
            targets, bounded = SoftTargets.from_row(row), bool(row["entropy_is_bound"])
            found[next(taken)] = _Row(targets, row["mantissa_bits"], classes, bounded)
    return found


def pair_json(pair: Pair) -> dict[str, Any]:
    """For programs: means in nats per token.

    A mean is null where a KL is infinite, or nothing is compared.
    """

    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "a": pair.a,
        "b": pair.b,
        "rows": pair.rows,
        "tokens": pair.tokens,
        "kl_a_b": finite(pair.mean("ab")),
        "kl_b_a": finite(pair.mean("ba")),
        "rounding": finite(pair.mean("rounding")),
        "kl_is_lower_bound": pair.bounded > 0,
        "tokens_of_bounded_tails": pair.bounded_tails,
        "rows_of_other_classes": pair.other_classes,
    }
