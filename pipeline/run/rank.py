"""One rank of stage two where a launcher has started the ranks: `train` under torchrun or srun.

The first rank plans, as `run` does, and tells the others what each stage is told. Then all do it.
"""

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TextIO, cast

from typing_extensions import override

from ...stages.models.students.factory_file import refuse_code
from ...stages.recipe.run_folder import SETTINGS
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import needed, stage_named
from ...stages.train.scalars import refuse_without_wandb
from ...stages.workers.clock import Clock
from ...stages.workers.job import StopFlag
from ...stages.workers.ranks import ADDRESS, COUNT, LOCAL, PORT, RANK, Ranks
from ...storage.errors import StillroomError, UsageError
from ...storage.store.stopping import stop_signals, stopped_by
from ...storage.words import counted
from ..plan.lines import Plan
from .jobs import stage_message
from .progress import ToldProgress
from .runner import Here, first_plan, logs_of, prepare, run_stages
from .screen import Screen
from .worker import answer_of, do, failed, job_of, meet

SLURM = {RANK: "SLURM_PROCID", COUNT: "SLURM_NTASKS", LOCAL: "SLURM_LOCALID"}
IN_A_STEP = "SLURM_STEP_ID"
"""Set by srun; the script of a job has the others too, and is no rank."""
_ECHO_SECONDS = 2.0
"""A launcher passes on a signal that the rank has had itself: that is no second one."""
NODES, JOB = "SLURM_JOB_NODELIST", "SLURM_JOB_ID"


class SaidElsewhere(StillroomError):
    """Another rank has said why all end."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def launched(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Who this rank is and where the ranks meet, by torchrun's names.

    It is empty where nobody has launched this process.

    Raises:
        UsageError: a launcher has said a part of it.
    """
    if RANK in environment or COUNT in environment:
        alone = environment.get(COUNT) == "1"
        _refuse_missing(environment, RANK, COUNT, *(() if alone else (LOCAL, ADDRESS, PORT)))
        return {}
    if IN_A_STEP not in environment or environment.get(SLURM[COUNT]) == "1":
        return {}
    needs = {ADDRESS: NODES, PORT: JOB}
    needs = {name: other for name, other in needs.items() if not environment.get(name)}
    _refuse_missing(environment, *SLURM.values(), *needs.values())
    told = {name: environment[theirs] for name, theirs in SLURM.items()}
    told[ADDRESS] = environment.get(ADDRESS) or _first_host(environment[NODES])
    # The same on all ranks, another one for the next job of this machine.
    told[PORT] = environment.get(PORT) or str(20_000 + int(environment[JOB]) % 20_000)
    return told


def _refuse_missing(environment: Mapping[str, str], *names: str) -> None:
    if missing := [name for name in names if not environment.get(name)]:
        set_now = " and ".join(n for n in (RANK, COUNT, IN_A_STEP) if n in environment)
        raise UsageError(
            f"train: the environment of this rank has no {', '.join(missing)}, which its launcher "
            "sets. Start it as `torchrun --nproc-per-node N -m stillroom train RECIPE`, or as "
            f"`srun stillroom train RECIPE`; to train in one process, unset {set_now}."
        )


def _first_host(nodes: str) -> str:
    """Of Slurm's list of nodes, where the first rank is."""
    try:
        asked = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return asked.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UsageError(
            f"train: `scontrol show hostnames {nodes}` does not say which host is the first "
            f"({type(error).__name__}). Set {ADDRESS} to the host of rank 0."
        ) from error


def train(
    recipe: Recipe, *, quiet: bool = False, allow_code: bool = False
) -> dict[str, Any] | None:
    """Be one rank: train the students that are to be trained, and judge them.

    Returns:
        On the first rank what `run` returns; None on the others.

    Raises:
        StillroomError: stage one is not done, or a stage failed.
        SaidElsewhere: another rank has said why all end.
    """
    refuse_code(recipe, allowed=allow_code)
    needed(recipe.student, "student")
    refuse_without_wandb(needed(recipe.train, "train").wandb)
    os.environ.update(launched())
    # A launcher shows what all ranks print: bars of libraries would tear the screen of the first.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    ranks = Ranks.here()
    with _log(recipe, ranks) as log, Screen(sys.stderr, quiet=quiet or not ranks.first) as screen:
        rank = _Rank(ranks, screen, log)
        try:
            outcome = None
            with lost_in_words(ranks):
                if ranks.first:
                    outcome = rank.lead(recipe)
                else:
                    rank.follow()
        except StillroomError as error:
            if isinstance(error, SaidElsewhere) or ranks.speaks():
                raise
            raise SaidElsewhere(error.exit_code) from error
    ranks.close()
    return outcome


@contextmanager
def lost_in_words(ranks: Ranks) -> Iterator[None]:
    """What only means that another rank is gone or hangs is said as an error of Stillroom's."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        if (lost := ranks.lost(error)) is None:
            raise
        raise StillroomError(f"train: {lost}.") from error


@contextmanager
def _log(recipe: Recipe, ranks: Ranks) -> Iterator[TextIO]:
    """Of one rank, beside those of the others."""
    name = "train.log" if ranks.first else f"train.{ranks.rank + 1}.log"
    with _Log(logs_of(recipe) / name) as log:
        yield cast(TextIO, log)


class _Log(io.TextIOBase):
    """A file that is there from its first line on: a training that is refused leaves none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    @override
    def write(self, text: str) -> int:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", buffering=1)
        return self._file.write(text)

    @override
    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class _Rank:
    """What this process does, and what it tells the others."""

    def __init__(self, ranks: Ranks, screen: Screen, log: TextIO) -> None:
        self._ranks, self._screen, self._log = ranks, screen, log
        self._at_work = False

    def lead(self, recipe: Recipe) -> dict[str, Any]:
        """Of the first: what `run` does with these stages, and the others are told of each."""
        names = ("train", "evaluate")
        code = StillroomError.exit_code
        try:
            self._meet()
            plan = first_plan(recipe, names, look=_refuse_unfinished)
            prepare(recipe, plan)
            outcome = run_stages(recipe, plan, names, Here(screen=self._screen, work=self._work))
            code = 0
            return outcome
        except StillroomError as error:
            code = error.exit_code
            raise
        finally:
            if not self._at_work:  # else the others have failed with it, or been lost
                self._ranks.told_in_time({"over": code})
                self._ranks.heard()

    def follow(self) -> None:
        """Of any other: the stages that the first one tells of."""
        self._meet()
        while "over" not in (message := self._ranks.told_in_time()):
            self._refuse_unshared(message)
            self._do(message)
        if message["over"]:
            raise SaidElsewhere(message["over"])

    def _meet(self) -> None:
        meet(self._ranks, ToldProgress("train", self._tell, self._log), self._tell)

    def _work(self, recipe: Recipe, plan: Plan, name: str) -> dict[str, Any]:
        message = stage_message(recipe, plan, name) | {"journal": ""}
        self._ranks.told_in_time(message)
        return self._do(message)

    def _do(self, message: dict[str, Any]) -> dict[str, Any]:
        """A stage, here and on all other ranks at the same time."""
        name, clock = message["name"], Clock(began=time.monotonic())
        progress = ToldProgress(name, self._tell, self._log)
        self._at_work = True
        with _stop_flag(agreed=self._ranks.count > 1) as stop:
            try:
                job = job_of(message, progress, stop, clock=clock, ranks=self._ranks)
                answer = answer_of(do(job, name), clock)
            except Exception as error:
                with redirect_stderr(self._log):
                    answer = failed(error, name, self._ranks)
        progress.finish()
        if "error" in answer:
            failure = StillroomError(answer["error"])
            failure.exit_code = answer["exit_code"]
            raise failure
        self._at_work = False
        return answer

    def _refuse_unshared(self, message: dict[str, Any]) -> None:
        arm = stage_named(message["name"]).arm or "student"
        begun = Path(message["train_dirs"][arm]) / SETTINGS
        if not begun.exists():
            raise UsageError(
                f"run.dir: rank {self._ranks.rank} on {socket.gethostname()} does not see {begun}, "
                "which rank 0 has written. Name a folder that all machines share; the store must "
                "be one too."
            )

    def _tell(self, event: dict[str, Any]) -> None:
        if self._ranks.first and event["event"] != "hangs":
            self._screen.hear(event)
            self._screen.tick()


class _StopFlag(StopFlag):
    """Set by the first signal; the next one ends this process at once."""

    _came = 0.0

    def _hear(self, number: int, frame: object) -> None:
        if not self.number:
            self._came = time.monotonic()
        elif time.monotonic() - self._came > _ECHO_SECONDS:
            os._exit(stopped_by(number).exit_code)
        super()._hear(number, frame)


@contextmanager
def _stop_flag(*, agreed: bool) -> Iterator[StopFlag]:
    """Set while a stage is at work; before and after it the command hears the signals itself."""
    before = {number: signal.getsignal(number) for number in stop_signals()}
    stop = _StopFlag(agreed=agreed)
    stop.listen()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse_unfinished(plan: Plan) -> Iterator[str]:
    first = [line for line in plan.stages if stage_named(line.name).table is not None]
    if left := [line for line in first if line.state != "done"]:
        said = ", ".join(
            f"{line.name} has {line.pending:,} of {counted(line.planned, 'row')} to do"
            if line.state == "to do"
            else f"{line.name} waits for them"
            for line in left
        )
        raise UsageError(
            f"train: stage one is not done: {said}. Run `stillroom run RECIPE --until "
            f"{stage_named(first[-1].name).room}` first."
        )
    yield from ()
