"""The ranks of one stage: processes that meet at each step.

So they start together, and end together. torchrun's agent could start them from within this
process. It puts each rank into a session of its own, which nobody here knows of: then nothing could
prove that all of them have ended. So they are the runner's own processes, with the environment that
torchrun gives.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from ...stages.recipe.run_folder import standing
from ...stages.workers.ranks import RANK, free_port, on_this_machine
from ...storage.errors import Noticed, StillroomError, Stopped
from .crew import DEATHS, Crew, Worker
from .posts import Post
from .process import LostOthers, StageDied
from .screen import Screen

_LOOKS = 3
"""That it takes to see that a process has ended whose children hold its line open."""
Ended = tuple[Worker, StillroomError]


class RankedCrew(Crew):
    """All ranks of one stage here, heard as one.

    All are ended with the first that dies, and then all are started again.
    """

    def __init__(
        self,
        message: dict[str, Any],
        posts: Sequence[Post],
        *,
        run_dir: Path,
        screen: Screen,
        training: Path,
    ) -> None:
        """`training`: the folder of the training run, whose checkpoints are how far it has come."""
        super().__init__(message, posts, run_dir=run_dir, screen=screen)
        self._training = training
        self._standing = standing(training)
        self._starts_in_vain = 0
        self._suspected: dict[str, Any] = {}

    @override
    def _start(self) -> None:
        """Start all of them, to meet at a port of their own.

        What the dead have left at another port misleads nobody.
        """
        port, self._suspected = free_port(), {}
        self._answers.clear()
        for rank, post in enumerate(self._posts):
            told = on_this_machine(rank, count=len(self._posts), port=port)
            own = replace(post, environment={**post.environment, **told})
            self._begin(own, (), who=f"the process of rank {rank}")

    @override
    def _hear(self, worker: Worker, event: dict[str, Any]) -> None:
        """The first rank tells how far all are; what any of them says is said once."""
        if event["event"] == "hangs":
            self._suspected = event
        elif event["event"] == "say":
            super()._hear(worker, event)
        elif _rank(worker) == 0:
            self._screen.hear(event)

    @override
    def _end(self, worker: Worker) -> None:
        """A rank has answered or died."""
        worker.process.close()
        worker.journal.unlink(missing_ok=True)  # ranks note no rows
        if self._signals or self._failure is not None:
            return
        try:
            answer = worker.process.result()
            if _rank(worker) == 0:  # it has the numbers of all
                self._answers.append(answer)
        except StillroomError as error:
            if error.exit_code in (Stopped.exit_code, Noticed.exit_code):
                self._fail(
                    error
                )  # the others stop at the same place; the first one writes a checkpoint
            else:
                self._after([(worker, error), *self._ended_too()])

    def _ended_too(self) -> list[Ended]:
        """Those that have ended as well by now: what ended first may be heard last."""
        found = []
        for worker in [*self._living]:
            for _ in range(_LOOKS):
                if not worker.process.ended:
                    for event in worker.process.listen(0.01):
                        self._hear(worker, event)
            if worker.process.ended:
                self._living.remove(worker)
                worker.process.close()
                try:
                    worker.process.result()
                except StillroomError as error:
                    found.append((worker, error))
        return found

    def _after(self, ended: Sequence[Ended]) -> None:
        """End those that are left, and start all again.

        None is started again where one has failed by an error of its own, or where nothing helps.
        """
        worker, cause = min(ended, key=lambda one: _weight(one[1]))
        if self._suspected and isinstance(cause, StageDied):
            left = {_rank(worker) for worker in self._living}
            if left.issuperset(self._suspected["ranks"]):  # the others died of waiting for it
                cause = StageDied(f"{self._name}: {self._suspected['text']}.", _KEPT)
        for other in self._living:
            other.process.close()
            other.journal.unlink(missing_ok=True)
        self._living.clear()
        now = standing(self._training)
        self._starts_in_vain = 1 + (self._starts_in_vain if now == self._standing else 0)
        self._standing = now
        if not isinstance(cause, StageDied) or self._starts_in_vain == DEATHS:
            self._fail(cause)
            return
        again = f"all {len(self._posts)} processes start again from the last checkpoint."
        self._say(worker, f"{cause.what} {self._name}: {again}")
        self._start()


_KEPT = "Checkpoints are kept. Run the same command to go on."


def _rank(worker: Worker) -> int:
    return int(worker.post.environment[RANK])


def _weight(error: StillroomError) -> int:
    """An error of its own says more than a death, and that more than that others were lost."""
    return 2 if isinstance(error, LostOthers) else 1 if isinstance(error, StageDied) else 0
