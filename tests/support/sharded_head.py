"""One of two ranks of a student that FSDP2 shards: `python sharded_head.py RANK FOLDER`.

Its gradients go into the folder.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from objectives import objective_of
from torch import Tensor, nn

from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import Head, LowRank
from stillroom.stages.targets.batch import TargetBatch

RANKS, TOKENS = 2, 10
D, V, K, R = 6, 23, 4, 2  # V is odd: the shards differ in size


class Student(nn.Module):
    """A body, an output layer and its LoRA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        self.down, self.up = nn.Parameter(torch.randn(R, D)), nn.Parameter(torch.randn(V, R))


def gradients(student: Any, rows: slice) -> dict[str, Tensor]:
    """Of the summed loss of some of the tokens."""
    generator = torch.Generator().manual_seed(1)
    inputs, teacher = (torch.randn(TOKENS, size, generator=generator) for size in (D, V))
    logprobs, ids = teacher.log_softmax(-1).topk(K)
    tail = teacher.log_softmax(-1).scatter(-1, ids, -torch.inf).logsumexp(-1)
    targets = TargetBatch(
        labels=torch.arange(TOKENS), ids=ids, logprobs=logprobs, tail_logprob=tail
    )
    hidden = student.body(inputs[rows])
    hidden.retain_grad()
    low_rank = LowRank(down=student.down, up=student.up, scale=0.5, dropout=nn.Identity())
    head = Head(weight=student.head.weight, bias=student.head.bias, low_rank=low_rank)
    aim = Aim(objective=objective_of(), soft_weight=0.7, hard_weight=0.3)
    chosen = targets.rows(rows.start, rows.stop)
    linear_distillation(hidden, head, chosen, aim=aim, chunk_tokens=3).total.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    whole = {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in found.items()
    }
    return whole | {"hidden": hidden.grad}


def main(rank: int, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=RANKS
    )
    student, mesh = Student(), init_device_mesh("cpu", (RANKS,))
    fully_shard(student.body, mesh=mesh)
    fully_shard(student, mesh=mesh)
    size = TOKENS // RANKS
    torch.save(gradients(student, slice(rank * size, (rank + 1) * size)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
