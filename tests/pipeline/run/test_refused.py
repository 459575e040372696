"""A command that is refused leaves nothing behind that was not there."""

from collections.abc import Callable
from pathlib import Path

from kit import prompts, stillroom, write_jsonl, write_recipe

from stillroom.storage.store.store import Store

HERE = "http://localhost:1/v1"
REFUSED = {
    "a number": ("run", "score.k=0"),
    "a plan": ("run", "train.evaluate_every_tokens=5"),
    "a source": ("run", "data.source={box}/none.jsonl"),
    "a teacher": ("run", "teacher.model={box}/none"),
    "a student": ("run", "student={{from_teacher_layers: [7]}}"),
    "a stage that waits": ("run", "loss.temperature=1.0", "--only", "score"),
    "a stage that is none": ("run", "evaluate.samples=0", "--only", "select"),
    "a stage that the recipe lacks": ("run", "data={{format: text, source: {box}/p.jsonl}}"),
    "a key": (
        "run",
        f"generate={{{{engine: openai, base_url: '{HERE}', model: m, api_key_env: NONE}}}}",
    ),
    "a run folder": ("run", "run.dir={box}/p.jsonl/run"),
    "a run folder's long name": ("run", f"run.dir={{box}}/{'n' * 300}"),
    "such a name in a new folder": ("run", f"run.dir={{box}}/new/{'n' * 300}"),
    "a store": ("run", "storage.dir={box}/p.jsonl/store"),
    "a source of rows": ("run", "storage.sources=[{box}/none]"),
    "a training before its rows": ("train", "run.seed=1"),
    "a launch": ("launch", "train.evaluate_every_tokens=5", "--on", "slurm", "--workers", "2"),
}


def seen(box: Path) -> dict[Path, float]:
    """Every file and folder, and when it was last changed."""
    return {path: path.stat().st_mtime for path in box.rglob("*")}


def test_what_is_refused_leaves_nothing(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    """Nor, where a store is there, anything new in it or in the run's folder."""
    teacher = tiny_llama("teacher")
    recipe = write_recipe(tmp_path, teacher, write_jsonl(tmp_path / "p.jsonl", prompts(12)))
    before = seen(tmp_path)
    for name, (word, override, *more) in REFUSED.items():
        stillroom(word, recipe, "--set", override.format(box=tmp_path), *more, expect=2)
        assert seen(tmp_path) == before, name


def test_what_was_hashed_before_there_is_a_store_is_remembered_in_it(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """So nothing is read twice, although a plan is made before the store is."""
    source = write_jsonl(tmp_path / "p.jsonl", prompts(12))
    recipe = write_recipe(tmp_path, tiny_llama("teacher"), source)
    stillroom("run", recipe, "--only", "data")
    remembered = list((tmp_path / "store" / "cache" / "sha256").iterdir())
    files = ("model.safetensors", "tokenizer.json", "p.jsonl")
    texts = [path.read_text() for path in remembered]
    assert all(any(file in text for text in texts) for file in files)
    assert Store.open(tmp_path / "store").commits("prompts")
