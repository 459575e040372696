"""Image classification from folders of pictures to a judged and published student.

It goes through the real command line.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import last_json, recipe_tree, stillroom, write_recipe
from planting import rows_of
from running import contents, kill_in_the_middle
from safetensors.torch import load_file
from samples import flip
from tiny_images import CLASSES, STUDENT, encoded, picture, save_tiny_resnet, write_folder
from typer.testing import CliRunner

from stillroom.pipeline.cli.main import app
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow


def told(*words: Any, code: int = 0) -> dict[str, Any]:
    """A command in this process: what it says to programs, and all of it under `above`."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout.rstrip("\n").split("\n")[-1])
    return found | {"above": result.stdout}


def test_one_command_from_folders_of_images_to_a_published_student(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load
    from transformers import pipeline

    source = write_folder(tmp_path / "pictures", 36)
    (source / "circle" / "broken.png").write_bytes(b"\x89PNG no image")
    teacher = save_tiny_resnet(tmp_path / "teacher")
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "image_classification"},
        "data": {"source": str(source), "format": "images", "holdout": 8},
        "student": {"config": STUDENT},
        "generate": None,
        "score": {"targets": "full"},
        "loss": {"temperature": 2.0, "hard_weight": 0.5},
        "train": {"epochs": 3, "tokens_per_step": 12, "learning_rate": 1.0e-2},
        "evaluate": {"baseline": True},
    }
    recipe = write_recipe(tmp_path, teacher, source, **sections)
    outcome = last_json(stillroom("run", recipe, "--json"))
    stages = ("data", "score", "train", "baseline", "evaluate")
    assert {name: s["state"] for name, s in outcome["stages"].items()} == dict.fromkeys(
        stages, "done"
    )
    results: dict[str, Any] = outcome["results"]
    assert list(results) == ["teacher", "student_before", "baseline", "student"]
    for arm in results.values():
        assert arm["f1_micro"] == pytest.approx(arm["accuracy"])

    folder = Path(outcome["run_dir"]) / "latest" / "student"
    says = pipeline("image-classification", model=str(folder))(picture(0))
    assert {one["label"] for one in says} == set(CLASSES)
    assert metadata_load(folder / "README.md")["pipeline_tag"] == "image-classification"
    assert 'print(classify("image.png"))' in (folder / "README.md").read_text()

    planned = told("plan", recipe)
    assert "images: 16 x 16 x 3 as the teacher reads them" in planned["above"]
    lines = planned["stages"]
    assert {line["state"] for line in lines.values()} == {"done"}
    assert (lines["data"]["rejected"], lines["score"]["committed"]) == (1, 36)
    assert "circle/broken.png" in lines["data"]["why"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| arm | accuracy | macro F1 | cross-entropy (nats/image) |" in report
    assert "held-out images" in report

    store = tmp_path / "store"
    assert told("verify", store)["ok"]
    row = next(row for row in rows_of(Store.open(store)) if row["label"] is not None)
    sample = told("inspect", store, "--key", row["key"].hex())
    assert (sample["label"], "an image" in sample["text"]) == (CLASSES[row["label"]], True)

    _publish(tmp_path, sections, results)
    commit = Store.open(store).commits("soft_targets")[0]
    flip(store / commit.shard.name, "image")
    assert not told("verify", store, code=3)["ok"]


def _publish(folder: Path, sections: dict[str, Any], results: dict[str, Any]) -> None:
    """Publish the rows, and learn from what was published alone: the same student."""
    import datasets
    from huggingface_hub import metadata_load

    published = folder / "published"
    told("export", folder / "store", published, "--license", "mit")
    assert metadata_load(published / "README.md")["task_categories"] == ["image-classification"]
    assert (
        "the distribution over the classes of each image" in (published / "README.md").read_text()
    )
    rows = datasets.load_dataset(str(published), "soft_targets", split="train")
    assert rows[0]["image"].size == (16, 16)
    alone = sections | {
        "run": {"dir": str(folder / "again"), "task": "image_classification"},
        "storage": {"dir": str(folder / "empty"), "sources": [str(published)]},
        "data": {"source": str(published), "format": "images", "holdout": 8},
    }
    path = folder / "again.yaml"
    path.write_text(json.dumps(recipe_tree(folder, published, folder, **alone)))
    again = last_json(stillroom("run", path, "--json"))["results"]
    assert again["student"]["kl_teacher"] == pytest.approx(results["student"]["kl_teacher"])
    assert again["student"]["accuracy"] == results["student"]["accuracy"]


def test_killed_in_every_stage_a_run_of_images_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """The command that a user gives is killed by SIGKILL.

    The student has the same weights and the same averages.
    """
    source, teacher = (
        write_folder(tmp_path / "pictures", 48),
        save_tiny_resnet(tmp_path / "teacher"),
    )
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "image_classification"},
        "storage": {"dir": str(tmp_path / "store"), "commit_rows": 4},
        "data": {"source": str(source), "format": "images", "holdout": 8},
        "student": {"config": STUDENT},
        "generate": None,
        "score": {"targets": "full"},
        "train": {"epochs": 6, "tokens_per_step": 8, "checkpoint_every_steps": 2},
    }
    recipe = write_recipe(tmp_path, teacher, source, **sections)
    for stage in ("data", "score", "train", "evaluate"):
        kill_in_the_middle(recipe, stage)
    disturbed = last_json(stillroom("run", recipe, "--json"))
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    other = {"storage.dir": tmp_path / "store2", "run.dir": tmp_path / "run2"}
    words = [word for name, path in other.items() for word in ("--set", f"{name}={path}")]
    undisturbed = last_json(stillroom("run", recipe, "--json", *words))
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "store2"))
    assert disturbed["results"] == undisturbed["results"]
    one, same = (
        load_file(Path(done["run_dir"]) / "latest" / "student" / "model.safetensors")
        for done in (disturbed, undisturbed)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_an_image_that_no_file_holds_is_named(tmp_path: Path) -> None:
    """A folder of nothing but what is refused."""
    source = tmp_path / "pictures"
    source.mkdir()
    (source / "two.gif").write_bytes(
        encoded(picture(0), "GIF", save_all=True, append_images=[picture(2)])
    )
    teacher = save_tiny_resnet(tmp_path / "teacher")
    recipe = write_recipe(
        tmp_path,
        teacher,
        source,
        run={"dir": str(tmp_path / "run"), "task": "image_classification"},
        data={"source": str(source), "format": "images", "holdout": 1},
        student=None,
        train=None,
        loss=None,
        generate=None,
        evaluate=None,
        score={"targets": "full"},
    )
    said = stillroom("plan", recipe, expect=2)
    assert "two.gif: image has several frames" in said.stderr
