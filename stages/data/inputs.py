"""What the source held, gathered while it is read.

It becomes the inputs record, and takes 36 bytes a row until it is a table.
"""

from array import array
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...storage.keys import KEY_BYTES, KeySet
from ...storage.tables.schema import KEY
from .remarks import Remarks


class Intake:
    """Rows of prompts in the source's order, each key once."""

    def __init__(self, *, sources: bool = False) -> None:
        """`sources`: the table shall say where each row stands."""
        self._seen = KeySet()
        self._keys, self._prompts = bytearray(), bytearray()
        self._windows, self._held_out = array("i"), bytearray()
        self._judging = KeySet()
        self._labelled = bytearray()
        self._sources: list[str] | None = [] if sources else None
        self._turns, self._rows_of_turns = bytearray(), array("q")
        self._last, self._rows_of_last = bytearray(), array("q")
        self.remarks = Remarks()
        """What is to be said of the records."""

    def __len__(self) -> int:
        return len(self._windows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._seen

    def add(
        self,
        key: bytes,
        prompt_key: bytes,
        *,
        windows: int = 1,
        turns: Sequence[bytes] = (),
        held_out: bool = False,
        labelled: bool = True,
        source: str = "",
    ) -> None:
        """Take a row.

        Args:
            key: The row's.
            prompt_key: Its prompt's.
            windows: Generations rows that given text became, 1 where it is generated.
            turns: Of a conversation, hashes up to each turn that is scored.
            held_out: Whether the recipe names it as one that judges; these come first.
            labelled: False: a text to classify that has no label.
            source: Where it stands.
        """
        if key not in self._seen:
            self._seen.update(key)
            for turn in turns:
                self._turns += turn
                self._rows_of_turns.append(len(self))
            if turns:
                self._last += turns[-1]
                self._rows_of_last.append(len(self))
            self._keys += key
            self._prompts += prompt_key
            self._windows.append(windows)
            self._held_out.append(held_out)
            self._labelled.append(labelled)
            if self._sources is not None:
                self._sources.append(source)
            if held_out:
                self._judging.update(prompt_key)

    def judges(self, prompt_key: bytes) -> bool:
        """Whether a row that was named as held out has this prompt.

        Then the prompt leaves the training set, and is counted.
        """
        found = prompt_key in self._judging
        self.remarks.in_both += found
        return found

    @property
    def held_out(self) -> int:
        """How many rows the recipe names as held out."""
        return sum(self._held_out)

    def prompts(self) -> int:
        """How many different prompts."""
        return len(pc.unique(_column(self._prompts)))

    def table(self, holdout: int) -> pa.Table:
        """The inputs table.

        Prompt keys are hashes: the smallest are a random sample that order cannot change. A
        conversation that would train on what a held-out row is judged by is left out.
        """
        prompts = _column(self._prompts).dictionary_encode()
        numbers = prompts.indices.to_numpy()  # counted up as prompts first appear
        held_out = np.zeros(len(prompts.dictionary), bool)
        if holdout:
            smallest = pc.select_k_unstable(
                prompts.dictionary, k=holdout, sort_keys=[("", "ascending")]
            )
            held_out[smallest.to_numpy()] = True
        # All rows of a prompt are on one side.
        test = held_out[numbers] | np.frombuffer(self._held_out, bool)
        table = pa.table(
            {
                "key": _column(self._keys),
                "prompt_key": _column(self._prompts),
                "split": pa.DictionaryArray.from_arrays(test.astype(np.int8), ["train", "test"]),
                "windows": pa.array(np.frombuffer(self._windows, np.int32)),
            }
        )
        if self._sources is not None:
            table = table.append_column("source", pa.array(self._sources, pa.string()))
        kept = test | ~self._repeats(test)
        self.remarks.left_out = int((~kept).sum())
        first = np.zeros(int(kept.sum()), bool)
        first[np.unique(numbers[kept], return_index=True)[1]] = True
        labelled = np.frombuffer(self._labelled, bool)
        for split, here in (("to train on", kept & ~test), ("held out", test)):
            self.remarks.labels[split] = int(here.sum()), int((here & labelled).sum())
        return table.filter(pa.array(kept)).append_column("first", pa.array(first))

    def labels(self) -> int:
        """How many of the rows to train on have a label, once the table is made."""
        return self.remarks.labels["to train on"][1]

    def _repeats(self, test: np.ndarray) -> np.ndarray:
        """[rows] bool: a scored turn is, with all before it, what a held-out row ends with."""
        answers = _column(self._last).filter(pa.array(test[_numbers(self._rows_of_last)]))
        found = pc.is_in(_column(self._turns), value_set=answers).to_numpy(zero_copy_only=False)
        repeats = np.zeros(len(self), bool)
        repeats[_numbers(self._rows_of_turns)[found]] = True
        return repeats


def _numbers(rows: "array[int]") -> np.ndarray:
    return np.array(rows, np.int64)


def _column(keys: bytearray) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(
        KEY, len(keys) // KEY_BYTES, [None, pa.py_buffer(bytes(keys))]
    )
