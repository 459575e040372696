"""The kernels `look` and `spread` against float64 and against plain torch.

On a GPU they run as they are, else they are interpreted.
"""

import os
from dataclasses import replace

import pytest
import torch
from objectives import objective_of
from torch import Tensor

from stillroom.stages.losses import fused_linear as fused
from stillroom.stages.losses import vocabulary as passes
from stillroom.stages.losses.objective import Aim, Objective
from stillroom.stages.losses.vocabulary import Asked, Seen, Slopes
from stillroom.stages.models.head import Head
from stillroom.stages.targets.batch import TargetBatch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "no GPU; test_triton.py runs these under Triton's interpreter", allow_module_level=True
    )

passes_triton = pytest.importorskip("stillroom.stages.losses.vocabulary_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TILES = 4096  # columns that one step of a kernel takes in float32; twice as many in bfloat16
FIELDS = ("entries", "label", "normaliser", "rest")

SHAPES = {  # V, K
    "less than a tile": (37, 5),
    "one entry": (50, 1),
    "a single tile": (TILES, 16),
    "tiles and a bit": (2 * TILES + 129, 64),
    "more entries than are taken at once": (5000, 1500),
    "no entries": (TILES + 1, 0),
    "all are entries": (40, 40),
}
HEADS = {  # T, scale, softcap
    "plain": (1.0, 1.0, None),
    "tempered": (2.0, 1.0, None),
    "sharpened and scaled": (0.5, 0.25, None),
    "capped": (1.0, 1.0, 5.0),
    "capped, scaled, tempered": (3.0, 1.5, 8.0),
}
BOTH = ("plain", "capped, scaled, tempered")


def logits(n: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    values = 4 * torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(DEVICE)


def question(
    n: int, vocabulary: int, k: int, head: tuple[float, float, float | None] = (1.0, 1.0, None)
) -> Asked:
    """Row 0's label is an entry (if there are any), row 1's is none (if it can be).

    Row 2 lacks an entry, and row 3 lacks all.
    """
    random = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(vocabulary, generator=random) for _ in range(n)])
    labels = ids[:, 0].clone()
    labels[1::2] = ids[1::2, -1]
    ids = ids[:, :k].clone()
    if n > 3 and 0 < k < vocabulary:
        ids[2, k // 2], ids[3] = -1, -1
    temperature, scale, softcap = head
    return Asked(
        ids=ids.to(DEVICE),
        labels=labels.to(DEVICE),
        temperature=temperature,
        scale=scale,
        softcap=softcap,
    )


def definition(raw: Tensor, asked: Asked) -> Seen:
    """Float64, by masks; differentiable."""
    z = raw.double() * asked.scale
    z = z if asked.softcap is None else asked.softcap * torch.tanh(z / asked.softcap)
    entry = (torch.arange(z.shape[1], device=z.device) == asked.ids[..., None]).any(1)
    others = (z / asked.temperature).masked_fill(entry, -torch.inf)
    rests = [row[row > -torch.inf].logsumexp(0) for row in others]
    entries = z.gather(1, asked.ids.clamp_min(0)).masked_fill(asked.ids < 0, -torch.inf)
    label = z.gather(1, asked.labels[:, None])[:, 0]
    return Seen(entries=entries, label=label, normaliser=z.logsumexp(1), rest=torch.stack(rests))


def derivatives(asked: Asked, seen: Seen) -> Slopes:
    """The derivatives of a loss that is linear in what was seen, with random weights."""
    random = torch.Generator().manual_seed(2)
    entries = (
        torch.randn(asked.ids.shape, generator=random).to(DEVICE).masked_fill(asked.ids < 0, 0.0)
    )
    label, normaliser, rest = torch.randn(3, len(asked.ids), generator=random).to(DEVICE)
    return Slopes(
        entries=entries,
        label=label,
        normaliser=normaliser,
        rest=rest.masked_fill(seen.rest == -torch.inf, 0.0),
    )


def gradient(raw: Tensor, asked: Asked, slopes: Slopes) -> Tensor:
    """The gradient of that loss, by autograd through the definition in float64."""
    leaf = raw.double().requires_grad_()
    seen = definition(leaf, asked)
    total = torch.zeros((), dtype=torch.float64, device=raw.device)
    for name in FIELDS:
        value, slope = getattr(seen, name), getattr(slopes, name)
        total = total + (value.masked_fill(value == -torch.inf, 0.0) * slope).sum()
    return torch.autograd.grad(total, leaf)[0]


def assert_seen(found: Seen, expected: Seen, *, tolerance: float = 1e-5) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(found, name).double(),
            getattr(expected, name).double(),
            rtol=tolerance,
            atol=tolerance,
            msg=name,
        )


# Not every head with every shape: on a GPU most pairs are kernels of their own, which have to be
# compiled.
PAIRS = [
    (shape, head)
    for shape in SHAPES
    for head in HEADS
    if shape == "tiles and a bit" or head in BOTH
]


@pytest.mark.parametrize(
    ("shape", "head"), [pytest.param(SHAPES[s], HEADS[h], id=f"{s}, {h}") for s, h in PAIRS]
)
def test_values_and_gradient_are_those_of_float64(
    shape: tuple[int, int], head: tuple[float, float, float | None]
) -> None:
    vocabulary, k = shape
    asked, raw = question(4, vocabulary, k, head), logits(4, vocabulary)
    expected = definition(raw, asked)
    work = raw.clone()
    seen = passes_triton.look(work, asked)
    assert_seen(seen, expected)
    slopes = derivatives(asked, seen)
    found = passes_triton.spread(work, asked, seen, slopes)
    assert found.data_ptr() == work.data_ptr()
    torch.testing.assert_close(found.double(), gradient(raw, asked, slopes), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("head", [HEADS[name] for name in BOTH], ids=BOTH)
def test_bfloat16_is_as_near_as_a_rounded_result(head: tuple[float, float, float | None]) -> None:
    asked, raw = question(4, 9001, 64, head), logits(4, 9001, torch.bfloat16)
    work = raw.clone()
    seen = passes_triton.look(work, asked)
    assert_seen(seen, definition(raw, asked))  # sums are float32
    slopes = derivatives(asked, seen)
    expected = gradient(raw, asked, slopes)
    found = passes_triton.spread(work, asked, seen, slopes)
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa; the interpreter rounds towards 0.
    torch.testing.assert_close(found.double(), expected, rtol=2.0**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_says_the_same(dtype: torch.dtype) -> None:
    asked, raw = question(4, 5003, 32, HEADS["capped, scaled, tempered"]), logits(4, 5003, dtype)
    ours, theirs = raw.clone(), raw.clone()
    seen, expected = passes_triton.look(ours, asked), passes.look(theirs, asked)
    assert_seen(seen, expected)
    slopes = derivatives(asked, seen)
    found = passes_triton.spread(ours, asked, expected, slopes)
    wanted = passes.spread(theirs, asked, expected, slopes)
    torch.testing.assert_close(
        found, wanted, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_entries_with_nearly_all_mass_leave_an_exact_rest(temperature: float) -> None:
    """One minus the kept would be 0 here."""
    asked, raw = question(4, 300, 3, (temperature, 1.0, None)), logits(4, 300)
    asked.ids[2:] = asked.ids[:2]
    raw.scatter_(1, asked.ids, 60.0)
    expected = definition(raw, asked)
    assert (expected.rest - expected.normaliser / temperature < -20).all()
    work = raw.clone()
    seen = passes_triton.look(work, asked)
    assert_seen(seen, expected)
    slopes = derivatives(asked, seen)
    found = passes_triton.spread(work, asked, seen, slopes)
    torch.testing.assert_close(found.double(), gradient(raw, asked, slopes), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("head", [HEADS["plain"], HEADS["tempered"]], ids=["plain", "tempered"])
def test_ids_that_cannot_be_drawn_get_no_gradient_and_make_no_nan(
    head: tuple[float, float, float | None],
) -> None:
    """Logits of -inf outside the entries, in one row all of them: then there is no rest."""
    asked, raw = question(2, 60, 6, head), logits(2, 60)
    banned = torch.ones_like(raw, dtype=torch.bool).scatter_(1, asked.ids, False)
    banned.scatter_(1, asked.labels[:, None], False)
    banned[1, 30:] = False
    raw = raw.masked_fill(banned, -torch.inf)
    seen = passes_triton.look(work := raw.clone(), asked)
    assert seen.rest.tolist()[0] == -torch.inf < seen.rest.tolist()[1]
    assert_seen(seen, definition(raw, asked))
    found = passes_triton.spread(work, asked, seen, derivatives(asked, seen))
    assert found.isfinite().all()
    assert (found[banned] == 0).all()


def test_rows_may_lie_apart_and_nothing_else_is_touched() -> None:
    asked, raw = question(4, 5001, 16), logits(4, 5001, torch.bfloat16)
    held = torch.full((6, 5024), 7.0, dtype=torch.bfloat16, device=DEVICE)
    work = held[1:5, :5001].copy_(raw)
    seen, alone = (
        passes_triton.look(work, asked),
        passes_triton.look(together := raw.clone(), asked),
    )
    assert_seen(seen, alone)  # sums in another order, perhaps: such rows are read by wider loads
    slopes = derivatives(asked, seen)
    passes_triton.spread(work, asked, seen, slopes)
    expected = passes_triton.spread(together, asked, seen, slopes)
    torch.testing.assert_close(work, expected, rtol=2.0**-7, atol=1e-7)
    held[1:5, :5001] = 7.0
    assert (held == 7.0).all()


def test_what_is_asked_and_slopes_may_be_views() -> None:
    """Autograd hands slopes over like this: expanded, transposed."""
    asked, raw = question(4, 100, 8), logits(4, 100)
    wide, twice = torch.full((4, 16), 99, device=DEVICE), torch.full((4, 2), 99, device=DEVICE)
    wide[:, ::2], twice[:, 1] = asked.ids, asked.labels
    seen = passes_triton.look(raw.clone(), asked)
    asked = replace(asked, ids=wide[:, ::2], labels=twice[:, 1])
    assert_seen(passes_triton.look(raw, asked), seen, tolerance=0)
    one = torch.ones((), device=DEVICE)
    views = Slopes(
        entries=torch.ones(8, 4, device=DEVICE).T,
        label=one.expand(4),
        normaliser=one.expand(4),
        rest=one.expand(4),
    )
    copies = Slopes(
        **{
            name: getattr(views, name).clone(memory_format=torch.contiguous_format)
            for name in FIELDS
        }
    )
    expected = passes_triton.spread(raw.clone(), asked, seen, copies)
    assert torch.equal(passes_triton.spread(raw, asked, seen, views), expected)


def test_rows_beyond_two_to_the_31_logits() -> None:
    """Memory is taken, but only three rows of it are touched."""
    far, vocabulary = 2**30, 600
    held = torch.empty(2 * far + vocabulary, dtype=torch.bfloat16, device=DEVICE)
    work = held.as_strided((3, vocabulary), (far, 1))
    asked, raw = question(3, vocabulary, 4), logits(3, vocabulary, torch.bfloat16)
    work.copy_(raw)
    seen = passes_triton.look(work, asked)
    assert_seen(seen, definition(raw, asked))
    slopes = derivatives(asked, seen)
    passes_triton.look(together := raw.clone(), asked)
    expected = passes_triton.spread(together, asked, seen, slopes)
    found = passes_triton.spread(work, asked, seen, slopes)
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-7)


def test_no_rows() -> None:
    asked = question(1, 10, 2)
    asked = Asked(
        ids=asked.ids[:0], labels=asked.labels[:0], temperature=1.0, scale=1.0, softcap=None
    )
    seen = passes_triton.look(raw := logits(1, 10)[:0], asked)
    assert seen.entries.shape == (0, 2)
    assert seen.rest.shape == (0,)
    assert passes_triton.spread(raw, asked, seen, derivatives(asked, seen)).shape == (0, 10)


OBJECTIVES = {
    "cross-entropy alone": None,
    "forward KL": objective_of(),
    "reverse KL at a temperature": objective_of(divergence="reverse_kl", temperature=2.0),
    "Jensen-Shannon": objective_of(divergence="jsd", jsd_weight=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_fused_loss_is_the_same_with_either_kernel(
    objective: Objective | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through chunks, a bias, a scale and a softcap, to the gradients of states and head."""
    n, hidden_size, vocabulary, k = 7, 12, 203, 9
    random = torch.Generator().manual_seed(3)
    states, weight = (
        torch.randn(n, hidden_size, generator=random),
        torch.randn(vocabulary, hidden_size, generator=random),
    )
    asked = question(n, vocabulary, k)
    teacher = torch.randn(n, vocabulary, generator=random).log_softmax(-1).to(DEVICE)
    entry = (torch.arange(vocabulary, device=DEVICE) == asked.ids[..., None]).any(1)
    targets = TargetBatch(
        labels=asked.labels,
        ids=asked.ids,
        logprobs=teacher.gather(1, asked.ids.clamp_min(0)).masked_fill(asked.ids < 0, -torch.inf),
        tail_logprob=teacher.masked_fill(entry, -torch.inf).logsumexp(-1),
    )
    found = []
    for module in (passes_triton, passes):
        monkeypatch.setattr(fused, "_kernel", lambda kernel, device, module=module: module)
        leaves = [
            tensor.clone().to(DEVICE).requires_grad_() for tensor in (states, weight, weight[:, 0])
        ]
        head = Head(weight=leaves[1], bias=leaves[2], scale=0.5, softcap=4.0)
        loss = fused.linear_distillation(
            leaves[0].to(dtype),
            head,
            targets,
            aim=Aim(objective=objective, soft_weight=0.7, hard_weight=0.3),
            chunk_tokens=3,
        )
        loss.total.backward()
        found.append([loss.total.detach(), loss.hard, *(leaf.grad for leaf in leaves)])
    tolerance = (
        1e-5 if dtype == torch.float32 else 2.0**-6
    )  # of the largest: products round their sums
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())
        )
