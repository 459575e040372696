"""The kernel `block_sums` against float64 and against plain torch.

It runs on a GPU where there is one, else interpreted.
"""

import os

import pytest
import torch
from torch import Tensor

from stillroom.stages.targets import entries_and_tail as targets
from stillroom.stages.targets.block_sums import BLOCK, BlockSums

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "no GPU; test_triton.py runs these under Triton's interpreter", allow_module_level=True
    )

targets_triton = pytest.importorskip("stillroom.stages.targets.block_sums_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
SPAN = BLOCK * targets_triton.BLOCKS  # ids of one program
FIELDS = ("maxima", "sums", "weighted")


def logits(n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = (
        5 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) + 20
    )
    return values.to(dtype).to(DEVICE)


def definition(z: Tensor, temperatures: tuple[float, ...]) -> BlockSums:
    """Float64, block by block, over the ids that have a finite logit."""
    found: dict[str, list[list[Tensor]]] = {name: [] for name in FIELDS}
    for row in z.double():
        blocks = [block[block > -torch.inf] for block in row.split(BLOCK)]
        below = [block - block.max() if len(block) else block for block in blocks]
        nothing = torch.tensor(-torch.inf, dtype=torch.float64, device=z.device)
        found["maxima"].append(
            torch.stack([block.max() if len(block) else nothing for block in blocks])
        )
        found["weighted"].append(torch.stack([(block.exp() * block).sum() for block in below]))
        sums = [
            torch.stack([(block / t).exp().sum() for block in below]) for t in (1.0, *temperatures)
        ]
        found["sums"].append(torch.stack(sums))
    return BlockSums(*(torch.stack(found[name]) for name in FIELDS))


def assert_same(found: BlockSums, expected: BlockSums) -> None:
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("temperatures", [(), (0.5, 2.0, 4.0)], ids=["one temperature", "four"])
@pytest.mark.parametrize("vocabulary", [1, 37, BLOCK, BLOCK + 1, SPAN, SPAN + 130, 2 * SPAN + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_those_of_float64(
    dtype: torch.dtype, vocabulary: int, temperatures: tuple[float, ...]
) -> None:
    z = logits(3, vocabulary, dtype)
    assert_same(targets_triton.block_sums(z, temperatures), definition(z, temperatures))


def test_ids_that_cannot_be_drawn_add_nothing() -> None:
    """Single ids, a whole block, and the whole of the last one, which is shorter."""
    z = logits(2, 3 * BLOCK + 9)
    z[0, 5:9] = z[0, BLOCK : 2 * BLOCK] = z[1, 3 * BLOCK :] = -torch.inf
    found = targets_triton.block_sums(z, (2.0,))
    assert_same(found, definition(z, (2.0,)))
    assert found.sums[0, :, 1].tolist() == [0.0, 0.0]
    assert found.maxima[1, 3] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_says_the_same(dtype: torch.dtype) -> None:
    z = logits(4, SPAN + 77, dtype)
    z[1, :BLOCK] = -torch.inf
    assert_same(targets_triton.block_sums(z, (3.0,)), targets.block_sums(z, (3.0,)))


def test_rows_may_lie_apart() -> None:
    z = logits(3, 1001, torch.bfloat16)
    held = torch.full((3, 1024), 100.0, dtype=torch.bfloat16, device=DEVICE)
    assert_same(targets_triton.block_sums(held[:, :1001].copy_(z), ()), definition(z, ()))


def test_rows_beyond_two_to_the_31_logits() -> None:
    """Memory is taken, but only three rows of it are touched."""
    far, vocabulary = 2**30, 300
    held = torch.empty(2 * far + vocabulary, dtype=torch.bfloat16, device=DEVICE)
    z = held.as_strided((3, vocabulary), (far, 1)).copy_(logits(3, vocabulary))
    assert_same(targets_triton.block_sums(z, ()), definition(z, ()))


def test_no_rows() -> None:
    found = targets_triton.block_sums(logits(1, 300)[:0], (2.0,))
    assert [getattr(found, name).shape for name in FIELDS] == [(0, 3), (0, 2, 3), (0, 3)]
