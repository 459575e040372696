"""Pooled states in the forward pass of scoring.

It is tested for one vector a text, what it takes, and when it means nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import prompts, recipe_tree, write_jsonl
from planting import rows_of
from tiny_classes import World, records
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.ledger.features import feature_bytes
from stillroom.stages.recipe.features import Feature
from stillroom.stages.recipe.sections import Recipe, Storage
from stillroom.stages.targets.features.capture import check_capture
from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.integrity.row_faults import row_faults
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.features import Rounded, check_features
from stillroom.storage.tables.row_builders import feature_row, text_key

ABOUT = {"teacher_id": "teacher", "stage": "score"}


def pooled(*poolings: str, layers: tuple[int, ...] = (1,), bits: int = 32) -> list[dict[str, Any]]:
    return [{"what": "pooled", "layers": [*layers], "pooling": p, "bits": bits} for p in poolings]


def recipe(
    folder: Path, teacher: Path, features: list[dict[str, Any]], batch: int | None = None
) -> Recipe:
    source = write_jsonl(folder / "prompts.jsonl", prompts(16))
    tree = recipe_tree(
        folder,
        teacher,
        source,
        generate={"engine": "hf", "temperature": 1.0, "max_tokens": 16},
        score={"k": 4, "features": features, "batch_tokens": batch},
    )
    return Recipe.model_validate(tree)


def found_in(store: Store) -> dict[tuple[bytes, str], np.ndarray]:
    return {
        (row["text_key"], row["kind"]): Rounded.from_row(row).restored()
        for row in rows_of(store, "features")
    }


def of_definition(states: torch.Tensor) -> dict[str, np.ndarray]:
    """The pooled vectors of the states [T, D] of one text, read alone."""
    exact = states.double().numpy()
    return {
        "pooled_cls": exact[0],
        "pooled_mean": exact.sum(0) / len(exact),
        "pooled_last": exact[-1],
    }


@pytest.mark.numeric
def test_what_is_stored_is_the_mean_and_the_last_of_plain_transformers(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """Texts that share padded passes, in the pass that makes targets and hidden states too."""
    teacher = tiny_llama(num_hidden_layers=3)
    hidden = {"what": "hidden", "layers": [0], "bits": 32}
    asked = recipe(tmp_path, teacher, [*pooled("mean", "last"), hidden], batch=256)
    store, _ = done_until_score(asked)
    texts = {
        text_key(r["token_ids"]): r["token_ids"] for r in rows_of(store) if r["kind"] == "topk"
    }
    found = found_in(store)
    assert found.keys() == {(t, k) for t in texts for k in ("pooled_mean", "pooled_last", "hidden")}
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    for text, ids in texts.items():
        with torch.no_grad():
            tensor = torch.from_numpy(ids.astype(np.int64))[None]
            shown = model(input_ids=tensor, output_hidden_states=True).hidden_states
        right = of_definition(shown[2][0])
        for kind in ("pooled_mean", "pooled_last"):
            assert found[text, kind].shape == (1, 16)
            np.testing.assert_allclose(found[text, kind][0], right[kind], atol=1e-5)
        np.testing.assert_allclose(found[text, "hidden"], shown[1][0].numpy(), atol=1e-5)
    assert verify(store).ok
    assert make_plan(asked).line("score").state == "done"


@pytest.mark.numeric
def test_an_encoder_is_pooled_over_its_tokens_and_no_padding(tmp_path: Path) -> None:
    teacher = save_tiny_bert(tmp_path / "teacher")
    kinds = ("pooled_cls", "pooled_mean", "pooled_last")
    score = {"targets": "full", "features": pooled("cls", "mean", "last"), "batch_tokens": 256}
    world = World(tmp_path, teacher, records(20), score=score).scored()
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    found = found_in(world.store)
    train = world.plan().snapshots["train"]
    rows = [r for s in train.shards for r in world.store.rows("soft_targets", {s.sha256: s.rows})]
    texts = {text_key(row["token_ids"]): row["token_ids"] for row in rows}
    assert found.keys() == {(text, kind) for text in texts for kind in kinds}
    for text, token_ids in texts.items():
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        separators = (ids == 3).long()  # [SEP]; a second one ends a pair
        parts = (separators.cumsum(1) - separators).clamp(max=1)
        with torch.no_grad():
            shown = model(input_ids=ids, token_type_ids=parts, output_hidden_states=True)
        right = of_definition(shown.hidden_states[2][0])
        for kind in kinds:
            np.testing.assert_allclose(found[text, kind][0], right[kind], atol=2e-5)


def test_another_pooling_is_another_feature_and_more_bits_serve(tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", num_hidden_layers=3)

    def line(*features: dict[str, Any]) -> Any:
        return make_plan(recipe(tmp_path, teacher, [*features])).line("score")

    mean = pooled("mean", bits=16)
    store, _ = done_until_score(recipe(tmp_path, teacher, mean))
    texts = len(rows_of(store, "features"))
    assert [line(*mean).state, line(*pooled("mean", bits=8)).state] == ["done", "done"]
    for other, least in (
        (pooled("last", bits=16), 32),
        (pooled("mean", layers=(0,), bits=16), 32),
        (pooled("mean"), 64),
        ([{"what": "hidden", "layers": [1]}], 0),
    ):
        missing = line(*other)
        assert missing.state == "to do"
        if least:
            assert missing.bytes_to_do == texts * (least + 60), "a text at a time"
    default = recipe(tmp_path, teacher, [{"what": "pooled", "layers": [1], "pooling": "mean"}])
    assert make_plan(default).line("score").state == "done", "16 bits where nothing is said"


def test_cls_means_nothing_where_the_first_token_sees_no_other(tmp_path: Path) -> None:
    feature = [Feature(kind="pooled_cls", layer=1, bits=16)]
    llama = save_tiny_llama(tmp_path / "llama")
    model = AutoModelForSequenceClassification.from_pretrained(llama).eval()
    with pytest.raises(UsageError, match="in block 1 of LlamaForSequenceClassification the first"):
        check_capture(model, feature)
    bert = save_tiny_bert(tmp_path / "bert")
    check_capture(AutoModelForSequenceClassification.from_pretrained(bert).eval(), feature)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 16), ("int8", 8)])
def test_a_file_takes_what_the_plan_says(dtype: str, bits: int, tmp_path: Path) -> None:
    """D = 384: at most 2 D + 64 bytes a text."""
    store = Store.open(tmp_path / "store", create=True)
    rng, texts, width = np.random.default_rng(0), 4096, 384
    # As `score` commits them where the recipe says nothing.
    limits = CommitLimits(rows=8 * Storage(dir="store").commit_rows)
    with store.writer("features", about=ABOUT, limits=limits) as writer:
        for _ in range(texts):
            names = {name: rng.bytes(16) for name in ("key", "reuse_key", "text_key")}
            states = rng.normal(size=(1, width)).astype(np.float32)
            writer.add(
                feature_row(
                    **names,
                    teacher_id="teacher",
                    kind="pooled_mean",
                    layer=5,
                    states=states,
                    dtype=dtype,
                )
            )
    commits = store.commits("features")
    per_text = sum(commit.shard.bytes for commit in commits) / texts
    said = feature_bytes(Feature(kind="pooled_mean", layer=5, bits=bits), {"pooled_mean": width})
    assert per_text == pytest.approx(said, rel=0.03)
    assert bits == 8 or per_text <= 2 * width + 64
    statistics = store.shard("features", commits[0].shard.sha256).about["statistics"]
    assert statistics[f"pooled_mean 5 {dtype}"]["vectors"] == commits[0].shard.rows


def test_a_text_has_one_vector() -> None:
    names = {name: bytes([n]) * 16 for n, name in enumerate(("key", "reuse_key", "text_key"))}
    row = feature_row(
        **names,
        teacher_id="teacher",
        kind="pooled_last",
        layer=1,
        states=np.ones((2, 4), np.float32),
        dtype="float16",
    )
    with pytest.raises(IntegrityError, match="2 vectors of kind pooled_last; a text has one"):
        check_features(row, ABOUT)
    assert [said for _, said in row_faults("features", row, ABOUT)]
    one = row | {"vectors": 1, "values": row["values"][:8]}
    check_features(one, ABOUT)
    assert not list(row_faults("features", one, ABOUT))
