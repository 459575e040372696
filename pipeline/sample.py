"""One sample of a store, token by token: what is there, what the teacher thought, what is scored."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from ..stages.kept import Kept
from ..storage.codec import SoftTargets
from ..storage.errors import UsageError
from ..storage.schema import TableName
from ..storage.store import Store

SHOWN = 5  # entries of a target
TABLES: tuple[TableName, ...] = ("soft_targets", "generations")


def find_row(store: Store, key: str | None) -> dict[str, Any]:
    """A soft-target row by key (hex, any unique beginning), else the first; a generation where nothing is scored.

    Raises:
        UsageError: no such row, or more than one.
    """
    begin = (key or "").lower()
    fitting = (
        (table, shard, row)
        for table in TABLES
        for found, shard, row in _keys(store, table)
        if found.hex().startswith(begin)
    )
    matches = list(fitting if key is not None else islice(fitting, 1))
    how = 'List keys with `stillroom query STORE "SELECT hex(key) FROM soft_targets"`.'
    if not matches:
        wanted = "row" if key is None else f"row whose key begins with {key}"
        raise UsageError(f"{store.root}: no {wanted} in soft_targets or generations. {how}")
    if len(matches) > 1:
        raise UsageError(f"{store.root}: {len(matches)} rows have keys that begin with {key!r}. Give more of it. {how}")
    table, shard, row = matches[0]
    about = store.shard(table, shard).about
    return next(iter(store.rows(table, {shard: [row]}))) | {"table": table, "class_names": about.get("class_names")}


def _keys(store: Store, table: TableName) -> Iterator[tuple[bytes, str, int]]:
    index = store.index(table, ["key"])
    return zip(*(index[c].to_pylist() for c in ("key", "shard", "row")), strict=True)


def tokenizer_of(store: Store, row: dict[str, Any]) -> Any:
    """The tokenizer kept with the row's teacher or author; None if the store has none (given text has no model)."""
    from tokenizers import Tokenizer

    name = row["teacher_id"] if row["table"] == "soft_targets" else row["author_id"]
    file = f"teachers/{name}/tokenizer.json"
    return Tokenizer.from_file(str(store.files.local(file))) if store.files.exists(file) else None


def describe(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The sample as plain data, for `--json`."""
    start = row["span_start"] if row["table"] == "soft_targets" else max(row["prompt_tokens"], 1)
    ids = row["token_ids"].tolist()
    tokens = [_show(tokenizer, token) for token in ids]
    found: dict[str, Any] = {
        "table": row["table"],
        "key": row["key"].hex(),
        "tokens": tokens,
        "token_ids": ids,
        "span_start": start,
    }
    if row["table"] == "soft_targets":
        targets, classes = SoftTargets.from_row(row), row.get("class_names")
        show = classes.__getitem__ if classes else partial(_show, tokenizer)
        if classes:
            found["label"] = None if row["label"] is None else classes[row["label"]]
            found["text"] = tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(tokens)
        found["kept"] = Kept.of_row(row).named() | {"mantissa_bits": row["mantissa_bits"]}
        found["positions"] = [
            _position(targets.positions(slice(n, n + 1)), start + n, show) for n in range(row["span_tokens"])
        ]
    return found


def _position(targets: SoftTargets, index: int, show: Callable[[int], str]) -> dict[str, Any]:
    (probabilities,) = targets.probabilities
    best = np.argsort(-probabilities, kind="stable")[:SHOWN]
    best = best[probabilities[best] > 0]  # no padding
    ids = best if targets.ids is None else targets.ids[0][best]
    entries = [[show(int(i)), float(probabilities[b])] for i, b in zip(ids, best, strict=True)]
    if targets.counts is not None:
        entries = [[*entry, int(targets.counts[0][b])] for entry, b in zip(entries, best, strict=True)]
    return {
        "index": index,
        "token_logprob": float(targets.token_logprob[0]),
        "entropy": float(targets.entropy[0]),
        "tail": None if targets.tail_logprob is None else float(np.exp(targets.tail_logprob[0])),
        "tempered_tail": _tempered(targets),
        "entries": entries,
    }


def _tempered(targets: SoftTargets) -> dict[str, float]:
    """Temperature -> probability outside the entries at it; none for sampled targets."""
    if targets.logprobs is None or targets.temperatures is None or targets.tempered_tails is None:
        return {}
    found = {}
    for t, tail in zip(targets.temperatures.tolist(), targets.tempered_tails[0].tolist(), strict=True):
        entries = np.logaddexp.reduce(targets.logprobs[0].astype(np.float64) / t)
        found[f"{t:g}"] = float(np.exp(tail - np.logaddexp(entries, tail)))
    return found


def _show(tokenizer: Any, token: int) -> str:
    piece = tokenizer.id_to_token(token) if tokenizer else None
    return f"[{token}]" if piece is None else str(piece)


def render(sample: dict[str, Any]) -> list[Any]:
    """The sample for people: the text with the scored span marked, then a line per scored position."""
    if "label" in sample:
        text, marked = Text(sample["text"]), f"gold label: {sample['label'] or 'none'}"
    else:
        text, marked = Text(), "scored tokens are bold"
        for index, token in enumerate(sample["tokens"]):
            shown = token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
            text.append(shown, style="bold" if index >= sample["span_start"] else "dim")
    parts: list[Any] = [Text(f"{sample['table']} {sample['key']}; {marked}\n"), text, Text("")]
    if "positions" in sample:
        settings = (_setting(name, value) for name, value in sample["kept"].items() if value != ())
        parts += [Text(", ".join(settings) + "\n"), _targets_table(sample)]
    return parts


def _setting(name: str, value: Any) -> str:
    values = value if isinstance(value, list | tuple) else [value]
    shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"{name.replace('_', ' ')} {shown}"


def _targets_table(sample: dict[str, Any]) -> Table:
    """A line per scored position; of drawn ids how often they were, in brackets."""
    drawn = sample["kept"]["kind"] == "sampled"
    tempered = list(sample["positions"][0]["tempered_tail"])
    table = Table("index", "gold label" if "label" in sample else "token", box=None, pad_edge=False)
    for name in ("probability", "entropy", *([] if drawn else ["tail", *(f"tail at {t}" for t in tempered)])):
        table.add_column(name, justify="right")
    table.add_column("drawn most" if drawn else "the teacher's best")
    for p in sample["positions"]:
        best = (f"{e[0]} {e[1]:.3f}" + (f" ({e[2]})" if len(e) > 2 else "") for e in p["entries"])
        tails = [] if drawn else [f"{p['tail']:.4f}", *(f"{p['tempered_tail'][t]:.4f}" for t in tempered)]
        numbers = (f"{np.exp(p['token_logprob']):.4f}", f"{p['entropy']:.3f}", *tails)
        token = (sample["label"] or "none") if "label" in sample else sample["tokens"][p["index"]]
        table.add_row(str(p["index"]), Text(token), *numbers, Text("  ".join(best)))
    return table
