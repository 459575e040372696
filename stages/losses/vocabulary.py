"""What a loss sees of the logits, and the way back: two passes over the vocabulary, in plain torch.

No loss here sees logits z [n, V] other than through the logits of K entries, the label's, and two
sums over ids:

    normaliser  log sum_j exp(z_j)         over all ids
    rest        log sum_j exp(z_j / T)     over the ids that are no entry: never the whole minus
                                           the entries, which cancels where the entries hold
                                           nearly all mass

So the gradient of any of them is that of a function of [n, K] numbers, carried back over the
vocabulary once:

    dz_j = slope(normaliser) exp(z_j - normaliser) + slope(rest) exp(z_j / T - rest) / T [j no
    entry]
         + slope(entry i) at its id + slope(label) at the label, which may be an entry

and through z = softcap(scale * raw), d raw_j = dz_j * scale * (1 - (z_j / c)^2). `look` takes the
entries out of the logits and leaves -inf in their places, so that one read gives maximum and sum of
what is left, and adds them to the normaliser again; `spread` relies on these places.

Letters: n tokens of a chunk, K entries, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CACHE_BYTES = 2 * 2**20  # float32 copies on a CPU: they stay in its cache
COPY_BYTES = 32 * 2**20  # on a GPU: enough to fill it


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Asked:
    """What is asked of n rows of logits."""

    ids: Tensor
    """[n, K] int64 entries, distinct in a row; -1 is none. K may be 0."""
    labels: Tensor
    """[n] int64"""
    temperature: float
    """T of `rest`."""
    scale: float
    """z = softcap(scale * raw), as in `Head`."""
    softcap: float | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """What a loss sees of them, float32."""

    entries: Tensor
    """[n, K] logits at the ids; -inf where there is none."""
    label: Tensor
    """[n] logit of the label."""
    normaliser: Tensor
    """[n] logsumexp of z over all ids."""
    rest: Tensor
    """[n] logsumexp of z / T over the ids that are no entry; -inf where every id is one."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slopes:
    """Derivatives of the loss with respect to what was seen, in float32.

    They include the weights of the tokens.
    """

    entries: Tensor
    """[n, K]; 0 where there is none."""
    label: Tensor
    """[n]"""
    normaliser: Tensor
    """[n]"""
    rest: Tensor
    """[n]; 0 where every id is an entry."""


def block_rows(raw: Tensor) -> int:
    """Rows of [n, V] whose float32 copies are made at once."""
    return max(1, (CACHE_BYTES if raw.device.type == "cpu" else COPY_BYTES) // (4 * raw.shape[1]))


def look(raw: Tensor, asked: Asked) -> Seen:
    """What a loss sees of n rows.

    Args:
        raw: [n, V] products of states and head (and bias), before scale and softcap; bfloat16 or
            float32. On return it holds what `spread` goes on from.
        asked: Of these rows.
    """
    places = _places(asked)
    entries = _logits(raw.gather(-1, places), asked).masked_fill(asked.ids < 0, -torch.inf)
    label = _logits(raw.gather(-1, asked.labels[:, None]), asked)[:, 0]
    if places.shape[1]:
        # A row without any entry has id 0 in its places, which stays what it is.
        none = (asked.ids < 0).all(-1, keepdim=True)
        raw.scatter_(-1, places, torch.where(none, raw[:, :1], -torch.inf).expand_as(places))
    if _one_softmax(raw, asked):
        highest = (raw if asked.scale == 1.0 else raw.mul_(asked.scale)).amax(-1)
        # Where all that is left is -inf the softmax would be NaN: id 0 stands in for it, and is
        # taken away again.
        nothing, first = highest == -torch.inf, raw[:, 0]
        first.masked_fill_(nothing, 0.0)
        torch.softmax(raw, -1, out=raw)
        others = rest = highest - raw.amax(-1).log()
        first.masked_fill_(nothing, 0.0)
    else:
        blocks = [_sums(rows, asked) for rows in raw.split(block_rows(raw))]
        others, rest = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    normaliser = torch.logaddexp(others, entries.logsumexp(-1))
    return Seen(entries=entries, label=label, normaliser=normaliser, rest=rest)


def spread(raw: Tensor, asked: Asked, seen: Seen, slopes: Slopes) -> Tensor:
    """Derivative of the loss with respect to `raw` [n, V], in its memory and dtype.

    Args:
        raw: As `look` left it.
        asked: What `look` was asked.
        seen: What it saw.
        slopes: Derivatives with respect to that.
    """
    at_entries = (
        slopes.entries
        + slopes.normaliser[:, None] * (seen.entries - seen.normaliser[:, None]).exp()
    )
    at_entries = (at_entries * _steepness(seen.entries, asked)).masked_fill(asked.ids < 0, 0.0)
    at_label = slopes.label * _steepness(seen.label, asked)
    if _one_softmax(raw, asked):
        shares = slopes.normaliser * (seen.rest - seen.normaliser).exp() + slopes.rest
        return _add_at_ids(raw.mul_(asked.scale * shares[:, None]), asked, at_entries, at_label)
    size = block_rows(raw)
    for start in range(0, len(raw), size):
        rows = slice(start, start + size)
        logits = _logits(raw[rows], asked)
        normaliser, rest = seen.normaliser[rows, None], seen.rest[rows, None]
        # -inf where nothing is outside the entries; there exp(-inf - rest) would be NaN instead of
        # 0.
        rest = rest.masked_fill(rest == -torch.inf, 0.0)
        gradient = slopes.normaliser[rows, None] * (logits - normaliser).exp_()
        slope = slopes.rest[rows, None] / asked.temperature
        gradient += (logits / asked.temperature).sub_(rest).exp_().mul_(slope)
        gradient *= _steepness(logits, asked)
        here = replace(asked, ids=asked.ids[rows], labels=asked.labels[rows])
        raw[rows] = _add_at_ids(gradient, here, at_entries[rows], at_label[rows])
    return raw


def _one_softmax(raw: Tensor, asked: Asked) -> bool:
    """Whether both sums and their gradients follow from one softmax, made in place.

    That softmax is over the ids that are no entry.

    Then the exponentials are made once and nothing is allocated. There must be such an id in each
    row.
    """
    plain = asked.temperature == 1.0 and asked.softcap is None and raw.dtype == torch.float32
    return plain and asked.ids.shape[1] < raw.shape[1]


def _sums(raw: Tensor, asked: Asked) -> tuple[Tensor, Tensor]:
    """Logsumexp of z and of z / T [rows] over what is left."""
    logits = _logits(raw, asked)
    others = logits.logsumexp(-1)
    return others, others if asked.temperature == 1.0 else (logits / asked.temperature).logsumexp(
        -1
    )


def _add_at_ids(gradient: Tensor, asked: Asked, at_entries: Tensor, at_label: Tensor) -> Tensor:
    gradient.scatter_add_(-1, asked.ids.clamp_min(0), at_entries)
    return gradient.scatter_add_(-1, asked.labels[:, None], at_label[:, None])


def _places(asked: Asked) -> Tensor:
    """[n, K] ids, an entry that is none at the place of one that is (0 in a row without any)."""
    if not asked.ids.shape[1]:
        return asked.ids
    return torch.where(asked.ids < 0, asked.ids.amax(-1, keepdim=True).clamp_min(0), asked.ids)


def _logits(raw: Tensor, asked: Asked) -> Tensor:
    """Finished logits in float32, or `raw` itself if nothing is to be changed.

    -inf stays -inf, which a softcap would lift.
    """
    logits = raw.float()
    if asked.scale != 1.0:
        logits = logits * asked.scale
    if asked.softcap is None:
        return logits
    return (asked.softcap * torch.tanh(logits / asked.softcap)).masked_fill(
        raw == -torch.inf, -torch.inf
    )


def _steepness(logits: Tensor, asked: Asked) -> Tensor | float:
    """Slope of z over raw where z is `logits`; finite where that is -inf."""
    if asked.softcap is None:
        return asked.scale
    return asked.scale * (1 - (logits.clamp_min(-asked.softcap) / asked.softcap).square())
