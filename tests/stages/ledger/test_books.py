"""The ledger agrees with its definition, written here row by row.

It survives every way that prompts and settings move.
"""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stillroom.stages.ledger.books import Books, Ledger, Pending
from stillroom.stages.ledger.generations import generation_ledger, pending_generations
from stillroom.stages.ledger.requests import (
    generation_key,
    sampling_id,
    sampling_settings,
    tokens_key,
)
from stillroom.stages.ledger.splits import choose_snapshots
from stillroom.stages.ledger.targets import (
    choose_generations,
    pending_targets,
    target_ledger,
    target_rows,
    text_rows,
)
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.targets.spec import target_bytes
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.snapshots.snapshot import Snapshot, _named, _snapshot_id, save_snapshot
from stillroom.storage.store import segments
from stillroom.storage.store.bindings import Binding
from stillroom.storage.store.index import Index
from stillroom.storage.store.store import CommitLimits, Store

AUTHOR, TEACHER, VOCABULARY, CONTEXT = "a" * 32, "t" * 32, 24, 64


def recipe(root: Path, **sections: dict[str, Any] | None) -> Recipe:
    tree: dict[str, Any] = {
        "run": {"dir": "unused"},
        "storage": {"dir": str(root)},
        "teacher": {"model": "unused"},
        "student": {"config": {}},
        "data": {"source": "unused", "format": "prompt"},
        "generate": {"max_tokens": 8, "samples": 2},
        "score": {"k": 4},
        "train": {"epochs": 1},
    }
    for name, section in sections.items():
        tree[name] = section if section is None else tree.get(name, {}) | section
    return Recipe.model_validate(tree)


def prompt_key(name: Any) -> bytes:
    return content_key("prompt", name=name)


def inputs(names: list[Any], held_out: int = 0) -> pa.Table:
    keys = [prompt_key(n) for n in names]
    test = set(sorted(set(keys))[:held_out])
    return pa.table(
        {
            "key": pa.array(
                [content_key("row", n=n, i=i) for i, n in enumerate(names)], pa.binary(16)
            ),
            "prompt_key": pa.array(keys, pa.binary(16)),
            "split": ["test" if k in test else "train" for k in keys],
            "windows": pa.array([1] * len(keys), pa.int32()),
            "first": [k not in keys[:i] for i, k in enumerate(keys)],
        }
    )


def add_prompts(store: Store, names: list[Any]) -> None:
    with store.writer("prompts", about={}) as writer:
        for name in names:
            row = {
                "key": prompt_key(name),
                "prompt_key": prompt_key(name),
                "format": "prompt",
                "text": str(name),
            }
            writer.add(row | {"source": "test"})


def generation(
    r: Recipe, name: Any, sample: int, *, tokens: int, reason: str = "stop", author: str = AUTHOR
) -> dict:
    assert r.generate is not None
    sampling = sampling_id(author, sampling_settings(r.generate, r.data))
    ids = [
        4 + byte % 20
        for byte in (prompt_key(name) + content_key("text", name=name, sample=sample))[
            13 : 16 + tokens
        ]
    ]
    reuse = generation_key(sampling, prompt_key(name), sample)
    return {
        "key": content_key(
            "generations", reuse_key=reuse, max_tokens=r.generate.max_tokens, tokens=tokens
        ),
        "reuse_key": reuse,
        "prompt_key": prompt_key(name),
        "author_id": author,
        "sampling_id": sampling,
        "sample_index": sample,
        "tokens_key": tokens_key(ids, 3),
        "token_ids": ids,
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "text": "",
        "finish_reason": reason,
        "max_tokens": r.generate.max_tokens,
        "row_seed": 0,
    }


def about(r: Recipe, author: str = AUTHOR) -> dict[str, Any]:
    assert r.generate is not None
    return {
        "author_id": author,
        "settings": sampling_settings(r.generate, r.data) | {"max_tokens": 8, "engine": "hf"},
    }


def write(
    store: Store, r: Recipe, rows: list[dict], author: str = AUTHOR, commit_rows: int = 3
) -> None:
    with store.writer(
        "generations", about=about(r, author), limits=CommitLimits(rows=commit_rows)
    ) as writer:
        for row in rows:
            writer.add(row)


def reject(store: Store, r: Recipe, name: Any, sample: int, reason: str) -> None:
    assert r.generate is not None
    with store.writer("rejects", about={}) as writer:
        writer.add(
            {
                "key": content_key("r", name=name, sample=sample),
                "stage": "generate",
                "prompt_key": prompt_key(name),
                "context_id": sampling_id(AUTHOR, sampling_settings(r.generate, r.data)),
                "sample_index": sample,
                "limit_tokens": CONTEXT,
                "reason": reason,
                "message": "",
                "attempts": 1,
            }
        )


def books_of(store: Store, r: Recipe, names: list[Any], held_out: int = 0) -> Books:
    return Books(store, r, data_id="unrecorded", surveyed=inputs(names, held_out))


def generate_books(store: Store, r: Recipe, names: list[Any]) -> tuple[Ledger, Pending]:
    with books_of(store, r, names) as books:
        ledger = generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
        return ledger, pending_generations(books, author_id=AUTHOR)


@pytest.mark.parametrize(
    ("reason", "completion", "wanted", "context", "expected"),
    [
        ("stop", 5, 8, 100, True),
        ("stop", 8, 8, 100, True),
        ("stop", 9, 8, 100, False),  # would have been cut
        ("stop", 5, 8, 7, False),  # would have been cut by the context
        ("length", 8, 8, 100, True),
        ("length", 8, 9, 100, False),  # would have gone on
        ("length", 8, 7, 100, False),
        ("length", 6, 8, 9, True),  # the context cut it, and still does
        ("length", 6, 8, 10, False),  # the context has grown
    ],
)
def test_a_row_serves_what_would_have_come_out_the_same(
    tmp_path: Path, reason: str, completion: int, wanted: int, context: int, expected: bool
) -> None:
    store = Store.open(tmp_path, create=True)
    made, asked = recipe(tmp_path), recipe(tmp_path, generate={"max_tokens": wanted, "samples": 1})
    write(store, made, [generation(made, "p", 0, tokens=completion, reason=reason)])
    with books_of(store, asked, ["p"]) as books:
        ledger = generation_ledger(books, author_id=AUTHOR, context_tokens=context)
    assert (ledger.committed, ledger.tokens) == ((1, completion) if expected else (0, 0))
    assert ledger.why == ({} if expected else {"stored under another max_tokens": 1})


def test_it_agrees_with_its_definition_on_random_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same books come out as one loop gives.

    Rows, rejects and repeated prompts are random, with index segments of two commits.
    """
    monkeypatch.setattr(segments, "SEGMENT", 2)
    rng = random.Random()
    for trial in range(6):
        root = tmp_path / str(trial)
        store, r = Store.open(root, create=True), recipe(root)
        pool = [f"p{i}" for i in range(12)]
        names = [rng.choice(pool) for _ in range(16)]
        add_prompts(store, pool)
        rows = [
            generation(r, n, s, tokens=rng.choice([3, 8, 9]), reason=rng.choice(["stop", "length"]))
            for n in pool
            for s in range(2)
            if rng.random() < 0.6
        ]
        write(store, r, rows, commit_rows=rng.randrange(1, 5))
        refused = {(n, s) for n in pool for s in range(2) if rng.random() < 0.2}
        for name, sample in refused:
            reject(store, r, name, sample, "too_long")
        if rng.random() < 0.5:
            Index(store, write=True).close()
        served = {
            (row["prompt_key"], row["sample_index"])
            for row in rows
            if (
                row["completion_tokens"] <= 8
                if row["finish_reason"] == "stop"
                else row["completion_tokens"] == 8
            )
        }
        asked = [(n, s) for n in dict.fromkeys(names) for s in range(2)]
        left = [
            (n, s) for n, s in asked if (prompt_key(n), s) not in served and (n, s) not in refused
        ]
        ledger, pending = generate_books(store, r, names)
        assert ledger.committed == sum((prompt_key(n), s) in served for n, s in asked)
        rejected = [a for a in asked if a in refused and (prompt_key(a[0]), a[1]) not in served]
        assert ledger.rejected == Counter({"too_long": len(rejected)} if rejected else {})
        assert ledger.pending == len(pending) == len(left)
        assert ledger.planned == len(asked)
        found = [
            (q.prompt_key, q.sample_index) for block in pending.blocks for q in pending.read(block)
        ]
        assert found == [(prompt_key(n), s) for n, s in left]  # in the order of the source
        places = {q.prompt: q.prompt_key for block in pending.blocks for q in pending.read(block)}
        for (shard, row), key in places.items():
            assert next(iter(store.rows("prompts", {shard: [row]})))["prompt_key"] == key


def test_blocks_are_the_same_for_a_worker_that_comes_later(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    names = [f"p{i}" for i in range(600)]
    add_prompts(store, names)
    _, before = generate_books(store, r, names)
    write(store, r, [generation(r, n, 0, tokens=3) for n in names[100:350]], commit_rows=100)
    _, after = generate_books(store, r, names)
    assert len(before.blocks) > 60
    whole = {block: [q.reuse_key for q in before.read(block)] for block in before.blocks}
    for block in after.blocks:
        mine = [q.reuse_key for q in after.read(block)]
        assert mine == [key for key in whole[block] if key in set(mine)]
    assert sum(len(after.read(b)) for b in after.blocks) == 350


def test_moved_extended_and_repeated_prompts_and_other_columns_miss_nothing(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    names = [f"p{i}" for i in range(10)]
    add_prompts(store, [*names, "new"])
    write(store, r, [generation(r, n, s, tokens=5) for n in names for s in range(2)])
    moved = list(reversed(names))
    for wanted, missing in ((moved, 0), (moved + names, 0), (["new", *names], 2), (names[:3], 0)):
        ledger, pending = generate_books(store, r, wanted)
        assert ledger.why == ({"new": missing} if missing else {})
        assert len(pending) == missing
    more = recipe(tmp_path, generate={"samples": 3})
    assert generate_books(store, more, names)[0].why == {"new": 10}
    assert generate_books(store, recipe(tmp_path, generate={"samples": 1}), names)[0].pending == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"temperature": 0.5}, "stored with other settings (temperature)"),
        ({"seed": 3}, "stored with other settings (seed)"),
        (
            {"top_p": 0.9, "stop": ["."]},
            "stored with other settings (end of stopped ids, stop, top p)",
        ),
    ],
)
def test_another_sampling_setting_is_a_miss_and_says_so(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    add_prompts(store, ["p", "q"])
    write(store, r, [generation(r, "p", s, tokens=5) for s in range(2)])
    ledger, pending = generate_books(store, recipe(tmp_path, generate=change), ["p", "q"])
    assert ledger.why == {reason: 2, "new": 2}
    assert len(pending) == 4


def test_another_author_is_a_miss_and_says_what_differs(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    other = "b" * 32
    store.put_teacher(other, {"identity.json": b'{"weights": {"a": "1"}, "tokenizer": "t"}'})
    write(store, r, [generation(r, "p", s, tokens=5, author=other) for s in range(2)], author=other)
    with books_of(store, r, ["p"]) as books:
        mine = {"weights": {"a": "2"}, "tokenizer": "t"}
        ledger = generation_ledger(
            books, author_id=AUTHOR, context_tokens=CONTEXT, author_parts=mine
        )
    assert ledger.why == {"stored from another author (other weights)": 2}


def target(
    row: dict[str, Any], *, kind: str = "topk", k: int = 4, bits: int = 10, teacher: str = TEACHER
) -> dict:
    import numpy as np

    from stillroom.storage.tables.soft_targets import SoftTargets

    n = row["completion_tokens"]
    k = VOCABULARY if kind == "full" else k
    logprobs = np.full((n, k), -np.log(VOCABULARY), np.float32)
    with np.errstate(divide="ignore"):
        tail = np.full(n, np.log(1 - k / VOCABULARY), np.float32)
    flat = np.full(n, -np.log(VOCABULARY), np.float32)
    ids = None if kind == "full" else np.tile(np.arange(k, dtype=np.int32), (n, 1))
    targets = SoftTargets(
        ids=ids, logprobs=logprobs, tail_logprob=tail, token_logprob=flat, entropy=-flat
    )
    return {
        "key": content_key("target", of=row["key"], kind=kind, k=k, bits=bits, teacher=teacher),
        "reuse_key": content_key("t", teacher=teacher, tokens=row["tokens_key"]),
        "tokens_key": row["tokens_key"],
        "generation_key": row["key"],
        "prompt_key": row["prompt_key"],
        "teacher_id": teacher,
        "kind": kind,
        "token_ids": row["token_ids"],
        "span_start": 3,
        "label": None,
    } | targets.columns(bits)


def score(store: Store, rows: list[dict], teacher: str = TEACHER) -> None:
    whose = {
        "teacher_id": teacher,
        "tokenizer_id": "k",
        "vocab_size": VOCABULARY,
        "mantissa_bits": 23,
    }
    with store.writer("soft_targets", about=whose, limits=CommitLimits(rows=2)) as writer:
        for row in rows:
            writer.add(row)


def score_books(
    store: Store, r: Recipe, names: list[Any], held_out: int = 1
) -> tuple[Ledger, list[Any], pa.Table]:
    with books_of(store, r, names, held_out) as books:
        generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
        choose_generations(books, author_id=AUTHOR)
        ledger = target_ledger(books, teacher_id=TEACHER, vocab_size=VOCABULARY, limit=CONTEXT)
        pending = pending_targets(books, teacher_id=TEACHER, vocab_size=VOCABULARY)
        wanted = [q for block in pending.blocks for q in pending.read(block)]
        return ledger, wanted, target_rows(books)


def test_of_rows_with_spans_the_scored_tokens_are_asked_for_and_counted(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    add_prompts(store, ["p", "q"])
    whole, spanned = (generation(r, name, 0, tokens=8) for name in "pq")
    spans = np.array([[3, 2], [8, 1]], np.int32)
    key = tokens_key(spanned["token_ids"], 3, spans)
    assert key != spanned["tokens_key"] == tokens_key(spanned["token_ids"], 3, np.array([[3, 8]]))
    spanned |= {"spans": spans.reshape(-1), "tokens_key": key}
    write(store, r, [whole, spanned])
    ledger, asked, _ = score_books(store, r, ["p", "q"], held_out=0)
    assert (ledger.pending, ledger.tokens_to_do) == (2, 8 + 3)
    assert ledger.bytes_to_do == int(8 * target_bytes(asked[0].kept)) + int(
        3 * target_bytes(asked[0].kept)
    )
    by_prompt = {request.prompt_key: request for request in asked}
    assert by_prompt[prompt_key("q")].spans.tolist() == [[3, 2], [8, 1]]
    assert by_prompt[prompt_key("q")].span_tokens == 3
    assert by_prompt[prompt_key("p")].spans.tolist() == [[3, 8]]
    with books_of(store, r, ["p", "q"], 0) as books:
        generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
        choose_generations(books, author_id=AUTHOR)
        counted = text_rows(books).sort_by("scored").select(["tokens", "scored"]).to_pylist()
    assert counted == [{"tokens": 11, "scored": 3}, {"tokens": 11, "scored": 8}]
    # A row of other spans of the same text is not the one that is asked for.
    others = target(spanned | {"completion_tokens": 3, "tokens_key": whole["tokens_key"]})
    score(store, [others | {"spans": [3, 2, 8, 1], "key": b"o" * 16}])
    assert score_books(store, r, ["q"], held_out=0)[0].pending == 1
    score(store, [target(spanned | {"completion_tokens": 3}) | {"spans": [3, 2, 8, 1]}])
    assert score_books(store, r, ["q"], held_out=0)[0].pending == 0


def test_a_smaller_k_is_served_a_larger_one_or_more_bits_are_not(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    names = [f"p{i}" for i in range(5)]
    rows = {n: generation(r, n, 0, tokens=5) for n in names}
    write(store, r, list(rows.values()))
    test = min(names, key=prompt_key)
    score(store, [target(row, kind="full" if n == test else "topk") for n, row in rows.items()])

    def again(**sections: Any) -> Ledger:
        return score_books(store, recipe(tmp_path, generate={"samples": 1}, **sections), names)[0]

    assert again().committed == again(score={"k": 2}).committed == 5
    assert again(score={"k": 2}).tokens == 25
    assert again(score={"k": 5}).why == {
        "stored with fewer entries": 4
    }  # the held-out row is whole
    assert again(storage={"mantissa_bits": 11}).why == {"stored with fewer bits": 5}
    _, _, chosen = score_books(store, recipe(tmp_path, generate={"samples": 1}), names)
    assert sorted(chosen["held_out"].to_pylist()) == [False] * 4 + [True]


def test_of_several_rows_the_one_that_covers_best_is_chosen(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    row = generation(r, "p", 0, tokens=5)
    write(store, r, [row])
    score(
        store,
        [
            target(row, kind="full"),
            target(row, k=8),
            target(row, k=4, bits=23),
            target(row, k=4),
            target(row),
        ],
    )
    _, wanted, chosen = score_books(store, r, ["p"], held_out=0)
    assert wanted == []
    (place,) = chosen["place"].to_pylist()
    sha256 = {c.seq: c.shard.sha256 for c in store.commits("soft_targets")}[place >> 32]
    best = next(iter(store.rows("soft_targets", {sha256: [place & 0xFFFFFFFF]})))
    assert (best["kind"], best["k"], best["mantissa_bits"]) == ("topk", 4, 10)


def test_equal_tokens_are_scored_once_and_what_is_judged_is_not_trained_on(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    names = ["p", "q"]
    test = min(names, key=prompt_key)
    rows = [generation(r, n, s, tokens=5) for n in names for s in range(2)]
    for row in rows:  # all four the same tokens
        row |= {"token_ids": rows[0]["token_ids"], "tokens_key": rows[0]["tokens_key"]}
    write(store, r, rows)
    ledger, wanted, _ = score_books(store, r, names)
    assert ledger.planned == len(wanted) == 1
    assert ledger.equal == 3
    assert (wanted[0].kept.kind, wanted[0].prompt_key) == ("full", prompt_key(test))
    assert wanted[0].token_ids.tolist() == rows[0]["token_ids"]
    with books_of(store, r, names, held_out=1) as books:
        generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
        choose_generations(books, author_id=AUTHOR)
        assert text_rows(books)["held_out"].to_pylist() == [True, True]


def test_held_out_rows_are_judged_up_to_the_budget_and_one_at_least(tmp_path: Path) -> None:
    store, names = Store.open(tmp_path, create=True), [f"p{i}" for i in range(6)]
    r = recipe(tmp_path, generate={"samples": 1})
    write(store, r, [generation(r, n, 0, tokens=5) for n in names])
    for budget, judged in ((1, 1), (5, 1), (11, 2), (1000, 6)):
        small = recipe(tmp_path, generate={"samples": 1}, evaluate={"tokens": budget})
        _, wanted, _ = score_books(store, small, [*names, "other"], held_out=7)
        assert sum(q.kept.kind == "full" for q in wanted) == judged


def test_another_teacher_is_a_miss_and_says_so(tmp_path: Path) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    row = generation(r, "p", 0, tokens=5)
    write(store, r, [row])
    score(store, [target(row, teacher="u" * 32)], teacher="u" * 32)
    assert score_books(store, r, ["p"], held_out=0)[0].why == {
        "stored from another teacher (uuuuuuuu)": 1
    }


def test_a_condition_on_generations_chooses(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    r = recipe(tmp_path, generate={"samples": 1}, select={"where": "completion_tokens > 4"})
    write(store, r, [generation(r, n, 0, tokens=3 + i) for i, n in enumerate("pqrs")])
    assert score_books(store, r, list("pqrs"), held_out=0)[0].planned == 2


@pytest.mark.parametrize(
    "where",
    ["text = (SELECT content FROM read_text('/etc/hostname'))", "true; INSTALL httpfs"],
)
def test_a_condition_of_a_stranger_sees_the_store_alone(tmp_path: Path, where: str) -> None:
    """`tests/storage/store/test_sql_walls.py` has the other ways out; this is the same door."""
    store = Store.open(tmp_path, create=True)
    r = recipe(tmp_path, generate={"samples": 1}, select={"where": where})
    write(store, r, [generation(r, "p", 0, tokens=3)])
    with pytest.raises(UsageError, match=r"^select.where: query: .*(disabled by|one SELECT)"):
        score_books(store, r, ["p"], held_out=0)


@pytest.mark.parametrize("change", ["retired", "damaged", "more"])
def test_a_segment_is_used_only_for_the_commits_it_was_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 2)
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path, generate={"samples": 1})
    names = [f"p{i}" for i in range(8)]
    write(store, r, [generation(r, n, 0, tokens=5) for n in names], commit_rows=2)
    Index(store, write=True).close()
    files = sorted((tmp_path / "cache/index/generations").iterdir())
    assert len(files) == 2
    expected = 8
    if change == "retired":
        store.retire(store.commits("generations")[1], reason="test")
        expected = 6
    elif change == "damaged":
        data = bytearray(files[0].read_bytes())
        data[len(data) // 2] ^= 1
        files[0].write_bytes(data)
    else:
        write(store, r, [generation(r, "p8", 0, tokens=5)])
        names, expected = [*names, "p8"], 9
    ledger, _ = generate_books(Store.open(tmp_path), r, names)
    assert ledger.committed == expected


def test_of_two_files_of_one_segment_the_sound_one_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 2)
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    write(store, r, [generation(r, n, 0, tokens=5) for n in "pqrs"], commit_rows=2)
    Index(store, write=True).close()
    (file,) = (tmp_path / "cache/index/generations").iterdir()
    for digest in ("0" * 32, "f" * 32):
        file.with_name(f"{file.name.split('-')[0]}-{digest}.parquet").write_bytes(b"damaged")
    found = segments.Segments(store.files, "generations").find(store.commits("generations"))
    assert found == f"cache/index/generations/{file.name}"


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_list_of_inputs_stops_the_plan(tmp_path: Path, damage: str) -> None:
    store, r = Store.open(tmp_path, create=True), recipe(tmp_path)
    store.put_inputs("d", inputs(["p", "q"]), {})
    (file,) = tmp_path.glob("data/inputs/*/*.parquet")
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1
    file.write_bytes(data)
    if damage == "missing":
        file.unlink()
    with pytest.raises(IntegrityError, match="missing or damaged"):
        Books(Store.open(tmp_path), r, data_id="d")


def test_a_condition_is_not_asked_of_damaged_rows(tmp_path: Path) -> None:
    store = Store.open(tmp_path, create=True)
    r = recipe(tmp_path, generate={"samples": 1}, select={"where": "text = ''"})
    write(store, r, [generation(r, "p", 0, tokens=3)])
    (file,) = tmp_path.glob("data/generations/*/*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    with books_of(store, r, ["p"]) as books:
        generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
        file.write_bytes(data)
        with pytest.raises(IntegrityError, match="damaged"):
            choose_generations(books, author_id=AUTHOR)


@pytest.mark.parametrize("scored", [True, False], ids=["scored", "black box"])
def test_the_order_of_samples_is_that_of_the_requests_whoever_committed_when(
    tmp_path: Path, scored: bool
) -> None:
    names = [f"p{i}" for i in range(12)]
    binding = Binding(
        teacher_id=TEACHER,
        author_id=AUTHOR,
        data_id="d",
        vocab_size=VOCABULARY,
        context_tokens=CONTEXT,
        author_context_tokens=CONTEXT,
    )
    orders = []
    for number, commit_rows in enumerate((24, 5, 1)):
        r = recipe(tmp_path / str(number), **({} if scored else {"score": None}))
        store = Store.open(r.storage.dir, create=True)
        rows = [generation(r, n, s, tokens=3 + i % 4) for i, n in enumerate(names) for s in (0, 1)]
        random.Random(number).shuffle(rows)
        write(store, r, rows, commit_rows=commit_rows)
        score(store, [target(row) for row in rows] if scored else [])
        snapshots = []
        for _ in range(2):
            with books_of(store, r, names) as books:
                generation_ledger(books, author_id=AUTHOR, context_tokens=CONTEXT)
                choose_generations(books, author_id=AUTHOR)
                if scored:
                    target_ledger(books, teacher_id=TEACHER, vocab_size=VOCABULARY, limit=CONTEXT)
                snapshots.append(choose_snapshots(books, binding)["train"])
            # A choice that was made before there was an order keeps that of its commits.
            save_snapshot(store, replace(snapshots[0], id=plain_id(snapshots[0]), order=None))
        ordered, earlier = snapshots
        assert (ordered.order is None, earlier.order, earlier.id) == (
            False,
            None,
            plain_id(ordered),
        )
        reader = SnapshotReader(store, ordered, ["prompt_key", "token_ids"])
        read = reader.samples(seed=1, start=0, stop=2 * ordered.rows)
        orders.append([(row["prompt_key"], row["token_ids"].tolist()) for row in read])
        if not scored:
            keys = [row["prompt_key"] for row in rows_in_order(store, ordered)]
            assert keys == [prompt_key(name) for name in names for _ in range(2)]
    assert orders[0] == orders[1] == orders[2]


def plain_id(snapshot: Snapshot) -> str:
    """What a choice of rows is called without an order."""
    return _snapshot_id(snapshot.table, _named(snapshot.shards))


def rows_in_order(store: Store, snapshot: Snapshot) -> list[dict[str, Any]]:
    """The rows in the order in which they were asked for."""
    places = {shard.sha256: shard.rows for shard in snapshot.shards}
    assert snapshot.order is not None
    rows = list(store.rows(snapshot.table, places))
    return [rows[number] for number in snapshot.order.samples]
