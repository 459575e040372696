"""Which stored soft targets can be reused for which request, and what the others lack.

It is SQL over the columns of `soft_targets`.

| wanted | can reuse |
| topk   | topk of as many entries or more; full |
| topp   | topp of as much mass, as many entries at most and at least;
|        | topk of as many entries; full |
| sampled| the same draws: as many, drawn alike from the same power of the same temperature |
| full   | full |

Each must have the mantissa bits and the temperatures that are asked for, or more; `full` has every
temperature. Any engine's row can be reused, unless the recipe names one.
"""

from collections.abc import Iterable

from ..recipe.kinds import HF, KINDS, WHOLE
from ..targets.spec import Kept

PLACES = 2**64

# What a row may lack, in the order in which it is asked: the row that comes furthest says why a
# request is not served.
_KIND, _ENTRIES, _TEMPERATURES, _BITS, _ENGINE = range(5)
OF_ENGINE = f"coalesce(engine, '{HF}')"
"""SQL: what ran the teacher."""


def best(kept: Kept, mantissa_bits: int, engine: str | None = None) -> str:
    """SQL: the row that covers a request best, with its place in the low 64 bits.

    The best is one of the kind, then of few entries, then of few bits, then an exact one.

    `engine`: whose rows are wanted; None: anybody's.
    """
    conditions = _conditions(kept, mantissa_bits, engine)
    covers = " AND ".join(f"({condition})" for condition in conditions)
    rank = f"((kind <> '{kept.kind}')::HUGEINT * 4294967296 + k) * 32 + mantissa_bits"
    rank = f"({rank}) * 2 + ({OF_ENGINE} <> '{HF}')::INT"  # the other one's tails are bounds
    return f"min(({rank}) * {PLACES}::HUGEINT + place) FILTER ({covers})"


def entries(best_row: str) -> str:
    """SQL: how many entries of a token the row has that `best` has found, at most."""
    return f"(({best_row}) // {PLACES}::HUGEINT // 64 % 4294967296)::BIGINT"


def lacks(kept: Kept, mantissa_bits: int, engine: str | None = None) -> str:
    """SQL: the number of what the nearest row lacks; that it covers all is the greatest."""
    conditions = _conditions(kept, mantissa_bits, engine)
    cases = (f"WHEN NOT ({c}) THEN {number}" for number, c in enumerate(conditions))
    return f"max(CASE {' '.join(cases)} ELSE {_ENGINE + 1} END)"


def reason(kept: Kept, lack: int) -> str:
    """Why rows that are stored do not serve, for people."""
    named = " and ".join(f"{t:g}" for t in kept.temperatures) or "1"
    if kept.structure.drawn and lack in (_ENTRIES, _TEMPERATURES):
        return (
            "stored with other draws"
            if lack == _ENTRIES
            else f"stored as drawn at another temperature than {named}"
        )
    return {
        _KIND: f"stored as other targets than {kept.kind}",
        _ENTRIES: "stored with fewer entries",
        _TEMPERATURES: f"stored without temperature {named}",
        _BITS: "stored with fewer bits",
    }.get(lack, "stored by another engine")


def _conditions(kept: Kept, mantissa_bits: int, engine: str | None) -> tuple[str, ...]:
    """Kind, entries, temperatures, bits and engine, none of them null."""
    kind = f"kind IN {_names((kept.kind, *KINDS[kept.kind].served_by))}"
    bits = f"mantissa_bits >= {mantissa_bits}"
    entries, temperatures = _entries(kept), _temperatures(kept)
    ran = "true" if engine is None else f"{OF_ENGINE} = '{engine}'"
    return kind, f"coalesce({entries}, false)", f"coalesce({temperatures}, false)", bits, ran


def _entries(kept: Kept) -> str:
    """A row of its kind as the kind says; of another kind, one with as many entries or with all."""
    asked = kept.columns()
    own = [f"kind = '{kept.kind}'"]
    for column, sign in KINDS[kept.kind].covers.items():
        own.append(f"{column} {sign} {_literal(asked[column])}")
    others = f"kind <> '{kept.kind}' AND k >= {kept.k}"
    return f"{_WHOLE} OR ({' AND '.join(own)}) OR ({others})"


def _temperatures(kept: Kept) -> str:
    if kept.structure.drawn and not kept.temperatures:
        return "temperatures IS NULL"
    if not kept.temperatures:
        return "true"
    asked = ", ".join(_literal(t) for t in kept.temperatures)
    enough = f"list_has_all(temperatures, [{asked}]::FLOAT[])"
    return f"{_WHOLE} OR coalesce({enough}, false)"


def _names(kinds: Iterable[str]) -> str:
    return f"({', '.join(map(repr, kinds))})"


def _literal(value: float | str) -> str:
    """SQL; what is no whole number is stored as float32."""
    return f"{value!r}::FLOAT" if isinstance(value, float) else repr(value)


_WHOLE = f"kind IN {_names(WHOLE)}"
