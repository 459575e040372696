"""How large passes may be, after a rank of a sharded student ran out of memory: a file in the run's folder.

The others wait for that rank inside a collective. So it writes the size and
dies, whoever started the ranks starts all of them again, and they go on from the last checkpoint.
"""

import json

from ....storage.bounds import NOT_AS_WRITTEN, integer, mapping, parsed
from ....storage.errors import StillroomError
from ....storage.files.local import LocalFiles
from ...workers.ranks import Ranks

_FILE = "tokens_per_pass.json"
_FIELD = "tokens_per_pass"


class OutOfMemory(StillroomError):
    """A rank of a sharded student ran out of memory; all ranks are to be started again, with passes of `tokens`."""

    def __init__(self, tokens: int, message: str, ranks: Ranks) -> None:
        """`message` is torch's."""
        self.tokens = tokens
        super().__init__(
            f"train: rank {ranks.rank} of {ranks.count} ran out of memory ({message}). The others wait "
            f"for it, so all ranks start again, with passes of {tokens} tokens. Run the same command "
            "again if they do not."
        )


def leave(files: LocalFiles, error: OutOfMemory) -> None:
    """Leave the size for the next start."""
    files.replace(_FILE, json.dumps({_FIELD: error.tokens}).encode())


def smaller(files: LocalFiles, tokens: int) -> int:
    """The size of passes at most: `tokens`, or what an earlier start left."""
    if not files.exists(_FILE):
        return tokens
    try:
        return min(tokens, integer(mapping(parsed(files.read(_FILE)))[_FIELD], least=1))
    except NOT_AS_WRITTEN:  # a hint, and no more
        return tokens
