"""The kinds of things that strangers write, and how an example damages one of them.

A target's damage is drawn by hypothesis; `damage(world, drawn)` makes it and gives the words of the
command lines that may follow, of which one is run.
"""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fuzz_edits import (
    BYTE_EDITS,
    JSON_EDITS,
    LINE_EDITS,
    MILD_EDITS,
    TABLE_EDITS,
    as_json,
    edited_bytes,
    edited_json,
    edited_lines,
    edited_table,
)
from fuzz_world import RECORDS, Words, World, on_published, on_run, on_store, words_of
from hypothesis import strategies as st

RECIPES = Path(__file__).parents[2] / "pipeline" / "recipes"
_PICK = st.integers(0, 2**20)


@dataclass(frozen=True)
class Target:
    """One kind of thing that strangers write."""

    drawn: Any
    damage: Callable[[World, Any], list[Words]]


def _damage_recipe(world: World, drawn: Any) -> list[Words]:
    which, edits, lines = drawn
    paths = [*world.files("*.yaml"), *sorted(RECIPES.glob("*.yaml"))]
    path = paths[which % len(paths)] if which else world.work / "every_field.yaml"
    text = path.read_text("utf-8")
    if edits is not None:
        tree = edited_json(yaml.safe_load(text), edits)
        text = yaml.safe_dump(tree, allow_unicode=True)
    if lines is not None:
        text = edited_lines(text, lines)
    world.write("recipe.yaml", text.encode("utf-8", "surrogatepass"))
    return [words_of("plan", world.work / "recipe.yaml", "--json")]


def _damage_recipe_bytes(world: World, drawn: Any) -> list[Words]:
    which, edits = drawn
    paths = world.files("*.yaml")
    world.write("recipe.yaml", edited_bytes(paths[which % len(paths)].read_bytes(), edits))
    return [words_of("plan", world.work / "recipe.yaml", "--json")]


def _rewrite(path: Path, edits: list[Any], sealed: bool) -> None:
    """A record of JSON, edited; `sealed`: its hash is that of what it now says."""
    record = edited_json(json.loads(path.read_bytes()), edits)
    if sealed and isinstance(record, dict):
        record = seal_anything(record)
    path.write_bytes(as_json(record))


def seal_anything(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its own hash, as `keys.seal` makes it, of values too that it would refuse."""
    record = {name: value for name, value in record.items() if name != "self"}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return record | {"self": digest}


def _in_a_file(*patterns: str, commands: Callable[[World], list[Words]]) -> Target:
    """JSON files of the copy: edited as JSON, sealed again or not, or as bytes."""

    def damage(world: World, drawn: Any) -> list[Words]:
        which, edits, sealed = drawn
        found = [path for pattern in patterns for path in world.files(pattern)]
        path = found[which % len(found)]
        if sealed is None:
            path.write_bytes(edited_bytes(path.read_bytes(), edits))
        else:
            _rewrite(path, edits, sealed)
        return commands(world)

    drawn = st.one_of(
        st.tuples(_PICK, JSON_EDITS, st.just(True)),
        st.tuples(_PICK, JSON_EDITS, st.just(True)),
        st.tuples(_PICK, JSON_EDITS, st.just(False)),
        st.tuples(_PICK, BYTE_EDITS, st.none()),
    )
    return Target(drawn, damage)


def _damage_shard(world: World, drawn: Any) -> list[Words]:
    """A shard of a store: bytes, or other rows.

    `sealed`: its name and its record say its new hash.
    """
    which, edits, what, sealed = drawn
    records = [*world.files("store/commits/*/*.json"), *world.files("store/inputs/*.json")]
    path = records[which % len(records)]
    record = json.loads(path.read_bytes())
    shard = world.work / "store" / record["shard"]["name"]
    _damage_parquet(shard, edits, what, world.files("store/data/**/*.parquet"))
    if sealed:
        new = _described(shard, record["shard"])
        name = Path(shard.parents[1].relative_to(world.work / "store"), new["sha256"][:2])
        new["name"] = f"{name}/{new['sha256'][:32]}.parquet"
        moved = world.work / "store" / new["name"]
        moved.parent.mkdir(exist_ok=True)
        shard.rename(moved)
        path.write_bytes(as_json(seal_anything(record | {"shard": record["shard"] | new})))
    return on_store(world)


def _damage_published_file(world: World, drawn: Any) -> list[Words]:
    which, edits, what, sealed = drawn
    files = world.files("published-*/*/*/*.parquet")
    file = files[which % len(files)]
    _damage_parquet(file, edits, what, files)
    if sealed:
        path = file.parents[1] / "MANIFEST.json"
        manifest = json.loads(path.read_bytes())
        for entry in manifest["files"]:
            if entry["name"] == file.relative_to(file.parents[1]).as_posix():
                entry |= _described(file, entry)
        path.write_bytes(as_json(seal_anything(manifest)))
    return on_published(world)


def _damage_card(world: World, drawn: Any) -> list[Words]:
    """The front matter of a published folder's card says which version counts."""
    which, edits, lines = drawn
    card = world.files("published-*/README.md")[which % 2]
    front, mark, rest = card.read_bytes().partition(b"\n---\n")
    if lines:
        front = edited_lines(front.decode(), edits).encode("utf-8", "surrogatepass")
    else:
        front = edited_bytes(front, edits)
    card.write_bytes(front + mark + rest)
    return on_published(world)


def _damage_parquet(path: Path, edits: list[Any], what: str, others: list[Path]) -> None:
    if what == "bytes":
        path.write_bytes(edited_bytes(path.read_bytes(), edits))
    elif what == "other":
        path.write_bytes(others[edits[0].where % len(others)].read_bytes())
    else:
        pq.write_table(
            edited_table(pq.read_table(path), edits),
            path,
            row_group_size=3 if what == "groups" else None,
            write_page_checksum=True,
        )


def _described(path: Path, before: dict[str, Any]) -> dict[str, Any]:
    """What a record says of a Parquet file; rows as before where it can no longer be opened."""
    data = path.read_bytes()
    found = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    try:
        footer = pq.ParquetFile(path).metadata
        groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        return found | {"rows": sum(groups), "row_groups": groups}
    except (pa.ArrowException, OSError, ValueError):
        return found | {"rows": before["rows"], "row_groups": before["row_groups"]}


_PARQUET = st.one_of(
    st.tuples(_PICK, BYTE_EDITS, st.just("bytes"), st.booleans()),
    st.tuples(_PICK, TABLE_EDITS, st.sampled_from(["rows", "rows", "groups"]), st.just(True)),
    st.tuples(_PICK, BYTE_EDITS, st.just("other"), st.just(True)),
)

_PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}
_KINDS = (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet", ".arrow")


def _damage_data(world: World, drawn: Any) -> list[Words]:
    """Make a file of records, in any of the formats that are read.

    The records are edited, packed, and then their bytes are edited.
    """
    which, edits, kind, packed, more = drawn
    name = sorted(RECORDS)[which % len(RECORDS)]
    records = edited_json(RECORDS[name], edits)
    data = _as_file(records, kind)
    packed = "" if kind in (".parquet", ".arrow") else packed
    data = _PACKED[packed](data)
    data = edited_bytes(data, more) if more else data
    source = world.work / f"damaged{kind}{packed}"
    source.write_bytes(data)
    recipe = [world.work / f"data-{name}.yaml", "--set", f"data.source={source}"]
    return [
        words_of("plan", *recipe, "--json"),
        words_of("run", *recipe, "--quiet", "--until", "data"),
        words_of("run", *recipe, "--quiet"),
    ]


def _as_file(records: Any, kind: str) -> bytes:
    rows = records if isinstance(records, list) else [records]
    if kind == ".jsonl":
        return b"\n".join(json.dumps(row).encode() for row in rows)
    if kind == ".csv":
        out = io.StringIO()
        objects = [row for row in rows if isinstance(row, dict)]
        names = {name: None for row in objects for name in row}
        writer = csv.DictWriter(out, list(names))
        writer.writeheader()
        writer.writerows(objects)
        return out.getvalue().encode("utf-8", "surrogatepass")
    if kind in (".txt", ".md"):
        return repr(records).encode()
    if kind in (".parquet", ".arrow"):
        try:
            table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
            return _as_parquet(table) if kind == ".parquet" else _as_arrow(table)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):
            return as_json(records)
    return as_json(records)


def _as_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _as_arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _damage_import(world: World, drawn: Any) -> list[Words]:
    """Make a foreign table of ids and log-probabilities.

    It has edited rows as JSONL, or is an edited table as Parquet.
    """
    edits, table_edits = drawn
    rng = random.Random(0)
    rows = [_foreign_row(rng) for _ in range(6)]
    if table_edits is None:
        source = world.work / "foreign.jsonl"
        source.write_bytes(_as_file(edited_json(rows, edits), ".jsonl"))
    else:
        source = world.work / "foreign.parquet"
        table = edited_table(pa.Table.from_pylist(rows), table_edits)
        source.write_bytes(_as_parquet(table))
    words = words_of(
        *("import", source, world.work / "imported", "--targets-at", "next", "--quiet"),
        *("--tokenizer", world.teacher, "--teacher-name", "t"),
        *("--columns", "tokens=tokens,ids=ids,values=values"),
    )
    return [words, [*words, "--skip-bad"]]


def _foreign_row(rng: random.Random) -> dict[str, Any]:
    tokens = [1, *(rng.randrange(4, 24) for _ in range(6))]
    entries = [[following, 0, 3] for following in [*tokens[1:], 2]]
    return {"tokens": tokens, "ids": entries, "values": [[-0.5, -1.5, -2.5] for _ in tokens]}


def targets() -> dict[str, Target]:
    """Every target, by name."""
    store_records = ("commits/*/*.json", "snapshots/*.json", "inputs/*.json", "bindings/*/*.json")
    other_records = ("STORE.json", "teachers/*/*.json", "claims/*/*/*.json", "cache/*/*.json")
    recipe = st.one_of(
        st.tuples(st.just(0), MILD_EDITS, st.none()),
        st.tuples(st.just(0), MILD_EDITS, st.none()),
        st.tuples(_PICK, JSON_EDITS, st.none()),
        st.tuples(_PICK, st.none(), LINE_EDITS),
    )
    data = st.tuples(
        *(_PICK, JSON_EDITS, st.sampled_from(_KINDS), st.sampled_from(sorted(_PACKED))),
        st.one_of(st.none(), st.none(), BYTE_EDITS),
    )
    imported = st.one_of(st.tuples(JSON_EDITS, st.none()), st.tuples(st.none(), TABLE_EDITS))
    return {
        "recipe": Target(recipe, _damage_recipe),
        "recipe bytes": Target(st.tuples(_PICK, BYTE_EDITS), _damage_recipe_bytes),
        "records": _in_a_file(*(f"store/{name}" for name in store_records), commands=on_store),
        "other records": _in_a_file(
            *(f"store/{name}" for name in other_records), commands=on_store
        ),
        "run": _in_a_file("run/**/*.json", "stopped/**/*.json", commands=on_run),
        "manifest": _in_a_file("published-*/*/MANIFEST.json", commands=on_published),
        "published records": _in_a_file(
            *("published-*/*/PROVENANCE.json", "published-*/*/*/*.json"),
            "published-*/*/*/*/*.json",
            commands=on_published,
        ),
        "card": Target(
            st.one_of(
                st.tuples(_PICK, LINE_EDITS, st.just(True)),
                st.tuples(_PICK, BYTE_EDITS, st.just(False)),
            ),
            _damage_card,
        ),
        "shards": Target(_PARQUET, _damage_shard),
        "published files": Target(_PARQUET, _damage_published_file),
        "data": Target(data, _damage_data),
        "import": Target(imported, _damage_import),
    }
