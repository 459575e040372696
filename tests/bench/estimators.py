"""What a sparse estimate of the teacher is worth before any student sees it.

The measures are distinct ids and variance, with exact small cases.

For t [N, V], the teacher at N positions, and R draws with replacement, in closed form:

    multinomial   distinct ids  sum_i 1 - (1 - t_i)^R      variance  sum_i t_i (1 - t_i) / R
    systematic    distinct ids  sum_i min(1, R t_i)        variance  sum_i f_i (1 - f_i) / R^2,
                                                                     f_i = R t_i mod 1
    top-m + tail  the m best exactly, R draws of either kind from what is left, weighted with its
                  mass; distinct ids are m more than the tail's, variance is the tail's times its
                  mass squared

The variance is that of the target, the mean over positions of E |t' - t|^2. The small case is
Zipf's law over 100,000 ids (Anshumann et al. 2025, arXiv 2503.16870, figure 2a).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillroom.stages.targets.entries_and_tail import targets_of
from stillroom.stages.targets.spec import Kept

ROUNDS = (4, 13, 50)
DISTINCT = (2.5, 4.0, 6.0, 10.0, 15.0)
HEADS = (1, 2, 3, 5, 8)
"""m of top-m + tail."""
Estimate = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From t [N, V] and R: distinct ids [N] and variance [N]."""


def multinomial(t: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Independent draws: distinct ids [N] and variance [N], expected."""
    return -torch.expm1(rounds * torch.log1p(-t)).sum(-1), (t * (1 - t)).sum(-1) / rounds


def systematic(t: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Equidistant points from one random offset: the same two."""
    part = (t * rounds).frac()
    return (t * rounds).clamp(max=1).sum(-1), (part * (1 - part)).sum(-1) / rounds**2


def head_and_tail(best: int, draw: Estimate) -> Estimate:
    """The `best` ids exactly and `rounds` draws from the others."""

    def estimate(t: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        rest = t.scatter(-1, t.topk(best).indices, 0.0)
        mass = rest.sum(-1, keepdim=True)
        distinct, variance = draw(rest / mass.clamp_min(1e-30), rounds)
        return best + distinct, variance * mass.squeeze(-1) ** 2

    return estimate


def at_equal_ids(t: Tensor) -> list[dict[str, float]]:
    """Variance of each estimator that keeps as many distinct ids per token as multinomial draws.

    It is given by that number of ids.

    There is one row for each such number of ids.

    `head + ...` is the best of `HEADS`; a variance between two numbers of draws is interpolated in
    logarithms.
    """
    most = 200
    curves = {
        name: [_curve(t, draw, most)]
        for name, draw in (("multinomial", multinomial), ("systematic", systematic))
    }
    for name, draw in (("head + multinomial", multinomial), ("head + systematic", systematic)):
        curves[name] = [
            _curve(t, head_and_tail(best, draw), most) for best in HEADS if best < t.shape[-1]
        ]
    found = []
    for distinct in DISTINCT:
        values = {
            name: min(_at(curve, distinct) for curve in some) for name, some in curves.items()
        }
        rounds = {
            f"{name} draws": _at(curves[name][0], distinct, 2)
            for name in ("multinomial", "systematic")
        }
        found.append({"distinct_ids": distinct} | values | rounds)
    return [row for row in found if all(map(np.isfinite, row.values()))]


def by_entropy(t: Tensor) -> dict[str, Tensor]:
    """All positions, and the half where the teacher is surest, as a larger model is.

    Named with their mean entropy.
    """
    entropy = -(t * t.clamp_min(1e-30).log()).sum(-1)
    sure = entropy.argsort()[: len(t) // 2]
    parts = {"all positions": torch.arange(len(t)), "the surer half": sure}
    return {
        f"{name}, {float(entropy[part].mean()):.2f} nats": t[part] for name, part in parts.items()
    }


def _curve(t: Tensor, draw: Estimate, most: int) -> np.ndarray:
    """[3, n] distinct ids, variance and draws, means over positions, from 1 draw on."""
    rounds = sorted({round(1.3**power) for power in range(60) if 1.3**power <= most})
    return np.array([[*(float(x.mean()) for x in draw(t, count)), count] for count in rounds]).T


def _at(curve: np.ndarray, distinct: float, row: int = 1) -> float:
    """Value where the curve has so many distinct ids; infinite where it never has."""
    if not curve[0, 0] <= distinct <= curve[0, -1]:
        return float("inf")
    return float(
        np.exp(np.interp(np.log(distinct), np.log(curve[0]), np.log(np.maximum(curve[row], 1e-12))))
    )


def distinct_ids(t: Tensor) -> dict[str, dict[str, float]]:
    """Expected distinct ids per token by number of draws."""
    draws = {"multinomial": multinomial, "systematic": systematic}
    return {
        name: {str(n): float(draw(t, n)[0].mean()) for n in ROUNDS} for name, draw in draws.items()
    }


def measured(t: Tensor, *, rounds: int, draw: str, repeats: int) -> dict[str, float]:
    """The same two of what the product draws, mean over `repeats` of every position."""
    distinct, squares = 0.0, 0.0
    for repeat in range(repeats):
        estimate = drawn(t, rounds=rounds, draw=draw, seed=repeat)
        distinct += float((estimate > 0).sum(-1).double().mean()) / repeats
        squares += float((estimate - t).square().sum(-1).mean()) / repeats
    return {"distinct_ids": distinct, "variance": squares}


def drawn(t: Tensor, *, rounds: int, draw: str, seed: int) -> Tensor:
    """[N, V] what the score stage makes of t: counts over rounds."""
    none = torch.zeros(len(t), dtype=torch.long)
    kept = Kept(kind="sampled", k=rounds, draw=draw, proposal=1.0)
    made = targets_of(t.log().clamp_min(-100).float(), none, kept=kept, seed=seed)
    assert made.ids is not None
    assert made.counts is not None
    ids, counts = torch.from_numpy(made.ids).long(), torch.from_numpy(made.counts).to(t.dtype)
    return torch.zeros_like(t).scatter_add_(-1, ids.clamp_min(0), counts / rounds)


def zipf_case(*, vocab_size: int = 100_000, k: int = 20, rows: int = 64) -> dict[str, Any]:
    """The exact small case, and `rows` draws of 50 rounds against it.

    The largest error is in standard errors.
    """
    t = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    t /= t.sum()
    mass = float(t[:k].sum())
    estimate = (
        sum(drawn(t[None], rounds=50, draw="multinomial", seed=seed)[0] for seed in range(rows))
        / rows
    )
    error = (t * (1 - t) / (50 * rows)).sqrt()
    return {
        "kept_mass": mass,
        "dropped tail, id 2": float(t[1] / mass),
        "to label, id 1": float(t[0] * (2 - mass)),
        "to label, the tail's factor": 1 - mass,
        "bucket, id 2": float(t[1]),
        "distinct_ids": distinct_ids(t[None])["multinomial"],
        "largest error of the mean, standard errors": float(
            ((estimate - t).abs() / error)[:k].max()
        ),
    }
