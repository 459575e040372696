"""How far the gradient of a student's loss on stored targets turns from the live teacher's.

The angle is shown against batch size.

The student is trained on the live teacher; at the start, half-way and at the end of that, every
estimator's gradient is taken on the same batches, through the product's own loss, from what the
store gives back. Batches of 2n tokens are sums of two of n, so one reading gives every size. Bias
stays as batches grow, sampling noise falls as one over the square root of the tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from arms import one_order
from objectives import objective_of
from target_arms import ARMS, MOST, ROUNDS, SMALL_K, SOFT, Arm, Bench, LivePacking, load_teacher
from torch import Tensor, nn

from stillroom.stages.evaluate.gradients import angle_and_ratio
from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.samples import Cursor, Sample, Samples, steps
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.recipe.kinds import Score
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.sections import Loss, Recipe
from stillroom.stages.targets.spec import Kept, wanted
from stillroom.stages.targets.stored import Reading, soft_part
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.snapshots.snapshot import load_snapshot
from stillroom.storage.store.store import Store

SMALLEST = 1024
"""Tokens of the smallest batch."""
ESTIMATORS = tuple(
    [f"top{k}-{tail}" for k in (*SMALL_K, MOST) for tail in ("drop", "bucket", "to_label")]
    + [f"sampled{rounds}-{draw}" for rounds in ROUNDS for draw in ("multinomial", "systematic")]
)
"""Names of arms whose gradients are compared."""


def angles(bench: Bench, tokens: int, *, names: tuple[str, ...]) -> dict[str, Any]:
    """Train a student on the live teacher and measure at three points of it.

    Returns:
        Point -> what `_sweep` returns, with `kl`, the student's distance to the teacher there in
        nats.
    """
    snapshots = {name: bench.prepare(ARMS[name])[0] for name in names}
    recipe, store = load_recipe(bench.recipe), Store.open(str(bench.folder / "store"))
    teacher = load_teacher(bench.folder / "teacher")
    student: Any = initial_student(recipe, bench.folder / "teacher").to(
        split_head(teacher).weight.device
    )
    found = {}
    with one_order():
        for point in _training(
            student,
            teacher,
            recipe=recipe,
            samples=_samples(store, snapshots[names[0]], soft=False),
        ):
            print(f"gradients at the {point} of the training", flush=True)
            sources = {
                snapshot: _samples(store, snapshot, soft=True)
                for snapshot in set(snapshots.values())
            }
            found[point] = _sweep(
                student, teacher, chunks=_Chunks(sources, snapshots), tokens=tokens
            )
    return found


def _samples(store: Store, snapshot: str, *, soft: bool) -> Samples:
    return Samples(store, load_snapshot(store, snapshot), soft=soft, seed=0)


def _training(
    student: Any, teacher: nn.Module, *, recipe: Recipe, samples: Samples
) -> Iterator[str]:
    """Train, stopping at `start`, `middle` and `end`."""
    train = recipe.train
    packing = LivePacking(
        teacher=teacher,
        tokens_per_pass=train.tokens_per_pass,
        vocab_size=split_head(student).vocab_size,
    )
    trainer = Trainer(student, packing=packing, loss=Loss(**SOFT), train=train)
    total = train.tokens or round((train.epochs or 1) * samples.lengths().tokens)
    ahead = ["middle"]
    yield "start"
    for step in steps(samples, Cursor(), tokens_per_step=train.tokens_per_step, stop_tokens=total):
        if ahead and step.after.tokens > total / 2:
            yield ahead.pop()
        trainer.step(step, done=step.after.tokens / total)
    yield "end"


class _Chunks:
    """The same texts with every estimator's targets, some samples at a time."""

    def __init__(self, sources: dict[str, Samples], snapshots: dict[str, str]) -> None:
        self._streams = {snapshot: samples.read(0) for snapshot, samples in sources.items()}
        self._snapshots = snapshots
        self.names = tuple(snapshots)
        self.most = min(samples.lengths().scored_tokens for samples in sources.values())

    def take(self, tokens: int) -> dict[str, list[Sample]]:
        """Whole samples by estimator, `tokens` of text or a little less than a sample more."""
        first, *others = self._streams
        found = {first: [next(self._streams[first])]}
        while sum(sample.scored_tokens for sample in found[first]) < tokens:
            found[first].append(next(self._streams[first]))
        for other in others:
            found[other] = [next(self._streams[other]) for _ in found[first]]
        return {name: found[snapshot] for name, snapshot in self._snapshots.items()}


@dataclass
class _Sums:
    """Gradients of batches that grow.

    The sum of two neighbours is the gradient of the batch that holds both.
    """

    angles: dict[int, list[list[tuple[float, float]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """By doublings of the smallest batch: for every batch, angle and ratio of every estimator."""
    waiting: dict[int, Tensor] = field(default_factory=dict)

    def add(self, gradients: Tensor, doublings: int = 0) -> None:
        """[E + 1, P] summed gradients of one batch, the full one first."""
        self.angles[doublings].append(
            [angle_and_ratio(found, gradients[0]) for found in gradients[1:]]
        )
        if doublings in self.waiting:
            self.add(self.waiting.pop(doublings) + gradients, doublings + 1)
        else:
            self.waiting[doublings] = gradients


def _sweep(student: Any, teacher: nn.Module, *, chunks: _Chunks, tokens: int) -> dict[str, Any]:
    """Angle in degrees and ratio of norms of every estimator, by batch size.

    They are means over the batches of that size.
    """
    sums, scored, kl, names = _Sums(), 0, 0.0, chunks.names
    batches = 2 ** (max(1, min(tokens, chunks.most) // SMALLEST).bit_length() - 1)
    smallest = min(SMALLEST, tokens)
    student.eval()
    for _ in range(batches):
        gradients, divergence, count = _gradients(student, teacher, texts=chunks.take(smallest))
        sums.add(gradients)
        scored, kl = scored + count, kl + divergence
    student.train()
    sizes = [scored / batches * 2**doublings for doublings in sums.angles]
    means = [torch.tensor(values, dtype=torch.float64).mean(0) for values in sums.angles.values()]
    return {
        "kl": kl / scored,
        "tokens": [round(size) for size in sizes],
        "batches": [len(values) for values in sums.angles.values()],
        "angle": {name: [float(mean[i, 0]) for mean in means] for i, name in enumerate(names)},
        "ratio": {name: [float(mean[i, 1]) for mean in means] for i, name in enumerate(names)},
    }


def _gradients(
    student: Any, teacher: nn.Module, *, texts: dict[str, list[Sample]]
) -> tuple[Tensor, float, int]:
    """[E + 1, P] gradients of the summed loss, the full one first; the full divergence.

    The scored tokens.
    """
    head = split_head(student)
    weights = [p for p in student.parameters() if p.requires_grad]
    settings = {"tokens_per_pass": 2**30, "vocab_size": head.vocab_size}
    (batch,) = LivePacking(teacher=teacher, **settings).batches(next(iter(texts.values())))
    batch = batch.to(head.weight.device)
    hidden = hidden_states(student, input_ids=batch.token_ids, position_ids=batch.position_ids)
    predicting = hidden.flatten(0, 1)[batch.predicting]
    targets = {"full": (batch.targets, objective_of())}
    for name, samples in texts.items():
        (other,) = Packing(kept=_kept(ARMS[name], head.vocab_size), **settings).batches(samples)
        assert torch.equal(other.token_ids, batch.token_ids.cpu()), "the texts are not in one order"
        targets[name] = (
            other.targets.to(head.weight.device),
            objective_of(tail=ARMS[name].loss.get("tail", "bucket")),
        )
    found, kl = [], 0.0
    for name, (target, objective) in targets.items():
        loss = linear_distillation(
            predicting, head, target, aim=Aim(objective=objective, soft_weight=1.0, hard_weight=0.0)
        ).total
        kl = loss.item() if name == "full" else kl
        gradient = torch.autograd.grad(loss, weights, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in gradient]))
    return torch.stack(found), kl, len(predicting)


def _kept(arm: Arm, vocab_size: int) -> Kept:
    return wanted(Score(**arm.score), vocab_size)


def kept_of(bench: Bench, arm: Arm) -> dict[str, float | None]:
    """Mean kept mass and entries per token of the targets that an arm reads.

    It is None where it reads none.

    None where it reads none.
    """
    if arm.live or not arm.loss["soft_weight"]:
        return {"kept_mass": None, "entries": None}
    snapshot, _ = bench.prepare(arm)
    reading = Reading(kept=_kept(arm, 2**31))
    mass, entries, tokens = 0.0, 0, 0
    for sample in _all(bench, snapshot):
        assert sample.targets is not None
        part = soft_part(
            sample.targets, torch.zeros(sample.scored_tokens, dtype=torch.long), reading
        )
        assert part.ids is not None
        tokens += sample.scored_tokens
        entries += int((part.ids >= 0).sum())
        if part.logprobs is not None:
            mass += float(part.logprobs.exp().sum())
    return {"kept_mass": mass / tokens if mass else None, "entries": entries / tokens}


def reference_positions(bench: Bench, held_out: str, count: int) -> Tensor:
    """[N, V] float64 the teacher's whole distribution at N held-out positions, evenly spread."""
    rows = [
        sample.targets.logprobs for sample in _all(bench, held_out) if sample.targets is not None
    ]
    logprobs = torch.cat([torch.from_numpy(row) for row in rows if row is not None])
    chosen = torch.linspace(0, len(logprobs) - 1, min(count, len(logprobs))).long()
    return logprobs[chosen].double().softmax(-1)


def _all(bench: Bench, snapshot: str) -> Iterator[Sample]:
    store = Store.open(str(bench.folder / "store"))
    samples = _samples(store, snapshot, soft=True)
    return samples.read(0, len(samples))
