"""From the samples of a step to forward passes.

Samples are packed into rows, and rows are split into passes.

Where the model can cut attention at the end of a sample (`models/attention/flat.py`), a pass is a
single row without padding. Else it has rows of like length, filled evenly, and as little padding as
that leaves.

Where a loss is between samples, a pass holds whole groups of them in the step's order, however many
tokens these have.

How they are packed and split changes speed and memory, never the gradient: samples in a row do not
see each other, and losses are summed over the whole step.

Letters: B rows, T tokens per row, N scored tokens, K entries, V vocabulary.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.errors import UsageError, in_short
from ..losses.definition import Distilled
from ..losses.fused_linear import linear_distillation
from ..losses.objective import Aim
from ..models.attention.flat import flat_inputs
from ..models.attention.longest import made_up
from ..models.device import evaluating
from ..models.head import hidden_states, split_head
from ..models.inputs.reads import check_ids
from ..recipe.fields import Kernel
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.batch import MoreTargets, TargetBatch, fit_vocabulary, joined, weighed
from ..targets.features.batch import FeatureTargets
from ..targets.features.shown import showing
from ..targets.spec import Kept
from ..targets.stored import Reading, soft_part
from .passes import Passes, whole_groups
from .samples import Sample

SHORTEST_ROW = 128
"""Tokens; shorter samples share a row. Attention costs rows x length^2, so not much longer."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """One forward pass: B rows of T positions, each row several samples and padding at its end."""

    token_ids: Tensor
    """[B, T] int64, 0 in the padding."""
    position_ids: Tensor
    """[B, T] int64, from 0 in each sample and in the padding; where they restart, attention is
    cut."""
    predicting: Tensor
    """[N] int64 indices into the flattened [B * T] of the positions that predict a scored token."""
    targets: TargetBatch
    """N targets in terms of the student's vocabulary."""
    more: MoreTargets | None = None
    """What further teachers say at some of these positions; None: nobody says more."""
    edges: Tensor | None = None
    """[S + 1] int32 ends of the samples of a flat row; None: rows that transformers cuts by their
    positions."""
    longest: int = 0
    """Tokens of the longest sample of a flat row."""
    features: FeatureTargets | None = None
    """The teacher's features of the samples; None: nothing is matched."""

    @property
    def positions(self) -> int:
        """Positions that are computed, padding included."""
        return self.token_ids.numel()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        parts = (getattr(self, f.name) for f in fields(self))
        return sum(part.nbytes for part in parts if isinstance(part, _MOVABLE))

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model takes."""
        inputs: dict[str, Any] = {"input_ids": self.token_ids, "position_ids": self.position_ids}
        return inputs if self.edges is None else inputs | flat_inputs(self.edges, self.longest)

    def to(self, device: torch.device) -> Self:
        """The same on another device.

        The way to a GPU is through page-locked memory, so that the copies do not block.
        """
        source = self.pin_memory() if device.type == "cuda" else self
        return source._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same in page-locked memory.

        A `DataLoader` with `pin_memory=True` calls this by its name.
        """
        return self._map(lambda part: part.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> Self:
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{name: change(part) for name, part in parts.items() if isinstance(part, _MOVABLE)},
        )


_MOVABLE = (Tensor, TargetBatch, MoreTargets, FeatureTargets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing(Passes):
    """Passes over text that is continued: samples packed into rows."""

    flat: bool = False
    """A pass is a single row without padding, of a model that was let `attend_apart`."""
    row_tokens: int | None = None
    """Positions of a row at most; None: about the longest sample, at least `SHORTEST_ROW`."""
    shared_rows: bool = True
    """False: one sample per row, for a model that lets packed samples see each other."""
    context: int | None = None
    """Tokens that the model reads at once. A shared row has no more, as some models have a table of
    so many."""
    kept: Kept | None = None
    """Entries to take of a sample that is stored with more: topk's or topp's. None: as stored."""
    unstored_temperature: Literal["refuse", "approximate"] = "refuse"
    """What to do where the temperature asked for is not stored; `Reading` has the approximation."""
    kernel: Kernel | None = None
    """Who makes the loss's passes over the vocabulary; `linear_distillation` has it."""

    def positions(self, sample: Sample) -> np.ndarray:
        """Those that predict a scored token."""
        return predicting_positions(sample.spans)

    def batches(
        self, samples: Sequence[Sample], temperature: float | None = 1.0
    ) -> Iterator[Batch]:
        """The forward passes of a step.

        Args:
            samples: The step's.
            temperature: Of the soft targets; None leaves them out.

        Raises:
            UsageError: a sample is longer than a row, has a token that the student does not know,
                or has soft targets that cannot be had at this temperature.
        """
        longest = max(len(sample) for sample in samples)
        if self.row_tokens is not None and longest > self.row_tokens:
            raise UsageError(
                f"train.row_tokens: {self.row_tokens} is shorter than a sample of {longest} "
                f"tokens. Set it to {longest} or more, or leave it out."
            )
        for group in self._groups(samples):
            yield self._batch(group, temperature)

    def _groups(self, samples: Sequence[Sample]) -> Iterator[list[list[Sample]]]:
        """The rows of each pass."""
        if self.group is not None:
            for part in whole_groups(samples, self.group, fits=self._fits):
                yield self._in_order(part)
            return
        if self.alone:
            yield from ([[sample]] for sample in samples)
            return
        longest, total = max(map(len, samples)), sum(map(len, samples))
        most = max(longest, self.tokens_per_pass)
        if self.flat:
            # As few passes as hold all tokens, a row each.
            for row in pack(samples, rows=math.ceil(total / most), limit=most):
                yield [row]
            return
        rows = [[sample] for sample in samples]
        if self.shared_rows:
            limit = min(most, self.row_tokens or most, max(longest, self.context or most))
            rows = pack(samples, rows=total // self._usual(longest), limit=limit)
        # A pass is as wide as its longest row: rows of like length go together.
        group: list[list[Sample]] = []
        for row in sorted(rows, key=_tokens, reverse=True):
            if group and (len(group) + 1) * _tokens(group[0]) > self.tokens_per_pass:
                yield group
                group = []
            group.append(row)
        yield group

    def _usual(self, longest: int) -> int:
        """Tokens of a shared row, about."""
        return max(longest, min(self.row_tokens or SHORTEST_ROW, self.tokens_per_pass))

    def _fits(self, samples: Sequence[Sample]) -> bool:
        """Whether the rows of a pass over these samples have no more than `tokens_per_pass`."""
        rows = self._in_order(samples)
        return len(rows) * max(map(_tokens, rows)) <= self.tokens_per_pass

    def _in_order(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """The rows of one pass, one sample after the other as they come.

        So groups lie in it side by side.
        """
        if self.flat:
            return [list(samples)]
        limit = self._usual(max(map(len, samples))) if self.shared_rows else 0
        rows: list[list[Sample]] = []
        for sample in samples:
            if rows and _tokens(rows[-1]) + len(sample) <= limit:
                rows[-1].append(sample)
            else:
                rows.append([sample])
        return rows

    def losses(self, model: nn.Module, batch: Batch, *, aim: Aim, dtype: torch.dtype) -> Distilled:
        """Summed loss of the scored tokens of one forward pass in `dtype`.

        It is weighted as `aim` says.
        """
        with torch.autocast(
            batch.token_ids.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16
        ):
            with showing(model, self.needs) as shown:
                hidden = self._states(model, batch)
        predicting = hidden.flatten(0, 1)[batch.predicting].to(dtype)
        head = split_head(model)
        found = linear_distillation(predicting, head, batch.targets, aim=aim, kernel=self.kernel)
        if (more := batch.more) is not None:
            soft = replace(aim, hard_weight=0.0)
            of_others = linear_distillation(
                predicting[more.at], head, more.targets, aim=soft, kernel=self.kernel
            )
            found = found.plus(of_others, more.at)
        return self.with_features(found, shown, batch.features, aim=aim)

    def _states(self, model: nn.Module, batch: Batch) -> Tensor:
        """[B, T, D] what the output layer is applied to."""
        return hidden_states(model, **batch.inputs)

    def head_weight(self, model: nn.Module) -> Tensor:
        """The weight of the output layer [V, D]: hidden states of other positions never meet it."""
        return split_head(model).weight

    def _batch(self, rows: Sequence[Sequence[Sample]], temperature: float | None) -> Batch:
        width = max(_tokens(row) for row in rows)
        token_ids = torch.zeros(len(rows), width, dtype=torch.long)
        position_ids = torch.zeros_like(token_ids)
        predicting, labels, starts = [], [], []
        for number, row in enumerate(rows):
            # Where each sample begins, where the padding does, and the end of the row.
            edges = np.cumsum([0, *map(len, row), width - _tokens(row)])
            counted = [torch.arange(stop - start) for start, stop in pairwise(edges)]
            position_ids[number] = torch.cat(counted)
            for sample, start in zip(row, edges[:-2], strict=True):
                ids = sample.token_ids.astype(np.int64)
                token_ids[number, start : start + len(sample)] = torch.from_numpy(ids)
                # Row `number` of the flattened [B * T] begins at number * T.
                starts.append(number * width + int(start))
                predicting.append(starts[-1] + torch.from_numpy(self.positions(sample)))
                labels.append(torch.from_numpy(scored_tokens(ids, sample.spans)))
        check_ids(int(token_ids.max()), self.vocab_size, "the text has")
        members = [sample for row in rows for sample in row]
        targets, more = self._targets(labels, members, temperature)
        batch = Batch(
            token_ids=token_ids,
            position_ids=position_ids,
            predicting=torch.cat(predicting),
            targets=targets,
            more=more,
            features=self.targets_of(members, starts),
        )
        if not self.flat:
            return batch
        ends = torch.tensor([0, *accumulate(map(len, members))], dtype=torch.int32)
        return replace(batch, edges=ends, longest=max(map(len, members)))

    def _targets(
        self, labels: Sequence[Tensor], samples: Sequence[Sample], temperature: float | None
    ) -> tuple[TargetBatch, MoreTargets | None]:
        """Targets of one sample after the other, of its first teacher and of others.

        A sample without soft targets has hard ones alone.
        """
        if temperature is None or any(sample.targets is None for sample in samples):
            alone = TargetBatch(labels=torch.cat(list(labels)))
            return fit_vocabulary(alone, self.vocab_size), None
        reading = Reading(
            kept=self.kept, temperature=temperature, unstored=self.unstored_temperature
        )
        first: list[TargetBatch] = []
        others: list[TargetBatch] = []
        positions: list[Tensor] = []
        start = 0
        for sample, hard in zip(samples, labels, strict=True):
            own, *more = self.asked_of(sample)
            first.append(weighed(soft_part(own[0], hard, reading), own[1]))
            others += [weighed(soft_part(said, hard, reading), share) for said, share in more]
            positions += [torch.arange(start, start + len(hard)) for _ in more]
            start += len(hard)
        targets = fit_vocabulary(joined(first), self.vocab_size)
        if not others:
            return targets, None
        further = fit_vocabulary(joined(others), self.vocab_size)
        return targets, MoreTargets(at=torch.cat(positions), targets=further)


def pack(samples: Sequence[Sample], *, rows: int, limit: int) -> list[list[Sample]]:
    """At least so many rows of about the same number of tokens.

    There are more where one would hold more than `limit`.

    Longest sample first, each into the row that holds the least so far: the widest row is at most
    4/3 of what is possible (Graham 1969, LPT rule), and much closer with many short samples. Within
    a row samples keep their order.

    Args:
        samples: None longer than `limit`.
        rows: How many are wished for; one is made at least, and none is empty.
        limit: Tokens of a row at most.
    """
    by_length = sorted(range(len(samples)), key=lambda index: -len(samples[index]))
    for count in range(max(1, min(rows, len(samples))), len(samples) + 1):
        made: list[list[int]] = [[] for _ in range(count)]
        held = [(0, row) for row in range(count)]
        for index in by_length:
            tokens, row = held[0]
            made[row].append(index)
            heapq.heapreplace(held, (tokens + len(samples[index]), row))
        if max(held)[0] <= limit:
            return [[samples[index] for index in sorted(row)] for row in made]
    raise AssertionError("a sample is longer than the limit")


def mixes_packed(model: nn.Module, lengths: Sequence[int] = (5, 7)) -> str | None:
    """Why samples may not be packed into one row of this model.

    It is None where the model keeps them apart where position ids restart.

    transformers cuts attention there; a recurrent layer may carry its state on. The model itself is
    asked, once, on a row with samples of these lengths.
    """
    device = next(model.parameters()).device
    texts = [ids.to(device)[None] for ids in made_up(lengths, split_head(model).vocab_size)]
    counted = [torch.arange(n, device=device)[None] for n in lengths]
    try:
        with evaluating(model), torch.no_grad():
            row = {"input_ids": torch.cat(texts, dim=1), "position_ids": torch.cat(counted, dim=1)}
            together = hidden_states(model, **row).split(list(lengths), dim=1)
            alone = [
                hidden_states(model, input_ids=ids, position_ids=positions)
                for ids, positions in zip(texts, counted, strict=True)
            ]
    except Exception as error:  # a row that a model cannot read, for want of memory or positions
        return f"a row of {sum(lengths)} tokens could not be read ({in_short(error)})"
    apart = all(
        torch.allclose(found, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))
        for found, right in zip(together, alone, strict=True)
    )
    return None if apart else "its architecture mixes packed samples"


def _tokens(row: Sequence[Sample]) -> int:
    return sum(len(sample) for sample in row)
