"""What all ranks have whole: the same weights, and the sum of their gradients.

The norm is found here too, however they are held. Torch's DistributedDataParallel is not used. It
sends gradients during the backward pass, so all ranks would need equally many passes, and a rank
that runs out of memory there leaves the others waiting. Here nothing is sent until all ranks have
done their passes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from ....storage.errors import NotTogether
from ...workers.ranks import Ranks

BUCKET_BYTES = 64 * 2**20
"""Gradients that are sent at once."""


def sum_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Give all ranks the sum of their gradients of whole weights.

    Those of sharded ones are summed already.

    A rank that had no pass has none. A weight that no rank has a gradient of keeps none: the
    optimizer leaves it alone.
    """
    if ranks.count == 1:
        return
    whole = [p for p in parameters if not isinstance(p, DTensor)]
    there = ranks.sum(torch.tensor([float(p.grad is not None) for p in whole]))
    found = []
    for parameter, count in zip(whole, there.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
    for bucket in _buckets(found):
        sent = ranks.sum(torch.cat([gradient.flatten() for gradient in bucket]))
        parts = sent.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def make_alike(module: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the first one's whole weights and averages.

    What a student's own code draws may differ. Of a sharded weight each number is one rank's alone.
    """
    if ranks.count > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and not isinstance(tensor, DTensor):
                distributed.broadcast(tensor, src=0)


def refuse_changed(before: Mapping[str, Tensor], now: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Refuse a student whose own code averages over what it is fed: a rank's part of a step.

    Raises:
        NotTogether: a rank's passes have changed a buffer.
    """
    if ranks.count == 1 or not before:
        return
    changed = [name for name, average in now.items() if not torch.equal(average, before[name])]
    for name in (name for of_rank in ranks.all(changed) for name in of_rank):
        raise NotTogether(
            f"compute.processes: a pass changes {name} of the student, which would depend on how "
            "many processes share a step. Set compute.processes to 1."
        )


def clipped(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Clip all gradients together; the norm that they had."""
    found = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in found if isinstance(p, DTensor) is sharded] for sharded in (True, False)]
    # One operation takes sharded tensors or whole ones, not both.
    norms = [_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds if kind]
    if not norms:
        return 0.0
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, most, norm)
    return float(norm)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    held: list[Tensor] = []
    for gradient in gradients:
        if held and sum(one.nbytes for one in held) + gradient.nbytes > BUCKET_BYTES:
            yield held
            held = []
        held.append(gradient)
    if held:
        yield held
