"""What rounding does to the numbers of a foreign table.

It finds how many bits they have, and what of a sum rounding may hide.
"""

import numpy as np

from ....storage.errors import UsageError

_FLOAT32_BITS = 24
"""Bits of mantissa, the first one counted, which is not stored."""
_STORED = 0x7FFFFF
"""The 23 that are stored, in the pattern of a float32."""
_SEEN = 4.0
"""How often over what rounding may hide the least entry must be, for a tail beyond it to be
seen."""
_NEARLY_ALL = 0.9
"""Of the positions that can tell, so many must say that a table is renormalised ..."""
_ENOUGH = 3
"""... and so many at least."""


def mantissa_bits(values: np.ndarray) -> int:
    """Bits of mantissa, the first one counted, that float32 needs for all values.

    bfloat16 needs 8; 24 is the most.
    """
    patterns = values.astype(np.float32).view(np.uint32).ravel()
    # A bit is set here if it is set in any value.
    used = int(np.bitwise_or.reduce(patterns, initial=0)) & _STORED
    if used == 0:
        return 1
    # used & -used is its lowest bit alone: the zeros below it are not needed.
    zeros = (used & -used).bit_length() - 1
    return _FLOAT32_BITS - zeros


def hidden_mass(kept: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[N] how much of the sum of these probabilities rounding may hide: sum_i p_i e_i + K 2^-24.

    The last term is what summing K float32 numbers may lose.

    Args:
        kept: [N, K] probabilities.
        error: [N, K] relative error of each.
    """
    of_entries: np.ndarray = (kept * error).sum(axis=1)
    of_summing = kept.shape[1] * 2.0**-_FLOAT32_BITS
    hidden: np.ndarray = of_entries + of_summing
    return hidden


def leaving_nothing(logprobs: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[M] bool: whether the entries sum to 1, so that nothing is left for other ids.

    M <= N are the positions where an id beyond the entries would be seen.

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
    nothing = 1 - kept.sum(axis=1) <= hidden
    nothing_seen: np.ndarray = nothing[seen]
    return nothing_seen


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
