"""The ranks of a stage: processes that do one piece of work together, and what they tell one another.

Who is who stands in the environment, by the names that torchrun sets and that `run` sets too. One
process alone is a rank as well: then nothing is sent, and torch.distributed is not opened.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import torch

RANK, COUNT, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started its ranks again."""
WAIT_SECONDS = 600.0
"""What one rank waits for another before it says that the other hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """All ranks of a stage, as one of them sees them."""

    rank: int = 0
    count: int = 1
    local: int = 0
    """Its number among those of this machine: which of the visible GPUs is its own."""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """As the environment of this process says; alone where it says nothing."""
        return cls(
            rank=int(environment.get(RANK, 0)),
            count=int(environment.get(COUNT, 1)),
            local=int(environment.get(LOCAL, 0)),
        )

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and shows how far the work is."""
        return self.rank == 0

    def open(self, *, seconds: float = WAIT_SECONDS) -> None:
        """Meet the others; each collective afterwards waits so long at most."""
        if self.count == 1:
            return
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        # Addresses of ranks that died stay in torchrun's store: each attempt has names of its own.
        store, _, _ = next(rendezvous("env://", timeout=timedelta(days=7)))
        own = PrefixStore(f"attempt-{os.environ.get(ATTEMPT, 0)}", store)
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(self.local % gpus)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=own,
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(seconds=seconds),
        )

    def close(self) -> None:
        """Part from the others."""
        if self.count > 1:
            from torch import distributed

            distributed.destroy_process_group()

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum over all ranks, in place."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.all(flag))

    def all(self, what: Any) -> list[Any]:
        """What each rank has, by its number."""
        if self.count == 1:
            return [what]
        from torch import distributed

        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, what)
        return found

    def told(self, what: Any) -> Any:
        """What the first rank has."""
        if self.count == 1:
            return what
        from torch import distributed

        told = [what]
        distributed.broadcast_object_list(told, src=0)
        return told[0]

    def part(self, things: int) -> range:
        """This rank's numbers of so many things, dealt out one after the other."""
        return range(self.rank, things, self.count)
