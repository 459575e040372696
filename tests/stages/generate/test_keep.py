"""`generate.keep`: what each token was drawn from is kept while the text is written.

`score` then finds it done.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kit import prompts, recipe_tree, stillroom, told, write_jsonl
from read_texts import log_softmax, teacher_at
from tiny_adapter import save_random_adapter

from stillroom.stages.models.causal_lm import KIND, load_causal_lm
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets

DRAWN = {"engine": "hf", "temperature": 0.7, "top_p": 0.8, "max_tokens": 12, "stop": ["tree"]}


def write(folder: Path, teacher: Path, /, *, holdout: int = 0, **sections: Any) -> Path:
    source = write_jsonl(folder / "prompts.jsonl", prompts(20))
    tree = recipe_tree(
        folder,
        teacher,
        source,
        generate=DRAWN | {"keep": {"k": 6}},
        score={"k": 4},
        data={"source": str(source), "format": "prompt", "holdout": holdout},
    )
    tree["storage"]["mantissa_bits"] = 23
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | sections))
    return path


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    return Store.open(folder / "store").index(table, SCHEMAS[table].names).to_pylist()


@pytest.fixture
def teacher(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("teacher")


def test_what_was_kept_needs_no_further_pass(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, teacher)
    stillroom("run", recipe, "--until", "generate")
    texts = {row["key"]: row for row in rows(tmp_path, "generations")}
    kept = rows(tmp_path, "soft_targets")
    assert {row["generation_key"] for row in kept} == {
        key for key, row in texts.items() if row["completion_tokens"]
    }
    model = load_causal_lm(teacher_at(teacher, tmp_path))
    for row in kept:
        text = texts[row["generation_key"]]
        assert (row["teacher_id"], row["tokens_key"]) == (text["author_id"], text["tokens_key"])
        said = log_softmax(model, row["token_ids"])[text["prompt_tokens"] - 1 : -1]
        arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in row.items()}
        targets = SoftTargets.from_row(arrays)
        assert targets.ids is not None
        at = np.take_along_axis(said, targets.ids.astype(np.int64), axis=1)
        np.testing.assert_allclose(targets.logprobs, at, atol=1e-4)
        assert (at[:, -1] >= -np.sort(-said, axis=1)[:, 5] - 1e-4).all()
        own = said[np.arange(len(said)), text["token_ids"][text["prompt_tokens"] :]]
        np.testing.assert_allclose(targets.token_logprob, own, atol=1e-4)
        np.testing.assert_allclose(targets.entropy, -(np.exp(said) * said).sum(1), atol=1e-4)

    def loads(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher is asked again")

    monkeypatch.setattr(type(KIND), "teacher", loads)
    line = told("plan", recipe)["stages"]["score"]
    assert (line["state"], line["committed"], line["pending"]) == ("done", len(kept), 0)
    stillroom("run", recipe, "--until", "train")
    assert told("verify", tmp_path / "store")["ok"]


def test_held_out_texts_are_read_for_their_references(teacher: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path, teacher, holdout=5)
    stillroom("run", recipe, "--until", "generate")
    line = told("plan", recipe)["stages"]["score"]
    assert 0 < line["pending"] <= 5
    stillroom("run", recipe, "--until", "score")
    stored = rows(tmp_path, "soft_targets")
    assert sum(row["kind"] == "full" for row in stored) == line["pending"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"score": None}, "no section `score`"),
        ({"score": {"k": 7}}, "k 6 is less than score.k 7"),
        ({"score": {"targets": "full"}}, "score.targets is 'full'"),
        ({"score": {"targets": "sampled"}}, "score.targets is 'sampled'"),
        ({"score": {"k": 4, "temperatures": [1.0, 2.0]}}, "keeps temperature 1 alone"),
        ({"score": {"k": 4, "engine": "vllm"}}, "takes its own rows alone"),
        (
            {"score": {"k": 4, "features": [{"what": "hidden", "layers": [0]}]}},
            "keeps no features",
        ),
        ({"generate": DRAWN | {"keep": {"k": 6}, "model": "another"}}, "another writes"),
        (
            {
                "generate": {
                    "engine": "vllm",
                    "keep": {"k": 6},
                    "engine_args": {"logprobs_mode": "processed_logprobs"},
                }
            },
            "generate.engine_args names a logprobs_mode",
        ),
    ],
)
def test_what_would_be_kept_for_nothing_is_refused(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    recipe = write(tmp_path, teacher, **sections)
    assert says in stillroom("plan", recipe, expect=2).stderr.replace("\n", " ")


def test_an_author_who_is_not_the_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    """What the models are decides.

    With an adapter the teacher is another model than the one that writes.
    """
    adapter = save_random_adapter(tmp_path / "adapter", teacher)
    keeping = DRAWN | {"keep": {"k": 6}}
    adapted = {"model": str(teacher), "adapter": str(adapter)}
    recipe = write(tmp_path, teacher, teacher=adapted, generate=keeping)
    assert told("plan", recipe)["stages"]["generate"]["pending"] == 20
    named = write(tmp_path, teacher, teacher=adapted, generate=keeping | {"model": str(teacher)})
    assert "is not the teacher that score" in stillroom("plan", named, expect=2).stderr.replace(
        "\n", " "
    )
