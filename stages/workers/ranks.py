"""The ranks of a stage: processes that do one piece of work together.

Here is also what they tell one another. Who is who stands in the environment, by the names that
torchrun sets and that `run` sets too. One process alone is a rank as well: then nothing is sent,
and torch.distributed is not opened.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ...storage.errors import NotTogether, StillroomError, in_short
from .watch import Lost, Suspicion, Watch, threads

if TYPE_CHECKING:
    import torch

RANK, COUNT, LOCAL = "RANK", "WORLD_SIZE", "LOCAL_RANK"
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""How often torchrun has started its ranks again."""
KEPT_BY_LAUNCHER = "TORCHELASTIC_USE_AGENT_STORE"
"""Set where torchrun keeps the store in which ranks meet; else the first rank does."""
WAIT_SECONDS = 600.0
"""What one rank waits for another before it says that the other hangs."""
WAIT = "STILLROOM_RANK_SECONDS"
"""Another number of seconds for that."""
_LOOK_SECONDS = 0.2
_SPEAK_SECONDS = 5.0
_FAILED = "failed"
"""The paper that says why a rank has ended in work that others wait for."""

T = TypeVar("T")


def on_this_machine(rank: int, *, count: int, port: int) -> dict[str, str]:
    """What tells one of several ranks of this machine alone who it is, and where they meet."""
    told = {RANK: str(rank), COUNT: str(count), LOCAL: str(rank)}
    told |= {ADDRESS: "127.0.0.1", PORT: str(port)}
    # gloo asks nobody who connects; these ranks need to be reached by one another alone.
    return told | {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}


def of_nobody(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a launcher says: for a process that is a rank of nothing."""
    names = (RANK, COUNT, LOCAL, ADDRESS, PORT, ATTEMPT, KEPT_BY_LAUNCHER)
    return {name: value for name, value in environment.items() if name not in names}


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@dataclass(kw_only=True, slots=True)
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

    _store: Any = field(default=None, repr=False, compare=False)
    _watch: Watch | None = field(default=None, repr=False, compare=False)
    _asked: Any = field(default=None, repr=False, compare=False)
    """The store by another connection: a question there may wait for its answer."""
    _papers: int = field(default=0, repr=False, compare=False)
    _meetings: int = field(default=0, repr=False, compare=False)

    def open(
        self, *, seconds: float | None = None, suspect: Callable[[Suspicion], None] | None = None
    ) -> None:
        """Meet the others; each collective afterwards waits so long at most.

        `suspect` is told who keeps the others waiting, shortly before they wait no more.
        """
        if self.count == 1:
            return
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        seconds = seconds or float(os.environ.get(WAIT, WAIT_SECONDS))
        before = threads()
        # Addresses of ranks that died stay in torchrun's store: each attempt has names of its own.
        store, _, _ = next(rendezvous("env://", timeout=timedelta(days=7)))
        self._store = PrefixStore(f"attempt-{os.environ.get(ATTEMPT, 0)}", store)
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(self.local % gpus)
        self._asked = self._store.clone()
        self._watch = Watch(self._store.clone(), rank=self.rank, count=self.count, seconds=seconds)
        self._watch.begin(suspect, keeper=None if os.environ.get(KEPT_BY_LAUNCHER) else 0)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=self._store,
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(seconds=seconds),
        )
        self._watch.serve = threads() - before

    def close(self) -> None:
        """Part from the others, where all has gone well."""
        if self.count > 1:
            from torch import distributed

            self.most(0)  # the store may end with this process, and another one may still read it
            if self._watch is not None:
                self._watch.end()
            distributed.destroy_process_group()

    def lost(self, error: Exception) -> str | None:
        """What to say of an error that only means that another rank is gone or hangs.

        It is None where the error means something else.
        """
        if self.count == 1:
            return None
        if isinstance(error, Lost):
            return str(error)
        from torch.distributed import DistError

        if not isinstance(error, DistError) and "gloo/" not in str(error):
            return None
        if self._watch is not None and self._watch.suspicion is not None:
            return self._watch.suspicion.text
        return f"rank {self.rank} of {self.count} lost the others ({in_short(error)})"

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum over all ranks, in place."""
        if self.count > 1:
            from torch import distributed

            self.come()
            distributed.all_reduce(tensor)
        return tensor

    def most(self, number: int) -> int:
        """The largest that a rank has."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        self.come()
        largest = torch.tensor([number])  # on the CPU: it waits for no kernel
        distributed.all_reduce(largest, distributed.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return self.most(int(flag)) > 0

    def all(self, what: Any) -> list[Any]:
        """What each rank has, by its number."""
        if self.count == 1:
            return [what]
        from torch import distributed

        self.come()
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, what)
        return found

    def told(self, what: Any) -> Any:
        """What the first rank has."""
        if self.count == 1:
            return what
        from torch import distributed

        self.come()
        told = [what]
        distributed.broadcast_object_list(told, src=0)
        return told[0]

    def told_in_time(self, what: Any = None) -> Any:
        """What the first rank has, as JSON, however long it works to make it.

        Nobody waits in a collective.

        Raises:
            Lost: the first rank hangs, or has failed.
        """
        if self._store is None:
            return what
        self._papers += 1
        name = f"paper-{self._papers}"
        if self.first:
            self._store.set(name, json.dumps(what))
            return what
        told = json.loads(self._patiently(lambda store: self._paper(store, name)))
        self._store.add(f"{name}-read", 1)
        return told

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives each rank, by its number, however long it takes some of them.

        Where it raises a StillroomError on one, all raise it once all have come. Where it raises
        anything else, all that listen then raise Lost; another finds that it lost the others.
        """
        found, failed = None, None
        with self._by_itself():
            try:
                found = work()
            except StillroomError as error:
                failed = error
        self.meet()
        parts = self.all((found, failed))
        for told in (failed, *(of_rank for _, of_rank in parts)):
            if told is not None:
                raise told
        return [part for part, _ in parts]

    def by_first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives the first rank, as JSON.

        The others do none of it and wait however long it takes. Where it raises a StillroomError,
        all that listen then raise one; another finds that it lost the others.
        """
        found = None
        if self.first:
            with self._by_itself():
                found = work()
        return self.told_in_time(found)

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` gives this rank, where those of a machine do it one after another.

        Machines work side by side, and the ranks wait until all have done it. Where it raises a
        StillroomError on one, no other of its machine begins, and all that listen then raise one;
        another finds that it lost the others.
        """
        if self.count == 1:
            return work()
        self.meet()
        machines = self.all(socket.gethostname())
        here = [rank for rank in range(self.count) if machines[rank] == machines[self.rank]]
        turn = here.index(self.rank)
        self._meetings += 1
        name = f"turn-{self._meetings}"
        if turn:
            self._patiently(lambda store: self._paper(store, f"{name}-{here[turn - 1]}"))
        with self._by_itself():
            found = work()
        self._store.set(f"{name}-{self.rank}", "done")
        self.meet()
        return found

    def meet(self) -> None:
        """Wait until all have come here, however long they work before."""
        if self.count == 1:
            return
        self._meetings += 1
        name = f"meeting-{self._meetings}"

        def come(store: Any) -> None:
            if store.add(name, 1) == self.count:
                store.set(f"{name}-all", "come")
            self._paper(store, f"{name}-all")

        self._patiently(come)

    def _patiently(self, ask: Callable[[Any], T]) -> T:
        """What `ask` gives of the store; it may wait there for others, who are watched."""
        assert self._watch is not None
        return self._watch.until(lambda: ask(self._asked))

    def _paper(self, store: Any, name: str) -> bytes:
        """What is written under a name, once it is; or what a rank has failed with, raised."""
        pause = 0.001  # most are there soon; and a wait of torch's own logs that it ended
        while not store.check([name]):
            if store.check([_FAILED]):
                raise self._failure(json.loads(store.get(_FAILED)))
            time.sleep(pause)
            pause = min(2 * pause, _LOOK_SECONDS)
        found: bytes = store.get(name)
        return found

    def _failure(self, told: Mapping[str, Any]) -> Exception:
        self._store.add(f"{_FAILED}-read", 1)
        if self.first:
            self._until_read(_FAILED)
        if not told["own"]:
            return Lost(f"rank {told['rank']} of {self.count} has failed ({told['said']})")
        error = NotTogether(told["said"]) if told["alone"] else StillroomError(told["said"])
        error.exit_code = told["exit_code"]
        return error

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        """Work for which others wait as long as it takes; they are told where it fails."""
        if self._watch is None:
            yield
            return
        with self._watch.does("works"):
            try:
                yield
            except Exception as error:
                own = isinstance(error, StillroomError)
                told = {
                    "rank": self.rank,
                    "own": own,
                    "said": str(error) if own else in_short(error),
                    "alone": isinstance(error, NotTogether),
                    "exit_code": getattr(error, "exit_code", 1),
                }
                with suppress(RuntimeError):  # the store is gone with the process that kept it
                    self._store.compare_set(_FAILED, "", json.dumps(told))
                    if own:
                        self._until_read(_FAILED)
                raise

    def heard(self) -> None:
        """Wait a little until all have read what was told last.

        The store may end with this process.
        """
        self._until_read(f"paper-{self._papers}")

    def _until_read(self, name: str) -> None:
        deadline = time.monotonic() + _SPEAK_SECONDS
        while self._store is not None and time.monotonic() < deadline:
            if self._store.add(f"{name}-read", 0) == self.count - 1:
                return
            time.sleep(_LOOK_SECONDS)

    def speaks(self) -> bool:
        """Whether this is the first of the ranks that has something to say of why all end."""
        if (store := self._store) is None:
            return True
        found: list[bytes] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone with the process that kept it
                found.append(store.compare_set("speaks", "", str(self.rank)))

        asking = threading.Thread(target=ask, daemon=True)  # it has no end where the store hangs
        asking.start()
        asking.join(_SPEAK_SECONDS)
        return not found or found[0] == str(self.rank).encode()

    def come(self) -> None:
        """Say that this rank is at a meeting: before each collective, or it looks like a hang."""
        if self._watch is not None:
            self._watch.come(further=True)

    def part(self, things: int) -> range:
        """This rank's numbers of so many things, dealt out one after the other."""
        return range(self.rank, things, self.count)
