"""What several teachers say of a held-out text.

The student is measured against each by itself, and against all as they are weighed.

A measure against the teachers is the mean of those against each, by the weights that the loss has
at the end of the training: of teachers that have this text, at each token. Each teacher's own
numbers are over the texts that it was asked for, so the cross-entropy beside them is that of its
route.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ...storage.tables.soft_targets import SoftTargets
from ..loader.teachers import TeacherSource, find_rows
from ..targets.teaching import Teaching
from ..workers.job import Job

if TYPE_CHECKING:
    from .metrics import Tally

Measures = dict[str, Tensor]
# Of one distribution, no means: they are the first teacher's.
_OF_ONE = ("confidence", "correct", "there", "best", "accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """What each teacher of a text says of it."""

    targets: Mapping[str, SoftTargets]
    """By the teacher's name; of N positions."""
    shares: np.ndarray
    """[J, N] their weights, whose sum over the teachers is 1."""

    def positions(self, part: slice) -> Self:
        """What they say of some of the positions."""
        some = {name: one.positions(part) for name, one in self.targets.items()}
        return replace(self, targets=some, shares=self.shares[:, part])

    def count(
        self,
        unit: bytes,
        tally: "Tally",
        measured: Callable[[SoftTargets], Measures],
        *,
        outcomes: np.ndarray | None = None,
    ) -> Measures:
        """The measures against all; those against each are added to its own tally.

        Args:
            unit: The text's prompt.
            tally: Of an arm.
            measured: The arm's measures against one teacher's targets.
            outcomes: [N] what is there, as `Measuring.outcomes` has it; None: at every position, or
                nowhere.
        """
        each = {name: measured(one) for name, one in self.targets.items()}
        for name, measures in each.items():
            tally.of_teacher(name).add(unit, measures)
        first = next(iter(each.values()))
        known = slice(None) if outcomes is None else outcomes >= 0
        names = [name for name in first if name not in _OF_ONE]
        means = {name: self._mean([one[name] for one in each.values()], known) for name in names}
        return first | means

    def _mean(self, values: Sequence[Tensor], known: "np.ndarray | slice") -> Tensor:
        """The mean of a measure at all positions, or at those where it is known what is there."""
        shares = self.shares if len(values[0]) == self.shares.shape[1] else self.shares[:, known]
        of_each = torch.as_tensor(shares, device=values[0].device)
        return (of_each * torch.stack([one.double() for one in values])).sum(0)


class HeldOutTeachers:
    """The teachers of held-out rows."""

    def __init__(self, names: Sequence[str], source: TeacherSource, teaching: Teaching) -> None:
        self.names, self._source, self._teaching = names, source, teaching

    @classmethod
    def of(cls, job: Job, store: Store, snapshot: Snapshot) -> Self | None:
        """None: the recipe has one teacher."""
        teaching = Teaching.of(job.recipe)
        if teaching is None or snapshot.table != "soft_targets":
            return None
        name = job.partners.get("test")
        partners = None if name is None else load_snapshot(store, name)
        source = find_rows(store, snapshot, partners, list(job.teachers.values()))
        return cls(list(job.teachers), source, teaching)

    def said(self, row: Mapping[str, Any], own: SoftTargets) -> Said:
        """What the teachers say of a held-out row, whose own targets are normalised."""
        found = self._source.of_text(row["number"], row["token_ids"], row["spans"], own)
        shares = self._teaching.shares(found)
        total = shares.sum(axis=0)
        # Where all of a text's teachers weigh nothing, they are judged alike.
        shares = np.where(total > 0, shares / np.where(total > 0, total, 1), 1 / len(found))
        return Said(targets={self.names[n]: one for n, one in found}, shares=shares)
