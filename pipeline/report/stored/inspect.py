"""One sample token by token.

Of a store it shows what the teacher thought of the text, of a run how its student differs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text

from ....stages.models.fit.quantized import quantized_words
from ....stages.models.inputs.token_text import Pieces, stored_tokenizer
from ....stages.recipe.run_folder import REPORT, as_a_run_writes
from ....stages.targets.spec import Kept
from ....storage.errors import IntegrityError, UsageError
from ....storage.integrity.checked import HELP, check_about
from ....storage.integrity.row_faults import FATAL, row_faults
from ....storage.store.bindings import all_bindings
from ....storage.store.store import Store
from ....storage.tables.heads import HEADS
from ....storage.tables.kinds import STRUCTURES
from ....storage.tables.row_builders import text_key
from ....storage.tables.schema import KEY, TableName
from ....storage.tables.shard import ShardFile
from ....storage.tables.soft_targets import SoftTargets
from ....storage.tables.spans import positions, spans_of
from ...printing.text import one_line, printable
from ..report import load_report
from ..token_view import coloured, drawn, fitting, rows_of, visible

SHOWN = 5  # entries of a target
_SCORED = "scored tokens stand in ⟦ ⟧"
FEATURE = ["kind", "layer", "vectors", "width", "dtype"]
"""What is shown of a row of features."""
TABLES: tuple[TableName, ...] = ("soft_targets", "generations")


def show(
    place: str, key: str | None, *, columns: int, colours: bool
) -> tuple[dict[str, Any], list[Any]]:
    """A row of a store or of a run folder, as data and for people.

    A run folder has the held-out rows that its report holds.

    `columns`: characters of a line; `colours`: whether it goes to a terminal.

    Raises:
        UsageError: no such row, or more than one.
    """
    if (report := Path(place) / REPORT).is_file():
        with as_a_run_writes(report):
            return _of_run(place, (key or "").lower(), columns=columns, colours=colours)
    store = Store.open(place)
    row = find_row(store, key)
    sample = describe(row, tokenizer_of(store, row))
    lines = render(sample, columns=columns, colours=colours)
    if how := quantized_words(store.teacher_parts(row.get("teacher_id") or row["author_id"])):
        sample["quantized"] = how
        lines.insert(0, Text(f"of a model that is quantised: {one_line(how)}"))
    sample["features"] = features_of(store, row)
    if sample["features"]:
        lines += [Text("\nstored of this text too"), _features_table(sample["features"])]
    if row["doubts"]:
        sample["doubts"] = row["doubts"]
        lines = [*(Text(f"doubtful: {doubt}") for doubt in row["doubts"]), Text(), *lines]
    return sample, lines


def _of_run(
    run_dir: str, begin: str, *, columns: int, colours: bool
) -> tuple[dict[str, Any], list[Any]]:
    rows = [row for row in rows_of(load_report(Path(run_dir))["evaluation"]) if row.arms]
    if not rows:
        raise UsageError(
            f"{run_dir}: its report holds no rows token by token (no teacher's distribution, or "
            "texts that are classified). Give the store instead of the run folder."
        )
    keys = ", ".join(row.key[:8] for row in rows)
    fitting = [row for row in rows if row.key.startswith(begin)]
    if not fitting or (begin and len(fitting) > 1):
        raise UsageError(
            f"{run_dir}: {len(fitting)} held-out rows have keys that begin with {begin!r}. It has "
            f"{keys}."
        )
    row = fitting[0]
    title = Text(
        f"held-out row {row.key}; {'coloured by ' * colours}KL(teacher || student) in nats\n"
    )
    return asdict(row), [
        title,
        *drawn(row, columns=columns, colours=colours),
        Text(f"rows of this run (--key): {keys}"),
    ]


def find_row(store: Store, key: str | None) -> dict[str, Any]:
    """A soft-target row by key (hex, any unique beginning), else the first.

    Where nothing is scored it is a generation.

    Raises:
        UsageError: no such row, or more than one.
        IntegrityError: the row cannot be shown.
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
        raise UsageError(
            f"{store.root}: {len(matches)} rows have keys that begin with {key!r}. Give more of "
            f"it. {how}"
        )
    table, shard, row = matches[0]
    file = store.shard(table, shard)
    (found,) = file.take([row])
    return found | {
        "table": table,
        "class_names": file.about.get("class_names"),
        "head": file.about.get("head", "lm"),
        "doubts": _doubts(file, table, found, where=f"{file.name}: row {row}"),
    }


def _doubts(file: ShardFile, table: TableName, row: dict[str, Any], *, where: str) -> list[str]:
    """What cannot be right of a row that can be shown.

    Raises:
        IntegrityError: it cannot be shown: lengths, spans or ids do not hold.
    """
    check_about(table, file.about, where=file.name)
    said = []
    for column, message in row_faults(table, row, file.about):
        named = f"{column}: {message}" if column else message
        if column in FATAL:
            raise IntegrityError(f"{where} ({row['key'].hex()}): {named}. {HELP}")
        said.append(named)
    return said


def _keys(store: Store, table: TableName) -> Iterator[tuple[bytes, str, int]]:
    index = store.index(table, ["key"])
    return zip(*(index[c].to_pylist() for c in ("key", "shard", "row")), strict=True)


def features_of(store: Store, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What is stored of a teacher's layers for this text.

    For a row of targets it is what its own teacher says.
    """
    index = store.index("features", ["text_key", "teacher_id", *FEATURE])
    mine = pc.equal(index["text_key"], pa.scalar(text_key(row["token_ids"]), KEY))
    if row["table"] == "soft_targets":
        mine = pc.and_(mine, pc.equal(index["teacher_id"], row["teacher_id"]))
    order = [(name, "ascending") for name in FEATURE]
    found: list[dict[str, Any]] = index.filter(mine).select(FEATURE).sort_by(order).to_pylist()
    return found


def _features_table(features: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("feature", no_wrap=True)
    for name in FEATURE[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for one in features:
        table.add_row(*("-" if one[name] is None else one_line(str(one[name])) for name in FEATURE))
    return table


def tokenizer_of(store: Store, row: dict[str, Any]) -> Any:
    """The tokenizer stored with the teacher, or with the model that wrote the text, or None."""
    name = row["teacher_id"] if row["table"] == "soft_targets" else row["author_id"]
    if not store.files.exists(f"teachers/{name}/identity.json"):
        # Text that came with the data has no model as its author: its teacher's tokenizer made it.
        bindings = all_bindings(store.files).values()
        name = next((one.teacher_id for one in bindings if one.author_id == name), name)
    file = f"teachers/{name}/tokenizer.json"
    return stored_tokenizer(store.files.local(file)) if store.files.exists(file) else None


def describe(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The sample as plain data, for `--json`."""
    spans = spans_of(row)
    ids, scored = row["token_ids"].tolist(), positions(spans).tolist()
    tokens, texts = [_show(tokenizer, token) for token in ids], Pieces(tokenizer)
    found: dict[str, Any] = {
        "table": row["table"],
        "key": row["key"].hex(),
        "tokens": tokens,
        "texts": [texts[token] for token in ids],
        "token_ids": ids,
        "span_start": scored[0],
        "spans": spans.tolist(),
    }
    if row["table"] == "soft_targets":
        targets, classes = SoftTargets.from_row(row), row.get("class_names") or ()
        show = classes.__getitem__ if classes else partial(_show, tokenizer)
        whole_text = HEADS[row.get("head", "lm")].whole_text
        if whole_text:
            found["label"] = None if row["label"] is None else classes[row["label"]]
            found["text"] = _text(row, tokens, tokenizer)
        found["kept"] = Kept.of_row(row).named() | {"mantissa_bits": row["mantissa_bits"]}
        found["positions"] = [
            _position(targets.positions(slice(n, n + 1)), index, show)
            for n, index in enumerate(scored)
        ]
        if HEADS[row.get("head", "lm")].masked:
            for n, label in enumerate(row["labels"].tolist()):
                found["positions"][n]["hidden"] = texts[label]
        if classes and not whole_text:
            _name_words(found, row["labels"], classes, tokenizer)
    return found


def _text(row: dict[str, Any], tokens: Sequence[str], tokenizer: Any) -> str:
    """A text that is classified; of an image what it is."""
    if row.get("image") is not None:
        return f"an image, a PNG file of {len(row['image']):,} bytes"
    ids = row["token_ids"].tolist()
    return str(tokenizer.decode(ids, skip_special_tokens=False)) if tokenizer else " ".join(tokens)


def _name_words(found: dict[str, Any], labels: Any, classes: Sequence[str], tokenizer: Any) -> None:
    """To each position the word whose first token stands there, and its gold label."""
    starts = [position["index"] for position in found["positions"]]
    for n, (start, end) in enumerate(pairwise([*starts, len(found["token_ids"])])):
        ids = found["token_ids"][start:end]
        word = tokenizer.decode(ids, skip_special_tokens=True) if tokenizer else ""
        label = -1 if labels is None else int(labels[n])
        found["positions"][n] |= {
            "word": word.strip() or found["tokens"][start],
            "label": None if label < 0 else classes[label],
        }


def _position(targets: SoftTargets, index: int, show: Callable[[int], str]) -> dict[str, Any]:
    (probabilities,) = targets.probabilities
    best = np.argsort(-probabilities, kind="stable")[:SHOWN]
    best = best[probabilities[best] > 0]  # no padding
    ids = best if targets.ids is None else targets.ids[0][best]
    entries = [[show(int(i)), float(probabilities[b])] for i, b in zip(ids, best, strict=True)]
    if targets.counts is not None:
        entries = [
            [*entry, int(targets.counts[0][b])] for entry, b in zip(entries, best, strict=True)
        ]
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
    for t, tail in zip(
        targets.temperatures.tolist(), targets.tempered_tails[0].tolist(), strict=True
    ):
        entries = np.logaddexp.reduce(targets.logprobs[0].astype(np.float64) / t)
        found[f"{t:g}"] = float(np.exp(tail - np.logaddexp(entries, tail)))
    return found


def _show(tokenizer: Any, token: int) -> str:
    piece = tokenizer.id_to_token(token) if tokenizer else None
    return f"[{token}]" if piece is None else str(piece)


def render(sample: dict[str, Any], *, columns: int, colours: bool) -> list[Any]:
    """The sample for people: its text, then a line per position.

    On a terminal the text is coloured by -log p of each token.
    """
    positions = sample.get("positions")
    if "label" in sample:
        marked, text = (
            f"gold label: {one_line(sample['label'] or 'none')}",
            Text(printable(sample["text"])),
        )
    elif positions and "word" in positions[0]:
        marked = "words with their gold labels"
        words = (f"{p['word']}⟦{p['label'] or 'none'}⟧" for p in positions)
        text = Text(printable(" ".join(words)))
    elif positions:
        marked = "coloured by the teacher's -log p" if colours else _SCORED
        # Surprise is several nats where a KL is one: the same shades for both.
        nats = {p["index"]: -p["token_logprob"] / 4 for p in positions}
        tokens = [(token, nats.get(index)) for index, token in enumerate(sample["texts"])]
        text = coloured(tokens, colours=True) if colours else Text(_marked(sample))
    else:
        marked, text = _SCORED, Text(_marked(sample))
    parts: list[Any] = [Text(f"{sample['table']} {sample['key']}; {marked}\n"), text, Text("")]
    if positions:
        settings = (_setting(name, value) for name, value in sample["kept"].items() if value != ())
        parts += [Text(", ".join(settings) + "\n"), _targets_table(sample, columns)]
    return parts


def _marked(sample: dict[str, Any]) -> str:
    """The text with each scored span in brackets."""
    texts = [printable(text) for text in sample["texts"]]
    for start, tokens in sample["spans"]:
        texts[start] = f"⟦{texts[start]}"
        texts[start + tokens - 1] += "⟧"
    return "".join(texts)


def _setting(name: str, value: Any) -> str:
    values = value if isinstance(value, list | tuple) else [value]
    shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"{name.replace('_', ' ')} {shown}"


def _targets_table(sample: dict[str, Any], columns: int) -> Table:
    """A line per scored position; of drawn ids how often they were, in brackets."""
    sampled = STRUCTURES[sample["kept"]["kind"]].drawn
    tempered = list(sample["positions"][0]["tempered_tail"])
    table = Table(box=None, pad_edge=False)
    table.add_column("index", justify="right", no_wrap=True)
    named = _named_columns(sample)
    for name in named:
        table.add_column(name, no_wrap=True, max_width=12, overflow="ellipsis")
    numbers = ("p", "entropy", *([] if sampled else ["tail", *(f"tail at {t}" for t in tempered)]))
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("drawn most" if sampled else "the teacher's best", no_wrap=True)
    width = max(18, columns - 7 - 14 * len(named) - sum(max(len(name), 6) + 2 for name in numbers))
    for p in sample["positions"]:
        best = [
            (_readable(e[0]), f"{e[1]:.3f}", *(f"({count})" for count in e[2:]))
            for e in p["entries"]
        ]
        tails = (
            []
            if sampled
            else [f"{p['tail']:.4f}", *(f"{p['tempered_tail'][t]:.4f}" for t in tempered)]
        )
        there = [Text(said) for said in _there(sample, p)]
        shown = (f"{np.exp(p['token_logprob']):.4f}", f"{p['entropy']:.3f}", *tails)
        table.add_row(str(p["index"]), *there, *shown, Text(fitting(best, width)))
    return table


def _named_columns(sample: dict[str, Any]) -> list[str]:
    """Headers of what is there at a position."""
    if "label" in sample:
        return ["gold label"]
    first = sample["positions"][0]
    if "hidden" in first:
        return ["token", "hidden"]
    return ["word", "gold label"] if "word" in first else ["token"]


def _there(sample: dict[str, Any], position: dict[str, Any]) -> list[str]:
    """What is there, by `_named_columns`."""
    if "label" in sample:
        return [one_line(sample["label"] or "none")]
    if "word" in position:
        return [visible(position["word"]), one_line(position["label"] or "none")]
    token = visible(sample["texts"][position["index"]])
    return [token, visible(position["hidden"])] if "hidden" in position else [token]


def _readable(piece: str) -> str:
    """A piece of a vocabulary without the marks that tokenizers put for white space."""
    return piece.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n")
