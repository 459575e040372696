"""The columns of the matrix.

They say what each command does, from which state, and the moment at which a fault finds it.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from kit import prompts, recipe_tree, stillroom, write_jsonl, write_recipe
from tiny_images import save_tiny_resnet, write_folder
from tiny_llama import save_tiny_llama
from tiny_masks import save_tiny_masked, texts
from tiny_words import save_tiny_tagger, tagged

from stillroom.storage.errors import IntegrityError, StillroomError
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.commits import numbers, read_commit
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import TABLES

ROWS, COMMIT_ROWS, K = 48, 8, 4
IMPORTED = 600
LICENSES = [
    word
    for name in ("license", "teacher-license", "source-license")
    for word in (f"--{name}", "mit")
]
# Some seconds of work that do not fit into the memory that the bench allows.
SQL = (
    "SELECT count(DISTINCT md5(i::VARCHAR)) AS many, (SELECT count(*) FROM generations) AS texts "
    "FROM range(2000000) numbers(i)"
)


@dataclass(frozen=True)
class Place:
    """Where everything of a cell lies."""

    root: Path
    url: str = ""
    """Of the store, where it is on S3."""

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def store(self) -> str:
        return self.url or str(self.root / "store")

    @property
    def out(self) -> Path:
        return self.root / "out"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One command."""

    words: Callable[[Place], list[object]]
    state: str
    """The column whose command has been the last before."""
    moment: tuple[str, int]
    """Call of the product, and which one: just before it the fault strikes."""
    disk_moment: tuple[str, int] | None = None
    """The same for faults of the disk, where the other moment has nothing to do with it."""
    unit: tuple[str, str]
    """What is counted, and after which call."""
    outcome: Callable[[Place], dict[str, str]] | None = None
    """What is made beside the store, by name."""
    copies: int = 1
    beside: bool = False
    """Whether the fault strikes while the call is at work, and not before it."""
    make: Callable[[Place], None] | None = None
    """Changes the state."""


def _run(stage: str) -> Callable[[Place], list[object]]:
    return lambda place: ["run", place.recipe, "--only", stage, *_stored(place)]


def _run_of(task: str, stage: str) -> Callable[[Place], list[object]]:
    return lambda place: ["run", place.root / f"{task}.yaml", "--only", stage, *_stored(place)]


def _stored(place: Place) -> list[str]:
    return ["--set", f"storage.dir={place.url}"] if place.url else []


def _files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def _student(place: Place) -> dict[str, str]:
    return _files(place.root / "run" / "latest" / "student")


def _evaluation(place: Place) -> dict[str, str]:
    record = json.loads((place.root / "run" / "latest" / "evaluation.json").read_text())
    return {arm: json.dumps(numbers) for arm, numbers in record["results"].items()}


def _damage(place: Place) -> None:
    """A shard of which a bit is turned, and a record that is gone."""
    store = Path(place.store)
    shard = sorted((store / "data" / "generations").rglob("*.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    record = store / "commits" / "soft_targets" / "00000002.json"
    record.write_bytes(record.read_bytes()[:-20])


def _litter(place: Place) -> None:
    """Withdrawn shards and files that killed processes left."""
    _damage(place)
    stillroom("repair", place.store)
    for number in range(3):
        folder = Path(place.store) / "data" / "generations" / f"0{number}"
        folder.mkdir(exist_ok=True)
        (folder / f".tmp-{number}").write_bytes(b"half")


def _foreign(place: Place) -> None:
    """A table of texts that the teacher drew, each token with the K best of what it says there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place.root / "teacher", dtype=torch.float32).eval()
    torch.manual_seed(0)
    ids = torch.tensor([[1, 4 + n % 15, 4 + n % 7] for n in range(IMPORTED)])
    with torch.no_grad():
        for _ in range(9):
            last = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(last, 1)], dim=1)
        values, entries = model(input_ids=ids).logits.log_softmax(-1).topk(K)
    parts = zip(ids.tolist(), entries.tolist(), values.tolist(), strict=True)
    table = [{"tokens": t, "prompt": 3, "ids": e, "values": v} for t, e, v in parts]
    write_jsonl(place.root / "table.jsonl", table)


def _of_other_tasks(root: Path) -> None:
    """Teacher, data and recipe of each task but the next token."""
    sources = {
        "token_classification": ("tagged", write_jsonl(root / "tagged.jsonl", tagged(ROWS))),
        "masked_lm": ("text", write_jsonl(root / "texts.jsonl", texts(ROWS))),
        "image_classification": ("images", write_folder(root / "pictures", ROWS)),
    }
    save = (save_tiny_tagger, save_tiny_masked, save_tiny_resnet)
    for save_teacher, (task, (kind, source)) in zip(save, sources.items(), strict=True):
        teacher = save_teacher(root / task)
        sections: dict[str, Any] = {
            "run": {"dir": str(root / "run"), "task": task},
            "storage": {"dir": str(root / "store"), "commit_rows": COMMIT_ROWS},
            "data": {"source": str(source), "format": kind, "holdout": 8},
            "score": {"targets": "topk", "k": K} if kind == "text" else {"targets": "full"},
            "student": {"model": str(teacher)},
            "train": {"epochs": 2, "tokens_per_step": 16, "checkpoint_every_steps": 2},
        }
        tree = recipe_tree(root, teacher, source, generate=None, **sections)
        (root / f"{task}.yaml").write_text(yaml.safe_dump(tree))


_APPEND = "storage.store.commits:CommitLog.append"
_ROW = ("rows", "storage.store.writer:ShardWriter.add")
_MOVE = "storage.files.local:LocalFiles.move_in"
_IMPORT = "tokens=tokens,ids=ids,values=values,prompt_tokens=prompt"

COLUMNS = {
    "data": Column(words=_run("data"), state="", moment=(_APPEND, 2), unit=_ROW),
    "generate": Column(words=_run("generate"), state="data", moment=(_APPEND, 2), unit=_ROW),
    "score": Column(words=_run("score"), state="generate", moment=(_APPEND, 2), unit=_ROW),
    "train": Column(
        words=_run("train"),
        state="score",
        moment=("stages.train.checkpoints:Checkpoints.save", 2),
        unit=("steps", "stages.train.trainer:Trainer.step"),
        outcome=_student,
    ),
    "evaluate": Column(
        words=_run("evaluate"),
        state="train",
        moment=("stages.models.students.student:load_student", 1),
        unit=("models judged", "stages.models.students.student:student_folder"),
        outcome=_evaluation,
    ),
    "export": Column(
        words=lambda place: ["export", place.recipe, place.out, *LICENSES, *_stored(place)],
        state="evaluate",
        moment=(_MOVE, 2),
        unit=("files", _MOVE),
        outcome=lambda place: _files(place.out),
    ),
    "publish": Column(
        words=lambda place: ["publish", place.recipe, "hf://datasets/user/name", *LICENSES],
        state="evaluate",
        moment=("huggingface_hub.hf_api:HfApi.create_commit", 2),
        disk_moment=(_MOVE, 2),
        unit=("commits", "huggingface_hub.hf_api:HfApi.create_commit"),
    ),
    "import": Column(
        words=lambda place: [
            *("import", place.root / "table.jsonl", place.store, "--targets-at", "next"),
            *("--columns", _IMPORT, "--teacher", place.root / "teacher"),
        ],
        state="",
        moment=(_APPEND, 2),
        unit=_ROW,
    ),
    "repair": Column(
        words=lambda place: ["repair", place.store],
        state="evaluate",
        moment=("storage.integrity.repair:retire", 2),
        unit=("withdrawals", "storage.integrity.repair:retire"),
        make=_damage,
    ),
    "vacuum": Column(
        words=lambda place: ["vacuum", place.store, "--older-than-hours", "0"],
        state="evaluate",
        moment=("storage.files.local:LocalFiles.remove", 3),
        unit=("files removed", "storage.files.local:LocalFiles.remove"),
        make=_litter,
    ),
    "query": Column(
        words=lambda place: ["query", place.store, SQL],
        state="evaluate",
        moment=("storage.store.sql:stoppable", 1),
        unit=("queries", "storage.store.sql:first_rows"),
        beside=True,
    ),
    "generate, two at once": Column(
        words=_run("generate"), state="data", moment=(_APPEND, 1), unit=_ROW, copies=2
    ),
    **{
        f"{stage} of {what}": Column(
            words=_run_of(task, stage),
            state=f"data of {what}" if stage == "score" else "",
            moment=(_APPEND, 2),
            unit=_ROW,
        )
        for what, task in (
            ("words", "token_classification"),
            ("hidden tokens", "masked_lm"),
            ("images", "image_classification"),
        )
        for stage in ("data", "score")
    },
    "train of images": Column(
        words=_run_of("image_classification", "train"),
        state="score of images",
        moment=("stages.train.checkpoints:Checkpoints.save", 2),
        unit=("steps", "stages.train.trainer:Trainer.step"),
        outcome=_student,
    ),
}

LOOKS = {
    "demo": "is `run` on a recipe of its own",
    "init": "writes one file, which must not exist",
    "plan": "writes nothing",
    "run": "is the first five columns",
    "status": "writes nothing",
    "report": "writes a page from files that are finished",
    "schema": "prints",
    "inspect": "writes nothing",
    "verify": "writes nothing",
    "doctor": "writes what it removes again",
    "launch": "starts `run` and `train` elsewhere",
    "train": "is the column of training, by ranks that others have started",
}
"""Commands without a column, and why."""


def prepare(place: Place) -> None:
    """Teachers, data and recipes, and a foreign table."""
    save_tiny_llama(place.root / "teacher", hidden_size=32, initializer_range=0.4)
    source = write_jsonl(place.root / "prompts.jsonl", prompts(ROWS))
    train = {"epochs": 2, "tokens_per_step": 128, "checkpoint_every_steps": 2}
    write_recipe(place.root, place.root / "teacher", source, train=train)
    _foreign(place)
    _of_other_tasks(place.root)


@dataclass
class Found:
    """What a place holds."""

    rows: dict[str, str] = field(default_factory=dict)
    """Table and key of every row that can be read -> hash of what it says."""
    twice: int = 0
    problems: list[str] = field(default_factory=list)
    outcome: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    """Outside of logs, caches and the store's tables."""
    vacuumed: int = 0
    """Files of data that nothing names, and temporary ones, which are gone now."""
    stay: list[str] = field(default_factory=list)
    """`files`, without them."""


def look(place: Place, column: Column, *, sweep: bool = False) -> Found:
    """Everything that can be read; `sweep`: what of it is useless, which then is gone."""
    found = Found(files=_names(place.root))
    if column.outcome is not None and sweep:
        with suppress(OSError):  # the command failed
            found.outcome = column.outcome(place)
    try:
        store = Store.open(place.store)
    except StillroomError:  # none is there yet
        return found
    for table in TABLES:
        withdrawn = numbers(store.files, table, folder="retired")
        for seq in numbers(store.files, table):
            with suppress(IntegrityError):  # damaged, on purpose: `verify` says so
                record = read_commit(store.files, table, seq)
                if record is not None and seq not in withdrawn:
                    _read(store, table, record[0].shard, found)
    found.problems = [problem.message for problem in verify(store).problems]
    if sweep:
        gone = vacuum(store, older_than_hours=0).files
        found.vacuumed = sum(name.startswith("data/") or "/.tmp-" in name for name in gone)
        found.stay = _names(place.root)
    return found


def _read(store: Store, table: Any, info: Any, found: Found) -> None:
    for row in store.shard(table, info.sha256).take(range(info.rows)):
        name = f"{table} {row['key'].hex()}"
        said = repr([v.tobytes() if hasattr(v, "tobytes") else v for v in row.values()])
        found.twice += name in found.rows
        found.rows[name] = hashlib.sha256(said.encode()).hexdigest()


def _names(root: Path) -> list[str]:
    passing = ("/logs/", "/tensorboard/", "/cache/", "/claims/", "/hub/")
    passing += ("/store/data/", "/store/commits/")  # `verify` and `vacuum` look at these
    names = (f"/{path.relative_to(root)}" for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if not any(part in name for part in passing))


def set_up() -> dict[str, str]:
    """What the commands find in their environment, beside their own place."""
    return {"STILLROOM_SQL_MEMORY": "100MB", "COLUMNS": os.environ.get("COLUMNS", "80")}
