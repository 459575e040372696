"""The one shift of the project: the hidden state at position t predicts the token at position t + 1.

By hand, six tokens, the first two a prompt, so the scored span starts at index 2 and holds 4
tokens:

    index              0     1     2     3     4     5
    token_ids          <s>   hi    a     b     c     </s>
    scored tokens                  a     b     c     </s>      token_ids[2:6]
    predicted from           hi    a     b     c               positions 1..4, slice(1, 5)

Nothing else adds or subtracts one. A labelled text has one target and no shift
(`class_span`). Works on numpy arrays and torch tensors alike.
"""

from typing import Any, TypeVar

Array = TypeVar("Array", bound=Any)


def scored_span(prompt_tokens: int, total_tokens: int) -> tuple[int, int]:
    """Start and length of what is scored after a prompt: nothing precedes the first token of a text without one."""
    start = max(prompt_tokens, 1)
    return start, max(total_tokens - start, 0)


def class_span(total_tokens: int) -> tuple[int, int]:
    """Start and length of what is scored of a labelled text: one target, at its last token, not shifted.

    All of the text has been read there. What the target is about is the text's class, not that
    token.
    """
    return total_tokens - 1, 1


def predicting_positions(span_start: int, span_tokens: int) -> slice:
    """Positions whose hidden states predict the scored span; as many as it has tokens.

    Args:
        span_start: Index of the first scored token, at least 1: nothing precedes token 0.
        span_tokens: N, the number of scored tokens.
    """
    assert span_start >= 1, f"token {span_start} has no position before it"
    return slice(span_start - 1, span_start - 1 + span_tokens)


def scored_tokens(token_ids: Array, span_start: int, span_tokens: int) -> Array:
    """[N] the tokens of the span: what the positions of `predicting_positions` are asked for."""
    assert 1 <= span_start <= len(token_ids) - span_tokens, "the span leaves the sequence"
    scored: Array = token_ids[span_start : span_start + span_tokens]
    return scored
