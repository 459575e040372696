"""From hidden states to soft targets, a chunk of positions at a time: [N, V] never exists whole.

Letters: N scored tokens, K entries, V vocabulary, D hidden, m temperatures, C blocks of `BLOCK`
ids. With z the logits, log p = z - logsumexp(z) over the full vocabulary, in float32; every kind
has `token_logprob` [N] and `entropy` [N] (nats) of that, but for sampled targets at another
temperature, whose entropy is that of the distribution they are drawn from.

The logits of a chunk are read once. Per block of ids b, with M_b its largest logit:

    S_b(T) = sum exp((z - M_b) / T)        W_b = sum exp(z - M_b) (z - M_b)

    logsumexp(z / T) = logsumexp_b(M_b / T + log S_b(T))
    entropy          = sum_b exp(M_b - Z) ((Z - M_b) S_b(1) - W_b)     Z = logsumexp(z)

The K best ids lie in the K blocks with the largest M_b, so only these are looked at again; what is
outside the entries is the sums of all other blocks and the ids of these blocks that are not kept:
nothing is subtracted, nothing cancels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.device import uses_triton
from ..models.head import Head
from ..recipe.fields import Kernel
from .best_entries import ENTRIES
from .block_sums import BLOCK, BlockSums, block_sums
from .draws import Columns, Span, drawn_columns, points_of
from .spec import Kept

# Float32 logits that are held at once.
CHUNK_BYTES = 64 * 2**20
# A GPU needs more rows to be busy: so many times as much ...
GPU_CHUNKS = 16
# ... but fewer where whole distributions are written: draws take several such arrays, in float64.
GPU_CHUNKS_WHOLE = 4
_ENTRIES = ("ids", "logprobs", "counts", "weights")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Arriving:
    """The targets of a batch, on their way from the device."""

    columns: Columns
    kept: Kept
    spans: Sequence[Span]
    event: torch.cuda.Event | None

    def rows(self) -> list[SoftTargets]:
        """One for each span, V ids at most.

        Where positions differ in entries, K is the number of the widest.
        """
        if self.event is not None:
            self.event.synchronize()
        ends = list(accumulate(span.positions for span in self.spans))
        parts = [
            slice(end - span.positions, end) for span, end in zip(self.spans, ends, strict=True)
        ]
        found = {name: values.numpy() for name, values in self.columns.items()}
        return [
            _targets({name: values[part] for name, values in found.items()}, self.kept)
            for part in parts
        ]


class Reducer:
    """Makes soft targets with one head."""

    def __init__(self, head: Head, *, kernel: Kernel | None = None) -> None:
        """`kernel` says who makes the block sums.

        None: Triton on an NVIDIA GPU that has it, else torch.

        Raises:
            UsageError: Triton is asked for and cannot run here.
        """
        self._head = head
        self._sums_of = _chosen(kernel, head.weight.device)

    def launch(
        self, hidden: Tensor, next_ids: Tensor, *, kept: Kept, spans: Sequence[Span]
    ) -> Arriving:
        """The distribution of the next token at each position, as far as it is kept.

        `topk`: the K best. `topp`: the fewest best whose mass is at least p, within `k_min` and
        `k`. Both with the mass outside the entries, a logsumexp over what is not kept (1 - sum of
        the kept would cancel), and for each temperature T the logsumexp of log p / T over the same
        ids. `full`: all V in id order. `sampled`: `draws.py`. On a GPU this returns before it is
        done.

        Args:
            hidden: [N, D] states at the predicting positions, after the final norm.
            next_ids: [N] the tokens that follow.
            kept: What is kept.
            spans: Which positions are one row's, in order.
        """
        device = self._head.weight.device
        hidden, next_ids = (
            t.to(device) for t in (hidden, next_ids)
        )  # a spread model has it elsewhere
        points = points_of(kept, spans)
        size = chunk_rows(self._head, kept)
        columns: Columns = {}
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            drawn = None if points is None else moved(points[chunk], device)
            logits = self._head.exact_logits(hidden[chunk])
            found = _reduced(
                logits, next_ids[chunk], kept=kept, points=drawn, sums_of=self._sums_of
            )
            for name, values in found.items():
                if name not in columns:
                    shape = (len(hidden), *values.shape[1:])
                    columns[name] = torch.empty(
                        shape, dtype=values.dtype, pin_memory=hidden.is_cuda
                    )
                columns[name][chunk].copy_(values, non_blocking=True)
        event = torch.cuda.current_stream(device).record_event() if hidden.is_cuda else None
        return Arriving(columns=columns, kept=kept, spans=spans, event=event)


def chunk_rows(head: Head, kept: Kept) -> int:
    """Positions whose logits are held at once."""
    busy = GPU_CHUNKS if kept.structure.has_tail else GPU_CHUNKS_WHOLE
    chunks = busy if head.weight.is_cuda else 1
    return max(1, chunks * CHUNK_BYTES // (4 * head.vocab_size))


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device is at."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def targets_of(logprobs: Tensor, next_ids: Tensor, *, kept: Kept, seed: int = 0) -> SoftTargets:
    """`Reducer.launch` of one row's distributions that are there already.

    They are log-probabilities [N, V], which are overwritten.
    """
    points = points_of(kept, [Span(len(logprobs), seed)])
    columns = _reduced(logprobs, next_ids, kept=kept, points=points)
    return _targets({name: values.cpu().numpy() for name, values in columns.items()}, kept)


class Collected:
    """`targets_of` one row whose distributions come some positions at a time, in order."""

    def __init__(self, kept: Kept, span: Span) -> None:
        self._kept, self._points = kept, points_of(kept, [span])
        self._parts: list[Columns] = []
        self._done = 0

    def add(self, logprobs: Tensor, next_ids: Tensor) -> None:
        """The distributions [n, V] of the next n positions, overwritten."""
        here = slice(self._done, self._done + len(logprobs))
        points = None if self._points is None else self._points[here]
        self._parts.append(_reduced(logprobs, next_ids, kept=self._kept, points=points))
        self._done = here.stop

    def targets(self) -> SoftTargets:
        """Of all positions."""
        names = self._parts[0]
        found = {name: torch.cat([part[name] for part in self._parts]) for name in names}
        return _targets({name: values.numpy() for name, values in found.items()}, self._kept)


SumsOf = Callable[[Tensor, Sequence[float]], BlockSums]


def _chosen(kernel: Kernel | None, device: torch.device) -> SumsOf:
    if not uses_triton(kernel, device, setting="score.kernel"):
        return block_sums
    from .block_sums_triton import block_sums as fused

    return fused


def _reduced(
    logits: Tensor,
    next_ids: Tensor,
    *,
    kept: Kept,
    points: Tensor | None,
    sums_of: SumsOf = block_sums,
) -> Columns:
    """What is kept at n positions; overwrites the logits [n, V]."""
    has_tail = kept.structure.has_tail
    sums = sums_of(logits, kept.temperatures if has_tail else ())
    # All relative to a row's largest logit: at logits of 30, float32 has five digits after the
    # point.
    highest = sums.maxima.amax(-1, keepdim=True)
    below = sums.maxima - highest
    normaliser = (below.exp() * sums.sums[:, 0]).sum(-1, keepdim=True).log()
    surprise = (below - normaliser).exp() * ((normaliser - below) * sums.sums[:, 0] - sums.weighted)
    token = logits.gather(-1, next_ids[:, None]).float() - highest - normaliser
    found = {
        "token_logprob": token[:, 0],
        "entropy": surprise.masked_fill(below == -torch.inf, 0.0).sum(
            -1
        ),  # 0 * inf is 0 here, and a NaN stays one
    }
    if has_tail:
        return found | _best(logits, sums, highest=highest, normaliser=normaliser, kept=kept)
    logprobs = logits.float().sub_(highest).sub_(normaliser)
    if points is None:
        return found | {
            "logprobs": logprobs,
            "tail_logprob": torch.full_like(found["entropy"], -torch.inf),
        }
    return found | drawn_columns(logprobs, points, kept)


def _best(
    logits: Tensor, sums: BlockSums, *, highest: Tensor, normaliser: Tensor, kept: Kept
) -> Columns:
    """The best entries, as many as the kind keeps, and what is outside them."""
    most = min(kept.k, logits.shape[-1])
    values, starts = _candidates(logits, sums.maxima, most)
    values = values - highest  # float32, whatever the logits are
    best, places = values.topk(most, dim=-1)
    ids = starts.gather(-1, places // BLOCK) + places % BLOCK
    logprobs = best - normaliser
    found: Columns = {}
    used = torch.ones_like(ids, dtype=torch.bool)
    if kept.kind in ENTRIES:
        mass = logprobs.double().exp().cumsum(-1)
        entries = ENTRIES[kept.kind](mass, kept)
        used = torch.arange(most, device=best.device) < entries[:, None]
        found["entries"] = entries.int()
    found |= {
        "ids": ids.int().masked_fill(~used, -1),
        "logprobs": logprobs.masked_fill(~used, -torch.inf),
    }
    values.scatter_(-1, places, best.masked_fill(used, -torch.inf))
    below, masses = sums.maxima - highest, sums.sums.log()
    tails = []
    for number, t in enumerate((1.0, *kept.temperatures)):
        blocks = (below / t + masses[:, number]).scatter(-1, starts // BLOCK, -torch.inf)
        near = (values if t == 1.0 else values / t).logsumexp(-1)
        tails.append(torch.logaddexp(blocks.logsumexp(-1), near) - normaliser[:, 0] / t)
    found["tail_logprob"] = tails[0]
    if kept.temperatures:
        found["tempered_tails"] = torch.stack(tails[1:], dim=-1)
    return found


def _candidates(logits: Tensor, maxima: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Logits [n, w] among which the `most` best are, and [n, w / BLOCK] where each block begins.

    They are whole blocks, one after another.

    A last block that is shorter is always among them, at the end: nothing is padded, so no id is
    made up.
    """
    n, whole = len(logits), logits.shape[1] // BLOCK
    rest = torch.arange(whole, maxima.shape[1], device=logits.device).expand(n, -1)
    if most >= whole:
        return logits, torch.arange(maxima.shape[1], device=logits.device).expand(n, -1) * BLOCK
    blocks = maxima[:, :whole].topk(most, dim=-1, sorted=False).indices
    rows = torch.arange(n, device=logits.device)[:, None]
    values = logits[:, : whole * BLOCK].unflatten(-1, (whole, BLOCK))[rows, blocks].flatten(1)
    if not rest.shape[1]:
        return values, blocks * BLOCK
    return torch.cat([values, logits[:, whole * BLOCK :]], dim=-1), torch.cat(
        [blocks, rest], dim=-1
    ) * BLOCK


def _targets(found: dict[str, np.ndarray], kept: Kept) -> SoftTargets:
    if "entries" in found:
        widest = int(found["entries"].max(initial=0))
        found |= {name: found[name][:, :widest] for name in _ENTRIES if name in found}
    if kept.temperatures:
        found["temperatures"] = np.array(kept.temperatures, np.float32)
    nothing: dict[str, Any] = dict.fromkeys(("ids", "logprobs", "tail_logprob"))
    return SoftTargets(**nothing | found)
