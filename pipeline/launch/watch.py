"""How far a run is that others do, shown on the run's screen.

It goes by what stands in the store and the run's folder.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict

from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ..plan.lines import Plan, StagePlan
from ..plan.plan import plan_again
from ..run.progress import Meter
from ..run.screen import Screen

LOOK_SECONDS = 5.0
LOOK_SHARE = 20
"""So many times as long as a look takes lie between two: a twentieth of the time at most."""


class Watch:
    """Looks again and again while others work."""

    def __init__(self, recipe: Recipe, plan: Plan, screen: Screen, names: Sequence[str]) -> None:
        """`names`: the lines of the plan that are to be done."""
        self._recipe, self._screen, self._names = recipe, screen, names
        self.plan = plan
        self._next = time.monotonic() + LOOK_SECONDS
        self._line = ""
        self._began = time.monotonic()
        self._first = plan.stages[0]
        self._show(1)

    @property
    def rows(self) -> int:
        """Committed and rejected, in all tables; grows while anybody gets on."""
        return sum(line.committed + line.rejected for line in self.plan.stages)

    def look(self, workers: int, *, now: bool = False) -> None:
        """Draw; where it is time, after a look into the store. `workers`: that are at work."""
        self._screen.tick()
        if not now and time.monotonic() < self._next:
            return
        began = time.monotonic()
        self.plan = plan_again(self._recipe, self.plan, self.plan.stages[0].name)
        spent = time.monotonic() - began
        self._next = time.monotonic() + max(LOOK_SECONDS, LOOK_SHARE * spent)
        self._show(workers)

    def _show(self, workers: int) -> None:
        to_do = [line for line in self.plan.stages if line.name in self._names]
        self._screen.plan(self.plan.stages, chosen=self._names, expected={})
        current = next((line for line in to_do if line.state != "done"), None)
        name = current.name if current is not None else ""
        if name != self._line:
            if self._line and self.plan.line(self._line).state == "done":
                self._screen.end(self._line, seconds=time.monotonic() - self._began)
            self._line, self._began = name, time.monotonic()
            if current is not None:
                self._first = current
                self._screen.begin(name)
        if current is not None:
            meter = self._meter(current, workers)
            self._screen.hear({"event": "at", "meter": asdict(meter)})

    def _meter(self, line: StagePlan, workers: int) -> Meter:
        """Of a stage that fills no table nothing is known but that it is not done."""
        if stage_named(line.name).table is None:
            return Meter(unit="done", total=1)
        return Meter(
            total=line.planned,
            first=self._first.committed + self._first.rejected,
            done=line.committed + line.rejected,
            workers=workers,
            tokens=max(0, line.tokens - self._first.tokens),
            seconds=time.monotonic() - self._began,
            rejects=max(0, line.rejected - self._first.rejected),
        )
