"""The workers of one stage, side by side.

They are heard as one, replaced where they die, and all ended before the stage is over.
"""

import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ...stages.recipe.stages import file_name
from ...stages.workers.journal import mark_seen, new_journal, read_journal
from ...storage.errors import StillroomError, Stopped
from ...storage.store.stopping import stop_signals, stopped_by
from ...storage.words import counted
from .posts import Post
from .process import GRACE_SECONDS, StageDied, StageProcess
from .progress import Meter, together
from .screen import Screen

DEATHS = 3  # of a worker's processes in a row that finished no row: then it is not this or that row
LOOK_SECONDS = 0.2


@dataclass(eq=False, kw_only=True, slots=True)
class Worker:
    """The process at a post."""

    post: Post
    process: StageProcess
    journal: Path
    in_vain: Sequence[Path]
    """Journals of those at this post that died before it, in a row, without one row done."""
    meter: Meter


class Crew:
    """All that work on one stage here."""

    def __init__(
        self, message: dict[str, Any], posts: Sequence[Post], *, run_dir: Path, screen: Screen
    ) -> None:
        """Take `message`, what each process is told, but for its own log.

        The `screen` shows what they tell.
        """
        self._message, self._posts = message, posts
        self._name: str = message["name"]
        self._run_dir, self._screen = run_dir, screen
        self._living: list[Worker] = []
        self._done: list[Worker] = []
        self._said: set[str] = set()
        self._answers: list[dict[str, Any]] = []
        self._failure: StillroomError | None = None
        self._signals = 0
        self._signal = 0
        self._deadline = float("inf")
        self._ends = ExitStack()
        self.groups: list[int] = []
        """Process groups of all that were started."""

    def finish(self) -> dict[str, Any]:
        """Work until every worker has answered.

        All of their process groups have ended then, whatever happened.

        Raises:
            Stopped: a signal came; also where the stage was done before it could stop, so that no
                other one starts.
            StageDied: the last worker died and no row is to blame.
            StillroomError: a worker failed; the others were asked to commit and leave.
        """
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            with self._ends:
                self._start()
                self._until_all_ended()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        # They were asked to leave and had to be killed: what they had in flight is not to blame.
        _forget(worker.journal for worker in self._living)
        if self._signals:
            raise self._stopped()
        if self._failure is not None:
            raise self._failure
        return _one_answer(self._answers)

    def _start(self) -> None:
        for post in self._posts:
            self._begin(post, ())

    def _begin(self, post: Post, in_vain: Sequence[Path], **more: Any) -> None:
        """A process at a post (why another one: `stages/workers/journal.py`)."""
        journal = new_journal(self._run_dir, file_name(self._name))
        own = {"log": str(post.log), "journal": str(journal), "began": time.monotonic()}
        process = StageProcess(self._message | own | more, post.environment)
        self._ends.callback(process.close)
        self.groups.append(process.group)
        worker = Worker(post=post, process=process, journal=journal, in_vain=in_vain, meter=Meter())
        self._living.append(worker)
        if self._signals:  # it came while the process was being started
            process.interrupt()

    def _until_all_ended(self) -> None:
        while self._living and self._signals < 2 and time.monotonic() < self._deadline:
            self._screen.tick()
            for worker in [*self._living]:
                if worker not in self._living:  # it was ended with another one
                    continue
                for event in worker.process.listen(LOOK_SECONDS / len(self._living)):
                    self._hear(worker, event)
                if worker.process.ended:
                    self._living.remove(worker)
                    self._end(worker)

    def _hear(self, worker: Worker, event: dict[str, Any]) -> None:
        if event["event"] == "at":
            worker.meter = Meter(**event["meter"])
            meters = [one.meter for one in (*self._living, *self._done)]
            self._screen.hear(event | {"meter": asdict(together(meters))})
        elif len(self._posts) == 1 or event["text"] not in self._said:
            self._said.add(event["text"])  # what all of them say is said once
            self._screen.hear(event)

    def _end(self, worker: Worker) -> None:
        """A process has answered or died."""
        worker.process.close()
        if self._signals:
            _forget([worker.journal])  # what it had in flight is not to blame
            self._done.append(worker)  # what it has committed is still shown
            return
        try:
            self._answers.append(worker.process.result())
            self._done.append(worker)
        except StageDied as death:
            self._replace(worker, death)
        except StillroomError as error:
            self._fail(error)

    def _replace(self, worker: Worker, death: StageDied) -> None:
        """Start another process for one that died, if it had rows in flight or worked before.

        Otherwise the others go on alone.
        """
        flight = read_journal(worker.journal)
        worked = bool(flight.rows) and flight.came_back > 0
        in_vain = [*(() if worked else worker.in_vain), worker.journal]
        others = bool(self._living or self._answers)
        hope = bool(flight.rows) or (others and flight.came_back > 0)
        if self._failure is not None or not hope or len(in_vain) == DEATHS:
            # No row is to blame for what died on a machine, or a device, that does no row at all.
            _forget(in_vain if flight.rows else [worker.journal])
            self._give_up(worker, death, others=others)
            return
        mark_seen(worker.journal)
        self._say(
            worker, f"{death.what} {self._name}: starts again. {_suspected(len(flight.rows))}"
        )
        self._begin(worker.post, in_vain)

    def _give_up(self, worker: Worker, death: StageDied, *, others: bool) -> None:
        if others and self._failure is None:
            self._say(worker, f"{death.what} {self._name}: goes on without this worker.")
        else:
            self._fail(death)

    def _say(self, worker: Worker, text: str) -> None:
        _note(worker.post.log, text)
        self._screen.say(text)

    def _fail(self, error: StillroomError) -> None:
        """The first failure is the stage's.

        The others have done nothing wrong and commit what they have.
        """
        if self._failure is None:
            self._failure = error
            self._ask_to_leave()

    def _stopped(self) -> Stopped:
        stopped = stopped_by(self._signal)
        for post in self._posts:  # the terminal may be gone: the logs say it too
            _note(post.log, f"{self._name}: {stopped}")
        return stopped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._signals:
            return  # where a terminal ends, shell and kernel may both say so
        self._signals += 1
        if self._signals == 1:
            self._signal = number
            self._ask_to_leave()

    def _ask_to_leave(self) -> None:
        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        for worker in self._living:
            worker.process.interrupt()


def _one_answer(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all have done together; the clock is that of the one that took longest."""
    longest = max(
        answers, key=lambda answer: sum(answer.get("details", {}).get("clock", {}).values())
    )
    sums = {
        name: sum(answer[name] for answer in answers)
        for name in ("rows", "tokens", "rejected")
        if name in longest
    }
    return longest | sums


def _suspected(rows: int) -> str:
    """What becomes of the rows that were in flight at a death."""
    if not rows:
        return "No row was in flight."
    flew = counted(rows, "row")
    return f"{flew} in flight: tried alone, after all others; what dies alone is rejected."


def _forget(journals: Iterable[Path]) -> None:
    for path in journals:
        path.unlink(missing_ok=True)


def _note(log: Path, text: str) -> None:
    """Write what the runner says of a stage into the stage's log too.

    Where the disk is full, it does not stand there.
    """
    with suppress(OSError), log.open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
