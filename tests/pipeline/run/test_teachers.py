"""Several teachers in one recipe.

Each is scored and kept alone, and asked for what its `where` and budget say.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from safetensors.torch import load_file
from tiny_llama import save_tiny_llama
from tiny_store import StopAfter

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.run_folder import read_record
from stillroom.storage.errors import Stopped, UsageError
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

ALONE: dict[str, Any] = {"student": None, "train": None, "loss": None, "evaluate": {"tokens": 200}}
PROMPTS, HELD_OUT = 24, 4
THE = "text LIKE 'the %'"


class Room:
    """Two teachers, prompts and a store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {
            name: save_tiny_llama(folder / name, seed=seed) for seed, name in enumerate(("a", "b"))
        }
        self.source = write_jsonl(folder / "prompts.jsonl", prompts(PROMPTS))

    def recipe(self, *teachers: dict[str, Any], **sections: Any) -> Path:
        """A recipe of teachers by name, and of what each is asked for."""
        entries = [{"model": str(self.models[one["name"]])} | one for one in teachers]
        tree = recipe_tree(self.folder, self.folder, self.source, **ALONE | sections)
        tree.pop("teacher")
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree | {"teachers": entries}))
        return path

    def rows(self, where: str = "true") -> dict[str, int]:
        """Rows of soft targets by teacher."""
        store = Store.open(self.folder / "store")
        found = query(
            store, f"SELECT teacher_id, count(*) AS n FROM soft_targets WHERE {where} GROUP BY ALL"
        )
        return dict(zip(found["teacher_id"].to_pylist(), found["n"].to_pylist(), strict=True))


def test_each_teacher_has_a_line_a_process_and_rows_of_its_own(tmp_path: Path) -> None:
    room = Room(tmp_path)
    recipe = room.recipe({"name": "a"}, {"name": "b", "where": THE})
    planned = last_json(stillroom("plan", recipe, "--json"))
    lines = ["data", "generate", "score/a", "score/b"]
    assert list(planned["stages"]) == lines
    assert list(planned["teachers"]) == ["a", "b"]
    assert any("the text is written by the first teacher, a" in note for note in planned["notes"])
    done = last_json(stillroom("run", recipe, "--json"))["stages"]
    assert {name: done[name]["state"] for name in lines} == dict.fromkeys(lines, "done")
    asked = sum(one["prompt"].startswith("the ") for one in prompts(PROMPTS))
    assert 0 < asked < PROMPTS
    ids = planned["teachers"]
    assert room.rows() == {ids["a"]: PROMPTS, ids["b"]: asked}
    told = last_json(stillroom("status", recipe, "--json"))["stages"]
    assert [told[f"score/{name}"]["rows"] for name in "ab"] == [PROMPTS, asked]
    assert told["score/a"]["bytes"] > told["score/b"]["bytes"] > 0
    again = last_json(stillroom("run", recipe, "--json"))["stages"]
    assert {entry["state"] for entry in again.values()} == {"cached"}
    # What leaves is of one teacher: of the other one's texts alone.
    to = (tmp_path / "out", "--license", "mit")
    assert (
        "and this recipe has a, b. Export each" in stillroom("export", recipe, *to, expect=2).stderr
    )
    generate = {
        "engine": "hf",
        "temperature": 0.0,
        "max_tokens": 12,
        "model": str(room.models["a"]),
    }
    alone = room.recipe({"name": "b", "where": THE}, generate=generate)
    left = last_json(stillroom("export", alone, *to, "--json"))["rows"]["soft_targets"]
    assert sum(left.values()) == asked


def test_a_teacher_that_is_added_scores_only_itself_and_one_that_is_removed_nothing(
    tmp_path: Path,
) -> None:
    room = Room(tmp_path)
    stillroom("run", room.recipe({"name": "a"}))  # as `teacher` alone
    both = room.recipe({"name": "a", "weight": 0.5}, {"name": "b", "weight": 2.0})
    states = {
        name: line["state"]
        for name, line in last_json(stillroom("plan", both, "--json"))["stages"].items()
    }
    assert states == {"data": "done", "generate": "done", "score/a": "done", "score/b": "to do"}
    stillroom("run", both)
    for teachers in (({"name": "a", "where": THE}, {"name": "b", "weight": 9.0}), ({"name": "a"},)):
        planned = last_json(stillroom("plan", room.recipe(*teachers), "--json"))["stages"]
        assert {line["state"] for line in planned.values()} == {"done"}


def test_a_budget_is_filled_in_the_order_of_the_hashes(tmp_path: Path) -> None:
    room = Room(tmp_path)
    recipe = room.recipe({"name": "a"}, {"name": "b", "budget_tokens": 60})
    ids = last_json(stillroom("plan", recipe, "--json"))["teachers"]
    stillroom("run", recipe)
    store = Store.open(tmp_path / "store")
    columns = "teacher_id, prompt_key, kind, span_tokens"
    ordered = f"SELECT {columns} FROM soft_targets ORDER BY prompt_key, key"
    rows = query(store, ordered).to_pylist()
    judged = {row["prompt_key"] for row in rows if row["kind"] == "full"}
    left, expected = 60, set()
    for row in rows:
        if row["teacher_id"] == ids["a"] and row["prompt_key"] not in judged:
            left -= row["span_tokens"]
            if (
                left < 0
            ):  # a later one that is shorter would make room for this one in a larger budget
                break
            expected.add(row["prompt_key"])
    found = {row["prompt_key"] for row in rows if row["teacher_id"] == ids["b"]}
    assert found == expected | judged
    assert 0 < len(expected) < PROMPTS - HELD_OUT


def test_a_teacher_that_is_gone_is_found_by_its_binding(tmp_path: Path) -> None:
    room = Room(tmp_path)
    recipe = room.recipe({"name": "a"}, {"name": "b"})
    stillroom("run", recipe)
    for name in "ab":
        room.models[name].rename(tmp_path / f"gone-{name}")
    planned = last_json(stillroom("plan", recipe, "--json"))
    assert {line["state"] for line in planned["stages"].values()} == {"done"}
    more = room.recipe({"name": "a"}, {"name": "b"}, score={"k": 9})
    refused = stillroom("run", more, expect=2).stderr
    assert "score/a: there is work to do" in refused
    assert "teacher or data are not here" in refused


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"vocab_size": 40}, "it tells 40 outcomes apart, the first one 32"),
        ({"seed": 0}, "is the same model as 'a'"),
    ],
)
def test_teachers_that_do_not_go_together_are_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    room = Room(tmp_path)
    room.models["b"] = save_tiny_llama(tmp_path / "other", **change)
    refused = stillroom("plan", room.recipe({"name": "a"}, {"name": "b"}), expect=2).stderr
    assert expected in refused


def test_a_where_that_is_no_condition_names_its_teacher(tmp_path: Path) -> None:
    room = Room(tmp_path)
    stillroom("run", room.recipe({"name": "a"}))
    recipe = room.recipe({"name": "a"}, {"name": "b", "where": "no_such_column = 1"})
    assert "teachers: where of 'b': " in stillroom("plan", recipe, expect=2).stderr


def test_one_plain_teacher_is_as_teacher(tmp_path: Path) -> None:
    room = Room(tmp_path)
    recipe = load_recipe(room.recipe({"name": "a"}))
    assert recipe.several == []
    with pytest.raises(UsageError, match="there is a section `teacher` too"):
        load_recipe(room.recipe({"name": "a"}), ["teacher.model=elsewhere"])


def test_texts_that_a_teacher_cannot_read_are_left_out_and_counted(tmp_path: Path) -> None:
    room = Room(tmp_path)
    room.models["b"] = save_tiny_llama(tmp_path / "short", seed=1, max_position_embeddings=12)
    records = [
        one | {"completion": " ".join(["cat", "dog", "tree"] * (1 + n % 3))}
        for n, one in enumerate(prompts(PROMPTS))
    ]
    write_jsonl(room.source, records)
    data = {"source": str(room.source), "format": "completion", "holdout": HELD_OUT}
    recipe = room.recipe({"name": "a"}, {"name": "b"}, data=data, generate=None)
    done = last_json(stillroom("run", recipe, "--json"))["stages"]
    plan = make_plan(load_recipe(recipe))
    rejected = plan.line("score/b").rejected
    assert 0 < rejected == PROMPTS - done["score/b"]["rows"] < PROMPTS
    assert plan.line("score/a").committed == PROMPTS
    (note,) = [note for note in plan.notes if "could not score" in note]
    assert f"(b: {rejected} " in note
    assert sum(snapshot.rows for snapshot in plan.snapshots.values()) == PROMPTS - rejected
    assert {s: one.rows for s, one in plan.partners.items()} == {
        s: one.rows for s, one in plan.snapshots.items()
    }


def given(room: Room) -> dict[str, Any]:
    """Sections of a recipe whose data bring the text."""
    write_jsonl(room.source, [one | {"completion": "cat dog tree"} for one in prompts(PROMPTS)])
    data = {"source": str(room.source), "format": "completion", "holdout": HELD_OUT}
    return {"data": data, "generate": None}


def test_the_first_teacher_decides_a_fresh_student_of_routes_that_share_no_text(
    tmp_path: Path,
) -> None:
    room = Room(tmp_path)
    sections = TRAINED | given(room)
    routes = {"name": "a", "where": THE}, {"name": "b", "where": f"NOT {THE}"}
    stillroom("run", room.recipe(*routes, **sections), "--until", "score")
    plans = [make_plan(load_recipe(room.recipe(*r, **sections))) for r in (routes, routes[::-1])]
    assert plans[0].snapshots["train"].id == plans[1].snapshots["train"].id
    for arm in ("student", "baseline"):
        assert plans[0].train_dirs[arm] != plans[1].train_dirs[arm]
    # Of one as of several, what nobody is asked for is counted.
    asked = query(Store.open(tmp_path / "store"), f"SELECT count(*) FROM prompts WHERE {THE}")
    unasked = PROMPTS - asked[0][0].as_py()
    notes = make_plan(load_recipe(room.recipe(routes[0], **sections))).notes
    said = [int(note.split()[0]) for note in notes if "are of no teacher: none is asked" in note]
    assert len(said) == 2  # held out, to train on
    assert sum(said) == unasked
    nothing = room.recipe(routes[0], routes[1] | {"where": "text LIKE 'THE %'"}, **sections)
    notes = make_plan(load_recipe(nothing)).notes
    assert "b is asked for no text: its `where` takes none of the prompts" in notes
    # A folder that was published stands for one teacher's texts, not for those of the others.
    plain = [{"name": "a"}, routes[1]]
    exported = room.recipe(routes[0], **given(room))
    stillroom("export", exported, tmp_path / "out", "--license", "mit")
    for name in "ab":
        room.models[name].rename(tmp_path / f"gone-{name}")
    storage = {"dir": str(tmp_path / "new"), "sources": [str(tmp_path / "out")]}
    refused = stillroom("plan", room.recipe(*plain, **sections, storage=storage), expect=2)
    assert "are those of one teacher, without prompts" in refused.stderr


def test_a_route_is_over_the_rows_of_this_recipe_alone(tmp_path: Path) -> None:
    room, taken = Room(tmp_path), {"name": "b", "where": "completion = 'cat dog tree'"}
    recipe = room.recipe({"name": "a"}, taken, **given(room))
    stillroom("run", recipe, "--until", "data")
    planned = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert planned["score/b"]["planned"] == PROMPTS
    write_jsonl(room.source, [one | {"completion": "dog cat"} for one in prompts(PROMPTS)])
    stillroom("run", recipe, "--until", "data")  # the same prompts, with other answers
    planned = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert [planned[f"score/{name}"]["planned"] for name in "ab"] == [PROMPTS, 0]


def test_a_where_over_the_source_is_of_the_files_of_this_recipe(tmp_path: Path) -> None:
    """Whoever read a prompt first stands in its row of `prompts`."""
    room, data = Room(tmp_path), tmp_path / "data"
    data.mkdir()
    taken = {"name": "b", "where": "source LIKE 'maths.jsonl:%'"}
    sections = given(room) | {"data": {"source": str(data), "format": "completion", "holdout": 4}}
    room.source.rename(data / "code.jsonl")

    def planned(*teachers: dict[str, Any]) -> list[int]:
        recipe = room.recipe(*teachers, **sections)
        stillroom("run", recipe, "--until", "data")
        stages = last_json(stillroom("plan", recipe, "--json"))["stages"]
        return [line["planned"] for name, line in stages.items() if name.startswith("score")]

    assert planned({"name": "a"}) == [PROMPTS]
    room.models["a"].rename(tmp_path / "gone")
    lacking = stillroom("plan", room.recipe({"name": "a"}, taken, **sections), expect=2)
    assert "asks for `source`, and the store's record of these prompts does not" in lacking.stderr
    (tmp_path / "gone").rename(room.models["a"])
    assert planned({"name": "a"}, taken) == [PROMPTS, 0]
    (data / "code.jsonl").rename(data / "maths.jsonl")
    assert planned({"name": "a"}, taken) == [PROMPTS, PROMPTS]
    assert len(query(Store.open(tmp_path / "store"), "SELECT 1 FROM prompts")) == PROMPTS
    stillroom("verify", tmp_path / "store")


def test_what_the_first_teacher_wrote_is_not_taken_for_the_text_of_another(tmp_path: Path) -> None:
    room = Room(tmp_path)
    stillroom("run", room.recipe({"name": "a"}, {"name": "b"}), "--until", "data")
    room.models["b"].rename(tmp_path / "gone")
    room.models["b"] = tmp_path / "b"
    assert "no folder" in stillroom("plan", room.recipe({"name": "b"}), expect=2).stderr
    both = last_json(stillroom("plan", room.recipe({"name": "a"}, {"name": "b"}), "--json"))
    assert both["stages"]["data"]["state"] == "done"


TRAINED: dict[str, Any] = {
    "student": {"config": {"hidden_size": 8, "num_hidden_layers": 1}},
    "train": {"epochs": 2, "tokens_per_step": 128, "learning_rate": 5.0e-3},
    "loss": {},
    "score": {"targets": "full", "batch_tokens": 256},
    "evaluate": {"tokens": 200, "samples": 0, "baseline": True},
}


@pytest.mark.slow
def test_a_student_of_two_teachers_and_what_trains_again(tmp_path: Path) -> None:
    room = Room(tmp_path)
    routed = [{"name": "a"}, {"name": "b", "where": THE}]
    recipe = room.recipe(*routed, **TRAINED)
    done = last_json(stillroom("run", recipe, "--json"))
    assert {entry["state"] for entry in done["stages"].values()} == {"done"}
    again = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert {line["state"] for line in again.values()} == {"done"}
    heavier = room.recipe(routed[0], routed[1] | {"weight": 2.0}, **TRAINED)
    stages = last_json(stillroom("plan", heavier, "--json"))["stages"]
    assert stages["train"]["why"] == "teachers.b.weight: 1.0 -> 2.0"
    states = {name: line["state"] for name, line in stages.items()}
    assert {states[name] for name in ("score/a", "score/b", "baseline")} == {"done"}
    run = Path(done["run_dir"])
    evaluation = read_record(next(run.glob("train-*/evaluation.json")))
    arms = {"teacher", "student_before", "baseline", "student"}
    assert {name: set(of["arms"]) for name, of in evaluation["teachers"].items()} == {
        "a": arms,
        "b": arms,
    }
    tokens = {name: of["arms"]["student"]["tokens"] for name, of in evaluation["teachers"].items()}
    assert tokens["a"] == evaluation["results"]["student"]["tokens"] > tokens["b"] > 0
    assert evaluation["teachers"]["a"]["arms"]["teacher"]["kl_teacher"] == 0.0
    # What a student of several was trained on is no dataset of one teacher.
    to = (tmp_path / "out", "--license", "mit")
    routed[0] |= {"where": f"NOT {THE}"}
    stillroom("run", room.recipe(*routed, **TRAINED), "--until", "train")
    kept = {one.stem for one in (tmp_path / "store" / "snapshots").glob("*.json")}
    mixed = make_plan(load_recipe(room.recipe(*routed, **TRAINED))).snapshots["train"].id
    assert mixed in kept
    named = ("--snapshot", mixed)
    refused = stillroom("export", tmp_path / "store", *to, *named, expect=2).stderr
    assert "differ in their teacher_id" in refused


def test_a_mixture_with_weights_of_each_token_trains(tmp_path: Path) -> None:
    room = Room(tmp_path)
    loss = {"teachers": "mixture", "teacher_weights": "entropy"}
    weight = {"shape": "linear", "start": 1.0, "end": 0.2}
    teachers = {"name": "a", "weight": weight}, {"name": "b", "where": THE}
    recipe = room.recipe(*teachers, **TRAINED | {"loss": loss})
    stages = last_json(stillroom("run", recipe, "--until", "train", "--json"))["stages"]
    assert stages["train"]["state"] == stages["baseline"]["state"] == "done"


class Killed(BaseException):
    """Ends a training where it stands, as a kill does: nobody saves anything."""


class KillAfter(StopAfter):
    """The process kills itself at the given look."""

    def check(self) -> None:
        try:
            super().check()
        except Stopped as stopped:
            raise Killed from stopped


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_with_both_teachers(tmp_path: Path) -> None:
    room = Room(tmp_path)
    weight = {"shape": "linear", "start": 1.0, "end": 0.2}
    teachers = {"name": "a", "weight": weight}, {"name": "b", "where": THE}
    train = {"epochs": 4, "tokens_per_step": 64, "checkpoint_every_steps": 2}
    alone = {"baseline": False, "tokens": 200, "samples": 0}
    recipe = room.recipe(*teachers, **TRAINED | {"train": train, "evaluate": alone})
    stillroom("run", recipe, "--until", "score")
    other = f"run.dir={tmp_path / 'other'}"
    stillroom("run", recipe, "--until", "train", "--set", other)
    killed = patch("kit.StopFlag", lambda: KillAfter(11))
    with killed, pytest.raises(Killed):
        stillroom("run", recipe, "--until", "train")
    (folder,) = (tmp_path / "run").glob("train-*")
    assert any((folder / "checkpoints").iterdir())
    assert not (folder / "train.json").exists()
    stillroom("run", recipe, "--until", "train")
    (whole,) = (tmp_path / "other").glob("train-*")
    one, two = (load_file(run / "student" / "model.safetensors") for run in (folder, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)
    histories = [read_record(run / "train.json")["history"] for run in (folder, whole)]
    assert histories[0] == histories[1]
