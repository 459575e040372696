"""Queries, keys and values in the pass of scoring.

Attention is rebuilt from what is stored, and it is tested what is refused.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import prompts, recipe_tree, stillroom, write_jsonl, write_recipe
from planting import rows_of
from tiny_classes import World, records
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama, tiny_tokenizer
from tiny_models import save_tiny_bert
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GptOssConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.losses.features.attention import stored_scores
from stillroom.stages.models.attention.maps import maps
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Layout, Rounded
from stillroom.storage.tables.row_builders import text_key

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.5,
}
GROUPED = SHAPE | {"intermediate_size": 32, "num_key_value_heads": 2}
TEACHERS = {
    "gpt2": GPT2Config(**SHAPE, n_positions=128),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, max_position_embeddings=128),
}


def teacher_of(folder: Path, name: str) -> Path:
    if name == "llama":
        shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5}
        return save_tiny_llama(folder, **shape)
    return saved(folder, TEACHERS[name])


def saved(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def multiplied(*kinds: str, bits: int | None = 32, layers: Sequence[int] = (0, 1)) -> list[Any]:
    return [{"what": kind, "layers": list(layers), "bits": bits} for kind in kinds]


def recipe_of(folder: Path, teacher: Path, features: list[Any], **score: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder / "prompts.jsonl", prompts(12))
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 16}
    score = {"k": 4, "features": features} | score
    tree = recipe_tree(folder, teacher, source, generate=spoken, score=score)
    return Recipe.model_validate(tree)


def stored(store: Store) -> dict[tuple[bytes, str, int], dict[str, Any]]:
    found = rows_of(store, "features")
    return {(row["text_key"], row["kind"], row["layer"]): row for row in found}


def rebuilt(found: dict[tuple[bytes, str, int], dict[str, Any]], text: bytes, layer: int) -> Any:
    """The maps of a text, from its rows alone."""
    rows = [found[text, kind, layer] for kind in ("queries", "keys")]
    queries, keys = (torch.from_numpy(Rounded.from_row(row).restored()) for row in rows)
    layout = Layout.from_row(rows[0])
    scores = stored_scores(queries, keys, layout, key_heads=rows[1]["heads"])
    (whole,) = maps(scores, [len(queries)])
    return whole


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_attention_of_stored_rows_is_the_models_eager_one(tmp_path: Path, name: str) -> None:
    """Texts of other lengths share a pass with padding."""
    teacher = teacher_of(tmp_path / "teacher", name)
    features = multiplied("queries", "keys", "values")
    store, _ = done_until_score(recipe_of(tmp_path, teacher, features, batch_tokens=64))
    found = stored(store)
    texts = {text_key(r["token_ids"]): r["token_ids"] for r in rows_of(store)}
    model = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager").eval()
    assert len(found) >= 6 * 6
    for text in {key for key, _, _ in found}:
        ids = torch.from_numpy(texts[text].astype(np.int64))[None]
        with torch.no_grad():
            eager = model(input_ids=ids, output_attentions=True).attentions
        for layer, right in enumerate(eager):
            torch.testing.assert_close(rebuilt(found, text, layer), right[0], rtol=0, atol=1e-5)
    assert verify(store).ok


@pytest.mark.numeric
def test_attention_of_an_encoders_stored_rows_is_its_eager_one(tmp_path: Path) -> None:
    teacher = save_tiny_bert(tmp_path / "teacher")
    score = {"targets": "full", "features": multiplied("queries", "keys"), "batch_tokens": 64}
    world = World(tmp_path, teacher, records(16), score=score).scored()
    found = stored(world.store)
    model = AutoModelForSequenceClassification.from_pretrained(teacher, attn_implementation="eager")
    inputs = Inputs.of(model.eval(), teacher)
    texts = {text_key(r["token_ids"]): r["token_ids"] for r in world.rows()}
    for text in {key for key, _, _ in found}:
        with torch.no_grad():
            eager = model(**inputs.tensors([texts[text]]), output_attentions=True).attentions
        for layer, right in enumerate(eager):
            whole = rebuilt(found, text, layer)
            torch.testing.assert_close(whole, right[0], rtol=0, atol=1e-5)


def test_a_teacher_with_sinks_is_refused_by_name_before_anything_runs(tmp_path: Path) -> None:
    config = GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    config.save_pretrained(tmp_path / "teacher")
    teacher = saved(tmp_path / "teacher", config)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(4))
    score = {"k": 4, "features": multiplied("queries", "keys")}
    path = write_recipe(tmp_path, teacher, source, score=score)
    refused = stillroom("plan", path, expect=2)
    assert "(gpt_oss): its attention is not softmax(scale q k^T) alone" in refused.stderr
    assert "attention sinks" in refused.stderr
    assert not (tmp_path / "store").exists()


def test_the_plan_says_what_grouped_queries_and_keys_take(tmp_path: Path) -> None:
    """They are in 16 bits where the recipe says nothing.

    Queries are of 4 heads of 4 numbers, keys of 2 that they share.
    """
    teacher = teacher_of(tmp_path / "teacher", "llama")
    recipe = recipe_of(tmp_path, teacher, multiplied("queries", "keys", bits=None, layers=[1]))
    assert any(note.startswith("features: 48 bytes a token") for note in make_plan(recipe).notes)
    store, _ = done_until_score(recipe)
    rows = rows_of(store, "features")
    assert {(row["kind"], row["width"], row["heads"]) for row in rows} == {
        ("queries", 16, 4),
        ("keys", 8, 2),
    }
    tokens = sum(row["vectors"] for row in rows if row["kind"] == "queries")
    assert sum(len(row["values"]) for row in rows) == 48 * tokens


@pytest.mark.numeric
def test_eight_bits_are_stored_where_attention_stays_and_refused_where_it_moves(
    tmp_path: Path,
) -> None:
    even = save_tiny_llama(tmp_path / "even", initializer_range=0.2)
    recipe = recipe_of(tmp_path / "a", even, multiplied("queries", "keys", bits=8))
    store, _ = done_until_score(recipe)
    rows = rows_of(store, "features")
    assert {row["dtype"] for row in rows} == {"int8"}
    assert all(0 < row["rounding_error"] < 0.02 for row in rows)
    sharp = save_tiny_llama(tmp_path / "sharp", initializer_range=1.0)
    recipe = recipe_of(tmp_path / "b", sharp, multiplied("keys", bits=8))
    store, _ = done_until_score(recipe)
    messages = [row["message"] for row in rows_of(store, "rejects")]
    assert messages
    for message in messages:
        assert re.search(r"keys of block [01] in 8 bits its attention moves by 0\.\d+", message)
        assert "0.05 are allowed. Ask for bits: 16" in message
    assert make_plan(recipe_of(tmp_path / "b", sharp, [])).line("score").state == "to do"


@pytest.mark.numeric
def test_a_teacher_in_bfloat16_is_recorded_as_it_multiplies(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "teacher", initializer_range=0.3)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    features = multiplied("queries", "keys", "values")
    store, _ = done_until_score(recipe_of(tmp_path, folder, features))
    found = stored(store)
    texts = {text_key(r["token_ids"]): r["token_ids"] for r in rows_of(store)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation("eager")
    for text in {key for key, _, _ in found}:
        ids = torch.from_numpy(texts[text].astype(np.int64))[None]
        with torch.no_grad():
            eager = model(input_ids=ids, output_attentions=True).attentions
        torch.testing.assert_close(rebuilt(found, text, 1), eager[1][0], rtol=0, atol=0.03)


def test_what_is_stored_serves_and_a_student_that_cannot_be_paired_is_refused(
    tmp_path: Path,
) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", num_attention_heads=4, num_key_value_heads=2)
    features = multiplied("queries", "keys", bits=16)
    recipe = recipe_of(tmp_path, teacher, features)
    done_until_score(recipe)
    for kinds in (("keys",), ("queries", "keys")):
        served = recipe_of(tmp_path, teacher, multiplied(*kinds, bits=8, layers=[1]))
        assert make_plan(served).line("score").state == "done", "16 bits serve 8"
    more = make_plan(recipe_of(tmp_path, teacher, multiplied("queries", bits=32))).line("score")
    assert "stored with features of fewer bits" in more.why
    source = tmp_path / "prompts.jsonl"

    def refused(loss: dict[str, Any], **student: Any) -> str:
        config = {"config": {"hidden_size": 8} | student}
        path = write_recipe(
            tmp_path,
            teacher,
            source,
            score={"k": 4, "features": features},
            loss={"features": [loss]},
            student=config,
        )
        return stillroom("plan", path, expect=2).stderr

    said = refused({"match": "attention"}, num_attention_heads=2, num_key_value_heads=1)
    assert "the teacher has 4 and the student 2. Use heads: average" in said
    relations = {"match": "relations", "of": ["keys"], "relation_heads": 3}
    said = refused(relations, num_attention_heads=4)
    assert "8 numbers of the teacher's keys cannot be cut into 3 parts" in said
    assert "needs values of the teacher" in refused(relations | {"of": ["values"]})
    assert "`heads` belongs to match 'attention'" in refused(relations | {"heads": "each"})
    assert "needs `relation_heads`" in refused({"match": "relations", "of": ["keys"]})
    sinks = {"model_type": "gpt_oss", "num_attention_heads": 4, "num_key_value_heads": 2}
    said = refused({"match": "attention"}, **sinks, num_hidden_layers=2)
    assert "the student's attention is not softmax(scale q k^T) alone" in said


def test_a_model_that_only_itself_can_say_is_refused_before_the_first_row(tmp_path: Path) -> None:
    """Loaded with eager attention, by its config: nothing is recorded of it."""
    folder = save_tiny_llama(tmp_path / "teacher")
    recipe = recipe_of(tmp_path, folder, multiplied("queries", "keys"))
    from stillroom.stages.models.attention import recorded

    def none_is_compared(*_: Any) -> dict[Any, Any]:
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recorded, "_compared", none_is_compared)
        with pytest.raises(UsageError, match="0 of its 2 layers use transformers' attention"):
            done_until_score(recipe)
    store = Store.open(tmp_path / "store")
    assert not store.commits("features")
    assert not store.commits("soft_targets")
