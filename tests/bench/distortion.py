"""What a sparse target gets wrong, for a student s that is being trained.

It is compared with the teacher's full distribution t.

Per token, in float64 from stored columns (rounded, read back, normalised):

    squared error       sum_i (t'_i - t_i)^2, t' = the entries, 0 elsewhere
    KL error            KL' - KL(t || s).
                        topk, topp: KL' over the entries and one bucket for the rest, so never
                        above the truth.
                        sampled: KL' = -entropy - sum_i t'_i log s_i, which has the truth as its
                        mean
    gradient            of the mean loss over a batch with respect to all weights of the student:
                        angle and length against that of KL(t || s).
                        d loss / d logit_j = r s_j + v_j with v sparse.
                        Bucket: r = 1 - T / S, T and S the masses outside the entries.
                        sampled, and tail dropped: r = 1

Letters: B rows, N tokens, K entries, V vocabulary, D hidden.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from small_models import SmallModel
from torch import Tensor

from stillroom.stages.targets.entries_and_tail import targets_of
from stillroom.stages.targets.spec import Kept
from stillroom.storage.tables.soft_targets import SoftTargets

WIDEST = 512
"""Entries of the best that are looked at: limit of topp."""


@dataclass
class Row:
    """A scored row: both models' answers about tokens 1 to N of `token_ids`."""

    token_ids: np.ndarray
    """[N + 1]"""
    best: SoftTargets
    """The `WIDEST` best."""
    kl: np.ndarray
    """[N] KL(t || s), nats."""
    squares: np.ndarray
    """[N] sum of t_i^2."""
    about: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By setting: log t and log s of its entries, [N, K]; padding is that of id 0."""
    drawn: dict[str, SoftTargets] = field(default_factory=dict)
    """By setting: sampled targets."""


@torch.no_grad()
def scored(
    teacher: SmallModel,
    student: SmallModel,
    ids: Tensor,
    *,
    number: int,
    draws: dict[str, tuple[str, int]],
) -> Row:
    """One row [N + 1] of token ids; `draws` are (draw, rounds) by setting."""
    following = ids[1:]
    truth = teacher.head.logits(teacher(ids[None, :-1])[0]).log_softmax(-1)
    guess = student.head.logits(student(ids[None, :-1])[0]).log_softmax(-1)
    best = targets_of(
        truth.clone(), following, kept=Kept(kind="topk", k=min(WIDEST, truth.shape[-1]))
    )
    mass = truth.exp()
    row = Row(
        token_ids=ids.numpy().astype(np.int32),
        best=best,
        kl=(mass * (truth - guess)).sum(-1).double().numpy(),
        squares=mass.double().square().sum(-1).numpy(),
    )
    for name, (draw, rounds) in draws.items():
        kept = Kept(kind="sampled", k=rounds, draw=draw, proposal=1.0)
        row.drawn[name] = targets_of(
            truth.clone(), following, kept=kept, seed=1000 * number + rounds
        )
    for name, targets in {"best": best, **row.drawn}.items():
        entry = torch.from_numpy(targets.ids).long().clamp(min=0)
        row.about[name] = truth.gather(-1, entry).numpy(), guess.gather(-1, entry).numpy()
    return row


def best_k(row: Row, k: int) -> SoftTargets:
    """The K best; what is cut goes to the tail."""
    rest = (
        np.logaddexp.reduce(row.best.logprobs[:, k:], axis=1, dtype=np.float64)
        if k < WIDEST
        else -np.inf
    )
    tail = np.logaddexp(row.best.tail_logprob, rest).astype(np.float32)
    entries = (row.best.ids[:, :k], row.best.logprobs[:, :k], tail)
    return SoftTargets(*entries, row.best.token_logprob, row.best.entropy)


def ragged(row: Row, entries: np.ndarray) -> SoftTargets:
    """So many of the best of each position; what is cut goes to the tail."""
    widest = int(entries.max())
    used = np.arange(row.best.ids.shape[1]) < entries[:, None]
    rest = np.where(used, -np.inf, row.best.logprobs.astype(np.float64))
    tail = np.logaddexp(row.best.tail_logprob, np.logaddexp.reduce(rest, axis=1)).astype(np.float32)
    ids = np.where(used, row.best.ids, -1)[:, :widest]
    logprobs = np.where(used, row.best.logprobs, -np.inf)[:, :widest].astype(np.float32)
    entries = entries.astype(np.int32)
    return SoftTargets(
        ids, logprobs, tail, row.best.token_logprob, row.best.entropy, entries=entries
    )


def above_p(row: Row, p: float) -> SoftTargets:
    """What `topp` keeps at k = `WIDEST`."""
    mass = np.exp(row.best.logprobs.astype(np.float64)).cumsum(axis=1)
    return ragged(row, np.minimum((mass < p).sum(axis=1) + 1, mass.shape[1]))


def above(row: Row, least: float) -> SoftTargets:
    """The entries whose probability is at least `least`, or the best one.

    This is no kind of the recipe.
    """
    return ragged(row, np.maximum((row.best.logprobs >= np.log(least)).sum(axis=1), 1))


@dataclass
class Entries:
    """The entries of a setting as its loss sees them, of one row: [N, K] each, 0 for padding."""

    ids: np.ndarray
    target: np.ndarray
    """t'"""
    truth: np.ndarray
    """t"""
    student: np.ndarray
    """log s"""
    tail: np.ndarray | None
    """[N] T; None: sampled."""
    entropy: np.ndarray
    """[N]"""

    @property
    def outside(self) -> np.ndarray:
        """[N] S, the student's mass outside the entries."""
        inside = np.where(self.truth > 0, np.exp(self.student), 0).sum(axis=1)
        return np.maximum(1 - inside, 1e-12)


def entries(row: Row, name: str, targets: SoftTargets) -> Entries:
    """What was read back of a row (not normalised yet), beside the truth about its entries."""
    truth, student = row.about[name]
    k = targets.ids.shape[1]
    used = targets.ids >= 0
    kept = targets.normalised()
    return Entries(
        ids=np.where(used, targets.ids, 0),
        target=np.where(used, kept.probabilities, 0).astype(np.float64),
        truth=np.where(used, np.exp(truth[:, :k].astype(np.float64)), 0),
        student=np.where(used, student[:, :k], 0).astype(np.float64),
        tail=None if kept.tail_logprob is None else np.exp(kept.tail_logprob.astype(np.float64)),
        entropy=targets.entropy.astype(np.float64),
    )


def squared_error(row: Row, e: Entries) -> np.ndarray:
    """Per token [N]."""
    return np.square(e.target - e.truth).sum(axis=1) + row.squares - np.square(e.truth).sum(axis=1)


def kl_error(row: Row, e: Entries) -> np.ndarray:
    """Per token [N], nats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if e.tail is None:
            return -e.entropy - (e.target * e.student).sum(axis=1) - row.kl
        inside = np.nan_to_num(e.target * (np.log(e.target) - e.student)).sum(axis=1)
        return inside + np.nan_to_num(e.tail * np.log(e.tail / e.outside)) - row.kl


def sparse_form(e: Entries, *, drop_tail: bool) -> tuple[np.ndarray, np.ndarray]:
    """The r [N] and v [N, K] of the module's docstring."""
    if e.tail is None:
        return np.ones(len(e.ids)), -e.target
    if drop_tail:
        return np.ones(len(e.ids)), -e.target / e.target.sum(axis=1, keepdims=True)
    r = 1 - e.tail / e.outside
    return r, np.where(e.truth > 0, (1 - r[:, None]) * np.exp(e.student), 0) - e.target


def gradients(
    models: tuple[SmallModel, SmallModel],
    rows: list[Row],
    forms: dict[str, list[tuple[np.ndarray, ...]]],
) -> dict[str, tuple[float, float]]:
    """Angle in degrees and length ratio of each setting's gradient to the full one, over the rows.

    `forms` are ids [N, K], r [N] and v [N, K] of each row, by setting.
    """
    teacher, student = models
    states = [student(torch.from_numpy(row.token_ids[None, :-1]).long())[0] for row in rows]
    weight = student.body.embed_tokens.weight.detach()
    names = ["full", *forms]
    of_weight = {name: torch.zeros_like(weight) for name in names}
    of_bias = {name: torch.zeros(len(weight)) for name in names}
    of_states: dict[str, list[Tensor]] = {name: [] for name in names}
    bucket = [name for name in forms if any((r != 1).any() for _, r, _ in forms[name])]
    with torch.no_grad():
        for number, row in enumerate(rows):
            h = states[number].detach()
            s = student.head.logits(h).softmax(-1)
            t = teacher.head.logits(
                teacher(torch.from_numpy(row.token_ids[None, :-1]).long())[0]
            ).softmax(-1)
            through, down, total = s @ weight, s.T @ h, s.sum(0)
            of_weight["full"] += down - t.T @ h
            of_bias["full"] += total - t.sum(0)
            of_states["full"].append(through - t @ weight)
            scales = {name: torch.from_numpy(forms[name][number][1]).float() for name in forms}
            wide = (
                s.T @ torch.cat([scales[name][:, None] * h for name in bucket], 1)
                if bucket
                else None
            )
            for name in forms:
                ids, v = (torch.from_numpy(forms[name][number][i]) for i in (0, 2))
                ids, v, r = ids.long(), v.float(), scales[name]
                at = bucket.index(name) * h.shape[1] if name in bucket else -1
                of_weight[name] += down if at < 0 else wide[:, at : at + h.shape[1]]
                of_weight[name].index_add_(
                    0, ids.flatten(), (v[..., None] * h[:, None]).flatten(0, 1)
                )
                of_bias[name] += total if at < 0 else r @ s
                of_bias[name].index_add_(0, ids.flatten(), v.flatten())
                sparse = torch.nn.functional.embedding_bag(
                    ids, weight, per_sample_weights=v, mode="sum"
                )
                of_states[name].append(r[:, None] * through + sparse)
    found = {}
    body = [p for p in student.body.parameters() if p.requires_grad]
    hidden, full = torch.cat(states), None
    for name in names:
        parts = torch.autograd.grad(hidden, body, torch.cat(of_states[name]), retain_graph=True)
        parts = [p + of_weight[name] if p.shape == weight.shape else p for p in parts]
        flat = torch.cat([*(p.flatten() for p in parts), of_bias[name]]).double()
        full = flat if full is None else full
        cosine = float(flat @ full / (flat.norm() * full.norm()))
        found[name] = (
            float(np.degrees(np.arccos(min(1.0, cosine)))),
            float(flat.norm() / full.norm()),
        )
    return found
