"""Which losses can be had of which targets: the whole table, and every refusal with a way out."""

from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from kit import recipe_tree
from pydantic import ValidationError

from stillroom.stages.recipe.checks.loss import check_loss
from stillroom.stages.recipe.divergences import DIVERGENCES
from stillroom.stages.recipe.fields import Tail
from stillroom.stages.recipe.kinds import Score
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.sections import Loss
from stillroom.storage.errors import UsageError

TAILS = get_args(Tail)
MOVING = {"shape": "linear", "start": 2.0, "end": 1.0}


def refusals(loss: dict[str, Any], score: dict[str, Any] | None) -> str:
    found = check_loss(Loss(**loss), None if score is None else Score(**score))
    return "\n".join(f"{path}: {message}" for path, message in found)


@pytest.mark.parametrize(("divergence", "tail"), list(product(DIVERGENCES, TAILS)))
def test_the_whole_table(divergence: str, tail: str) -> None:
    """Every loss can be had of entries with a tail.

    Infinite ones are refused, and policies for a tail that is not there.
    """
    infinite = divergence in ("reverse_kl", "adaptive_kl") and tail in ("drop", "to_label")
    named: dict[str, Any] = {"divergence": divergence, "tail": tail}
    for score in ({"targets": "topk"}, {"targets": "topp", "p": 0.9}):
        found = refusals(named, score)
        assert ("is infinite where" in found) == infinite
        assert bool(found) == infinite
    assert bool(refusals(named, {"targets": "full"})) == (tail != "bucket")
    assert bool(refusals(named, {"targets": "sampled"})) == (
        tail != "bucket" or divergence != "forward_kl"
    )
    assert not refusals(named | {"soft_weight": 0.0}, {"targets": "sampled"})
    assert not refusals(named, None)


@pytest.mark.parametrize(
    ("loss", "score", "expected"),
    [
        (
            {"divergence": "jsd"},
            {"targets": "sampled"},
            "loss.divergence: 'jsd' needs the teacher's probability",
        ),
        (
            {"tail": "drop"},
            {"targets": "full"},
            "loss.tail: targets 'full' have no tail (got 'drop'). Remove it",
        ),
        (
            {"tail": "renormalize"},
            {"k": 1},
            "loss.tail: 'renormalize' compares entries with one another, and score.k",
        ),
        (
            {"divergence": "skew_reverse_kl", "skew": 0.0, "tail": "drop"},
            {},
            "'skew_reverse_kl' is infinite where",
        ),
        (
            {"divergence": "alpha_beta", "alpha_beta": [0, 1], "tail": "drop"},
            {},
            "'alpha_beta' is infinite where",
        ),
        ({"divergence": "alpha_beta", "alpha_beta": [0.2, 0.7], "tail": "drop"}, {}, ""),
        (
            {"skew": 0.3},
            {},
            (
                "loss.skew: belongs to divergence 'skew_forward_kl' and 'skew_reverse_kl'; this "
                "recipe has"
            ),
        ),
        (
            {"divergence": "jsd", "head_mass": 0.3},
            {},
            "loss.head_mass: belongs to divergence 'adaptive_kl'",
        ),
        ({"divergence": "jsd", "jsd_weight": 0.3}, {}, ""),
        ({"soft_weight": 0, "hard_weight": 0}, None, "both 0: nothing to learn"),
        (
            {"soft_weight": MOVING | {"end": 0}, "hard_weight": 0},
            {},
            "both 0 at the end: nothing to learn",
        ),
        ({"soft_weight": MOVING | {"end": 0}}, {}, ""),
        (
            {"temperature": 2.0},
            {},
            "loss.temperature: 2 is not stored: score.temperatures is [1.0]. Add it there",
        ),
        ({"temperature": 2.0}, {"temperatures": [1.0, 2.0]}, ""),
        ({"temperature": 2.0}, {"temperatures": [2.0]}, ""),
        ({"temperature": 2.0}, {"targets": "full"}, ""),
        ({"temperature": 2.0, "unstored_temperature": "approximate"}, {}, ""),
        (
            {"temperature": MOVING},
            {"temperatures": [1.0, 2.0]},
            "a schedule passes through temperatures that no store",
        ),
        ({"temperature": MOVING | {"end": 2.0}}, {"temperatures": [2.0]}, ""),
        ({"temperature": MOVING}, {"targets": "full"}, ""),
        ({"temperature": MOVING, "unstored_temperature": "approximate"}, {}, ""),
        ({"temperature": 2.0}, {"targets": "sampled", "temperatures": [2.0]}, ""),
        (
            {},
            {"targets": "sampled", "temperatures": [2.0]},
            "loss.temperature: sampled targets serve the temperature",
        ),
        (
            {"temperature": 2.0, "unstored_temperature": "approximate"},
            {"targets": "sampled"},
            "(got 2). Give both the",
        ),
        (
            {"temperature": MOVING},
            {"targets": "sampled", "temperatures": [2.0]},
            "(got a schedule)",
        ),
    ],
)
def test_what_is_refused_and_what_is_not(
    loss: dict[str, Any], score: dict[str, Any] | None, expected: str
) -> None:
    found = refusals(loss, score)
    assert expected in found
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.soft_weight=-1", "loss.soft_weight: must be at least 0 (got -1)"),
        ("loss.soft_weight=much", "loss.soft_weight: input should be a valid number"),
        ("loss.temperature=0", "loss.temperature: must be greater than 0"),
        (
            "loss.temperature={shape: linear, start: 2, end: 0}",
            "loss.temperature: must be greater than 0",
        ),
        (
            "loss.soft_weight={shape: linear, start: 1, ed: 0}",
            "loss.soft_weight.ed: unknown key. Did you mean 'end'?",
        ),
        ("loss.soft_weight={shape: linear, start: 1}", "loss.soft_weight.end: missing"),
        (
            "loss.soft_weight={shape: up, start: 1, end: 0}",
            "loss.soft_weight.shape: must be one of 'linear', 'cosine'",
        ),
        (
            "loss.soft_weight={shape: wsd, start: 1, end: 0}",
            "loss.soft_weight: shape 'wsd' needs a `peak`",
        ),
        ("loss.skew=1", "loss.skew: must be less than 1"),
        ("loss.jsd_weight=1", "loss.jsd_weight: must be less than 1"),
        ("loss.divergence=kl", "loss.divergence: must be one of 'forward_kl'"),
    ],
)
def test_mistakes_have_their_path(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(recipe_tree(tmp_path, tmp_path / "teacher", tmp_path / "prompts.jsonl"))
    )
    with pytest.raises(UsageError) as caught:
        load_recipe(path, [override])
    assert expected in str(caught.value)


def test_mistakes_have_their_line(tmp_path: Path) -> None:
    tree = recipe_tree(tmp_path, tmp_path / "teacher", tmp_path / "prompts.jsonl")
    tree["loss"] = {"soft_weight": {"shape": "linear", "start": 1.0, "end": -1.0}, "tail": "drop"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "end: -1.0" in text)
    with pytest.raises(
        UsageError, match=rf"recipe\.yaml:{line}: loss\.soft_weight\.end: must be at least 0"
    ):
        load_recipe(path)
    tree["loss"] = {"divergence": "reverse_kl", "tail": "drop"}
    path.write_text(yaml.safe_dump(tree))
    line = next(
        i for i, text in enumerate(path.read_text().splitlines(), 1) if "tail: drop" in text
    )
    with pytest.raises(
        UsageError, match=rf"recipe\.yaml:{line}: loss\.tail: 'drop' leaves the teacher nothing"
    ):
        load_recipe(path)


@pytest.mark.parametrize("exponents", [[-1, 0.5], [0, 0], [1, -1], [101, 0]])
def test_exponents_with_which_the_loss_is_huge_are_refused(exponents: list[float]) -> None:
    with pytest.raises(ValidationError, match="must be two numbers of at least 0"):
        Loss(divergence="alpha_beta", alpha_beta=exponents)
