"""Rejects of a stage that runs a model.

A row's failure and the machine's must be told apart there.
"""

from typing import TYPE_CHECKING, Any

from ...storage.errors import StillroomError

if TYPE_CHECKING:
    from ...storage.store.writer import ShardWriter


class Rejects:
    """Takes rows that failed in the engine.

    A wrong driver, a broken build or too little memory fails every row, and none of that is the
    rows' fault. So a row that fails in the engine is rejected only where the engine is known to do
    rows; until then it is held back.
    """

    def __init__(self, writer: "ShardWriter", *, proven: bool) -> None:
        """`proven`: whether the store holds rows of this model already."""
        self._writer = writer
        self._proven = proven
        self._held: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Reject a row that failed in the engine, now or as soon as the engine has done another."""
        if self._proven:
            self._writer.add(row)
        else:
            self._held.append(row)

    def engine_works(self) -> None:
        """The engine did a row."""
        self._proven = True
        while self._held:
            self._writer.add(self._held.pop(0))

    def check(self) -> None:
        """See, at the end of the stage, that not every row failed.

        Raises:
            StillroomError: every row failed; none of them is rejected.
        """
        if self._held:
            first = self._held[0]
            raise StillroomError(
                f"{first['stage']}: all {len(self._held)} rows that were tried failed "
                f"({first['reason']}: {first['message']}), and none was ever done here, so none "
                "was rejected. Check model, engine and machine, then run the same command again."
            )
