"""`look` and `spread` of `vocabulary.py` as Triton kernels, for logits on a GPU.

They are the same functions, with the same meaning.

One program takes one row. `look` reads it once, `spread` reads it once and writes it once, in
place; what is read or written besides is O(n K). Nothing is converted beforehand: a row stays in
the dtype of the matrix product, scale and softcap are applied on the way, all sums are float32.
Bytes per token in bfloat16, and how long they take beside the three products of the head (D =
4,096, V = 151,936, 6 D V operations) at 4.3 TB/s and 790 TFLOP/s:

    look        2 V       0.07 us
    spread      4 V       0.14 us
    products    -         4.73 us

Memory leaves time for one exponential per logit, not for two: an SM does 16 a cycle and is handed 9
values of bfloat16. So at T = 1 one serves both the normaliser and the rest, in both kernels, and
`look` rescales its sums once per thread and tile, not per logit, each thread by a maximum of its
own: threads exchange nothing before the row's end.

A thread moves 16 bytes at once where the rows begin at multiples of 16 bytes: a caller whose V is
no such multiple does well to pad the row stride.

Letters: n tokens of a chunk, K entries, V vocabulary, T temperature.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .vocabulary import Asked, Seen, Slopes

LANES = tl.constexpr(256)  # threads of a program
UNROLL = tl.constexpr(4)  # loads of 16 bytes that a thread has under way at once
LEAST = tl.constexpr(-1e30)  # below any logit; unlike -inf it may be subtracted from itself


def look(raw: Tensor, asked: Asked) -> Seen:
    """What a loss sees of n rows; `passes.look`.

    Args:
        raw: [n, V] of any row stride, bfloat16, float16 or float32. On return the entries' places
            hold -inf.
        asked: Of these rows.
    """
    n, k = asked.ids.shape
    entries, *sums = (raw.new_empty(shape, dtype=torch.float32) for shape in ((n, k), n, n, n))
    _launch(_look, raw, asked, entries, *sums)
    return Seen(entries=entries, label=sums[0], normaliser=sums[1], rest=sums[2])


def spread(raw: Tensor, asked: Asked, seen: Seen, slopes: Slopes) -> Tensor:
    """Derivative of the loss with respect to `raw` [n, V], in its memory and dtype.

    It is what `vocabulary.spread` computes.

    Args:
        raw: As `look` left it.
        asked: What `look` was asked.
        seen: What it saw.
        slopes: Derivatives with respect to that.
    """
    held = (
        of
        for part in (seen, slopes)
        for of in (part.entries, part.label, part.normaliser, part.rest)
    )
    _launch(_spread, raw, asked, *(tensor.contiguous() for tensor in held))
    return raw


def _launch(kernel: triton.JITFunction, raw: Tensor, asked: Asked, *tensors: Tensor) -> None:
    n, k = asked.ids.shape
    if not n:
        return
    assert raw.stride(1) == 1
    width = 16 // raw.element_size()
    unit = math.gcd(raw.stride(0), width)  # shows the compiler that rows begin at such multiples
    with torch.cuda.device_of(raw):
        kernel[(n,)](
            *(
                raw,
                raw.stride(0) // unit,
                asked.ids.contiguous(),
                asked.labels.contiguous(),
                *tensors,
            ),
            *(raw.shape[1], k, 1 / asked.temperature),
            TEMPERED=asked.temperature != 1.0,
            SCALE=asked.scale,
            SOFTCAP=asked.softcap,
            WIDTH=width,
            UNIT=unit,
            ENTRIES=min(1024, triton.next_power_of_2(max(k, 16))),
            num_warps=LANES.value // 32,
            enable_fp_fusion=True,
        )


# A kernel's parameters are its pointers: what they point to is named as in `Asked`, `Seen` and
# `Slopes`.


@triton.jit
def _look(
    raw,
    stride,
    ids,
    labels,
    entries,
    label,
    normaliser,
    rest,
    V,
    K,
    coolness,
    TEMPERED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One row; coolness is 1 / T."""
    row = tl.program_id(0).to(tl.int64)  # n * V and n * K pass 2^31
    raw, ids, entries = raw + row * stride * UNIT, ids + row * K, entries + row * K
    tl.store(label + row, _logits(tl.load(raw + tl.load(labels + row)), SCALE, SOFTCAP))

    # The entries: first all are read, then all are taken out, then the rest is read; threads share
    # the row.
    entry_top, entry_sum = tl.full([], LEAST, tl.float32), tl.zeros([], tl.float32)
    for start in range(0, K, ENTRIES):
        column = start + tl.arange(0, ENTRIES)
        place = tl.load(ids + column, mask=column < K, other=-1)
        z = _logits(tl.load(raw + place, mask=place >= 0, other=-float("inf")), SCALE, SOFTCAP)
        tl.store(entries + column, z, mask=column < K)
        top = tl.maximum(entry_top, tl.max(z, 0))
        entry_sum = entry_sum * _exp(entry_top - top) + tl.sum(_exp(z - top), 0)
        entry_top = top
    tl.debug_barrier()
    for start in range(0, K, ENTRIES):
        column = start + tl.arange(0, ENTRIES)
        place = tl.load(ids + column, mask=column < K, other=-1)
        tl.store(raw + place, -float("inf"), mask=place >= 0)
    tl.debug_barrier()

    # Each lane has a maximum and sums of its own until the row's end.
    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    tile = tl.arange(0, TILE)
    top, total = tl.full([LANES], LEAST, tl.float32), tl.zeros([LANES], tl.float32)
    tempered = tl.zeros([LANES], tl.float32)
    whole = V // TILE * TILE
    for start in range(0, whole, TILE):
        z = _logits(tl.load(raw + start + tile), SCALE, SOFTCAP)
        top, total, tempered = _take_in(z, top, total, tempered, coolness, WIDTH, TEMPERED)
    if whole < V:
        inside = whole + tile < V
        z = _logits(tl.load(raw + whole + tile, mask=inside, other=-float("inf")), SCALE, SOFTCAP)
        top, total, tempered = _take_in(z, top, total, tempered, coolness, WIDTH, TEMPERED)

    highest = tl.max(top, 0)
    others = tl.sum(total * _exp(top - highest), 0)
    of_rest = highest + tl.log(others)
    if TEMPERED:
        of_rest = highest * coolness + tl.log(
            tl.sum(tempered * _exp((top - highest) * coolness), 0)
        )
    tl.store(rest + row, of_rest)
    both = tl.maximum(highest, entry_top)
    others = others * _exp(highest - both) + entry_sum * _exp(entry_top - both)
    tl.store(normaliser + row, both + tl.log(others))


@triton.jit
def _spread(
    raw,
    stride,
    ids,
    labels,
    entries,
    label,
    normaliser,
    rest,
    by_entries,
    by_label,
    by_normaliser,
    by_rest,
    V,
    K,
    coolness,
    TEMPERED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One row; `by_x` is the derivative with respect to x, coolness is 1 / T."""
    row = tl.program_id(0).to(tl.int64)
    raw, ids = raw + row * stride * UNIT, ids + row * K
    entries, by_entries = entries + row * K, by_entries + row * K
    total, others = tl.load(normaliser + row), tl.load(rest + row)
    # With nothing outside the entries every z below is -inf, and -inf - -inf would be NaN.
    others = tl.where(others == -float("inf"), total, others)
    to_all, to_rest = tl.load(by_normaliser + row) * SCALE, tl.load(by_rest + row) * SCALE
    if TEMPERED:
        to_rest *= coolness
    # exp(z - total) is exp(z - others) times the mass outside the entries, which is at most 1
    else:
        to_rest += to_all * _exp(others - total)

    TILE: tl.constexpr = UNROLL * LANES * WIDTH
    tile = tl.arange(0, TILE)
    whole = V // TILE * TILE
    for start in range(0, whole, TILE):
        z = _logits(tl.load(raw + start + tile), SCALE, SOFTCAP)
        tl.store(
            raw + start + tile,
            _slopes(z, total, others, to_all, to_rest, coolness, TEMPERED, SOFTCAP),
        )
    if whole < V:
        inside = whole + tile < V
        z = _logits(tl.load(raw + whole + tile, mask=inside, other=-float("inf")), SCALE, SOFTCAP)
        slopes = _slopes(z, total, others, to_all, to_rest, coolness, TEMPERED, SOFTCAP)
        tl.store(raw + whole + tile, slopes, mask=inside)
    tl.debug_barrier()

    token, to_label = tl.load(labels + row), tl.load(by_label + row) * SCALE
    entry_labels = tl.zeros([], tl.int32)
    for start in range(0, K, ENTRIES):
        column = start + tl.arange(0, ENTRIES)
        place = tl.load(ids + column, mask=column < K, other=-1)
        z = tl.load(entries + column, mask=column < K, other=-float("inf"))
        slope = tl.load(by_entries + column, mask=column < K, other=0.0) * SCALE + to_all * _exp(
            z - total
        )
        slope += tl.where(place == token, to_label, 0.0)
        tl.store(raw + place, slope * _steepness(z, SOFTCAP), mask=place >= 0)
        entry_labels += tl.sum((place == token).to(tl.int32), 0)
    if entry_labels == 0:
        z = tl.load(label + row)
        slope = _slopes(z, total, others, to_all, to_rest, coolness, TEMPERED, SOFTCAP)
        tl.store(raw + token, slope + to_label * _steepness(z, SOFTCAP))


@triton.jit
def _take_in(z, top, total, tempered, coolness, WIDTH: tl.constexpr, TEMPERED: tl.constexpr):
    """Maximum and sums [LANES] with a tile added.

    The sums are those of exp(z - top) and of exp((z - top) / T).
    """
    z = tl.reshape(z, [UNROLL, LANES, WIDTH])
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    below = z - higher[None, :, None]
    total = total * _exp(top - higher) + tl.sum(tl.sum(_exp(below), 2), 0)
    if TEMPERED:
        tempered = tempered * _exp((top - higher) * coolness) + tl.sum(
            tl.sum(_exp(below * coolness), 2), 0
        )
    return higher, total, tempered


@triton.jit
def _slopes(
    z, total, others, to_all, to_rest, coolness, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr
):
    """Derivative with respect to raw where there is no entry, without what the label adds."""
    if TEMPERED:
        slopes = to_rest * _exp(z * coolness - others) + to_all * _exp(z - total)
    else:
        slopes = to_rest * _exp(z - others)
    return slopes * _steepness(z, SOFTCAP)


@triton.jit
def _logits(raw, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """softcap(scale * raw) in float32; -inf stays -inf."""
    z = raw.to(tl.float32) * SCALE
    if SOFTCAP is not None:
        capped = SOFTCAP - 2 * SOFTCAP / (1 + _exp(z * (2 / SOFTCAP)))
        z = tl.where(z == -float("inf"), z, capped)
    return z


@triton.jit
def _steepness(z, SOFTCAP: tl.constexpr):
    """Derivative of the softcap where its value is z; finite where that is -inf."""
    steepness = 1.0
    if SOFTCAP is not None:
        capped = tl.maximum(z, -SOFTCAP) / SOFTCAP
        steepness = 1 - capped * capped
    return steepness


@triton.jit
def _exp(x):
    """`tl.exp` spends three more instructions on results below 2^-126, which are 0 here."""
    return tl.exp2(x * 1.4426950408889634)
