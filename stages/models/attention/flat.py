"""Attention of samples that follow one another in a single row.

Each attends to itself alone, with no mask and no padding.

transformers hands its models' queries, keys and values to a function by name. This one cuts them
where a sample ends. On a GPU in bfloat16 it is the variable-length attention of torch
(FlashAttention 2: Dao 2023, arXiv 2307.08691), on a CPU one call per sample. Where a sample ends
comes as transformers' own `cu_seq_lens_q`, so layers of other kinds that know it may use it too.

A model may do something else between queries and keys than this (soft-capping, sinks, chunks). So
`attend_apart` asks the model itself, at the lengths of the training; one that answers otherwise
keeps its own attention, and its rows get padding.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..device import evaluating, out_of_memory
from ..head import hidden_states, split_head

NAME = "stillroom_samples_apart"
SHORT = (5, 7)
"""Tokens of the samples that stand around the longest one when a model is asked."""


def flat_inputs(edges: Tensor, longest: int) -> dict[str, Any]:
    """What a model takes beside ids and positions [1, T].

    `edges` is [S + 1] int32 of S samples, `longest` the tokens of the longest.
    """
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend_apart(model: nn.Module, longest: int, dtype: torch.dtype) -> str | None:
    """Let the model attend within samples of one row, if it computes the same for each alone.

    Hidden states of two short samples around one of `longest` tokens are compared with those of
    each alone, by the model's own attention in float32; in bfloat16 they may be off by twice as
    much as the model's own are. Then a training pass is tried. A model that differs or fails is
    left as it was.

    Returns:
        None: it does so from now on. Else why not.

    Raises:
        StillroomError: one sample of `longest` tokens does not fit in memory.
    """
    plain: Any = model
    plain = plain.get_base_model() if hasattr(plain, "get_base_model") else plain
    device = next(model.parameters()).device
    if device.type == "cuda" and dtype != torch.bfloat16:
        return "on a GPU only bfloat16 has variable-length attention"
    own = plain.config._attn_implementation
    lengths = [SHORT[0], max(longest, 1), SHORT[1]]
    with evaluating(model):
        try:
            with torch.no_grad():
                exact = [_states(model, [n], torch.float32) for n in lengths]
                rounded = (
                    exact
                    if dtype == torch.float32
                    else [_states(model, [n], dtype) for n in lengths]
                )
                _register()
                plain.set_attn_implementation(NAME)
                together = _states(model, lengths, dtype, flat=True).split(lengths, dim=1)
            alike = plain.config._attn_implementation == NAME and all(
                _off(found, right) <= 2 * _off(usual, right) + 1e-3
                for found, usual, right in zip(together, rounded, exact, strict=True)
            )
            obstacle = None if alike else "its hidden states differ from those of each sample alone"
            if alike:
                model.train()
                _states(model, list(SHORT), dtype, flat=True).sum().backward()
        except torch.OutOfMemoryError as error:
            raise out_of_memory(longest, str(error)) from error
        except Exception as error:  # whatever a model or a kernel says of what it cannot do
            obstacle = f"{type(error).__name__}: {error}".partition("\n")[
                0
            ]  # torch may append a trace
    model.zero_grad()
    if obstacle is not None:
        plain.set_attn_implementation(own)
    return obstacle


def _off(found: Tensor, right: Tensor) -> float:
    """Root of the mean square difference, over that of `right`."""
    return float((found.float() - right).norm() / right.norm().clamp_min(1e-30))


def _states(
    model: nn.Module, lengths: list[int], dtype: torch.dtype, *, flat: bool = False
) -> Tensor:
    """Hidden states [1, T, D] of made-up samples.

    Token n of a sample is the same whatever stands around it.
    """
    device = next(model.parameters()).device
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device)[None]
    ids = (positions * 7 + 1) % split_head(model).vocab_size
    edges = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    more = flat_inputs(edges, max(lengths)) if flat else {}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return hidden_states(model, input_ids=ids, position_ids=positions, **more)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample; the interface of transformers' attention functions.

    Args:
        module: The attention layer that calls.
        query: [1, H, T, d]
        key: [1, h, T, d], h divides H.
        value: As `key`.
        attention_mask: None.
        asked: `scaling`, `dropout`, `sliding_window`, `cu_seq_lens_q` [S + 1], `max_length_q`.

    Returns:
        [1, T, H, d]

    Raises:
        NotImplementedError: something else is asked for, or nobody says where samples end.
    """
    window, edges = asked.get("sliding_window"), asked.get("cu_seq_lens_q")
    beyond = [
        name
        for name in ("softcap", "s_aux", "sinks", "position_bias", "cache")
        if asked.get(name) is not None
    ]
    causal = asked.get("is_causal", getattr(module, "is_causal", True)) is not False
    if beyond or attention_mask is not None or edges is None or not causal:
        raise NotImplementedError(
            f"attention within samples: {beyond or 'a mask of its own, or no ends of samples'}"
        )
    dropout = asked.get("dropout", 0.0)
    if query.is_cuda:
        if dropout:
            raise NotImplementedError("variable-length attention with dropout")
        return _by_kernel(
            (query, key, value), edges, asked["max_length_q"], window, scale=asked.get("scaling")
        ), None
    how: dict[str, Any] = {
        "scale": asked.get("scaling"),
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    lengths, parts = edges.diff().tolist(), []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        mask = None if window is None or q.shape[2] <= window else _within(window, q)
        how |= {"attn_mask": mask, "is_causal": mask is None, "dropout_p": dropout}
        parts.append(functional.scaled_dot_product_attention(q, k, v, **how))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _by_kernel(
    parts: Sequence[Tensor], edges: Tensor, longest: int, window: int | None, *, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Autocast knows nothing of this kernel, and rotary embeddings may have left float32.
    query, key, value = (part[0].transpose(0, 1).to(torch.bfloat16) for part in parts)
    how: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            how["enable_gqa"] = True
        else:  # torch 2.11
            times = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(times, dim=1) for part in (key, value))
    made = varlen_attn(query, key, value, edges, edges, longest, longest, **how)
    assert isinstance(made, Tensor)  # nothing beside was asked for
    return made[None]


def _within(window: int, query: Tensor) -> Tensor:
    """[T, T] bool: a position sees itself and the `window` - 1 before it."""
    all_of_them = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    return all_of_them.tril() & all_of_them.triu(1 - window)
