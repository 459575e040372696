"""What the source held, gathered while it is read: the inputs record, 36 bytes a row until it is a table."""

from array import array

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...storage.keys import KEY_BYTES, KeySet
from ...storage.tables.schema import KEY


class Intake:
    """Rows of prompts in the source's order, each key once."""

    def __init__(self) -> None:
        self._seen = KeySet()
        self._keys, self._prompts = bytearray(), bytearray()
        self._windows = array("i")

    def __len__(self) -> int:
        return len(self._windows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._seen

    def add(self, key: bytes, prompt_key: bytes, *, windows: int = 1) -> None:
        """Take a row; `windows`: generations rows that given text became, 1 where it is generated."""
        if key not in self._seen:
            self._seen.update(key)
            self._keys += key
            self._prompts += prompt_key
            self._windows.append(windows)

    def prompts(self) -> int:
        """How many different prompts."""
        return len(pc.unique(_column(self._prompts)))

    def table(self, holdout: int) -> pa.Table:
        """The inputs table.

        Prompt keys are hashes: the smallest are a random sample that order cannot change.
        """
        prompts = _column(self._prompts).dictionary_encode()
        numbers = prompts.indices.to_numpy()  # counted up as prompts first appear
        # So a row is the first of its prompt where the count goes up.
        first = np.diff(np.maximum.accumulate(numbers), prepend=-1) > 0
        held_out = np.zeros(len(prompts.dictionary), bool)
        if holdout:
            smallest = pc.select_k_unstable(
                prompts.dictionary, k=holdout, sort_keys=[("", "ascending")]
            )
            held_out[smallest.to_numpy()] = True
        # All rows of a prompt are on one side.
        split = pa.DictionaryArray.from_arrays(held_out[numbers].astype(np.int8), ["train", "test"])
        return pa.table(
            {
                "key": _column(self._keys),
                "prompt_key": _column(self._prompts),
                "split": split,
                "windows": pa.array(np.frombuffer(self._windows, np.int32)),
                "first": pa.array(first),
            }
        )


def _column(keys: bytearray) -> pa.FixedSizeBinaryArray:
    return pa.FixedSizeBinaryArray.from_buffers(
        KEY, len(keys) // KEY_BYTES, [None, pa.py_buffer(bytes(keys))]
    )
