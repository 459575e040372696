"""A snapshot as a torch `IterableDataset` of global batches.

Ranks and workers share the batches, and reading can go on at any of them.

Global batch n is samples [n * B, (n + 1) * B) of the snapshot's order, through all epochs without a
seam or an end. Rank r of R takes the r-th of its R equal parts; worker w of W makes the batches n
with (n - first) % W = w, which is the order in which a `DataLoader` asks its workers. So what a
global batch holds depends on neither. A row group is decoded by every worker that wants a row of
it: workers spread collating, not decoding; 0 or 1 is most often best.

State is a function of how many global batches were consumed, which the training loop knows (its
step number times its accumulation): `state_at(n)`. Nothing has to travel from the workers, and what
they prefetched plays no part.

    dataset = SnapshotDataset(samples, global_batch=64, collate=Collator(packing))
    dataset.load_state_dict(dataset.state_at(n))  # to go on after n batches
    for inputs in DataLoader(dataset, batch_size=None, num_workers=1):
        ...
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import fields, replace
from itertools import count
from typing import Any

from torch import Tensor, distributed
from torch.utils.data import IterableDataset, get_worker_info

from ...storage.errors import UsageError
from ..targets.batch import TargetBatch
from .packing import Batch, Packing
from .samples import Sample, Samples


class SnapshotDataset(IterableDataset[Any]):
    """This rank's part of every global batch, collated; without end."""

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch: int,
        collate: Callable[[list[Sample]], Any] = list,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        """Begin with global batch 0.

        Args:
            samples: The samples and their order.
            global_batch: B, samples of a batch over all ranks.
            collate: Makes what is yielded of the samples of one rank's part.
            rank: None: as torch.distributed has it, 0 where it is not initialised.
            world_size: As `rank`; 1 where torch.distributed is not initialised.
        """
        together = distributed.is_available() and distributed.is_initialized()
        self._rank = rank if rank is not None else distributed.get_rank() if together else 0
        self._ranks = (
            world_size
            if world_size is not None
            else distributed.get_world_size()
            if together
            else 1
        )
        if not 0 <= self._rank < self._ranks or global_batch < 1 or global_batch % self._ranks:
            raise UsageError(
                f"global_batch: {global_batch} samples cannot be shared equally by {self._ranks} "
                f"ranks (rank {self._rank}). Choose a multiple of the number of ranks, and a rank "
                "below it."
            )
        self._samples, self._global_batch, self._collate = samples, global_batch, collate
        self._batches = 0
        self._iterated = False

    def __iter__(self) -> Iterator[Any]:
        """Batches from the state on.

        Without workers the state goes along with what is handed out.
        """
        self._iterated = True
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part = self._global_batch // self._ranks
        starts = count(
            (self._batches + first) * self._global_batch + self._rank * part,
            step * self._global_batch,
        )
        with closing(
            self._samples.batches(range(start, start + part) for start in starts)
        ) as batches:
            for samples in batches:
                self._batches += step
                yield self._collate(samples)

    def state_at(self, batches: int) -> dict[str, Any]:
        """The state after `batches` global batches, on any number of ranks and workers."""
        samples = batches * self._global_batch
        return {
            "snapshot": self._samples.snapshot.id,
            "seed": self._samples.seed,
            "epoch": samples // len(self._samples),
            "samples": samples,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state after what this object handed out itself: without workers only.

        Everywhere else use `state_at`.
        """
        if get_worker_info() is not None or not self._iterated:
            raise UsageError(
                "SnapshotDataset.state_dict: this object handed nothing out itself, or it is a "
                "worker's, which does not know what was consumed. Take `state_at(batches)` of "
                "the dataset in the training process, with the number of global batches consumed "
                "there."
            )
        return self.state_at(self._batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what `state` had consumed, before iterating.

        Raises:
            UsageError: it is the state of another order, or lies within a global batch of this
                size.
        """
        batches, rest = divmod(state["samples"], self._global_batch)
        expected = self.state_at(batches)
        if rest or any(state[name] != expected[name] for name in ("snapshot", "seed")):
            raise UsageError(
                f"SnapshotDataset: the state is {dict(state)}, expected snapshot "
                f"{expected['snapshot']}, seed {expected['seed']} and a multiple of "
                f"{self._global_batch} samples. Resume with the snapshot, seed and global_batch "
                "of the run that was stopped."
            )
        self._batches = batches


class Collator:
    """Samples as one forward pass, in a dict of tensors.

    This is what `transformers.Trainer` and its like hand to a loss.

    Keys are `input_ids` and `position_ids` [B, T], `predicting` and `labels` [N]. Where there are
    targets, `target_ids`, `target_logprobs` [N, K] and `target_tail_logprob` [N] come too, or
    sampled `target_ids`, `target_probabilities` [N, K] and `target_entropy` [N]. `batch_of` is the
    way back.
    """

    def __init__(self, packing: Packing, *, temperature: float = 1.0) -> None:
        """Targets at the objective's `temperature`.

        `packing.tokens_per_pass` is not looked at: the pass is as large as its samples.
        """
        self._packing = replace(packing, tokens_per_pass=sys.maxsize)
        self._temperature = temperature

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The pass of these samples."""
        (batch,) = self._packing.batches(samples, self._temperature)
        targets = {
            field.name: getattr(batch.targets, field.name) for field in fields(batch.targets)
        }
        labels = targets.pop("labels")
        found = {
            "input_ids": batch.token_ids,
            "position_ids": batch.position_ids,
            "predicting": batch.predicting,
        }
        soft = {f"target_{name}": tensor for name, tensor in targets.items() if tensor is not None}
        return {**found, "labels": labels, **soft}


def batch_of(inputs: Mapping[str, Tensor]) -> Batch:
    """The batch that `Collator` made a dict of."""
    soft = {
        name.removeprefix("target_"): inputs[name] for name in inputs if name.startswith("target_")
    }
    return Batch(
        token_ids=inputs["input_ids"],
        position_ids=inputs["position_ids"],
        predicting=inputs["predicting"],
        targets=TargetBatch(labels=inputs["labels"], **soft),
    )
