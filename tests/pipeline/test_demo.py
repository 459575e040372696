"""The demo's ingredients.

There is enough English, a tokenizer that loses nothing, and a teacher that learned and loads.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillroom.pipeline import demo
from stillroom.stages.recipe.load import load_recipe

SMALL = demo._Sizes(
    vocabulary=400,
    hidden=32,
    intermediate=64,
    layers=1,
    heads=1,
    context=64,
    steps=40,
    windows=4,
    learning_rate=1e-2,
    documents=400,
    prompts=20,
)


class Heard:
    """A progress line that only listens."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.notes: list[str] = []
        self.said: list[str] = []

    def start(self, *, total: int, unit: str, done: int = 0) -> None:
        self.total = total

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        self.done += units
        self.notes.append(note)

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module", autouse=True)
def texts() -> Iterator[list[str]]:
    """The corpus, read once."""
    found = demo.documents()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "documents", lambda: found)
        yield found


@pytest.fixture(scope="module")
def made(tmp_path_factory, texts) -> tuple[Path, Heard]:
    folder, heard = tmp_path_factory.mktemp("demo") / 'a "quoted": folder', Heard()
    demo.make_demo(folder, heard, sizes=SMALL)
    return folder, heard


def test_corpus_is_a_megabyte_of_prose(texts):
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)
    assert sum(" the " in text for text in texts) > len(texts) / 2


def test_corpus_comes_in_one_order(texts):
    assert texts == sorted(texts)


def test_tokenizer_gives_text_back(made):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "teacher")
    for text in ("Return the first item.", "naïve   spaces\nand lines", "日本語 {}[]\\ \x00"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_are_openings(made, texts):
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "teacher")
    rows = [json.loads(line) for line in (made[0] / "prompts.jsonl").read_text().splitlines()]
    shortest, longest = SMALL.prompt_tokens
    assert len(rows) == SMALL.prompts
    for row in rows:
        assert (
            shortest
            <= len(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"])
            <= longest
        )
        assert f"{row['prompt']} {row['reference']}" in texts


def test_teacher_loads_and_has_learned(made):
    teacher = AutoModelForCausalLM.from_pretrained(made[0] / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(made[0] / "teacher")
    assert teacher.config.vocab_size == len(tokenizer) == SMALL.vocabulary
    assert teacher.generation_config.eos_token_id == tokenizer.eos_token_id
    first, last = (
        float(note.removeprefix("loss ")) for note in (made[1].notes[0], made[1].notes[-1])
    )
    assert last < first - 0.5


def test_progress_counts_every_token(made):
    assert made[1].done == made[1].total == SMALL.steps * SMALL.windows * SMALL.context


def test_recipe_names_the_folder(made):
    recipe = load_recipe(made[0] / "recipe.yaml")
    assert recipe.teacher.model == str(made[0].resolve() / "teacher")
    assert recipe.data.source == str(made[0].resolve() / "prompts.jsonl")
    assert demo.RECIPE_FOLDER not in (made[0] / "recipe.yaml").read_text().split("\n\n", 1)[1]


def test_shipped_recipe_is_valid():
    shipped = load_recipe(Path(demo.__file__).parent / "recipes/demo.yaml")
    assert shipped.run.dir.startswith(demo.RECIPE_FOLDER)


def test_second_time_trains_nothing(made):
    weights = made[0] / "teacher/model.safetensors"
    before, heard = weights.stat().st_mtime_ns, Heard()
    demo.make_demo(made[0], heard, sizes=SMALL)
    assert weights.stat().st_mtime_ns == before
    assert not heard.done


def test_same_sizes_make_the_same_teacher(made, tmp_path):
    demo.make_demo(tmp_path, Heard(), sizes=SMALL)
    weights = "teacher/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (made[0] / weights).read_bytes()


def test_unfinished_or_other_sizes_start_over(tmp_path):
    few = replace(SMALL, steps=2)
    demo.make_demo(tmp_path, Heard(), sizes=few)
    (tmp_path / "demo.json").write_text('{"sizes"')
    again = Heard()
    demo.make_demo(tmp_path, again, sizes=few)
    assert again.done
    other = Heard()
    demo.make_demo(tmp_path, other, sizes=replace(few, steps=3))
    assert other.done == 3 * SMALL.windows * SMALL.context
