"""Training against the live teacher, in plain torch and transformers.

Training from a store must equal it.

Nothing of the product's own training is used: no packing, no chunks, no head inside the loss, no
schedule or optimizer of its own. What defines the run (recipe, order of samples) is given.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM

from stillroom.stages.recipe.sections import Recipe

STEADY = 1e-3
"""A learning rate at which trainings that round otherwise stay together.

Adam moves a weight by about the rate, however small its gradient is; so where rounding decides a
gradient's sign, the rate decides how far two trainings part. A last bit of all first weights (6e-8
of each) made 1.4e-5 of a loss within 60 steps at 5e-3, growing all along. At 1e-3 it makes 1.4e-6,
little more than of the first loss.
"""

Text = tuple[Sequence[int], int]
"""Token ids, and the index of the first that is scored."""


class LiveMatch(Protocol):
    """What of a live teacher's features is matched besides its distribution."""

    leaves: Sequence[Tensor]
    """That train besides the student."""
    shown: dict[str, Any]
    """What both models are asked to show."""
    every_token: bool
    """Whether its sum is divided by all tokens of the step; else by the scored ones."""

    def loss(self, theirs: Any, mine: Any, start: int) -> Tensor:
        """Weighted, summed over one text."""


class LiveHidden:
    """States of a block, of which transformers shows `hidden_states[layer + 1]`."""

    every_token = False

    def __init__(self, *, teacher: int, student: int, weight: float, map: Tensor) -> None:
        """`map`: [D, d] a leaf that requires a gradient."""
        self.teacher, self.student, self.weight, self.map = teacher, student, weight, map
        self.leaves, self.shown = [map], {"output_hidden_states": True}

    def loss(self, theirs: Any, mine: Any, start: int) -> Tensor:
        """Summed over the positions that predict a scored token, of one text."""
        t = theirs.hidden_states[self.teacher][0, start - 1 : -1]
        s = mine.hidden_states[self.student][0, start - 1 : -1] @ self.map.T
        return self.weight * (s - t).square().mean(-1).sum()


class LiveAttention:
    """Eager maps of a block, head by head."""

    every_token = True

    def __init__(self, *, teacher: int, student: int, weight: float) -> None:
        self.teacher, self.student, self.weight = teacher, student, weight
        self.leaves, self.shown = [], {"output_attentions": True}

    def loss(self, theirs: Any, mine: Any, start: int) -> Tensor:
        """Summed over all tokens; a map's zeros add nothing."""
        t, s = theirs.attentions[self.teacher][0], mine.attentions[self.student][0]
        terms = torch.where(t > 0, t * (t.clamp_min(1e-30).log() - s.clamp_min(1e-30).log()), 0.0)
        return self.weight * terms.sum(-1).mean(0).sum()


class LiveValues:
    """Relations of a block's values, the teacher's times a matrix.

    They are what `v_proj` says, which nothing rotates.
    """

    every_token = True

    def __init__(self, *, teacher: int, student: int, weight: float, matrix: Tensor) -> None:
        """`matrix`: [D, d]."""
        self.blocks, self.weight, self.matrix = (teacher, student), weight, matrix
        self.leaves, self.shown = [], {}
        self._said: tuple[list[Tensor], list[Tensor]] = ([], [])

    def watch(self, models: Sequence[Any]) -> None:
        """Keep what the blocks of both say, text after text."""
        for model, block, said in zip(models, self.blocks, self._said, strict=True):
            layer = model.model.layers[block].self_attn.v_proj
            layer.register_forward_hook(lambda _, __, values, said=said: said.append(values[0]))

    def loss(self, theirs: Any, mine: Any, start: int) -> Tensor:
        """The loss summed over all tokens, each with every token.

        Products are over the root of the whole width.
        """
        t, s = (said.pop(0) for said in self._said)
        narrow = t @ self.matrix
        right = (narrow @ narrow.T / t.shape[1] ** 0.5).log_softmax(-1)
        found = (s @ s.T / s.shape[1] ** 0.5).log_softmax(-1)
        return self.weight * (right.exp() * (right - found)).sum()


@dataclass
class LiveBetween:
    """Losses between the samples of a step: groups of consecutive ones, a part after the other."""

    teacher: int
    """Index into `hidden_states`: 1 is what the first block hands on."""
    student: int
    pool: Callable[[Tensor], Tensor]
    """Of the states [T, D] of a text."""
    group: int
    parts: Sequence[tuple[float, Callable[[Tensor, Tensor], Tensor], Callable[[int], int]]]
    """Weight, sum over a group of the teacher's and the student's vectors, terms of a group."""
    leaves: Sequence[Tensor] = ()
    """A map [D, d] of the student's vectors, or none."""

    def loss(self, shown: Sequence[tuple[Any, Any]]) -> Tensor:
        """Of a step: each part divided by its terms."""
        theirs = torch.stack([self.pool(t.hidden_states[self.teacher][0]) for t, _ in shown])
        mine = torch.stack([self.pool(s.hidden_states[self.student][0]) for _, s in shown])
        for to_teacher in self.leaves:
            mine = mine @ to_teacher.T
        total = torch.zeros(())
        for weight, measure, terms in self.parts:
            sums = zip(theirs.split(self.group), mine.split(self.group), strict=True)
            found = [(measure(t, s), terms(len(t))) for t, s in sums]
            total = total + weight * sum(s for s, _ in found) / max(sum(n for _, n in found), 1)
        return total


@dataclass
class LiveRun:
    """What came of it."""

    losses: list[float] = field(default_factory=list)
    """Per step: soft_weight * KL(teacher || student) + hard_weight * cross-entropy, nats per scored
    token."""
    weights: dict[str, Tensor] = field(default_factory=dict)


def live_training(
    recipe: Recipe,
    texts: Iterable[Text],
    *,
    total_tokens: int,
    matched: LiveMatch | None = None,
    between: LiveBetween | None = None,
) -> LiveRun:
    """Train a fresh student of the recipe on texts in the order given.

    The teacher reads each as it comes.

    Args:
        recipe: With a forward KL over the whole vocabulary, AdamW and a cosine schedule.
        texts: All that is trained on, epoch after epoch.
        total_tokens: Their tokens together: the schedule's length.
        matched: What of the features is matched besides, if anything.
        between: And between the samples of a step.
    """
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher.model, dtype=torch.float32).eval()
    student = fresh_student(recipe)
    if matched is not None and "output_attentions" in matched.shown:
        for model in (teacher, student):
            model.set_attn_implementation("eager")
    if isinstance(matched, LiveValues):
        matched.watch((teacher, student))
    asked = matched.shown if matched else {"output_hidden_states": between is not None}
    leaves = [leaf for one in (matched, between) if one is not None for leaf in one.leaves]
    trained = [*student.parameters(), *leaves]
    optimizer = torch.optim.AdamW(
        _groups(trained, recipe.train.weight_decay), lr=0.0, betas=recipe.train.betas
    )
    found, done = LiveRun(), 0
    for step in _steps(texts, recipe.train.tokens_per_step):
        scored = sum(len(ids) - start for ids, start in step)
        tokens = sum(len(ids) for ids, _ in step)
        shares = scored, tokens if matched and matched.every_token else scored
        shown = [_shown(teacher, student, text, asked) for text in step]
        losses = [
            _loss(recipe, *both, text, matched, shares)
            for both, text in zip(shown, step, strict=True)
        ]
        loss = sum(losses, torch.zeros(()) if between is None else between.loss(shown))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.train.clip_norm)
        done += sum(len(ids) for ids, _ in step)
        for group in optimizer.param_groups:
            group["lr"] = _rate(recipe, done / total_tokens)
        optimizer.step()
        found.losses.append(float(loss.detach()))
    found.weights = {name: weight.detach().clone() for name, weight in student.state_dict().items()}
    return found


def fresh_student(recipe: Recipe) -> Any:
    """Fresh weights: the teacher's config with the recipe's changes, `run.seed`."""
    config = AutoConfig.from_pretrained(recipe.teacher.model)
    for name, value in (recipe.student.config or {}).items():
        setattr(config, name, value)
    torch.manual_seed(recipe.run.seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def saved_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a student that was saved."""
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict())


def assert_trained_alike(losses: Sequence[float], folder: Path, truth: LiveRun) -> None:
    """Hold a training against the live one: the loss of every step, and the saved student.

    The student has no map.

    At `STEADY` a weight moves by 1e-3 in a step and rounding parts the losses by 2e-6. Rows of
    another token or text move a loss by 1e-2.
    """
    off = [abs(a - b) for a, b in zip(losses, truth.losses, strict=True)]
    assert max(off) <= 1e-5, f"at step {off.index(max(off)) + 1} of {len(off)}: {max(off):.3g}"
    weights = saved_weights(folder)
    assert weights.keys() == truth.weights.keys()
    apart = {n: float((weights[n] - truth.weights[n]).abs().max()) for n in weights}
    assert max(apart.values()) <= 2e-5, apart


def _shown(teacher: Any, student: Any, text: Text, asked: dict[str, Any]) -> tuple[Any, Any]:
    """What both say of one text."""
    ids = torch.tensor([list(text[0])])
    with torch.no_grad():
        theirs = teacher(input_ids=ids, **asked)
    return theirs, student(input_ids=ids, **asked)


def _loss(
    recipe: Recipe,
    theirs: Any,
    mine: Any,
    text: Text,
    matched: LiveMatch | None,
    shares: tuple[int, int],
) -> Tensor:
    """Of one text, its share of the step's: by scored tokens, and by those of what is matched."""
    ids, start = torch.tensor([list(text[0])]), text[1]
    temperature = float(recipe.loss.temperature)  # type: ignore[arg-type]
    target = (theirs.logits[0, start - 1 : -1] / temperature).log_softmax(-1)
    logits = mine.logits[0, start - 1 : -1]
    soft = (
        kl_div((logits / temperature).log_softmax(-1), target, reduction="sum", log_target=True)
        * temperature**2
    )
    hard = cross_entropy(logits, ids[0, start:], reduction="sum")
    of = recipe.loss
    total = of.soft_weight * soft + of.hard_weight * hard  # type: ignore[operator]
    total = total / shares[0]
    return total if matched is None else total + matched.loss(theirs, mine, start) / shares[1]


def _steps(texts: Iterable[Text], tokens: int) -> Iterator[list[Text]]:
    """Texts in order until the next one would exceed so many tokens."""
    held: list[Text] = []
    for text in texts:
        if held and sum(len(ids) for ids, _ in held) + len(text[0]) > tokens:
            yield held
            held = []
        held.append(text)
    yield held


def _groups(parameters: Sequence[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    matrices = [p for p in parameters if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _rate(recipe: Recipe, done: float) -> float:
    """Linear warm-up, then half a cosine down to the last rate."""
    train = recipe.train
    assert train.schedule == "cosine"
    if done < train.warmup_fraction:
        return train.learning_rate * done / train.warmup_fraction
    after = (done - train.warmup_fraction) / (1 - train.warmup_fraction)
    return train.learning_rate * (
        train.final_fraction + (1 - train.final_fraction) * (1 + math.cos(math.pi * after)) / 2
    )
