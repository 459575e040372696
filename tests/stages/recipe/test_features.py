"""Features in the recipe: what cannot be captured or matched is said with its path.

An empty list is as none.
"""

from pathlib import Path
from typing import Any

import pytest
from kit import write_recipe

from stillroom.pipeline.plan.students import train_settings
from stillroom.stages.ledger.features import feature_bytes
from stillroom.stages.recipe.features import (
    Feature,
    FeatureLoss,
    FeatureRequest,
    captured,
    learnt,
)
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.errors import UsageError

HIDDEN = [{"what": "hidden", "layers": [0, 2]}]
VALUES = [{"what": "values", "layers": [1], "project": 256}]
PROJECTED = {"match": "relations", "of": ["values"], "relation_heads": 1, "project": 256}
MEAN = [{"what": "pooled", "layers": [1], "pooling": "mean"}]


def written(folder: Path, **sections: Any) -> Path:
    return write_recipe(folder, folder / "teacher", folder / "rows.jsonl", **sections)


@pytest.mark.parametrize(
    ("score", "loss", "said"),
    [
        ({"features": [{"what": "hidden", "layers": []}]}, {}, "`layers` names none"),
        ({"features": [{"what": "hidden", "layers": [1, 1]}]}, {}, "names one twice"),
        ({"features": [{"what": "hidden", "layers": [-1]}]}, {}, "at least 0 (got -1)"),
        ({"features": [{"what": "hidden", "layers": [1], "bits": 4}]}, {}, "8, 16 or 32 (got 4)"),
        ({"features": [{"what": "logits", "layers": [1]}]}, {}, "must be one of 'hidden'"),
        ({"features": [{"what": "hidden", "layer": [1]}]}, {}, "Did you mean 'layers'?"),
        ({"features": [{"what": "embeddings", "layers": [0]}]}, {}, "are of no layer"),
        ({"features": [{"what": "embeddings", "bits": 8}]}, {}, "kept with 16 or 32"),
        ({"features": [{"what": "embeddings"}] * 2}, {}, "embeddings are asked for more than once"),
        ({"features": [*HIDDEN, *HIDDEN]}, {}, "hidden of layer 0 is asked for 2 times"),
        ({"features": HIDDEN, "engine": "vllm"}, {}, "engine 'vllm' shows no states of blocks"),
        ({}, {"features": [{"match": "hidden"}]}, "loss.features.0: match 'hidden' needs hidden"),
        (
            {"features": HIDDEN},
            {"features": [{"match": "hidden", "layers": {1: 0}}]},
            "loss.features.0.layers: hidden of layer 1 of the teacher is not stored; "
            "score.features has layers 0, 2",
        ),
        (
            {"features": [{"what": "queries", "layers": [0]}, {"what": "keys", "layers": [1]}]},
            {"features": [{"match": "attention"}]},
            "needs queries and keys of one layer",
        ),
        (
            {"features": [{"what": "values", "layers": [0]}]},
            {"features": [{"match": "relations", "of": ["values", "values"], "relation_heads": 2}]},
            "names one twice",
        ),
        (
            {"features": HIDDEN},
            {"features": [{"match": "hidden", "heads": "each"}]},
            "`heads` belongs to match 'attention'; this is 'hidden'",
        ),
        ({"features": HIDDEN}, {"features": [{"match": "hidden", "layers": {}}]}, "is empty"),
        (
            {"features": HIDDEN},
            {"features": [{"match": "hidden", "alpha": 0.5}]},
            "loss.features.0.alpha: unknown key. Write weight: it is used as given",
        ),
        (
            {"features": HIDDEN},
            {"features": [{"match": "hidden", "layer_mapping": {0: 0}}]},
            "Write layers: {teacher's block: student's block}, uniform or last.",
        ),
        ({"features": [HIDDEN[0] | {"dtype": "int8"}]}, {}, "Write bits: 8, 16 or 32."),
        (
            {"features": [HIDDEN[0] | {"project": 8}]},
            {},
            "`project` is of what: values; this is hid",
        ),
        ({"features": [VALUES[0] | {"project": 0}]}, {}, "at least 1 (got 0)"),
        ({"features": [*VALUES, *VALUES]}, {}, "values_256 of layer 1 is asked for 2 times"),
        (
            {"features": VALUES},
            {"features": [PROJECTED | {"project": 128}]},
            "needs values_128 of the teacher, which score.features does not store. Add "
            "score.features: [{what: values, project: 128, layers: [...]}]",
        ),
        (
            {"features": VALUES},
            {"features": [{n: PROJECTED[n] for n in PROJECTED if n != "project"}]},
            "needs values of the teacher, which score.features does not store",
        ),
        (
            {"features": VALUES},
            {"features": [PROJECTED | {"of": ["keys", "values"]}]},
            "`project` is of values alone. Set of: [values]",
        ),
        (
            {"features": VALUES},
            {"features": [PROJECTED | {"relation_heads": 4}]},
            "projected vectors have no heads, and cannot be cut. Set relation_heads: 1",
        ),
        (
            {"features": [VALUES[0] | {"project": 64}]},
            {"features": [PROJECTED | {"project": 64}]},
            "relations need 128 numbers at least",
        ),
        (
            {"features": VALUES},
            {"features": [{"match": "hidden", "project": 256}]},
            "`project` belongs to match 'relations'; this is 'hidden'",
        ),
        ({"features": HIDDEN}, {"features": [{"match": "hidden", "weight": 0}]}, "is 0 throughout"),
        (
            {"features": HIDDEN},
            {"features": [{"match": "hidden", "distance": "l1"}]},
            "'smooth_l1'",
        ),
        ({"features": [{"what": "pooled", "layers": [1]}]}, {}, "what: pooled needs `pooling`"),
        ({"features": [HIDDEN[0] | {"pooling": "mean"}]}, {}, "`pooling` is of what: pooled; this"),
        (
            {"features": [{"what": "pooled", "layers": [1], "pooling": "cls"}]},
            {},
            "the first token, which in a causal model sees no other. Use 'last' or 'mean'",
        ),
        (
            {"features": [{"what": "pooled", "layers": [1], "pooling": "mean"}] * 2},
            {},
            "pooled_mean of layer 1 is asked for 2 times",
        ),
        ({"features": HIDDEN}, {"features": [{"match": "logits"}]}, "must be one of 'hidden'"),
        ({"features": MEAN}, {"features": [{"match": "rkd"}]}, "match 'rkd' needs `pooling`"),
        (
            {"features": HIDDEN},
            {"features": [{"match": "similarity", "pooling": "mean"}]},
            "Add score.features: [{what: pooled, pooling: mean, layers: [...]}]",
        ),
        (
            {"features": MEAN},
            {"features": [{"match": "rkd", "pooling": "last"}]},
            "needs pooled_last of the teacher, which score.features does not store",
        ),
        (
            {"features": MEAN},
            {"features": [{"match": "rkd", "pooling": "mean", "temperature": 1}]},
            "`temperature` belongs to match 'infonce'; this is 'rkd'",
        ),
        (
            {"features": MEAN},
            {"features": [{"match": "rkd", "pooling": "mean", "group": 1}]},
            "at least 2 (got 1)",
        ),
        (
            {"features": MEAN},
            {
                "features": [
                    {"match": match, "pooling": "mean", "group": group}
                    for match, group in (("rkd", 8), ("similarity", 16))
                ]
            },
            "loss.features: groups of 8 and 16 samples: a pass holds whole groups, of one size",
        ),
        (
            {"features": HIDDEN},
            {"features": [{"match": "embeddings"}]},
            "does not store. Add score.features: [{what: embeddings}]",
        ),
        (
            {"features": [{"what": "embeddings"}]},
            {"features": [{"match": "embeddings", "layers": {0: 0}}]},
            "embeddings are of no layer",
        ),
        (
            {"features": [{"what": "embeddings"}]},
            {"features": [{"match": "embeddings", "distance": "cosine"}]},
            "`distance` belongs to match 'hidden'; this is 'embeddings'",
        ),
    ],
)
def test_what_cannot_work_is_said_with_its_path(
    tmp_path: Path, score: dict[str, Any], loss: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as refused:
        load_recipe(written(tmp_path, score={"k": 4} | score, loss=loss))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("layers", "example"), [([2], "{2: 0}"), ({0: "first"}, "{11: 5}"), ("first", "{11: 5}")]
)
def test_layers_of_another_form_are_told_in_words(
    tmp_path: Path, layers: Any, example: str
) -> None:
    loss = {"features": [{"match": "hidden", "layers": layers}]}
    with pytest.raises(UsageError) as refused:
        load_recipe(written(tmp_path, score={"k": 4, "features": HIDDEN}, loss=loss))
    (line,) = str(refused.value).splitlines()
    assert line.endswith(
        "loss.features.0.layers: must be {teacher's block: student's block}, as "
        f"{example}, or uniform, or last (got {layers!r})."
    )


def test_features_alone_are_something_to_learn(tmp_path: Path) -> None:
    loss = {"soft_weight": 0.0, "hard_weight": 0.0}
    with pytest.raises(UsageError, match="nothing to learn"):
        load_recipe(written(tmp_path, loss=loss))
    score = {"k": 4, "features": HIDDEN}
    load_recipe(written(tmp_path, score=score, loss=loss | {"features": [{"match": "hidden"}]}))


def test_without_a_student_nothing_is_matched(tmp_path: Path) -> None:
    score = {"k": 4, "features": HIDDEN}
    alone = {"student": None, "train": None, "evaluate": {}}
    load_recipe(written(tmp_path, score=score, loss=None, **alone))
    with pytest.raises(UsageError, match=r"loss\.features: has no meaning without `student`"):
        load_recipe(
            written(tmp_path, score=score, loss={"features": [{"match": "hidden"}]}, **alone)
        )


def test_which_layers_are_stored_and_which_are_learnt(tmp_path: Path) -> None:
    score = {"k": 4, "features": [*HIDDEN, {"what": "hidden", "layers": [5], "bits": 16}]}
    path = written(tmp_path, score=score, loss={"features": [{"match": "hidden"}]})
    recipe = load_recipe(path, ["loss.features=[{match: hidden, layers: {0: 0}}, {match: hidden}]"])
    assert recipe.score is not None
    stored = [
        Feature(kind="hidden", layer=layer, bits=bits) for layer, bits in ((0, 8), (2, 8), (5, 16))
    ]
    assert captured(recipe.score.features) == stored
    assert learnt(recipe.loss.features, recipe.score.features) == [stored[0], stored[2]]
    assert [one.dtypes for one in stored[1:]] == [
        ("int8", "float16", "float32"),
        ("float16", "float32"),
    ]


@pytest.mark.parametrize("loss", [{}, {"soft_weight": 0.0, "hard_weight": 1.0}])
def test_an_empty_list_is_hashed_as_none(tmp_path: Path, loss: dict[str, Any]) -> None:
    """And layers and weights are in the hash of a student, though it learns from nothing else."""
    without = load_recipe(written(tmp_path, loss=loss))
    empty = load_recipe(
        written(
            tmp_path,
            score={"k": 4, "batch_tokens": 256, "features": []},
            loss=loss | {"features": []},
        )
    )
    settings = [train_settings(recipe, "s", "student") for recipe in (without, empty)]
    assert settings[0] == settings[1]
    assert "features" not in settings[0]["loss"]
    score = {"k": 4, "features": HIDDEN}
    with_some = load_recipe(
        written(tmp_path, score=score, loss=loss | {"features": [{"match": "hidden"}]})
    )
    assert train_settings(with_some, "s", "student")["loss"]["features"]
    assert train_settings(with_some, "s", "baseline") == train_settings(without, "s", "baseline")


def test_a_match_says_its_own_settings_alone() -> None:
    """So a hash of one knows none that came after it."""
    hidden = {"match": "hidden", "layers": "last", "weight": 1.0, "distance": "mse"}
    assert FeatureLoss(match="hidden").model_dump() == hidden
    whole = FeatureLoss(match="relations", of=["values"], relation_heads=1)
    relations = {"match", "layers", "weight", "of", "relation_heads"}
    assert whole.model_dump().keys() == relations, "as before there was a projection"
    projected = FeatureLoss.model_validate(PROJECTED)
    assert projected.model_dump().keys() == relations | {"project"}
    assert projected.needs == ("values_256",)
    attention = FeatureLoss(match="attention", heads="average")
    assert attention.model_dump().keys() == {"match", "layers", "weight", "heads"}
    assert FeatureLoss.model_validate(attention.model_dump()) == attention


def test_projected_values_are_a_kind_of_their_own() -> None:
    asked = [FeatureRequest.model_validate(one) for one in VALUES]
    both = [FeatureRequest(what="values", layers=[1]), *asked]
    whole, narrow = captured(both)
    assert [one.kind for one in (whole, narrow)] == ["values", "values_256"]
    assert narrow.words == "values of block 1 in 256 numbers"
    assert learnt([FeatureLoss.model_validate(PROJECTED)], both) == [narrow]
    sizes = [feature_bytes(one, {"values": 768}) for one in (whole, narrow)]
    assert sizes == [1536, 512]


def test_a_loss_learns_from_the_layers_of_which_all_is_stored() -> None:
    asked = [("queries", [0, 1]), ("keys", [1, 2]), ("values", [0])]
    stored = [FeatureRequest(what=what, layers=layers) for what, layers in asked]
    found = learnt([FeatureLoss(match="attention", layers="uniform")], stored)
    assert [(one.kind, one.layer, one.dtype) for one in found] == [
        ("keys", 1, "float16"),
        ("queries", 1, "float16"),
    ]
