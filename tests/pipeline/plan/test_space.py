"""What a plan says of disk: before the text is written, after some of it, and where it is short."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit import prompts, stillroom, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

from stillroom.pipeline.plan.lines import Plan
from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.plan.space import space_notes
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.targets.spec import Kept, target_bytes

MOST, HELD_OUT = 12, 4
ALONE = {"student": None, "train": None, "loss": None, "evaluate": {"tokens": 200}}


def target(kind: str, k: int) -> float:
    return target_bytes(Kept(kind=kind, k=k))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Twelve prompts, of which four are judged on; the best four ids of the others are kept."""
    teacher = save_tiny_llama(tmp_path / "teacher")
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    return write_recipe(tmp_path, teacher, source, **ALONE)


def planned(recipe: Path) -> Plan:
    return make_plan(load_recipe(recipe, []))


def test_targets_of_texts_that_nobody_has_written_yet_are_counted_at_their_longest(
    recipe: Path,
) -> None:
    vocabulary = planned(recipe).bound.binding.vocab_size
    line = planned(recipe).line("score")
    assert (line.state, line.tokens_to_do) == ("waits", 12 * MOST)
    whole, best = target("full", vocabulary), target("topk", 4)
    assert line.bytes_to_do == int(MOST * (HELD_OUT * whole + 8 * best))
    stillroom("run", recipe, "--until", "generate")
    written = planned(recipe).line("score")
    assert written.tokens_to_do <= line.tokens_to_do
    assert written.bytes_to_do <= line.bytes_to_do
    # Twice the prompts: those that are written are counted as they are, the others at the longest.
    write_jsonl(recipe.parent / "prompts.jsonl", prompts(24))
    stillroom("run", recipe, "--only", "data")
    more = planned(recipe).line("score")
    assert more.tokens_to_do == written.tokens_to_do + 12 * MOST
    stillroom("run", recipe)
    done = planned(recipe)
    assert [line.bytes_to_do for line in done.stages] == [0, 0, 0]


def test_too_little_room_is_said_before_anything_is_made(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(line.bytes_to_do for line in planned(recipe).stages)
    asked = []

    def free(count: int) -> None:
        usage = lambda folder: asked.append(folder) or SimpleNamespace(free=count)  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", usage)

    free(needed)
    assert "disk:" not in " ".join(planned(recipe).notes)
    free(needed - 1)
    (note,) = [note for note in planned(recipe).notes if note.startswith("disk:")]
    assert "storage.dir" in note
    assert "score.k" in note
    assert set(asked) == {recipe.parent}  # the store's folder is still to be made
    assert "disk:" in stillroom("plan", recipe).stdout
    elsewhere = load_recipe(recipe, ["storage.dir=s3://bucket/store"])
    assert space_notes(elsewhere, planned(recipe)) == []
