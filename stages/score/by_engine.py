"""Soft targets of text that an engine reads.

What it says of each position is made into what is kept.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..engines.base import Said, Text
from ..engines.opening import open_reader
from ..ledger.requests import TargetRequest
from ..models.identity import Identity
from ..recipe.kinds import VLLM
from ..targets.alignment import predicting_positions, scored_tokens
from ..targets.bounded import Best, Bounded, bounded_targets
from ..targets.draws import Span
from ..targets.entries_and_tail import Collected
from ..targets.features.capture import Projections
from ..targets.spec import Kept
from ..workers.job import Job
from .scorer import Batch, Neighbours, Read, target_seed


class _Together:
    """An engine keeps rows apart itself."""

    apart = ""

    def may_share(self, lengths: Iterable[int]) -> bool:
        """Whatever they are."""
        return True


class Teacher:
    """A causal language model in an engine; see `scorer.Teacher`."""

    def __init__(self, job: Job, identity: Identity, *, longest: int) -> None:
        self.device, self.model = torch.device("cpu"), None
        self.company: Neighbours = _Together()
        self.projections: Projections = {}
        self._job, self._vocab_size = job, identity.vocab_size
        given = job.score.engine_args
        self._reader = open_reader(VLLM, identity, given, longest=longest, clock=job.clock)

    def begin(self, batch: Batch) -> Callable[[], list[Read]]:
        """Begin to ask for the best entries, where these are all that is kept.

        Every id is asked for where draws, temperatures or all are kept.
        """
        kept = batch[0].kept
        every = _needs_every(kept, self._vocab_size)
        rows: list[_EveryId | _BestEntries] = [
            _EveryId(request, target_seed(self._job, request), self._vocab_size)
            if every
            else _BestEntries(request, self._vocab_size)
            for request in batch
        ]
        texts = [
            Text(number, r.token_ids.tolist(), predicting_positions(r.spans))
            for number, r in enumerate(batch)
        ]
        entries = None if every else kept.k
        for said in self._reader.read(texts, entries, self._job.stop.check):
            rows[said.number].add(said)
        found = [row.targets() for row in rows]
        return lambda: [Read(one.targets, {}, {}, {}, one.tail_bound) for one in found]


def _needs_every(kept: Kept, vocab_size: int) -> bool:
    """Whether every id is asked for.

    From half of all ids on, the others are not spared either: so their tail is exact.
    """
    some = kept.structure.has_tail and not kept.temperatures
    return not some or 2 * kept.k >= vocab_size


class _EveryId:
    """A row of which the whole distribution is said, some positions at a time: exact."""

    def __init__(self, request: TargetRequest, seed: int, vocab_size: int) -> None:
        self._following = scored_tokens(request.token_ids, request.spans).astype(np.int64)
        self._collected = Collected(request.kept, Span(request.span_tokens, seed))
        self._vocab_size, self._done = vocab_size, 0

    def add(self, said: Said) -> None:
        """The next positions."""
        n, width = said.ids.shape
        if width != self._vocab_size:
            raise ValueError(f"{width} ids at a position, the teacher has {self._vocab_size}")
        logprobs = torch.full((n, width), torch.nan)
        logprobs.scatter_(1, torch.from_numpy(said.ids).long(), torch.from_numpy(said.logprobs))
        here = slice(self._done, self._done + n)
        self._collected.add(logprobs, torch.from_numpy(self._following[here]))
        self._done = here.stop

    def targets(self) -> Bounded:
        """The targets of all positions."""
        return Bounded(self._collected.targets(), None)


class _BestEntries:
    """A row of which the best entries are said, all positions at once.

    So its tails are within bounds.
    """

    def __init__(self, request: TargetRequest, vocab_size: int) -> None:
        self._request, self._vocab_size = request, vocab_size

    def add(self, said: Said) -> None:
        """All positions."""
        following = scored_tokens(self._request.token_ids, self._request.spans)
        best = Best(said.ids, said.logprobs, following, said.token_logprob)
        self._found = bounded_targets(best, self._request.kept, self._vocab_size)

    def targets(self) -> Bounded:
        """The targets of all positions."""
        return self._found
