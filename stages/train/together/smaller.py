"""How large passes may be after a rank of a sharded student ran out of memory.

The size is in a file in the run's folder. The others wait for that rank inside a collective. So it
writes the size and dies, whoever started the ranks starts all of them again, and they go on from
the last checkpoint.
"""

from ....storage.bounds import integer
from ....storage.errors import ProcessDied
from ....storage.files.local import LocalFiles
from ...recipe.run_folder import TOKENS_PER_PASS
from ...workers.ranks import Ranks


class OutOfMemory(ProcessDied):
    """A rank of a sharded student ran out of memory.

    All ranks are to be started again, with passes of `tokens`.
    """

    def __init__(self, tokens: int, message: str, ranks: Ranks) -> None:
        """`message` is torch's."""
        self.tokens = tokens
        super().__init__(
            f"train: rank {ranks.rank} of {ranks.count} ran out of memory ({message}). The others "
            f"wait for it, so all ranks start again, with passes of {tokens} tokens. Run the same "
            "command again if they do not."
        )


def leave(files: LocalFiles, error: OutOfMemory) -> None:
    """Leave the size for the next start."""
    files.replace(TOKENS_PER_PASS, str(error.tokens).encode())


def smaller(files: LocalFiles, tokens: int) -> int:
    """The size of passes at most: `tokens`, or what an earlier start left."""
    if not files.exists(TOKENS_PER_PASS):
        return tokens
    try:
        return min(tokens, integer(int(files.read(TOKENS_PER_PASS)), least=1))
    except ValueError:  # a hint, and no more
        return tokens
