"""What is read of `tests/fixtures/format1`.

That is names made from content, by today's code, and what an export holds.

Everything that is imported from Stillroom for that fixture is imported here, so that one place
follows a move.
"""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stillroom.pipeline.plan.resolve import bind, student_id
from stillroom.pipeline.plan.students import train_settings
from stillroom.stages.ledger.requests import sampling_id, sampling_settings
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.keys import content_id

FORMAT1 = Path(__file__).parents[1] / "fixtures" / "format1"
SNAPSHOT = "0" * 32  # a name that stands for any rows

# Models and data that stand in for those that a shipped recipe names, by the format of its data.
LANGUAGE_MODEL = {"teacher.model": "models/teacher", "storage.dir": "elsewhere"}
STAND_INS = {
    "prompt": LANGUAGE_MODEL | {"data.source": "data/prompt.jsonl"},
    "instruction": LANGUAGE_MODEL | {"data.source": "data/instruction.jsonl"},
    "labelled": {
        "teacher.model": "models/classifier",
        "storage.dir": "elsewhere",
        "data.source": "data/labelled.jsonl",
    },
}
# shipped recipe -> the format of its data, and whether it names an existing student
SHIPPED = {
    "black_box": ("instruction", True),
    "demo": ("prompt", False),
    "qwen3_8b_to_0.6b": ("instruction", True),
    "sst2": ("labelled", False),
    "template": ("prompt", True),
    "tinystories": ("prompt", False),
}


def unpack(folder: Path) -> None:
    """The models, data, recipes, store and runs, in a folder of one's own."""
    with tarfile.open(FORMAT1 / "made.tar.gz") as archive:
        archive.extractall(folder, filter="data")


def identities(name: str) -> dict[str, str]:
    """What a shipped recipe's names stand for; the working directory holds the stand-ins."""
    data_format, existing = SHIPPED[name]
    words = STAND_INS[data_format] | ({"student.model": "models/teacher"} if existing else {})
    path = Path("shipped") / f"{name}.yaml"
    recipe = load_recipe(path, [f"{field}={value}" for field, value in words.items()])
    binding = bind(recipe, write=False).binding
    found = {
        "teacher": binding.teacher_id,
        "author": binding.author_id,
        "data": binding.data_id,
    }
    if recipe.generate is not None:
        settings = sampling_settings(recipe.generate, recipe.data)
        found["sampling"] = sampling_id(binding.author_id, settings)
    for arm in ("student", "baseline"):
        deciding = train_settings(recipe, SNAPSHOT, arm)
        deciding["student"]["identity"] = student_id(recipe, write=False)
        found[f"train folder of the {arm}"] = f"train-{content_id('train', **deciding)[:8]}"
    return found


def names_in(store: Path) -> dict[str, list[str]]:
    """Of what a store keeps beside its tables: the names that were made from content."""
    depths = {"bindings": 1, "claims": 2, "inputs": 1, "teachers": 1}
    return {
        folder: sorted(
            path.relative_to(store).with_suffix("").as_posix()
            for path in store.glob(folder + "/*" * depth)
        )
        for folder, depth in depths.items()
    }


def contents(exported: Path) -> dict[str, str]:
    """Table and split -> sha256 of the rows, bit for bit, whatever wrote the Parquet."""
    found = {}
    for file in sorted(exported.rglob("*.parquet")):
        rows = sorted(pq.read_table(file).to_pylist(), key=lambda row: row["key"])
        text = json.dumps(rows, sort_keys=True, default=bytes.hex)
        table, split = file.parent.name, file.stem.split("-")[0]
        found[f"{table}/{split}"] = hashlib.sha256(text.encode()).hexdigest()
    return found


def trained(run_dir: Path, arm: str = "student") -> Path:
    """The training folder of one arm in a run folder."""
    settings: dict[Path, dict[str, Any]] = {
        path.parent: json.loads(path.read_text()) for path in run_dir.glob("train-*/settings.json")
    }
    (folder,) = [folder for folder, record in settings.items() if record["arm"] == arm]
    return folder
