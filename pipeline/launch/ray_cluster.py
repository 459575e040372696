"""Ray runs a run's jobs as actors of a cluster, one after the other.

Actors that are lost are started again.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from ...storage.errors import StillroomError, Stopped, UsageError
from ...storage.store.stopping import stop_signals
from ...storage.words import counted
from ..run.screen import Screen
from .jobs import Job, Launch, begin, gpus_each, jobs, ranks_asked, workers_asked
from .ray_worker import RayWorker
from .slurm import Asked
from .watch import Watch

LOSSES = 3
"""Of one worker in a row, without a row done by anybody: then it is no accident."""
SLOT_SECONDS = 300.0
"""A worker waits so long for a place on the cluster; then the others go on without it."""
LEAVE_SECONDS = 40.0
"""After they were asked to stop: the thirty that a run takes at most, and what Ray needs."""
_LOOK_SECONDS = 0.5
# Read when Ray is imported. The third binds what is started here to the loopback address.
_NOBODY_ELSE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else it writes ~/.ray/auth_token
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """What of the cluster the jobs take."""

    workers: int
    gpus: int
    """Of each worker."""
    ranks: int
    """GPUs of the training."""
    threads: int
    """Of each worker that has no GPU."""


def launch_on_ray(launch: Launch, asked: Asked, *, quiet: bool) -> dict[str, Any]:
    """Do the jobs on the cluster that RAY_ADDRESS names, or on this machine; `{"run_dir", "jobs"}`.

    Raises:
        UsageError: the cluster has not what a worker needs.
        Stopped: a signal came; the workers have committed and left.
        StillroomError: a job failed.
    """
    todo = jobs(launch, training=("run",))
    names = [name for job in todo for name in job.stages]
    done = []
    with (
        _cluster(launch, asked) as ray,
        Screen(sys.stderr, quiet=quiet) as screen,
        _heard() as signals,
    ):
        there = {job.name for job in todo}
        places = _places(ray, launch, asked, there)
        begin(launch.recipe)
        screen.say(f"ray: {_sizes(places, there)}")
        watch = Watch(launch.recipe, launch.plan, screen, names)
        for job in todo:
            began = time.monotonic()
            lost = _Actors(ray, job, places, watch, screen, signals).finish()
            watch.look(1, now=True)
            spent = round(time.monotonic() - began, 2)
            done.append({"name": job.name, "seconds": spent, "lost": lost})
    return {"run_dir": launch.recipe.run.dir, "jobs": done}


def refuse_ray(*, connects: bool) -> None:
    """What can be told before anything is written.

    Raises:
        UsageError: Ray is to be asked, and not installed.
    """
    if connects and find_spec("ray") is None:
        raise UsageError(
            "launch: Ray is not installed here. Install it: pip install 'stillroom[ray]'"
        )


def described(launch: Launch, asked: Asked) -> list[str]:
    """What would be started; no cluster is asked."""
    address = os.environ.get("RAY_ADDRESS")
    lines = [f"on the Ray cluster at {address}" if address else "on Ray, started on this machine"]
    for job in jobs(launch, training=("run",)):
        lines.append(f"{job.name} ({_size(launch, job, asked)}): stillroom {' '.join(job.words)}")
    return lines


def _size(launch: Launch, job: Job, asked: Asked) -> str:
    """Of a job, as far as it is known before a cluster is asked."""
    if job.name == "workers":
        workers = workers_asked(launch.recipe, asked.workers) or "one for each GPU"
        return f"actors: {workers}, GPUs of each: {gpus_each(launch.recipe, asked.gpus)}"
    if job.name == "train":
        ranks = ranks_asked(launch.recipe, asked.ranks) or "all of a node"
        return f"one actor, GPUs: {0 if asked.gpus == 0 else ranks}"
    return "one actor"


@contextmanager
def _cluster(launch: Launch, asked: Asked) -> Iterator[Any]:
    """Ray, connected; what was started here has ended afterwards."""
    there = "RAY_ADDRESS" in os.environ
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not there:
        os.environ.update({k: v for k, v in _NOBODY_ELSE.items() if k not in os.environ})
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        try:
            if there:
                ray.init(**quiet)
            else:
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, _cpus_needed(launch, asked)),
                    include_dashboard=False,
                    object_store_memory=80 << 20,  # nothing but exit codes goes through it
                    _node_ip_address="127.0.0.1",
                    _temp_dir=scratch,
                    **quiet,
                )
        except Exception as error:  # Ray raises bare ones too
            where = (
                f"the cluster at {os.environ['RAY_ADDRESS']}" if there else "Ray on this machine"
            )
            raise StillroomError(f"launch: cannot connect to {where}: {error}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _cpus_needed(launch: Launch, asked: Asked) -> int:
    return workers_asked(launch.recipe, asked.workers) or 1


def _places(ray: Any, launch: Launch, asked: Asked, there: Collection[str]) -> Places:
    """How the jobs are laid on the cluster.

    `there`: the names of the jobs; nothing is asked of one that is not there.

    Raises:
        UsageError: no node has as many GPUs as one worker, or the training, was asked to have.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = [int(node.get("GPU", 0)) for node in nodes]
    most = max(found, default=0)
    # A number of GPUs is one of each worker's, but 0 says of all jobs that they have none.
    gpus = asked.gpus if "workers" in there or asked.gpus == 0 else None
    on_cpus = gpus == 0 or (gpus is None and not most)
    each = gpus_each(launch.recipe, gpus) if "workers" in there and not on_cpus else 0
    fit = sum(count // each for count in found) if each else 1
    workers = workers_asked(launch.recipe, asked.workers) or max(1, fit)
    trains = "train" in there and not on_cpus
    ranks = (ranks_asked(launch.recipe, asked.ranks) or most) if trains else 0
    for what, count in (("a worker", each), ("the training", ranks)):
        if count > most:
            raise UsageError(
                f"launch: {what} is to have {counted(count, 'GPU')}, and no node of the cluster "
                f"has more than {counted(most, 'GPU')}. Give --gpus and --ranks, or 0 for CPUs."
            )
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    threads = max(1, cpus // workers)
    return Places(workers=workers, gpus=each, ranks=ranks, threads=threads)


def _sizes(places: Places, there: Collection[str]) -> str:
    if "workers" not in there:
        none = "no workers, for there is nothing that they could share"
        if "train" not in there:
            return none
        on = f"on {counted(places.ranks, 'GPU')}" if places.ranks else "on CPUs"
        return f"{none}; the training {on}"
    on = f"{counted(places.gpus, 'GPU')} each" if places.gpus else "on CPUs"
    return f"{counted(places.workers, 'worker')}, {on}"


@contextmanager
def _heard() -> Iterator[list[int]]:
    """The signals that came, instead of what they do otherwise."""
    came: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, hear) for number in stop_signals()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(eq=False, kw_only=True, slots=True)
class _Slot:
    """An actor of a job, and what it does."""

    actor: Any
    there: Any
    """Answered when it has its place."""
    ended: Any
    """Answered with exit code and last words."""
    began: float
    rows: int
    """That all had done when it was started."""
    losses: int


class _Actors:
    """The actors of one job."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        places: Places,
        watch: Watch,
        screen: Screen,
        signals: list[int],
    ) -> None:
        """`signals`: those that have come."""
        self._ray, self._job, self._watch, self._screen = ray, job, watch, screen
        self._signals = signals
        count = places.workers if job.name == "workers" else 1
        gpus = {"prompts": 0, "workers": places.gpus, "train": places.ranks}[job.name]
        self._class = ray.remote(RayWorker).options(
            num_cpus=1, num_gpus=gpus, max_restarts=0, max_concurrency=3
        )
        threads = str(places.threads if job.name == "workers" else places.threads * places.workers)
        # Ray sets it to 1; what this process was told counts for its workers too.
        self._environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
        self._losses = 0
        self._failure: StillroomError | None = None
        self._deadline = float("inf")
        self._slots: list[_Slot] = []
        for _ in range(count):
            self._begin(losses=0)

    def finish(self) -> int:
        """Until every actor has ended; how many were lost.

        Raises:
            Stopped: a signal came.
            StillroomError: a command failed, or nothing of the cluster is left to work on.
        """
        try:
            while self._slots and len(self._signals) < 2 and time.monotonic() < self._deadline:
                self._once()
        finally:
            for slot in self._slots:
                self._ray.kill(slot.actor)
        if self._signals:
            raise Stopped()
        if self._failure is not None:
            raise self._failure
        return self._losses

    def _once(self) -> None:
        waiting = [slot.ended for slot in self._slots]
        ended, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=_LOOK_SECONDS)
        for slot in [slot for slot in self._slots if slot.ended in ended]:
            self._slots.remove(slot)
            self._end(slot)
        if self._signals or self._failure is not None:
            self._ask_to_leave()
            return
        self._give_up_waiting()
        self._watch.look(sum(self._is_there(slot) for slot in self._slots) or 1)

    def _begin(self, *, losses: int) -> None:
        actor = self._class.remote()
        there = actor.there.remote()
        ended = actor.run.remote(self._job.words, str(Path.cwd()), self._environment)
        slot = _Slot(
            actor=actor,
            there=there,
            ended=ended,
            began=time.monotonic(),
            rows=self._watch.rows,
            losses=losses,
        )
        self._slots.append(slot)

    def _is_there(self, slot: _Slot) -> bool:
        found, _ = self._ray.wait([slot.there], timeout=0)
        return bool(found)

    def _end(self, slot: _Slot) -> None:
        """A command has ended, or its actor is gone."""
        errors = self._ray.exceptions
        try:
            code, said = self._ray.get(slot.ended)
        except errors.RayTaskError as error:  # it could not be started
            self._fail(StillroomError(f"{self._job.name}: {error.cause}"))
            return
        except errors.RayError as error:
            # Its process, its node or the way to it: ActorDiedError and ActorUnavailableError mean
            # the same here, for a call that may have run is made again either way.
            self._lose(slot, type(error).__name__)
            return
        self._ray.kill(slot.actor)
        if code == 0:
            self._drop_waiting()
        elif code < 0 or code in (75, 130):  # killed, or told to stop by somebody on its node
            self._lose(slot, f"exit code {code}")
        else:
            failed = StillroomError(
                said.rpartition("error: ")[2] or f"{self._job.name}: ended with {code}"
            )
            failed.exit_code = code
            self._fail(failed)

    def _lose(self, slot: _Slot, why: str) -> None:
        """Take note that a worker's place is lost.

        Another one is sought, unless that goes on and nothing is done.
        """
        self._ray.kill(slot.actor)
        if self._signals or self._failure is not None:  # it was asked to leave
            return
        self._losses += 1
        self._watch.look(1, now=True)
        losses = 1 if self._watch.rows > slot.rows else slot.losses + 1
        if losses < LOSSES:
            self._screen.say(f"{self._job.name}: a worker was lost ({why}); another one is started")
            self._begin(losses=losses)
        elif self._slots:
            self._screen.say(f"{self._job.name}: lost {losses} times in a row: goes on without it")
        else:
            self._fail(_nothing_left(self._job, f"the last worker was lost {losses} times ({why})"))

    def _give_up_waiting(self) -> None:
        """Nobody waits for ever for a place that the cluster may never have again."""
        late = [
            slot
            for slot in self._slots
            if time.monotonic() - slot.began > SLOT_SECONDS and not self._is_there(slot)
        ]
        for slot in late:
            self._slots.remove(slot)
            self._ray.kill(slot.actor)
            self._screen.say(f"{self._job.name}: no place for a worker in {SLOT_SECONDS:.0f} s")
        if late and not self._slots:
            self._fail(_nothing_left(self._job, "the cluster has no place for a worker"))

    def _drop_waiting(self) -> None:
        """One has found all done: who has no place yet would find the same."""
        for slot in [slot for slot in self._slots if not self._is_there(slot)]:
            self._slots.remove(slot)
            self._ray.kill(slot.actor)

    def _fail(self, error: StillroomError) -> None:
        self._failure = self._failure or error

    def _ask_to_leave(self) -> None:
        if self._deadline < float("inf"):
            return
        self._deadline = time.monotonic() + LEAVE_SECONDS
        self._drop_waiting()
        for slot in self._slots:
            slot.actor.stop.remote()


def _nothing_left(job: Job, why: str) -> StillroomError:
    return StillroomError(
        f"{job.name}: {why}. Finished rows are kept; see logs/ in the run's folder. Run the same "
        "command to go on."
    )
