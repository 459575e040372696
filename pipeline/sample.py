"""One sample of a store, token by token: what is there, what the teacher thought, what is scored."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

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
    return next(iter(store.rows(table, {shard: [row]}))) | {"table": table}


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
        targets = SoftTargets.from_row(row)
        found["positions"] = [
            _position(targets.positions(slice(n, n + 1)), start + n, tokenizer) for n in range(row["span_tokens"])
        ]
    return found


def _position(targets: SoftTargets, index: int, tokenizer: Any) -> dict[str, Any]:
    (probabilities,) = targets.probabilities
    best = np.argsort(-probabilities, kind="stable")[:SHOWN]
    ids = best if targets.ids is None else targets.ids[0][best]
    return {
        "index": index,
        "token_logprob": float(targets.token_logprob[0]),
        "entropy": float(targets.entropy[0]),
        "tail": None if targets.tail_logprob is None else float(np.exp(targets.tail_logprob[0])),
        "entries": [[_show(tokenizer, int(i)), float(probabilities[b])] for i, b in zip(ids, best, strict=True)],
    }


def _show(tokenizer: Any, token: int) -> str:
    piece = tokenizer.id_to_token(token) if tokenizer else None
    return f"[{token}]" if piece is None else str(piece)


def render(sample: dict[str, Any]) -> list[Any]:
    """The sample for people: the text with the scored span marked, then a line per scored position."""
    text = Text()
    for index, token in enumerate(sample["tokens"]):
        shown = token.replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")
        text.append(shown, style="bold" if index >= sample["span_start"] else "dim")
    parts: list[Any] = [Text(f"{sample['table']} {sample['key']}; scored tokens are bold\n"), text, Text("")]
    if "positions" in sample:
        table = Table("index", "token", box=None, pad_edge=False)
        for name in ("probability", "entropy", "tail"):
            table.add_column(name, justify="right")
        table.add_column("the teacher's best")
        for p in sample["positions"]:
            best = "  ".join(f"{token} {probability:.3f}" for token, probability in p["entries"])
            tail = "-" if p["tail"] is None else f"{p['tail']:.4f}"
            row = (f"{np.exp(p['token_logprob']):.4f}", f"{p['entropy']:.3f}", tail, best)
            table.add_row(str(p["index"]), Text(sample["tokens"][p["index"]]), *row[:3], Text(row[3]))
        parts.append(table)
    return parts
