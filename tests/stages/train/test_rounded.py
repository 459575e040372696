"""Attention and relations of rows that are stored rounded.

They are off from the live teacher by what the rows state, and by no more.

A row says how far its numbers X' together are from those of the teacher: |X' - X| = e |X|. So by
the mean value theorem a function f of them is off by |grad f| e |X| at most, the gradient somewhere
between X and X'. The loss is such a function, and so is the student's gradient along any direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_features import Causal
from planting import rows_of
from tiny_classes import World, records
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.features import FeatureSource, open_features
from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.passes import Passes
from stillroom.stages.loader.samples import Sample, Samples
from stillroom.stages.losses.features.matching import Matching, pairs_of, parts_of
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.attention.recorded import Recorded
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.features import FeatureLoss, captured
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.targets.features.shown import showing
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.row_builders import text_key

pytestmark = pytest.mark.numeric

KINDS = ("queries", "keys", "values")
TEACHER, STUDENT, PARTS = 1, 0, 4  # the blocks that are paired, and relation heads
LAYERS = {TEACHER: STUDENT}
ASKED: dict[str, dict[str, Any]] = {
    "attention": {"match": "attention"},
    "average": {"match": "attention", "heads": "average"},
    "relations": {"match": "relations", "relation_heads": PARTS},
}
LOSSES = [asked | {"layers": LAYERS} for asked in ASKED.values()]
# Bits -> what their error makes of a loss, or of a gradient, is a smaller share of it than this.
BITS = {8: 0.1, 16: 0.005}
FLOAT32 = 1e-5  # of what the product computes in float32, and the definition in float64


@dataclass(frozen=True)
class Stored:
    """Texts with what a teacher's block multiplied, rounded; a student of half its width."""

    teacher: Any
    student: Any
    inputs: Callable[[Sample], dict[str, Tensor]]
    passes: Callable[[Matching], Passes]
    recipe: Recipe
    source: FeatureSource
    samples: Sequence[Sample]
    errors: dict[tuple[bytes, str], float]
    """Text and kind -> what its row states."""


def opened(recipe: Recipe, store: Store, folder: Path) -> tuple[Any, FeatureSource]:
    plan = make_plan(recipe, write=True)
    for snapshot in (plan.snapshots["train"], plan.features):
        save_snapshot(store, snapshot)
    wanted, files = captured(recipe.score.features), LocalFiles(folder)
    source = open_features(
        store, plan.snapshots["train"], plan.features, wanted=wanted, files=files
    )
    return plan.snapshots["train"], source


def features(bits: int) -> list[dict[str, Any]]:
    return [{"what": kind, "layers": [TEACHER], "bits": bits} for kind in KINDS]


def llama(folder: Path, bits: int) -> Stored:
    causal = Causal(folder, features=features(bits), asked=LOSSES, initializer_range=0.3)
    snapshot, source = opened(causal.recipe(), causal.store, folder / "found")
    student = save_tiny_llama(folder / "student", seed=1, hidden_size=8, initializer_range=0.3)
    models = [AutoModelForCausalLM.from_pretrained(f).eval() for f in (causal.teacher, student)]
    return Stored(
        *models,
        inputs=lambda sample: {"input_ids": torch.from_numpy(sample.token_ids[None]).long()},
        passes=lambda matching: Packing(tokens_per_pass=60, vocab_size=32, matching=matching),
        recipe=causal.recipe(),
        source=source,
        samples=list(Samples(causal.store, snapshot, soft=True, features=source).read(0, 6)),
        errors=errors(causal.store),
    )


def bert(folder: Path, bits: int) -> Stored:
    teacher = save_tiny_bert(folder / "teacher", num_hidden_layers=3, initializer_range=0.3)
    score = {"targets": "full", "features": features(bits)}
    loss = {"features": LOSSES}
    student = save_tiny_bert(folder / "student", seed=1, hidden_size=8, initializer_range=0.3)
    more: dict[str, Any] = {"score": score, "loss": loss, "student": {"model": str(student)}}
    world = World(folder, teacher, records(30), **more).scored()
    snapshot, source = opened(world.recipe, world.store, folder / "found")
    of_classes = AutoModelForSequenceClassification.from_pretrained
    models = [of_classes(f).eval() for f in (teacher, student)]
    inputs = Inputs.of(models[1], teacher)
    return Stored(
        *models,
        inputs=lambda sample: inputs.tensors([sample.token_ids]),
        passes=lambda matching: ClassPasses(
            tokens_per_pass=60, vocab_size=32, inputs=inputs, matching=matching
        ),
        recipe=world.recipe,
        source=source,
        samples=list(Samples(world.store, snapshot, soft=True, features=source).read(0, 6)),
        errors=errors(world.store),
    )


def errors(store: Store) -> dict[tuple[bytes, str], float]:
    rows = rows_of(store, "features")
    return {(row["text_key"], row["kind"]): row["rounding_error"] for row in rows}


MAKE = {"llama": llama, "bert": bert}


@pytest.fixture(scope="module", params=[(n, b) for n in MAKE for b in BITS], ids=str)
def stored(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Stored, int]:
    name, bits = request.param
    return MAKE[name](tmp_path_factory.mktemp(name), bits), bits


def found(stored: Stored, asked: FeatureLoss) -> tuple[float, Tensor]:
    """What the product finds.

    It is the mean over all tokens, and the gradient of the student's embeddings.
    """
    (pair,) = pairs_of([asked], stored.recipe.score.features, student_blocks=2)
    known = {"layouts": stored.source.layouts(), "student_width": 8, "seed": 0}
    passes = stored.passes(Matching(parts_of(pair, **known)))
    shares = tuple(1 / np.array(passes.counts(stored.samples)))
    aim = Aim(soft_weight=0.0, hard_weight=0.0, objective=None, features=shares)
    stored.student.zero_grad()
    total = 0.0
    for batch in passes.batches(stored.samples, None):
        loss = passes.losses(stored.student, batch, aim=aim, dtype=torch.float32).total
        loss.backward()
        total += float(loss.detach())
    return total, stored.student.get_input_embeddings().weight.grad.clone()


def in_heads(vectors: Tensor, heads: int) -> Tensor:
    return vectors.unflatten(1, (heads, -1)).transpose(0, 1)


def log_attention(queries: Tensor, keys: Tensor, of: Recorded) -> Tensor:
    """[H, T, T] of queries and keys [T, h d], each key for as many heads as share it."""
    heads, served = of.queries.shape[1], of.keys.shape[1]
    q, k = in_heads(queries, heads), in_heads(keys, served).repeat_interleave(heads // served, 0)
    scores = of.scale * q @ k.transpose(1, 2)
    ahead = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead & of.causal, -1e30).log_softmax(-1)


def log_relations(vectors: Tensor) -> Tensor:
    x = in_heads(vectors, PARTS)
    return (x @ x.transpose(1, 2) / x.shape[-1] ** 0.5).log_softmax(-1)


def defined(asked: FeatureLoss, t: dict[str, Tensor], s: dict[str, Tensor], of: Any) -> Tensor:
    """Summed over the tokens of a text."""
    if asked.match == "attention":
        both = [log_attention(x["queries"], x["keys"], o) for x, o in zip((t, s), of, strict=True)]
        if asked.heads == "average":
            both = [log.exp().mean(0, keepdim=True).clamp_min(1e-300).log() for log in both]
        pairs = [tuple(both)]
    else:
        pairs = [(log_relations(t[kind]), log_relations(s[kind])) for kind in KINDS]
    return sum((a.exp() * (a - b)).sum(-1).mean(0).sum() for a, b in pairs)


def vectors(model: Any, block: int, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """The vectors by kind, [T, h d] float64, and how they are multiplied."""
    with showing(model.double(), [("attention", block)]) as shown:
        model(**inputs)
    of = shown.attention(block)
    tokens = torch.arange(of.queries.shape[2])
    return {k: of.vectors(k, tokens).transpose(0, 1).flatten(1) for k in KINDS}, of


@dataclass(frozen=True)
class Text:
    """What the blocks of teacher and student multiply of a text.

    Each is [T, h d] by kind.
    """

    true: dict[str, Tensor]
    restored: dict[str, Tensor]
    """The teacher's of the rows."""
    mine: dict[str, Tensor]
    how: tuple[Recorded, Recorded]
    missed: dict[str, float]
    """|X' - X|, as the rows state it."""

    def most(self, asked: FeatureLoss, weight: Tensor, direction: Tensor) -> np.ndarray:
        """How far the loss, and its gradient along a direction, are off at most.

        They are as steep as anywhere between.
        """
        shares = np.linspace(0, 1, 5)
        return np.max([self._off(asked, share, weight, direction) for share in shares], axis=0)

    def _off(
        self, asked: FeatureLoss, share: float, weight: Tensor, direction: Tensor
    ) -> list[float]:
        at = {k: torch.lerp(self.true[k], self.restored[k], share).requires_grad_() for k in KINDS}
        loss = defined(asked, at, self.mine, self.how)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        found = []
        for function in (loss, (gradient * direction).sum()):
            slopes = torch.autograd.grad(
                function, [*at.values()], retain_graph=True, materialize_grads=True
            )
            pairs = zip(slopes, self.missed.values(), strict=True)
            found.append(sum(float(slope.norm()) * missed for slope, missed in pairs))
        return found


def text_of(world: Stored, sample: Sample) -> Text:
    with torch.no_grad():
        true, of_teacher = vectors(world.teacher, TEACHER, world.inputs(sample))
    mine, of_student = vectors(world.student, STUDENT, world.inputs(sample))
    states, key = sample.states(), text_key(sample.token_ids)
    restored = {kind: torch.from_numpy(states[kind, TEACHER]).double() for kind in KINDS}
    missed = {kind: world.errors[key, kind] * float(true[kind].norm()) for kind in KINDS}
    for kind in KINDS:
        there = float((restored[kind] - true[kind]).norm())
        assert there == pytest.approx(missed[kind], rel=0.02), "what the row states is so"
    return Text(true, restored, mine, (of_teacher, of_student), missed)


def over(
    texts: list[Text], asked: FeatureLoss, weight: Tensor, *, shift: int = 0
) -> tuple[float, Tensor]:
    """The mean over all tokens, and its gradient, by definition.

    The teacher's vectors may be some tokens on.
    """
    losses = [
        defined(asked, {k: x.roll(shift, 0) for k, x in text.true.items()}, text.mine, text.how)
        for text in texts
    ]
    loss = sum(losses) / sum(len(text.true["keys"]) for text in texts)
    (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("name", ASKED)
def test_it_is_off_by_what_the_rows_state_at_most(stored: tuple[Stored, int], name: str) -> None:
    """Value and gradient; and the gradient by less than rows of one token on would make."""
    world, bits = stored
    asked = FeatureLoss.model_validate(ASKED[name] | {"layers": LAYERS})
    value, gradient = found(world, asked)
    weight = world.student.double().get_input_embeddings().weight
    texts = [text_of(world, sample) for sample in world.samples]
    exact, right = over(texts, asked, weight)
    off = gradient.double() - right
    bounds = sum(text.most(asked, weight, off / off.norm()) for text in texts)
    bounds = bounds / sum(map(len, world.samples))
    assert abs(value - exact) <= bounds[0] + FLOAT32 * exact
    assert float(off.norm()) <= bounds[1] + FLOAT32 * float(right.norm())
    assert bounds[0] < BITS[bits] * exact
    assert bounds[1] < BITS[bits] * float(right.norm())
    _, turned = over(texts, asked, weight, shift=1)
    assert float((turned - right).norm()) > bounds[1]
