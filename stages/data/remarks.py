"""What is to be said of the records once all are read.

It names those that were rejected or left out, or that lack something.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from ...storage.errors import RowError
from ...storage.words import counted
from .formats import NOT_READ


class Remarks:
    """Counts of records, and sentences about them."""

    def __init__(self) -> None:
        self.rejected: Counter[str] = Counter()
        """Reason -> records that cannot be used."""
        self.in_both = 0
        """Records that are not trained on, because their prompts are held out."""
        self.left_out = 0
        """Conversations that are not trained on, because a turn answers a held-out prompt."""
        self.labels: dict[str, tuple[int, int]] = {}
        """A split in words -> its rows, and how many have a label."""
        self.columns: tuple[str, ...] = ()
        """Of the first record that can be read."""
        self._first_rejected: dict[str, str] = {}
        self._unread: Counter[str] = Counter()
        self._had: set[str] = set()

    def see(self, record: dict[str, Any] | str, named: Collection[str]) -> None:
        """Note which of the columns that the recipe names a record has."""
        if isinstance(record, dict):
            self.columns = self.columns or tuple(record)
            self._had.update(name for name in named if name in record)

    def absent(self, named: Collection[str]) -> list[str]:
        """The columns of these that no record had."""
        return [name for name in named if name not in self._had]

    def reject(self, where: str, error: RowError) -> None:
        """Count a record that cannot be used."""
        self.rejected[error.reason] += 1
        self._first_rejected.setdefault(error.reason, f"{where}: {error}")

    def why_rejected(self) -> str:
        """Of each reason, the number of records and the first one."""
        return "; ".join(
            f"{count:,} rejected: {reason}, the first at {self._first_rejected[reason]}"
            for reason, count in self.rejected.most_common()
        )

    def count_unread(self, columns: Sequence[str]) -> None:
        """Count the columns of a record that a template could use, and that no format has."""
        self._unread.update(columns)

    def notes(self) -> list[str]:
        """What is to be said of all records once the table is made, a sentence each."""
        said = [
            f"{counted(count, 'record has', 'records have')} a column {name!r}, which nothing "
            f"reads. {NOT_READ[name]}"
            for name, count in sorted(self._unread.items())
        ]
        if self.in_both:
            said.append(
                f"records left out of training: {self.in_both:,}. Their prompts are held out too"
            )
        if lacking := [
            f"{n - has:,} of {n:,} {split}" for split, (n, has) in self.labels.items() if has < n
        ]:
            said.append(
                f"texts without a label: {' and '.join(lacking)}. They teach what the teacher says "
                "of them, and judge how close a student comes to it, nothing else"
            )
        if self.left_out:
            said.append(
                f"conversations left out of training: {self.left_out:,}. One of their turns is "
                "the answer of a held-out record. To train on them, give each conversation "
                "once, whole, not again for each of its turns; or set data.turns: last"
            )
        return said
