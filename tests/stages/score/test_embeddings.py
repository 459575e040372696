"""The teacher's embeddings.

They are kept once, in the pass that scores, and where all rows are there already.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from planting import rows_of
from tiny_jobs import done_until_score, teacher_job
from tiny_llama import save_tiny_llama
from transformers import AutoModelForCausalLM

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.ledger.features import embeddings_name, find_embeddings
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.score.embeddings import keep_embeddings
from stillroom.stages.targets.features.projection import projection_matrix
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import content_id
from stillroom.storage.store.store import Store

KEPT = [{"what": "embeddings"}]


def recipe(folder: Path, teacher: Path, features: list[dict[str, Any]]) -> Recipe:
    source = write_jsonl(folder / "prompts.jsonl", prompts(8))
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 8}
    stage = {"k": 4, "features": features}
    return Recipe.model_validate(recipe_tree(folder, teacher, source, generate=spoken, score=stage))


@pytest.mark.numeric
def test_they_are_kept_once_and_beside_rows_that_are_there_already(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    teacher = tiny_llama()
    store, identity = done_until_score(recipe(tmp_path, teacher, []))
    rows = len(rows_of(store))
    asked = recipe(tmp_path, teacher, KEPT)
    exact = AutoModelForCausalLM.from_pretrained(teacher).get_input_embeddings().weight.detach()
    plan = make_plan(asked)
    line = plan.line("score")
    assert (line.state, line.pending, line.why) == ("to do", 0, "the teacher's embeddings to keep")
    assert line.bytes_to_do == 2 * exact.numel()
    assert any(f"{2 * exact.numel():,} bytes, once" in note for note in plan.notes)
    assert plan.snapshots == {}, "nobody trains before they are there"
    _, job, _ = teacher_job(asked)
    score.run(job, identity)
    assert len(rows_of(store)) == rows
    assert rows_of(store, "features") == [], "no bytes a token"
    kept = find_embeddings(store, identity.id, 16)
    stored = store.matrix(kept.id)
    np.testing.assert_array_equal(stored, exact.numpy().astype(np.float16))
    missed = torch.from_numpy(stored.astype(np.float64)) - exact.double()
    error = float(missed.norm() / exact.double().norm())
    assert kept.about["rounding_error"] == pytest.approx(error, rel=1e-6)
    assert 0 < error < 2**-11
    assert make_plan(asked).line("score").state == "done"
    assert verify(store).ok
    # More bits serve fewer, not the other way round.
    more = recipe(tmp_path, teacher, [KEPT[0] | {"bits": 32}])
    assert make_plan(more).line("score").state == "to do"
    score.run(teacher_job(more)[1], identity)
    exactly = store.matrix(find_embeddings(store, identity.id, 32).id)
    np.testing.assert_array_equal(exactly, exact.numpy())
    assert kept == find_embeddings(store, identity.id, 16)


def test_what_float16_does_not_hold_is_refused(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    store = Store.open(tmp_path / "store", create=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 0] = 70_000.0
    with pytest.raises(UsageError, match=r"beyond what float16 holds\. Set bits: 32"):
        keep_embeddings(store, model, teacher_id="t", bits=16)
    keep_embeddings(store, model, teacher_id="t", bits=32)
    assert find_embeddings(store, "t", 16) is not None


@pytest.mark.parametrize("changed", [False, True], ids=["right", "changed"])
def test_deep_verification_compares_matrices_with_what_they_were_made_of(
    tmp_path: Path, changed: bool
) -> None:
    """A changed number that was there before scoring: rows and checksums agree with it."""
    teacher = save_tiny_llama(tmp_path / "teacher", initializer_range=0.3)
    values = {"what": "values", "layers": [0], "project": 6}
    asked = recipe(tmp_path, teacher, [*KEPT, values])
    store, _, identity = teacher_job(asked)
    if changed:
        exact = AutoModelForCausalLM.from_pretrained(teacher).get_input_embeddings().weight
        embeddings = exact.detach().numpy().astype(np.float16)
        embeddings[5, 3] *= 1.01
        about = {"what": "embeddings", "teacher_id": identity.id, "dtype": "float16"}
        about |= {"shape": list(embeddings.shape), "rounding_error": 0.0}
        store.put_matrix(embeddings_name(identity.id, "float16"), embeddings, about)
        said = {"what": "projection", "width": 8, "to": 6}
        projection = projection_matrix(8, 6)
        projection[2, 1] += 1e-3
        store.put_matrix(content_id("matrix", **said), projection, said)
    done_until_score(asked)
    words = ("verify", store.root, "--deep", "--teacher", teacher, "--json")
    done = stillroom(*words, expect=3 if changed else 0)
    deep = last_json(done)["deep"]
    off = {one["what"]: (one["off"], one["message"][:15]) for one in deep["features"]["matrices"]}
    assert deep["ok"] is not changed
    assert deep["features"]["off"] == []
    if changed:
        assert off == {"embeddings": (1, "row 5, column 3"), "projection": (1, "row 2, column 1")}
        assert "2 of 2 matrices are not what the teacher has" in " ".join(done.stdout.split())
    else:
        assert off == {"embeddings": (0, ""), "projection": (0, "")}
