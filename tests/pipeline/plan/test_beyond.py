"""Numbers that are larger than what they count: exact and said by `plan`, or refused by it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import prompts, stillroom, told, write_jsonl, write_recipe

Folder = Callable[..., Path]
WHOLE = "every one of the 32 outcomes that the teacher tells apart is kept"
FULL = "score.targets: full has the whole distribution as well"
TOPP = ["score.targets=topp", "score.p=0.9"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Folder) -> Path:
    """12 prompts, 4 of them held out; the teacher has 32 ids, and reads 128 tokens."""
    source = write_jsonl(tmp_path / "p.jsonl", prompts(12))
    return write_recipe(tmp_path, tiny_llama("teacher"), source)


def settings(overrides: list[str]) -> list[str]:
    return [word for one in overrides for word in ("--set", one)]


SAID = {
    "score.k": (["score.k=100000"], f"score.k: 100,000 entries: {WHOLE}; {FULL}, in fewer bytes"),
    "all of score.k": (["score.k=32"], f"score.k: 32 entries: {WHOLE}; {FULL}, in fewer bytes"),
    "topp": ([*TOPP, "score.k=33"], "score.k: 33 limits nothing: it is more than all of the 32"),
    "k_min": ([*TOPP, "score.k=99", "score.k_min=40"], f"score.k_min: 40 entries: {WHOLE}; {FULL}"),
    "rounds": (
        ["score={targets: sampled, rounds: 33}"],
        "score.rounds: 33 draws of the 32 outcomes that the teacher tells apart; "
        f"{FULL}, without their noise",
    ),
    "keep": (
        ["generate.keep={k: 33}"],
        f"generate.keep.k: 33 are more than there are: {WHOLE}",
    ),
    "max_tokens": (
        ["generate.max_tokens=128"],
        "generate.max_tokens: 128, and prompt and answer have 128 tokens at most: an answer ends "
        "there",
    ),
}
SILENT = [["score.k=31"], [*TOPP, "score.k=32"], ["generate.keep={k: 32}"]]
SILENT += [
    ["score={targets: full}"],
    ["score={targets: sampled, rounds: 31}"],
    ["generate.max_tokens=127"],
]


def test_what_is_more_than_there_is_is_said_and_nothing_else(recipe: Path) -> None:
    for overrides, sentence in SAID.values():
        (note,) = told("plan", recipe, *settings(overrides))["notes"]
        assert note.startswith(sentence)
    for overrides in SILENT:
        assert told("plan", recipe, *settings(overrides))["notes"] == [], overrides


def test_nothing_is_set_aside_that_leaves_nothing_to_train_on(recipe: Path) -> None:
    """Before the teacher has read a text, and with prompts in the store as without."""
    validated = settings(["train.evaluate_every_tokens=100"])
    for begun in (False, True):
        if begun:
            stillroom("run", recipe, "--only", "data")
        for count in (8, 64):
            more = settings([f"train.validation_prompts={count}"])
            said = stillroom("plan", recipe, *validated, *more, expect=2).stderr
            aside = f"{count} prompts are to be set aside (train.validation_prompts), and there are"
            assert f"{aside} 8 to train on. Set it to less than 8" in said
        told("plan", recipe, *validated, *settings(["train.validation_prompts=7"]))
        told("plan", recipe)  # nobody is set aside


ENDPOINT = "engine: openai, base_url: http://localhost:1/v1, model: m, max_tokens: 12"


def test_an_endpoint_is_asked_for_no_more_entries_than_there_are_ids(recipe: Path) -> None:
    """It would refuse every call; many give 20 at most, and the plan says so beyond them."""
    for k, code in ((33, 2), (32, 0), (21, 0), (20, 0)):
        asked = settings([f"generate={{{ENDPOINT}, keep: {{k: {k}}}}}", "score={k: 4}"])
        said = stillroom("plan", recipe, *asked, expect=code)
        assert ("generate.keep.k: 33, but" in said.stderr) == (k > 32)
        assert ("many endpoints give 20 at most" in said.stdout) == (20 < k <= 32)


def test_an_answer_of_an_endpoint_that_nobody_reads_is_said_to_be_paid_for(recipe: Path) -> None:
    asked = settings([f"generate={{{ENDPOINT}}}", "generate.max_tokens=128"])
    assert any("is paid for and rejected" in note for note in told("plan", recipe, *asked)["notes"])


def test_more_threads_than_cores_are_said(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do the work, and wait for one another: that is no error."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for own, count, said in (
        (None, 4, None),
        (None, 9, "with 9 threads on 4 cores: they wait for one another. Set compute.{} to 4 or"),
        ("1", 4, None),
        ("4", 2, "with 8 threads on 4 cores: they wait for one another. Set OMP_NUM_THREADS (now"),
        ("1", 9, "Set compute.{} to 4 or less"),
        ("4", 9, "Set compute.{} to 4 or less and OMP_NUM_THREADS (now 4) to 1"),
        ("no number", 9, None),
    ):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if own is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", own)
        for name, stage in (("processes", "train"), ("workers", "generate")):
            notes = told("plan", recipe, *settings([f"compute.{name}={count}"]))["notes"]
            (note,) = [note for note in notes if note.startswith(f"{stage}: {count} ")]
            assert ("threads" in note) == (said is not None), note
            assert said is None or said.format(name) in note
            assert ("OMP_NUM_THREADS" in note) == (own == "4")
            assert ("OMP_NUM_THREADS (now 4) to 2" in note) == (own == "4" and count == 2)
