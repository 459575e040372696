"""Which committed rows a recipe trains on, validates on and is judged on: a snapshot of each."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...storage.errors import UsageError
from ...storage.snapshots.asked import in_asked_order
from ...storage.snapshots.snapshot import Snapshot, is_kept, load_snapshot, make_snapshot
from ...storage.store.bindings import Binding
from ...storage.tables.schema import TableName
from ..recipe.features import learnt
from ..recipe.fields import Split
from .books import Books
from .targets import feature_places, target_rows, text_rows
from .teachers import sample_rows


def choose_snapshots(books: Books, binding: Binding) -> dict[Split, Snapshot]:
    """Split what is done into train, validation and test.

    No prompt that a pinned snapshot trains on is judged on.

    Validation takes the training prompts with the smallest hashes, a random sample; only where the
    recipe asks for it.
    """
    table: TableName = "generations" if books.recipe.score is None else "soft_targets"
    rows = text_rows(books) if books.recipe.score is None else target_rows(books)
    return _named(books, binding, table, _split(books, binding, table, rows))


def choose_samples(
    books: Books, binding: Binding, teachers: int
) -> tuple[dict[Split, Snapshot], dict[Split, Snapshot]]:
    """Split the same of several teachers, after `keep_scored` of each.

    There is one row a text, and beside it are the others' rows of these texts.

    The first has the row of each text's first teacher, so that one text is one sample.
    """
    parts = _split(books, binding, "soft_targets", sample_rows(books, teachers))
    partners: dict[Split, Snapshot] = {}
    for name, part in parts.items():
        others = part["others"].combine_chunks().flatten()
        if len(others):
            places = books.index.places("soft_targets", others.to_numpy(zero_copy_only=False))
            about = {"data_id": binding.data_id, "partners_of": name}
            partners[name] = make_snapshot(books.store, "soft_targets", places, about)
    return _named(books, binding, "soft_targets", parts), partners


def _split(
    books: Books, binding: Binding, table: TableName, rows: pa.Table
) -> dict[Split, pa.Table]:
    """The rows of each split that has some."""
    validation = _validation_prompts(books, rows)
    pinned = pc.is_in(rows["prompt_key"], _pinned_prompts(books, binding, table))
    aside = pc.and_(pc.invert(rows["held_out"]), pc.is_in(rows["prompt_key"], validation))
    parts: dict[Split, pa.Table] = {
        "train": rows.filter(pc.invert(pc.or_(rows["held_out"], aside))),
        "validation": rows.filter(pc.and_(aside, pc.invert(pinned))),
        "test": rows.filter(pc.and_(rows["held_out"], pc.invert(pinned))),
    }
    return {name: part for name, part in parts.items() if part.num_rows}


def _named(
    books: Books, binding: Binding, table: TableName, parts: dict[Split, pa.Table]
) -> dict[Split, Snapshot]:
    """A snapshot of each split; each knows the ids of all."""
    found = {name: _snapshot(books, binding, table, name, part) for name, part in parts.items()}
    splits = {name: snapshot.id for name, snapshot in found.items()}
    return {
        name: replace(snapshot, about={**snapshot.about, "splits": splits})
        for name, snapshot in found.items()
    }


def choose_features(books: Books, binding: Binding) -> Snapshot | None:
    """The features that the loss needs of the rows to train on, or None where it needs none.

    They get a snapshot of their own: what trains from them finds them, and nobody sweeps them away.
    """
    losses = books.recipe.loss.features
    if books.recipe.score is None or books.recipe.train is None:
        return None
    if not learnt(losses, books.recipe.score.features):
        return None
    rows = feature_places(books)
    if not rows.num_rows:
        return None
    about = {
        "teacher_id": binding.teacher_id,
        "data_id": binding.data_id,
        "features": [asdict(one) for one in learnt(losses, books.recipe.score.features)],
    }
    places = books.index.places("features", rows["place"].to_numpy())
    return make_snapshot(books.store, "features", places, about)


def _snapshot(
    books: Books, binding: Binding, table: TableName, split: Split, rows: pa.Table
) -> Snapshot:
    tokens = rows["tokens"].to_numpy().astype(np.int64)
    lengths = {
        "samples": rows.num_rows,
        "tokens": int(tokens.sum()),
        "scored_tokens": int(rows["scored"].to_numpy().astype(np.int64).sum()),
        "longest": int(tokens.max()),
    }
    about: dict[str, Any] = {
        "split": split,
        "teacher_id": binding.teacher_id,
        "data_id": binding.data_id,
        "lengths": lengths,
        "shortest": int(tokens.min()),
    }
    asked = rows.select(["number", "place", "bytes"]).sort_by("number")
    places = asked["place"].to_numpy()
    found = make_snapshot(books.store, table, books.index.places(table, places), about)
    if found.rows < len(places) or is_kept(books.store, found):
        # It was made before there was an order, and what it taught is kept under its name.
        return found
    samples = _numbers(books, table, found, places)
    return in_asked_order(found, samples, asked["bytes"].to_numpy())


def _numbers(books: Books, table: TableName, snapshot: Snapshot, places: np.ndarray) -> np.ndarray:
    """[N] what number the row at each place has in a snapshot, shard after shard."""
    counts = [len(shard.rows) for shard in snapshot.shards]
    firsts = dict(
        zip((shard.sha256 for shard in snapshot.shards), np.cumsum([0, *counts]), strict=False)
    )
    rows = {shard.sha256: shard.rows for shard in snapshot.shards}
    by_place = np.argsort(places)
    commits = places[by_place] >> 32
    numbers = np.empty(len(places), np.int64)
    for mine in np.split(by_place, np.flatnonzero(np.diff(commits)) + 1):
        sha256 = books.index.commit(table, int(places[mine[0]] >> 32)).shard.sha256
        at = np.searchsorted(rows[sha256], places[mine] & 0xFFFFFFFF)
        numbers[mine] = firsts[sha256] + at
    return numbers


def _validation_prompts(books: Books, rows: pa.Table) -> pa.Array:
    train = books.recipe.train
    count = train.validation_prompts if train and train.evaluate_every_tokens is not None else 0
    prompts = pc.unique(rows.filter(pc.invert(rows["held_out"]))["prompt_key"])
    return prompts.take(pc.array_sort_indices(prompts)[:count])


def _pinned_prompts(books: Books, binding: Binding, table: TableName) -> pa.Array:
    """Prompts in the snapshot that `train.snapshot` names; none if it names none."""
    name = books.recipe.train.snapshot if books.recipe.train else None
    if name is None:
        return pa.array([], pa.binary(16))
    snapshot = load_snapshot(books.store, name)
    teacher = snapshot.about.get("teacher_id")
    if snapshot.table != table or teacher != binding.teacher_id:
        raise UsageError(
            f"train.snapshot: {snapshot.id} holds {snapshot.table} of teacher {teacher}; this "
            f"recipe trains on {table} of {binding.teacher_id}. Name a snapshot of this teacher, "
            "or leave it out."
        )
    shards = ((books.store.shard(table, shard.sha256), shard.rows) for shard in snapshot.shards)
    keys = [file.select(rows, ["prompt_key"])["prompt_key"] for file, rows in shards]
    return pc.unique(
        pa.chunked_array([chunk for key in keys for chunk in key.chunks], pa.binary(16))
    )
