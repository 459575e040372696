"""The steps of a validation, dealt out to the ranks."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from ...loader.samples import Sample, Step
from ...workers.ranks import Ranks


class Dealt:
    """Each step is dealt out whole, to one rank.

    So steps, and the groups that follow from them, are those of one rank alone.
    """

    def __init__(
        self,
        steps: Iterable[Step],
        ranks: Ranks,
        *,
        counts: Callable[[Sequence[Sample]], np.ndarray],
    ) -> None:
        """`counts`: terms of each part that is matched, of some samples."""
        self._steps, self._ranks, self._counts = steps, ranks, counts
        self.terms = counts([])
        """Of all steps, as the next three; complete once `mine` has ended."""
        self.number = 0
        self.scored = 0
        self.longest = 0
        self._spare: Sample | None = None

    def mine(self) -> Iterator[Step]:
        """Those of this rank."""
        for step in self._steps:
            self.terms = self.terms + self._counts(step.samples)
            self.scored += step.scored_tokens
            self.longest = max(self.longest, step.longest)
            if self._spare is None:
                self._spare = min(step.samples, key=len)
            self.number += 1
            if (self.number - 1) % self._ranks.count == self._ranks.rank:
                yield step

    @property
    def spare(self) -> Sample:
        """A short one, for a rank that has nothing of its own left."""
        assert self._spare is not None
        return self._spare
