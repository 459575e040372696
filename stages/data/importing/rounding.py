"""What rounding does to the numbers of a foreign table: how many bits they have, and what of a sum it may hide."""

import numpy as np

from ....storage.errors import UsageError

_FLOAT32_BITS = 24
_SEEN = 4.0
"""How often over what rounding may hide the least entry must be, for a tail beyond it to be
seen."""
_NEARLY_ALL = 0.9
_ENOUGH = 3


def mantissa_bits(values: np.ndarray) -> int:
    """Bits of mantissa, the first one counted, that float32 needs for all values: 8 for bfloat16's, 24 at most."""
    pattern = (
        int(np.bitwise_or.reduce(values.astype(np.float32).view(np.uint32).ravel(), initial=0))
        & 0x7FFFFF
    )
    return 1 if pattern == 0 else _FLOAT32_BITS - ((pattern & -pattern).bit_length() - 1)


def hidden_mass(kept: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[N] how much of the sum of these probabilities rounding may hide.

    Args:
        kept: [N, K] probabilities.
        error: [N, K] relative error of each.
    """
    hidden: np.ndarray = (kept * error).sum(axis=1) + kept.shape[1] * 2.0**-_FLOAT32_BITS
    return hidden


def leaving_nothing(logprobs: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[M] bool: whether the entries sum to 1, of the M <= N positions where an id beyond them would be seen.

    The best of the other ids is seldom much less likely than the least entry. Where that entry is
    well above what rounding may hide, entries that sum to 1 all the same were normalised over
    themselves. Where it is not, because the teacher is that sure, nothing can be told, and the
    position is left out.

    Args:
        logprobs: [N, K] natural-log probabilities, all entries that the table has.
        error: [N, K] how far rounding may have moved each.
    """
    kept = np.exp(logprobs)
    hidden = hidden_mass(kept, error)
    seen = kept.min(axis=1) > _SEEN * hidden
    nothing: np.ndarray = (1 - kept.sum(axis=1) <= hidden)[seen]
    return nothing


def refuse_renormalised(source: str, nothing_left: np.ndarray, *, rows: int) -> None:
    """Refuse a table whose probabilities are of its entries alone: what the tail was is lost.

    Nine in ten of the positions that can tell must say so, and three at least: a single row may
    have been written so.

    Args:
        source: The table's name, for the message.
        nothing_left: [M] `leaving_nothing` of the first rows.
        rows: How many rows these are.

    Raises:
        UsageError: they look so.
    """
    if len(nothing_left) < _ENOUGH or nothing_left.mean() < _NEARLY_ALL:
        return
    raise UsageError(
        f"{source}: in the first {rows} rows, the entries sum to 1 at {int(nothing_left.sum())} "
        f"of {len(nothing_left)} positions whose least entry leaves room for others. Expected "
        "less than 1, for the vocabulary has more ids than the lists have entries. These look "
        "renormalised over their entries: the tail cannot be told, and the targets would be "
        "wrong. Give the values over the whole vocabulary, as the softmax of all logits has them "
        "(--values logits with --columns lse=COLUMN, where only logits are left)."
    )
