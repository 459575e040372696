"""The one shift of the project: the state at position t predicts the token at position t + 1.

By hand, a conversation of nine tokens with two turns of the assistant, so two scored spans: 2
tokens from index 2 on, 3 from index 6 on:

    index              0     1     2     3     4     5     6     7     8
    token_ids          <s>   hi    a     </s>  and   now   b     c     </s>
    scored tokens                  a     </s>              b     c     </s>
    predicted from           hi    a                 now   b     c

    spans [[2, 2], [6, 3]]: positions 1, 2, 5, 6, 7 predict the tokens 2, 3, 6, 7, 8

Nothing else adds or subtracts one. A labelled text has one target and no shift (`class_span`).

Rows with a target at a token's own position have spans too, and no shift. By hand, three words, of
which the second has two tokens; a word's class is said at its first token:

    index              0      1     2     3       4     5
    token_ids          [CLS]  EU    re    ##ject  it    [SEP]
    targets of                EU    re            it
    said at                   EU    re            it

    spans [[1, 2], [4, 1]]: positions 1, 2, 4

So has a text of which tokens are hidden (`masks.py`). By hand, one token of eight:

    index              0      1     2     3       4     5     6     7
    text               [CLS]  the   cat   sat     on    the   mat   [SEP]
    token_ids          [CLS]  the   cat   [MASK]  on    the   mat   [SEP]
    labels                                sat
    said at                               [MASK]

    spans [[3, 1]]: position 3

Which of the two a row has is its head's to say (`storage/tables/heads.py`). This works on numpy
arrays and torch tensors alike.
"""

from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np

from ...storage.tables.heads import Head
from ...storage.tables.spans import one_span, positions

Array = TypeVar("Array", bound=Any)


def class_span(total_tokens: int) -> np.ndarray:
    """[1, 2] what is scored of a labelled text: one target, at its last token, not shifted.

    All of the text has been read there. What the target is about is the text's class, not that
    token.
    """
    return one_span(total_tokens - 1, 1)


def predicting_positions(spans: np.ndarray) -> np.ndarray:
    """[N] int64 positions whose hidden states predict the scored tokens, ascending.

    Args:
        spans: [S, 2] start and tokens of each scored span, ascending. The first starts at 1 or
            later: nothing precedes token 0.
    """
    assert spans[0, 0] >= 1, "the first token of a row has no position before it"
    return positions(spans) - 1


def target_positions(spans: np.ndarray, head: Head) -> np.ndarray:
    """[N] int64 positions, ascending, at which a model with this head says the targets."""
    return predicting_positions(spans) if head.shifted else positions(spans)


def spans_at(indices: np.ndarray) -> np.ndarray:
    """[S, 2] the fewest spans that hold these tokens, ascending: of 1, 2 and 4 [[1, 2], [4, 1]]."""
    first = np.flatnonzero(np.diff(indices, prepend=indices[0] - 2) > 1)
    tokens = np.diff(first, append=len(indices))
    spans: np.ndarray = np.stack([indices[first], tokens], axis=1, dtype=np.int64)
    return spans


def parts_of(spans: np.ndarray) -> list[slice]:
    """Which of the N targets belong to each span: of [[2, 2], [6, 3]] 0 to 2 and 2 to 5."""
    edges = accumulate(spans[:, 1].tolist(), initial=0)
    return [slice(*both) for both in pairwise(edges)]


def scored_tokens(token_ids: Array, spans: np.ndarray) -> Array:
    """[N] the tokens of the spans: what the positions of `predicting_positions` are asked for."""
    assert len(token_ids) >= spans[-1, 0] + spans[-1, 1], "a span leaves the sequence"
    scored: Array = token_ids[positions(spans)]
    return scored
