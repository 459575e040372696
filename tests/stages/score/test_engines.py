"""Rows of several engines in one store.

It is tested which one scores, whose rows are reused, what is said of them, and that another one
reads.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, told, write_jsonl
from read_texts import ReadByHf, in_place_of_vllm, shifted_by_one

from stillroom.stages.models.causal_lm import KIND
from stillroom.storage.errors import NotLoaded
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS

pytestmark = pytest.mark.filterwarnings("ignore")
K = 4


def write(folder: Path, teacher: Path, engine: str | None, **sections: Any) -> Path:
    """Stage one and a student, of a teacher that draws its text."""
    source = write_jsonl(folder / "prompts.jsonl", prompts(24))
    named = {} if engine is None else {"engine": engine}
    sections = {
        "generate": {"engine": "hf", "temperature": 1.0, "max_tokens": 12},
        "score": {"k": K} | named,
    } | sections
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(folder, teacher, source, **sections)))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    table = Store.open(folder / "store").index("soft_targets", SCHEMAS["soft_targets"].names)
    return sorted(table.to_pylist(), key=lambda row: (row["engine"] or "", row["tokens_key"]))


@pytest.fixture
def teacher(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("teacher")


def test_rows_by_vllm_teach_and_are_those_of_transformers(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_vllm(monkeypatch)
    by_vllm = write(tmp_path, teacher, "vllm")
    results = last_json(stillroom("run", by_vllm, "--json"))["results"]
    (tmp_path / "hf").mkdir()
    theirs = last_json(stillroom("run", write(tmp_path / "hf", teacher, "hf"), "--json"))["results"]
    for name in ("kl_teacher", "cross_entropy"):  # students from either engine
        assert results["student"][name] == pytest.approx(theirs["student"][name], rel=0.05)
    of_vllm = rows_of(tmp_path)
    assert {row["engine"] for row in of_vllm} == {"vllm"}
    assert {row["kind"] for row in of_vllm} == {"topk", "full"}  # to train on, and to judge on
    for row in of_vllm:
        bounded = row["kind"] == "topk"
        assert row["entropy_is_bound"] == (True if bounded else None)
        assert (row["tail_bound"] is not None) == bounded
    deep = ("verify", tmp_path / "store", "--deep", "--teacher", teacher, "--json")
    found = told(*deep)["deep"]
    assert found["engines"] == {"vllm": found["rows"]}

    licences = [f"--{what}license=mit" for what in ("", "teacher-", "source-")]
    stillroom("export", tmp_path / "store", tmp_path / "out", *licences)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(of_vllm)} rows by `vllm`" in card
    assert "`tail_bound` nats" in card

    # Any engine's row serves, unless one is named.
    assert told("plan", write(tmp_path, teacher, None))["stages"]["score"]["state"] == "done"
    by_hf = write(tmp_path, teacher, "hf")
    line = told("plan", by_hf)["stages"]["score"]
    assert line["pending"] == line["planned"]
    assert "stored by another engine" in line["why"]
    stillroom("run", by_hf, "--until", "score")
    plan = told("plan", write(tmp_path, teacher, None))
    (mixed,) = [note for note in plan["notes"] if "several engines" in note]
    assert f"{len(of_vllm)} by hf and {len(of_vllm)} by vllm" in mixed
    assert told("verify", tmp_path / "store")["ok"]

    of_hf, of_vllm = rows_of(tmp_path)[: len(of_vllm)], rows_of(tmp_path)[len(of_vllm) :]
    for one, other in zip(of_vllm, of_hf, strict=True):
        assert (one["reuse_key"], one["engine"], other["engine"]) == (
            other["reuse_key"],
            "vllm",
            None,
        )
        rounding = 2**-9
        for name in ("logprobs", "token_logprob"):
            np.testing.assert_allclose(one[name], other[name], rtol=rounding, atol=1e-4)
        off = np.abs(np.subtract(one["tail_logprob"], other["tail_logprob"]))
        off = np.where(np.equal(one["tail_logprob"], other["tail_logprob"]), 0.0, off)
        bound = np.array(one["tail_bound"] or 0.0)
        assert (off <= bound + 1e-4 + rounding * np.abs(np.nan_to_num(other["tail_logprob"]))).all()
        assert (
            np.array(one["entropy"]) <= np.array(other["entropy"]) * (1 + rounding) + 1e-4
        ).all()
    # What is exact is taken where both are there.
    stillroom("run", write(tmp_path, teacher, None), "--until", "train")


def test_the_first_worker_decides_for_all(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers does not load the teacher, vLLM reads.

    A worker where it does then asks vLLM too.
    """
    opened = in_place_of_vllm(monkeypatch)
    recipe = write(tmp_path, teacher, None)
    stillroom("run", recipe, "--until", "generate")
    assert "chosen by the first worker" in " ".join(told("plan", recipe)["notes"])
    right = KIND.teacher
    calls: list[str] = []

    def refuses(self: Any, identity: Any, **more: Any) -> Any:
        calls.append("asked")
        if len(calls) == 1:
            raise NotLoaded("too new")
        return right(identity, **more)

    monkeypatch.setattr(type(KIND), "teacher", refuses)
    stillroom("run", recipe, "--until", "score")
    assert len(opened) == 1
    assert {row["engine"] for row in rows_of(tmp_path)} == {"vllm"}
    # More to do, and transformers loads it now.
    more = write(tmp_path, teacher, None, score={"k": K + 1})
    assert "vllm, as the first worker decided" in " ".join(told("plan", more)["notes"])
    stillroom("run", more, "--until", "score")
    assert len(opened) == 2
    assert {row["engine"] for row in rows_of(tmp_path)} == {"vllm"}


def test_what_vllm_does_not_run_is_not_handed_to_it(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is one that bitsandbytes quantises.

    The failure of transformers is told, and not vLLM's refusal.
    """
    opened = in_place_of_vllm(monkeypatch)
    monkeypatch.setattr("stillroom.stages.engines.opening.by_bitsandbytes", lambda parts: True)
    recipe = write(tmp_path, teacher, None)
    stillroom("run", recipe, "--until", "generate")
    assert "the engine is" not in " ".join(told("plan", recipe)["notes"])

    def refuses(*_: Any, **__: Any) -> Any:
        raise NotLoaded("no room for it")

    monkeypatch.setattr(type(KIND), "teacher", refuses)
    assert "no room for it" in stillroom("run", recipe, "--until", "score", expect=2).stderr
    assert opened == []


def test_transformers_scores_where_it_loads_the_teacher(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = in_place_of_vllm(monkeypatch)
    stillroom("run", write(tmp_path, teacher, None), "--until", "score")
    assert opened == []
    assert {row["engine"] for row in rows_of(tmp_path)} == {None}


def of_two(folder: Path, teachers: dict[str, Path], engine: str | None, **sections: Any) -> Path:
    """The same of two teachers, by their names."""
    path = write(folder, folder / "none", engine, **sections)
    tree = yaml.safe_load(path.read_text())
    del tree["teacher"]
    tree["teachers"] = [{"name": name, "model": str(model)} for name, model in teachers.items()]
    path.write_text(yaml.safe_dump(tree))
    return path


def test_what_needs_exact_tails_takes_other_rows_than_those_of_bounds(
    teacher: Path, tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights by entropy ask for exact tails.

    The report of teachers takes them where they are, and else says so.
    """
    in_place_of_vllm(monkeypatch)
    two = {"a": teacher, "b": tiny_llama("other", seed=1)}
    stillroom("run", of_two(tmp_path, two, "vllm"), "--until", "score")
    stages = told("plan", of_two(tmp_path, two, None))["stages"]
    assert [stages[f"score/{name}"]["state"] for name in two] == ["done", "done"]
    report = ("report", "--teachers", tmp_path / "store", "--out", tmp_path / "page.html", "--json")
    done = stillroom(*report)
    (pair,) = last_json(done)["pairs"]
    assert 0 < pair["tokens_of_bounded_tails"] < pair["tokens"]  # held-out rows are full
    assert "within a bound alone" in done.stdout

    by_entropy = of_two(tmp_path, two, None, loss={"teacher_weights": "entropy"})
    stages = told("plan", by_entropy)["stages"]
    for name in two:
        line = stages[f"score/{name}"]
        assert line["pending"] == line["planned"]
        assert "stored by another engine" in line["why"]
    stillroom("run", by_entropy, "--until", "score")
    (pair,) = last_json(stillroom(*report))["pairs"]
    assert pair["tokens_of_bounded_tails"] == 0


def test_room_is_made_for_texts_that_the_teacher_reads(
    teacher: Path, tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another teacher may read less than the one that writes.

    What is longer is a reject, and needs no room.
    """
    opened = in_place_of_vllm(monkeypatch)
    two = {"a": teacher, "b": tiny_llama("other", seed=1, max_position_embeddings=12)}
    recipe = of_two(tmp_path, two, "vllm")
    stillroom("run", recipe, "--until", "score")
    assert len(opened) == 2
    line = told("plan", recipe)["stages"]["score/b"]
    assert line["state"] == "done"
    assert line["rejected"] > 0


def test_another_texts_distributions_are_found_by_deep_verification(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine got wrong by a position is off and named.

    The tokens' own log-probabilities are wrong too.
    """
    opened = in_place_of_vllm(monkeypatch)
    right = ReadByHf.read
    monkeypatch.setattr(
        ReadByHf, "read", lambda self, *asked: shifted_by_one(partial(right, self))(*asked)
    )
    stillroom("run", write(tmp_path, teacher, "vllm"), "--until", "score")
    assert opened
    deep = ("verify", tmp_path / "store", "--deep", "--teacher", teacher, "--json")
    assert last_json(stillroom(*deep, expect=3))["deep"]["off"]
