"""A training reads no shard whose rows cannot be right, wherever in its snapshot.

A machine asks each shard once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from planting import copied, planted, rows_of, unchecked_writer
from tiny_jobs import scored_store
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress, make_job, make_recipe, make_store, random_texts

from stillroom.stages.audit import every_row
from stillroom.stages.evaluate import stage as evaluate
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.keys import content_key
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.soft_targets import SoftTargets

SHARDS, OF_SHARD = 9, 8
SHARD, BAD = 3, 5
"""The audit looks at eight rows of the shards 0, 2, 5 and 8."""
VOCABULARY = 32
SCORE: dict[str, dict[str, Any]] = {
    "topk": {"k": 6},
    "topp": {"targets": "topp", "p": 0.8, "k": 12},
    "sampled": {"targets": "sampled", "rounds": 8},
    "full": {"targets": "full"},
}

Row = dict[str, Any]
Change = Callable[[Row], Row]


@dataclass(frozen=True)
class World:
    """Rows of one kind in shards, scored by a tiny teacher."""

    teacher: Path
    store: Store
    kind: str

    def job(self, folder: Path, shards: Sequence[int] = range(SHARDS), **how: Any) -> Job:
        """To train a few steps on some shards."""
        settings = {"tokens": 60, "learning_rate": 1e-3} | how.pop("train", {})
        score = SCORE[self.kind]
        recipe = make_recipe(self.store, self.teacher, score=score, train=settings)
        commits = self.store.commits("soft_targets")
        places = {commits[n].shard.sha256: range(OF_SHARD) for n in shards}
        snapshot = make_snapshot(self.store, "soft_targets", places, {})
        save_snapshot(self.store, snapshot)
        return make_job(recipe, folder, train=snapshot.id, test=snapshot.id, **how)

    def place(self, shard: int) -> str:
        """Where the row is that is changed in a shard, for a pattern."""
        info = self.store.commits("soft_targets")[shard].shard
        (row,) = self.store.rows("soft_targets", {info.sha256: [BAD]}, ["key"])
        return rf"{info.name}: row {BAD} \({row['key'].hex()}\): "


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A teacher, and the whole distribution of each row."""
    folder = tmp_path_factory.mktemp("whole")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
    texts = random_texts(SHARDS * OF_SHARD, longest=12)
    return World(teacher, make_store(folder / "store", teacher, texts=texts, k=None), "full")


def with_faults(whole: World, root: Path, kind: str, changes: Sequence[Change]) -> World:
    """The rows as another kind.

    After the first `SHARD` shards comes one with each fault, sealed.
    """
    store = copied(whole.store, root, lambda row: row, tables=("generations",))
    commits = whole.store.commits("soft_targets")
    about = whole.store.shard("soft_targets", commits[0].shard.sha256).about
    about = {n: v for n, v in about.items() if n not in ("format_version", "table", "statistics")}
    rows = [of_kind(row, kind) for row in rows_of(whole.store)]
    shards = [rows[start : start + OF_SHARD] for start in range(0, len(rows), OF_SHARD)]
    faulty = []
    for number, change in enumerate(changes):
        one = [
            row | {"key": content_key("fault", of=row["key"], number=number)}
            for row in shards[SHARD]
        ]
        faulty.append([*one[:BAD], change(one[BAD]), *one[BAD + 1 :]])
    limits = CommitLimits(rows=OF_SHARD)
    with store.writer("soft_targets", about=about, limits=limits) as writer:
        for row in chain(*shards[:SHARD], *faulty, *shards[SHARD:]):
            writer.add(row)
    return World(whole.teacher, store, kind)


def of_kind(row: Row, kind: str) -> Row:
    """A row of whole distributions as one of another kind."""
    if kind == "full":
        return row
    teacher = SoftTargets.from_row(row)
    assert teacher.logprobs is not None
    order = np.argsort(-teacher.logprobs, axis=1).astype(np.int32)
    ordered = np.take_along_axis(teacher.logprobs, order, axis=1)
    n, k = len(ordered), SCORE[kind].get("k", 8)
    entries = np.full(n, k)
    if kind == "topp":
        entries = np.clip((np.exp(ordered).cumsum(axis=1) < 0.8).sum(axis=1) + 1, 1, k)
    if kind == "sampled":
        rng = np.random.default_rng(row["token_ids"])
        drawn = np.stack(
            [rng.multinomial(k, p / p.sum()) for p in np.exp(teacher.logprobs.astype(np.float64))]
        )
        order = np.argsort(-drawn, axis=1, kind="stable").astype(np.int32)
        entries = (drawn > 0).sum(axis=1)
    width = int(entries.max())
    used = np.arange(width) < entries[:, None]
    found: dict[str, Any] = {
        "ids": np.where(used, order[:, :width], -1).astype(np.int32),
        "entries": None if kind == "topk" else entries.astype(np.int32),
    }
    if kind == "sampled":
        counts = np.take_along_axis(drawn, order, axis=1)[:, :width].astype(np.int32)
        found |= {"counts": counts, "logprobs": None, "tail_logprob": None}
    else:
        rest = np.where(np.arange(VOCABULARY) < entries[:, None], 0, np.exp(ordered)).sum(axis=1)
        kept = np.where(used, ordered[:, :width], -np.inf).astype(np.float32)
        found |= {"logprobs": kept, "tail_logprob": np.log(rest).astype(np.float32)}
    columns = replace(teacher, **found).columns(23) | {"kind": kind, "k": k}
    if kind == "topp":
        columns |= {"p": 0.8, "k_min": 1}
    if kind == "sampled":
        columns |= {"draw": "multinomial", "proposal": 1.0}
    return row | columns


def number(name: str, value: float, at: int = 1) -> Change:
    def change(row: Row) -> Row:
        values = row[name].copy()
        values[at] = value
        return row | {name: values}

    return change


FAULTS: dict[str, tuple[str, Change]] = {
    "an id twice": ("topk topp sampled", lambda r: number("ids", r["ids"][0])(r)),
    "an id of nobody": ("topk topp sampled", number("ids", VOCABULARY)),
    "an id below 0": ("topk topp sampled", number("ids", -2)),
    "log-probability + 5": ("topk topp full", lambda r: r | {"logprobs": r["logprobs"] + 5}),
    "log-probability of the token + 5": (
        "topk topp sampled full",
        lambda r: r | {"token_logprob": r["token_logprob"] + 5},
    ),
    "tail + 50": ("topk topp", lambda r: r | {"tail_logprob": r["tail_logprob"] + 50}),
    "NaN": ("topk topp full", number("logprobs", np.nan)),
    "NaN of the token": ("topk topp sampled full", number("token_logprob", np.nan)),
    "a token of nobody": ("topk topp sampled full", number("token_ids", VOCABULARY)),
    "a token below 0": ("topk topp sampled full", number("token_ids", -1)),
    "a target less": ("topk topp sampled full", lambda r: r | {"entropy": r["entropy"][1:]}),
    "a span that leaves the text": (
        "topk topp sampled full",
        lambda r: r | {"span_start": len(r["token_ids"])},
    ),
    "other counts": ("sampled", lambda r: r | {"counts": r["counts"] + 1}),
}


@pytest.mark.parametrize("kind", SCORE)
def test_a_shard_that_was_sealed_with_a_fault_trains_nobody(
    whole: World, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked_writer(monkeypatch)
    changes = [change for kinds, change in FAULTS.values() if kind in kinds.split()]
    world = with_faults(whole, tmp_path / "store", kind, changes)
    sound = [*range(SHARD), *range(SHARD + len(changes), SHARDS + len(changes))]
    for shard in range(SHARD, SHARD + len(changes)):
        read = sorted([*sound[:SHARD], shard, *sound[SHARD + 1 :]])
        job = world.job(tmp_path / "student", read)
        with pytest.raises(IntegrityError, match=world.place(shard)) as refused:
            train.run(job)
        assert refused.value.exit_code == 3
    with pytest.raises(IntegrityError, match=world.place(shard)):
        evaluate.run(job)
    with pytest.raises(IntegrityError, match=world.place(shard)):
        train.run(world.job(tmp_path / "baseline", read, arm="baseline"))
    assert not (tmp_path / "student").exists()
    assert train.run(world.job(tmp_path / "sound", sound)).rows, "the others train"


def lines_of(job: Job, begin: str) -> list[str]:
    said: list[str] = job.progress.said  # type: ignore[attr-defined]
    return [line for line in said if line.startswith(begin)]


def test_a_machine_asks_each_shard_once(
    whole: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = []
    for name, arm, shards in (
        ("a", "student", range(4)),
        ("b", "baseline", range(4)),
        ("c", "student", range(5)),
    ):
        train.run(job := whole.job(tmp_path / name, shards, arm=arm))
        said.append(lines_of(job, "checked"))
    checked = ["checked 4 shards, 32 rows"]
    assert said == [checked, [], ["checked 1 shard, 8 rows; checked before: 4 shards"]]
    # Where nothing can be kept, each is asked each time.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for name in ("d", "e"):
        train.run(job := whole.job(tmp_path / name, range(4)))
        assert lines_of(job, "checked") == checked


def test_what_is_known_of_files_is_asked_side_by_side(
    whole: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an object store each is a round trip."""
    together = Barrier(2, timeout=60)

    def held(*file: Any) -> None:
        together.wait()

    monkeypatch.setattr(every_row, "held", held)
    job = whole.job(tmp_path / "run", range(4))
    snapshot = load_snapshot(whole.store, job.snapshots["train"])
    assert len(every_row.check_rows(whole.store, [snapshot, snapshot], job)) == 4


def test_numbers_may_be_meant_and_what_nobody_can_read_may_not(
    whole: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked_writer(monkeypatch)
    names = ("log-probability of the token + 5", "a token of nobody")
    world = with_faults(whole, tmp_path / "store", "full", [FAULTS[name][1] for name in names])
    job = world.job(tmp_path / "run", [SHARD, 0], train={"audit": "warn"})
    train.run(job)
    assert "a log probability is above 0" in lines_of(job, "audit: /")[0]
    judged = replace(job, progress=SilentProgress())
    evaluate.run(judged)
    assert lines_of(judged, "audit: /") == lines_of(job, "audit: /")[:1]
    with pytest.raises(IntegrityError, match=world.place(SHARD + 1)):
        train.run(world.job(tmp_path / "other", [SHARD + 1, 0], train={"audit": "warn"}))


def test_what_a_student_is_judged_on_is_asked_before_it_is_trained(
    whole: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked_writer(monkeypatch)
    world = with_faults(whole, tmp_path / "store", "full", [FAULTS["a token of nobody"][1]])
    learnt, judged = world.job(tmp_path / "run", [0]), world.job(tmp_path / "other", [SHARD])
    with pytest.raises(IntegrityError, match=world.place(SHARD)):
        train.run(replace(learnt, snapshots=learnt.snapshots | {"test": judged.snapshots["test"]}))


def test_a_text_beyond_the_students_vocabulary_is_named(whole: World, tmp_path: Path) -> None:
    job = whole.job(tmp_path / "run")
    tree = job.recipe.model_dump(mode="json", exclude_none=True)
    tree["student"]["config"]["vocab_size"] = 23
    named = (
        r"its vocabulary has 23 ids, but the text has token 23 \(row \d of data/.*, [0-9a-f]{32}\)"
    )
    with pytest.raises(UsageError, match=named):
        train.run(replace(job, recipe=Recipe.model_validate(tree)))


def test_a_shard_of_shifted_targets_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Each row agrees with itself, and the audit looks at four of the five shards."""
    teacher = save_tiny_llama(tmp_path / "teacher", initializer_range=0.5)
    recipe, store, identity = scored_store(tmp_path, teacher, rows=24, score={"k": 4})
    own = rows_of(store)
    shifted = rows_of(planted(store, tmp_path / "shifted", "shifted", consistent=True))
    about = store.shard("soft_targets", store.commits("soft_targets")[0].shard.sha256).about
    about = {n: v for n, v in about.items() if n not in ("format_version", "table", "statistics")}
    for number in range(5):
        with store.writer("soft_targets", about=about) as writer:
            for row in shifted if number == 3 else own:
                key = content_key("again", number=number, key=row["key"])
                writer.add(row | {"key": key})
    commits = store.commits("soft_targets")[-5:]
    places = {commit.shard.sha256: range(len(own)) for commit in commits}
    save_snapshot(store, snapshot := make_snapshot(store, "soft_targets", places, {}))
    job = make_job(recipe, tmp_path / "run", train=snapshot.id)
    named = f"{commits[3].shard.name}: rows 0 to 23 .* shifted by one position"
    with pytest.raises(IntegrityError, match=named):
        train.run(replace(job, teacher_id=identity.id, author_id=identity.id))
