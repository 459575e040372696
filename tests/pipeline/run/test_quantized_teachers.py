"""Quantised teachers on the command line.

They are other teachers than the float one and stand side by side with it; and some are refused.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from planting import rows_of
from quantized import needs_bitsandbytes, saved
from tiny_classes import World, records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert

from stillroom.storage.store.store import Store

needs_bitsandbytes()
TEXTS, HELD_OUT, V, K = 20, 6, 32, 4
ALONE: dict[str, Any] = {"student": None, "train": None, "loss": None, "evaluate": {"tokens": 200}}


class Room:
    """A float teacher on given text, and recipes of it."""

    ids: dict[str, str]
    """Of the teachers, by their names."""
    notes: list[str]
    """Of the plan."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        sizes = {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.1}
        self.teacher = save_tiny_llama(folder / "teacher", **sizes)
        texts = [{**row, "completion": "a red cat sat on the mat"} for row in prompts(TEXTS)]
        self.source = write_jsonl(folder / "texts.jsonl", texts)

    def recipe(self, teacher: dict[str, Any] | list[dict[str, Any]], **sections: Any) -> Path:
        """A recipe of one teacher, or of several by name."""
        data = {"source": str(self.source), "format": "completion", "holdout": HELD_OUT}
        storage = {"dir": str(self.folder / "store"), "mantissa_bits": 23}
        own: dict[str, Any] = ALONE | {"data": data, "storage": storage, "generate": None}
        tree = recipe_tree(self.folder, self.teacher, self.source, **own | sections)
        named = [{"model": str(self.teacher)} | one for one in _listed(teacher)]
        tree["teacher"] = named[0]
        if isinstance(teacher, list):
            del tree["teacher"]
            tree["teachers"] = named
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


def _listed(given: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return given if isinstance(given, list) else [given]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    """Three teachers of one model, scored."""
    room = Room(tmp_path_factory.mktemp("room"))
    three = [
        {"name": "plain"},
        {"name": "nf4", "quantize": "nf4"},
        {"name": "int8", "quantize": "int8"},
    ]
    recipe = room.recipe(three)
    planned = last_json(stillroom("plan", recipe, "--json"))
    room.ids, room.notes = planned["teachers"], planned["notes"]
    stillroom("run", recipe)
    return room


def test_each_is_another_teacher_and_is_called_what_it_is(room: Room) -> None:
    assert len(set(room.ids.values())) == 3
    said = [note for note in room.notes if "is quantised" in note]
    assert [note.rpartition("quantised: ")[2] for note in said] == [
        f"{how} (bitsandbytes, while it is loaded)" for how in ("nf4", "int8")
    ]
    alone = room.recipe({"quantize": "nf4"})
    planned = last_json(stillroom("plan", alone, "--json"))
    assert {line["state"] for line in planned["stages"].values()} == {"done"}
    assert "nf4 (bitsandbytes" in stillroom("status", alone).stdout
    row = next(
        r for r in rows_of(Store.open(room.folder / "store")) if r["teacher_id"] == room.ids["nf4"]
    )
    shown = last_json(
        stillroom("inspect", room.folder / "store", "--key", row["key"].hex(), "--json")
    )
    assert shown["quantized"] == "nf4 (bitsandbytes, while it is loaded)"
    stillroom("export", alone, room.folder / "out", "--license", "mit")
    assert (
        "nf4 (bitsandbytes, while it is loaded)" in (room.folder / "out" / "README.md").read_text()
    )


def test_the_report_lays_them_side_by_side(room: Room, tmp_path: Path) -> None:
    """Against the sum over the ids that both have, from the store's rows, by loops."""
    page = tmp_path / "page.html"
    done = stillroom("report", "--teachers", room.folder / "store", "--out", page, "--json")
    found = last_json(done)
    assert "at least" in done.stdout
    assert "nf4 (bitsandbytes" in page.read_text()
    by_teacher: dict[str, dict[bytes, dict[str, Any]]] = defaultdict(dict)
    for row in rows_of(Store.open(room.folder / "store")):
        by_teacher[row["teacher_id"]][row["tokens_key"]] = row
    for line in found["teachers"]:
        rows = [r for r in by_teacher[line["teacher_id"]].values() if r["kind"] == line["kind"]]
        entropies = np.concatenate([r["entropy"] for r in rows]).astype(np.float64)
        assert (line["rows"], line["tokens"]) == (len(rows), len(entropies))
        assert line["rows"] == (HELD_OUT if line["kind"] == "full" else TEXTS - HELD_OUT)
        assert line["entropy"] == pytest.approx(entropies.mean(), rel=1e-6)
        assert line["kept_mass"] == pytest.approx(np.mean([r["kept_mass"] for r in rows]), rel=1e-6)
    assert len(found["pairs"]) == 3
    for pair in found["pairs"]:
        sides = by_teacher[pair["a"]], by_teacher[pair["b"]]
        kls = [_kl(sides[0][key], sides[1][key]) for key in sides[0]]
        assert pair["rows"] == TEXTS == len(kls)
        mean = np.concatenate(kls).mean()
        assert pair["kl_a_b"] == pytest.approx(mean, rel=1e-3, abs=1e-9)
        assert pair["kl_is_lower_bound"]
        assert pair["rounding"] < 1e-9
    names = {teacher: name for name, teacher in room.ids.items()}
    apart = {
        frozenset((names[p["a"]], names[p["b"]])): min(p["kl_a_b"], p["kl_b_a"])
        for p in found["pairs"]
    }
    nf4, int8 = apart[frozenset(("plain", "nf4"))], apart[frozenset(("plain", "int8"))]
    assert 0 < int8 < nf4 < 0.1


def _kl(p: dict[str, Any], q: dict[str, Any]) -> list[float]:
    """KL at each token, over ids that are entries of both and one outcome for all others."""
    found = []
    for n in range(p["span_tokens"]):
        mine, theirs = _entries(p, n), _entries(q, n)
        both = [(mine[i], theirs[i]) for i in mine.keys() & theirs.keys()]
        rest = [1 - sum(side) for side in zip(*both, strict=True)] if both else [1.0, 1.0]
        outcomes = [*both, *([tuple(rest)] if len(both) < V else [])]
        found.append(sum(a * np.log(a / b) for a, b in outcomes))
    return found


def _entries(row: dict[str, Any], position: int) -> dict[int, float]:
    k = row["k"]
    part = slice(position * k, (position + 1) * k)
    ids = range(k) if row["ids"] is None else row["ids"][part].tolist()
    return dict(zip(ids, np.exp(row["logprobs"][part].astype(np.float64)).tolist(), strict=True))


def test_a_deep_verification_reads_as_it_was_identified(room: Room) -> None:
    """The three have one folder.

    Without --quantize the float one is found first, where it has rows.
    """
    deep = ("verify", room.folder / "store", "--deep", "--teacher", room.teacher, "--json")
    for name, more in (("plain", ()), ("nf4", ("--quantize", "nf4"))):
        found = last_json(stillroom(*deep, *more))["deep"]
        assert (found["teacher_id"], found["rows"]) == (room.ids[name], TEXTS)
        assert (name in found["quantized"]) is (name != "plain")
    assert "--quantize: nf2 is none. Use nf4, int8" in (
        stillroom(*deep, "--quantize", "nf2", expect=2).stderr
    )
    alone = {"dir": str(room.folder / "alone")}
    stillroom("run", room.recipe({"quantize": "int8"}, storage=alone))
    deep = ("verify", alone["dir"], "--deep", "--teacher", room.teacher, "--json")
    found = last_json(stillroom(*deep))["deep"]
    assert found["ok"]
    assert found["teacher_id"] == room.ids["int8"]


def test_a_config_that_lies_is_found_out_before_anything_is_kept(tmp_path: Path) -> None:
    room = Room(tmp_path)
    config = json.loads((room.teacher / "config.json").read_text())
    lie = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (room.teacher / "config.json").write_text(json.dumps(config | lie))
    for command in ("plan", "run"):
        line = stillroom(command, room.recipe({}), expect=2).stderr
        assert "is not quantised: its config.json names fp8 (quantization_config)" in line
    assert not list((tmp_path / "store").glob("teachers/*"))


def test_what_does_not_go_together_is_refused_by_name(tmp_path: Path) -> None:
    room = Room(tmp_path)
    data = {"source": str(room.source), "format": "prompt", "holdout": 2}
    four = saved(tmp_path / "four", room.teacher, "nf4")
    for teacher in ({"quantize": "nf4"}, {"model": str(four)}):
        writes = room.recipe(teacher, data=data, generate={"engine": "vllm"})
        line = stillroom("plan", writes, expect=2).stderr
        assert "generate.engine: 'vllm' does not run" in line
        assert "which is quantised: nf4 (bitsandbytes, " in line
    both = [{"name": "float"}, {"name": "int8", "quantize": "int8"}]  # the first is not paid for
    line = stillroom("plan", room.recipe(both, score={"k": 4, "engine": "vllm"}), expect=2).stderr
    assert "score.engine: 'vllm' does not run" in line
    twice = room.recipe({"model": str(four), "quantize": "int8"})
    assert f"teacher.quantize: {four} is quantised already (bitsandbytes" in (
        stillroom("plan", twice, expect=2).stderr
    )
    student = {"student": {"model": str(four)}, "train": {"epochs": 1}, "evaluate": {"tokens": 9}}
    line = stillroom("plan", room.recipe({}, **student), expect=2).stderr
    assert f"student.model: {four} is quantised (bitsandbytes in its config.json)" in line


def test_a_quantised_teacher_writes_in_its_own_words(tmp_path: Path) -> None:
    """Where no engine is named it gets the one that quantises, though another may be installed."""
    room = Room(tmp_path)
    data = {"source": str(room.source), "format": "prompt", "holdout": 2, "limit": 4}
    generate = {"temperature": 0.0, "max_tokens": 6}
    stillroom("run", room.recipe({"quantize": "nf4"}, data=data, generate=generate))
    four = saved(tmp_path / "four", room.teacher, "nf4")
    same = {"dir": str(tmp_path / "same")}
    stillroom("run", room.recipe({"model": str(four)}, data=data, generate=generate, storage=same))
    texts = [
        sorted(tuple(row["token_ids"]) for row in rows_of(Store.open(place), "generations"))
        for place in (tmp_path / "store", same["dir"])
    ]
    assert texts[0] == texts[1]


def test_classes_are_laid_side_by_side_and_what_cannot_be_is_said(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        bert = save_tiny_bert(tmp_path / name / "bert", seed=seed)
        storage = {"dir": str(tmp_path / "store"), "mantissa_bits": 23}
        world = World(tmp_path / name, bert, records(30))
        world.recipe = world.changed(storage=storage)
        world.store = Store.open(tmp_path / "store", create=True)
        world.scored()
        out = ("--out", tmp_path / "page.html")
        done = stillroom("report", "--teachers", tmp_path / "store", *out, "--json")
        pairs = last_json(done)["pairs"]
        if name == "one":
            assert "KL needs two teachers, and this store has rows of one." in done.stdout
            assert not pairs
    rows = rows_of(Store.open(tmp_path / "store"))
    sides: dict[str, dict[bytes, np.ndarray]] = defaultdict(dict)
    for row in rows:
        sides[row["teacher_id"]][row["tokens_key"]] = row["logprobs"].astype(np.float64)
    (pair,) = pairs
    p, q = (np.stack([sides[pair[side]][key] for key in sorted(sides[pair["a"]])]) for side in "ab")
    assert pair["kl_a_b"] == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-5)
    assert pair["kl_b_a"] == pytest.approx((np.exp(q) * (q - p)).sum(1).mean(), rel=1e-5)
    assert not pair["kl_is_lower_bound"]
    nowhere = stillroom("report", "--teachers", tmp_path / "nowhere", expect=2).stderr
    assert "no store here" in nowhere
    empty = Store.open(tmp_path / "empty", create=True)
    assert "no soft targets, so there are no teachers" in (
        stillroom("report", "--teachers", empty.root, expect=2).stderr
    )
    both = stillroom("report", tmp_path, "--teachers", tmp_path / "store", expect=2).stderr
    assert "name run folders, or --teachers STORE" in both
