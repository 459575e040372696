"""How far the gradient of a student's soft loss turns when the teacher is stored sparsely.

It is compared with the gradient of the teacher stored whole.

On held-out rows, whose reference targets are the teacher's whole distribution t (beyond a
vocabulary of 65,536: its 4,096 best ids, conditioned on them), two gradients of one divergence are
compared, summed over the scored tokens, with respect to all weights of the student:

    g_full      the divergence from t
    g_sparse    the divergence from what the recipe keeps of t (cut, or drawn with a seed of the
                row), tail policy and temperature as in training

    angle       of g_sparse and g_full, degrees        norm ratio      |g_sparse| / |g_full|

as in Anshumann et al. 2025 (arXiv 2503.16870), table 3. A bias, as of entries whose tail is
dropped, turns the gradient by the same angle however many tokens there are; the noise of drawn
targets averages out, the angle falling with one over the square root of the tokens. So an angle is
given with its number of tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.keys import row_seed
from ...storage.tables.soft_targets import SoftTargets
from ..loader.packing import Packing
from ..loader.samples import Sample
from ..losses.objective import Aim, Objective
from ..targets.entries_and_tail import targets_of
from ..targets.spec import Kept

Gradient = Tensor | Sequence[Tensor]


def angle_and_ratio(found: Gradient, full: Gradient) -> tuple[float, float]:
    """The angle between two gradients in degrees, and the ratio of their norms.

    The ratio is the norm of the first as a share of the second's.

    With a and b the unit vectors of the two, angle = 2 atan2(|a - b|, |a + b|) (Kahan 2006, "How
    Futile are Mindless Assessments of Roundoff in Floating-Point Computation?", section 12). Unlike
    the arccosine it is right for angles near 0 and 180 degrees, where the cosine does not change
    any more. Computed in float64.

    Args:
        found: A gradient: one tensor, or several (of each parameter).
        full: Another one, of the same shapes.

    Returns:
        Degrees, 0 to 180, and |found| / |full|. NaN where they are not defined: the angle where
        either is zero or not finite, the ratio where `full` is zero.
    """
    one, other = ([side] if isinstance(side, Tensor) else side for side in (found, full))
    norm, full_norm = _norm(one), _norm(other)
    ratio = norm / full_norm if full_norm else math.nan
    if not (math.isfinite(norm) and math.isfinite(full_norm) and norm and full_norm):
        return math.nan, ratio
    apart = _norm(
        a.double() / norm - b.double() / full_norm for a, b in zip(one, other, strict=True)
    )
    together = _norm(
        a.double() / norm + b.double() / full_norm for a, b in zip(one, other, strict=True)
    )
    return math.degrees(2 * math.atan2(apart, together)), ratio


def _norm(parts: Iterable[Tensor]) -> float:
    return math.hypot(
        *(float(torch.linalg.vector_norm(part.detach(), dtype=torch.float64)) for part in parts)
    )


def compare_gradients(
    model: nn.Module,
    rows: Iterable[Mapping[str, Any]],
    *,
    kept: Kept,
    objective: Objective,
    packing: Packing,
) -> dict[str, float | int | None]:
    """Angle and norm ratio of a student's sparse gradient on held-out rows.

    Args:
        model: The student, in evaluation mode: no dropout. Its weights and their `grad` stay as
            they are.
        rows: Held-out rows with `generation_key`, `token_ids`, `spans`, `span_tokens` and reference
            targets.
        kept: What the recipe keeps of the teacher.
        objective: The soft part of the loss.
        packing: How a row becomes a forward pass; takes all entries that targets have.

    Returns:
        `angle_degrees` and `norm_ratio` (None where not defined) and `tokens`.
    """
    weights = [parameter.requires_grad_() for parameter in model.parameters()]
    sparse, full = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    aim, tokens = Aim(soft_weight=1.0, hard_weight=0.0, objective=objective), 0
    for row in rows:
        whole = _whole(row)
        found = kept_of(whole, kept, seed=row_seed(row["generation_key"]))
        for sums, targets in ((sparse, found), (full, whole)):
            sample = Sample(token_ids=row["token_ids"], spans=row["spans"], targets=targets)
            for batch in packing.batches([sample], objective.temperature):
                there = batch.to(weights[0].device)
                total = packing.losses(model, there, aim=aim, dtype=torch.float32).total
                _add(sums, torch.autograd.grad(total, weights, allow_unused=True))
        tokens += row["span_tokens"]
    angle, ratio = (
        value if math.isfinite(value) else None for value in angle_and_ratio(sparse, full)
    )
    return {"angle_degrees": angle, "norm_ratio": ratio, "tokens": tokens}


def _add(sums: Iterable[Tensor], parts: Iterable[Tensor | None]) -> None:
    """A weight that the loss does not depend on has no part."""
    for total, part in zip(sums, parts, strict=True):
        if part is not None:
            total += part


def kept_of(reference: SoftTargets, kept: Kept, *, seed: int) -> SoftTargets:
    """What a recipe keeps of a whole distribution.

    Scoring would have made the same from the teacher's logits.

    Args:
        reference: Log-probabilities of every id that counts, without a tail.
        kept: What is kept.
        seed: sampled: of the draws.
    """
    if kept.structure.whole:
        return reference
    logprobs = torch.tensor(reference.logprobs)
    nothing = torch.zeros(len(logprobs), dtype=torch.long)  # which token follows matters to no loss
    found = targets_of(logprobs, nothing, kept=kept, seed=seed)
    if reference.ids is None:
        return found
    assert found.ids is not None
    ids = np.take_along_axis(reference.ids, found.ids.clip(min=0), axis=1)
    return replace(found, ids=np.where(found.ids < 0, -1, ids))


def _whole(row: Mapping[str, Any]) -> SoftTargets:
    """All that is stored of the teacher.

    Of entries and a tail, it is the teacher conditioned on the entries.
    """
    targets = SoftTargets.from_row(row).normalised()
    if targets.ids is None:
        return targets
    nothing = np.full_like(targets.tail_logprob, -np.inf)
    return replace(
        targets, tail_logprob=nothing, temperatures=None, tempered_tails=None
    ).normalised()
