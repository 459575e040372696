"""Which stored targets can be reused for which request.

The SQL agrees with the rules, written here row by row.
"""

from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillroom.stages.ledger.coverage import PLACES, best, lacks, reason
from stillroom.stages.recipe.kinds import Score
from stillroom.stages.targets.spec import Kept, reference, target_bytes, wanted
from stillroom.storage.tables.schema import SCHEMAS

V = 24
COLUMNS = ("kind", "k", "p", "k_min", "draw", "proposal", "temperatures", "mantissa_bits")
TEMPERATURES = st.sets(st.sampled_from([0.7, 2.0, 4.0])).map(
    lambda found: tuple(sorted(map(single, found)))
)

CONNECTION = duckdb.connect(config={"threads": 1})


def single(value: float) -> float:
    return float(np.float32(value))


def kept() -> st.SearchStrategy[Kept]:
    few = st.integers(1, 4)
    shares = st.sampled_from([0.5, 0.9]).map(single)
    return st.one_of(
        st.just(Kept(kind="full", k=V)),
        st.builds(Kept, kind=st.just("topk"), k=few, temperatures=TEMPERATURES),
        st.builds(
            Kept,
            kind=st.just("topp"),
            k=few,
            p=shares,
            k_min=st.integers(1, 2),
            temperatures=TEMPERATURES,
        ),
        st.builds(
            Kept,
            kind=st.just("sampled"),
            k=few,
            draw=st.sampled_from(["multinomial", "systematic"]),
            proposal=st.sampled_from([1.0, 0.7]).map(single),
            temperatures=st.sampled_from([(), (2.0,)]),
        ),
    )


def serves(row: Kept, bits: int, asked: Kept, asked_bits: int) -> bool:
    """The rules, in words: `stages/ledger/README.md`."""
    if bits < asked_bits:
        return False
    if asked.kind == "sampled":
        return row == asked
    if row.kind == "full":
        return True
    if (
        row.kind == "sampled"
        or asked.kind == "full"
        or not set(asked.temperatures) <= set(row.temperatures)
    ):
        return False
    if asked.kind == "topk":
        return row.kind == "topk" and row.k >= asked.k
    if row.kind == "topk":
        return row.k >= asked.k
    assert row.p is not None
    assert row.k_min is not None
    return row.p >= asked.p and row.k >= asked.k and row.k_min >= asked.k_min


def answers(
    rows: list[tuple[Kept, int]],
    asked: Kept,
    bits: int,
    *,
    engines: list[str | None] | None = None,
    named: str | None = None,
) -> tuple[Any, ...]:
    """What the SQL says of these rows, each at the place of its number.

    The rows were made by `engines`, and `named` is asked for.
    """
    lists = {name: [row.columns().get(name) for row, _ in rows] for name in COLUMNS[:-2]}
    lists["temperatures"] = [list(row.temperatures) or None for row, _ in rows]
    lists["mantissa_bits"] = [b for _, b in rows]
    lists["engine"] = engines or [None] * len(rows)
    arrays = {
        name: pa.array(values, SCHEMAS["soft_targets"].field(name).type)
        for name, values in lists.items()
    }
    stored = pa.table(arrays | {"place": pa.array(range(len(rows)), pa.int64())})
    CONNECTION.register("stored", stored)
    (found,) = CONNECTION.execute(
        f"SELECT {best(asked, bits, named)}, {lacks(asked, bits, named)} FROM stored"
    ).fetchall()
    return found


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(kept(), st.sampled_from([7, 10])), min_size=1, max_size=6),
    asked=kept(),
    bits=st.sampled_from([7, 10]),
    engines=st.lists(st.sampled_from([None, "vllm"]), min_size=6, max_size=6),
    named=st.sampled_from([None, "hf", "vllm"]),
)
def test_the_sql_is_the_rules(
    rows: list[tuple[Kept, int]],
    asked: Kept,
    bits: int,
    engines: list[str | None],
    named: str | None,
) -> None:
    engines = engines[: len(rows)]
    serving = [
        place
        for place, (row, b) in enumerate(rows)
        if serves(row, b, asked, bits) and named in (None, engines[place] or "hf")
    ]
    chosen, lack = answers(rows, asked, bits, engines=engines, named=named)
    assert (chosen is not None) == bool(serving)
    if chosen is None:
        assert "stored" in reason(asked, lack)
        return
    place = chosen % PLACES
    assert place in serving
    ranks = {
        p: (rows[p][0].kind != asked.kind, rows[p][0].k, rows[p][1], engines[p] is not None, p)
        for p in serving
    }
    assert ranks[place] == min(ranks.values())


@pytest.mark.parametrize(
    ("row", "asked", "says"),
    [
        (Kept(kind="topk", k=4), Kept(kind="topk", k=5), "stored with fewer entries"),
        (
            Kept(kind="topk", k=4),
            Kept(kind="topk", k=4, temperatures=(2.0,)),
            "stored without temperature 2",
        ),
        (
            Kept(kind="topk", k=4),
            Kept(kind="topk", k=4, temperatures=(1.5, 2.0)),
            "stored without temperature 1.5 and 2",
        ),
        (Kept(kind="topk", k=4), Kept(kind="full", k=V), "stored as other targets than full"),
        (
            Kept(kind="topp", k=4, p=0.5, k_min=1),
            Kept(kind="topk", k=4),
            "stored as other targets than topk",
        ),
        (
            Kept(kind="topp", k=4, p=0.5, k_min=1),
            Kept(kind="topp", k=4, p=0.9, k_min=1),
            "stored with fewer entries",
        ),
    ],
)
def test_the_nearest_row_says_what_is_missing(row: Kept, asked: Kept, says: str) -> None:
    far = Kept(kind="sampled", k=9, draw="multinomial", proposal=1.0)
    _, lack = answers([(far, 10), (row, 10)], asked, 10)
    assert reason(asked, lack) == says


def test_another_engines_row_is_what_is_missing() -> None:
    asked = Kept(kind="topk", k=4)
    chosen, lack = answers([(asked, 10)], asked, 10, engines=["vllm"], named="hf")
    assert chosen is None
    assert reason(asked, lack) == "stored by another engine"


def drawn(rounds: int, *temperatures: float, **more: Any) -> Kept:
    return Kept(
        kind="sampled",
        k=rounds,
        temperatures=temperatures,
        **{"draw": "multinomial", "proposal": 1.0} | more,
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (drawn(51), "stored with other draws"),
        (drawn(50, draw="systematic"), "stored with other draws"),
        (drawn(50, proposal=0.5), "stored with other draws"),
        (drawn(50, 2.0), "stored as drawn at another temperature than 2"),
    ],
)
def test_draws_serve_only_themselves(asked: Kept, says: str) -> None:
    chosen, lack = answers([(drawn(50), 10), (Kept(kind="full", k=V), 10)], asked, 10)
    assert chosen is None
    assert reason(asked, lack) == says
    assert answers([(drawn(50), 7)], drawn(50), 10)[0] is None
    assert (
        reason(drawn(50), answers([(drawn(50), 7)], drawn(50), 10)[1]) == "stored with fewer bits"
    )
    assert answers([(drawn(50, 2.0), 10)], drawn(50, 2.0), 10)[0] is not None


def settings_of() -> Iterator[tuple[dict[str, Any], int, Kept, Kept]]:
    everything = Kept(kind="full", k=V)
    yield {"k": 9}, V, Kept(kind="topk", k=9), everything
    yield {"k": 64}, V, Kept(kind="topk", k=V), everything
    tempered = {"temperatures": [4, 1.0, 2, 2.0]}
    at = (2.0, 4.0)
    yield (
        {"k": 9} | tempered,
        70_000,
        Kept(kind="topk", k=9, temperatures=at),
        Kept(kind="topk", k=4096, temperatures=at),
    )
    yield {"targets": "full"} | tempered, V, everything, everything
    topp = {"targets": "topp", "p": 0.9, "k_min": 3}
    yield topp, 2, Kept(kind="topp", k=2, p=single(0.9), k_min=2), Kept(kind="full", k=2)
    yield {"targets": "sampled", "temperatures": [1.0]}, V, drawn(50), everything
    yield (
        {"targets": "sampled", "temperatures": [1.7], "rounds": 4},
        V,
        drawn(4, single(1.7)),
        everything,
    )


@pytest.mark.parametrize(("score", "vocabulary", "trained", "judged"), list(settings_of()))
def test_what_a_recipe_wants(
    score: dict[str, Any], vocabulary: int, trained: Kept, judged: Kept
) -> None:
    section = Score.model_validate(score)
    assert wanted(section, vocabulary) == trained
    assert reference(section, vocabulary) == judged
    assert target_bytes(trained) > 0
