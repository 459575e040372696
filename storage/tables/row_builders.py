"""Row builders: one function for each kind of row, with a keyword for each column.

So nobody spells a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..keys import content_key
from .features import NARROWED, Layout, Projected, Rounded
from .soft_targets import SoftTargets, round_mantissa
from .spans import flat

TokenIds = Sequence[int] | np.ndarray


def text_key(token_ids: TokenIds) -> bytes:
    """Name of a text whatever is asked of it: its token ids."""
    return content_key("text", token_ids=np.asarray(token_ids, dtype="<i4").tobytes())


def generation_row(
    *,
    key: bytes,
    reuse_key: bytes,
    prompt_key: bytes,
    author_id: str,
    sampling_id: str,
    sample_index: int,
    tokens_key: bytes,
    token_ids: TokenIds,
    prompt_tokens: int,
    text: str,
    finish_reason: str,
    source_key: bytes | None = None,
    max_tokens: int | None = None,
    row_seed: int | None = None,
    spans: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of `generations`; `token_ids` are the prompt's and then the completion's.

    `spans`: [S, 2] start and tokens of what is scored, where that is not all that follows the
    prompt.
    """
    return {
        "key": key,
        "reuse_key": reuse_key,
        "prompt_key": prompt_key,
        "source_key": source_key,
        "author_id": author_id,
        "sampling_id": sampling_id,
        "sample_index": sample_index,
        "tokens_key": tokens_key,
        "token_ids": token_ids,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(token_ids) - prompt_tokens,
        "text": text,
        "finish_reason": finish_reason,
        "max_tokens": max_tokens,
        "row_seed": row_seed,
        "spans": None if spans is None else flat(spans),
        "text_key": text_key(token_ids),
    }


def given_row(
    *,
    author_id: str,
    source_key: bytes,
    prompt_key: bytes,
    window: int,
    tokens_key: bytes,
    token_ids: TokenIds,
    prompt_tokens: int,
    text: str,
    spans: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of `generations` for text that came with the data: one window of a row of `prompts`.

    Nobody sampled it, so its author stands for the sampling settings, and it has no limit and no
    seed.
    """
    reuse_key = content_key("given", author=author_id, source=source_key, window=window)
    return generation_row(
        key=content_key("generations", reuse_key=reuse_key, max_tokens=None),
        reuse_key=reuse_key,
        prompt_key=prompt_key,
        source_key=source_key,
        author_id=author_id,
        sampling_id=author_id,
        sample_index=window,
        tokens_key=tokens_key,
        token_ids=token_ids,
        prompt_tokens=prompt_tokens,
        text=text,
        finish_reason="given",
        spans=spans,
    )


def target_row(
    *,
    key: bytes,
    reuse_key: bytes,
    tokens_key: bytes,
    generation_key: bytes,
    prompt_key: bytes,
    teacher_id: str,
    token_ids: TokenIds,
    spans: np.ndarray,
    targets: SoftTargets,
    mantissa_bits: int,
    settings: Mapping[str, Any],
    label: int | None = None,
    labels: np.ndarray | None = None,
    image: bytes | None = None,
    engine: str | None = None,
    tail_bound: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of `soft_targets`: a target for each scored token.

    `spans`: [S, 2] start and tokens of what is scored.
    `engine`: what ran the teacher; None: hf.
    `tail_bound`: [N] how far off the tails may be, the entropies being the least that they can be;
    None: all are exact.
    `settings`: the columns that say what was kept of the distribution: `kind`, and those of `k`,
    `p`, `k_min`, `draw` and `proposal` that the kind has.
    """
    names = {
        "key": key,
        "reuse_key": reuse_key,
        "tokens_key": tokens_key,
        "generation_key": generation_key,
        "prompt_key": prompt_key,
        "teacher_id": teacher_id,
        "token_ids": token_ids,
        "span_start": int(spans[0, 0]),
        "spans": None if len(spans) == 1 else flat(spans),
        "text_key": text_key(token_ids),
        "label": label,
        "labels": labels,
        "image": image,
        "engine": engine,
        "tail_bound": None if tail_bound is None else _rounded_up(tail_bound, mantissa_bits),
        "entropy_is_bound": None if tail_bound is None else True,
    }
    # The settings come last: `k` of a ragged kind is its limit, not the widest position's entries.
    return {**names, **targets.columns(mantissa_bits), **settings}


def _rounded_up(bounds: np.ndarray, bits: int) -> np.ndarray:
    """Bounds in so many bits, none of them less than it was."""
    return round_mantissa(bounds * (1 + 2.0**-bits), bits)


def feature_row(
    *,
    key: bytes,
    reuse_key: bytes,
    text_key: bytes,
    teacher_id: str,
    kind: str,
    layer: int | None,
    states: np.ndarray,
    dtype: str,
    layout: Layout | None = None,
    projected: Projected | None = None,
) -> dict[str, Any]:
    """A row of `features`: states [T, D] float32 of all tokens of a text, as they are stored.

    `layout`: their heads, and what attention makes of them; None: they have none.
    `projected`: by what matrix they were made narrower; None: they are whole.

    Raises:
        FloatingPointError: a number cannot be stored.
    """
    rounded = Rounded.of(states, dtype)
    layout = layout or Layout(width=states.shape[1])
    return {
        "key": key,
        "reuse_key": reuse_key,
        "text_key": text_key,
        "teacher_id": teacher_id,
        "kind": kind,
        "layer": layer,
        "positions": None,
        "vectors": len(states),
        **dict.fromkeys(NARROWED),
        **asdict(layout),
        **({} if projected is None else asdict(projected)),
        "dtype": dtype,
        "values": rounded.values.tobytes(),
        "scale": rounded.scale,
        "rounding_error": rounded.error(states),
    }
