"""What the stages of a run folder took, the last time that each worked.

It says where the time went, and what to expect.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...stages.recipe.run_folder import LOGS
from ...stages.recipe.stages import STAGES, stage_named
from ...storage.bounds import NOT_AS_WRITTEN, integer, mapping, parsed
from ...storage.errors import StillroomError
from ...storage.files.local import LocalFiles
from ..plan.lines import StagePlan

NAME = "pace.json"


def _measured(entry: dict[str, Any]) -> dict[str, Any]:
    """What was kept of a stage, as it was written."""
    clock = {name: float(seconds) for name, seconds in entry["clock"].items()}
    rows, seconds = integer(entry["rows"]), float(entry["seconds"])
    return {"rows": rows, "seconds": seconds, "clock": {"start": 0.0} | clock}


class Pace:
    """`logs/pace.json` of a run folder: stage -> `{"rows", "seconds", "clock"}`."""

    def __init__(self, run_dir: Path) -> None:
        self._files = LocalFiles(run_dir / LOGS)
        self._kept: dict[str, dict[str, Any]] = {}
        with suppress(FileNotFoundError, *NOT_AS_WRITTEN):  # it foretells, and nothing more
            kept = mapping(parsed(self._files.read(NAME)))
            self._kept = {name: _measured(entry) for name, entry in kept.items()}

    def keep(self, name: str, *, rows: int, clock: dict[str, float]) -> None:
        """A stage was done; `clock` is where the seconds of its process went, by name."""
        self._kept[name] = {"rows": rows, "seconds": round(sum(clock.values()), 3), "clock": clock}
        with suppress(
            StillroomError
        ):  # a full disk: what is not kept is not known later, and nothing more
            self._files.replace(NAME, json.dumps(self._kept, indent=1).encode())

    def clock(self, name: str) -> dict[str, float] | None:
        """Where the seconds of a stage's process went, the last time."""
        found = self._kept.get(name)
        return None if found is None else dict(found["clock"])

    def expected(self, stages: list[StagePlan]) -> dict[str, float | None]:
        """Seconds that each stage with work is likely to take.

        It is None where nothing like it was measured here.
        """
        return {line.name: self._expect(line) for line in stages if line.state != "done"}

    def _expect(self, line: StagePlan) -> float | None:
        # Lines of one room, as the student and its baseline, take the same time for the same work.
        room = stage_named(line.name).room
        alike = [stage.name for stage in STAGES if stage.room == room]
        names = [line.name, *alike]
        found = next((self._kept[name] for name in names if name in self._kept), None)
        if found is None:
            return None
        seconds, start = found["seconds"], found["clock"]["start"]
        # A student's training counts no pending rows, nor does a stage that waits.
        if not line.pending or not found["rows"]:
            return float(seconds)
        seconds_a_row = (seconds - start) / found["rows"]
        return float(start + seconds_a_row * line.pending)
