"""Which stored soft targets serve which request, as SQL over the columns of `soft_targets`; and what the others lack.

| wanted | is served by |
| topk   | topk of as many entries or more; full |
| topp   | topp of as much mass, as many entries at most and at least; topk of as many entries; full |
| sampled| the same draws: as many, drawn alike from the same power of the same temperature |
| full   | full |

Each with the mantissa bits and the temperatures that are asked for, or more; `full` has every
temperature.
"""

from ..targets.spec import Kept

PLACES = 2**64

# What a row may lack, in the order in which it is asked: the row that comes furthest says why a
# request is not served.
_KIND, _ENTRIES, _TEMPERATURES, _BITS = range(4)


def best(kept: Kept, mantissa_bits: int) -> str:
    """SQL: the row that covers a request best, its place in the low 64 bits: of the kind, few entries, few bits."""
    covers = " AND ".join(f"({condition})" for condition in _conditions(kept, mantissa_bits))
    rank = f"((kind <> '{kept.kind}')::HUGEINT * 4294967296 + k) * 32 + mantissa_bits"
    return f"min(({rank}) * {PLACES}::HUGEINT + place) FILTER ({covers})"


def lacks(kept: Kept, mantissa_bits: int) -> str:
    """SQL: the number of what the nearest row lacks; that it covers all is the greatest."""
    cases = (
        f"WHEN NOT ({c}) THEN {number}" for number, c in enumerate(_conditions(kept, mantissa_bits))
    )
    return f"max(CASE {' '.join(cases)} ELSE {_BITS + 1} END)"


def reason(kept: Kept, lack: int) -> str:
    """Why rows that are stored do not serve, for people."""
    named = " and ".join(f"{t:g}" for t in kept.temperatures) or "1"
    if kept.kind == "sampled" and lack in (_ENTRIES, _TEMPERATURES):
        return (
            "stored with other draws"
            if lack == _ENTRIES
            else f"stored as drawn at another temperature than {named}"
        )
    return {
        _KIND: f"stored as other targets than {kept.kind}",
        _ENTRIES: "stored with fewer entries",
        _TEMPERATURES: f"stored without temperature {named}",
    }.get(lack, "stored with fewer bits")


def _conditions(kept: Kept, mantissa_bits: int) -> tuple[str, str, str, str]:
    """Kind, entries, temperatures and bits, none of them null."""
    kinds = {"topk": ("topk", "full"), "topp": ("topp", "topk", "full")}.get(
        kept.kind, (kept.kind,)
    )
    kind = f"kind IN ({', '.join(map(repr, kinds))})"
    temperatures = f"[{', '.join(f'{t!r}::FLOAT' for t in kept.temperatures)}]"
    enough = f"list_has_all(temperatures, {temperatures}::FLOAT[])" if kept.temperatures else "true"
    if kept.kind == "sampled":
        draws = f"k = {kept.k} AND draw = '{kept.draw}' AND proposal = {kept.proposal!r}::FLOAT"
        alike = enough if kept.temperatures else "temperatures IS NULL"
        return (
            kind,
            f"coalesce({draws}, false)",
            f"coalesce({alike}, false)",
            f"mantissa_bits >= {mantissa_bits}",
        )
    entries = f"kind = 'full' OR k >= {kept.k}"
    if kept.kind == "topp":
        entries += f" AND (kind = 'topk' OR (p >= {kept.p!r}::FLOAT AND k_min >= {kept.k_min}))"
    return (
        kind,
        f"coalesce({entries}, false)",
        f"kind = 'full' OR coalesce({enough}, false)",
        f"mantissa_bits >= {mantissa_bits}",
    )
