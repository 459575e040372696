"""What the fused loss costs beside the usual one: memory, and rounding."""

import math

import pytest
import torch
from allocations import allocated
from objectives import objective_of
from torch.nn import functional

from stillroom.stages.losses import fused_linear as fused
from stillroom.stages.losses import vocabulary as passes
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import Head
from stillroom.stages.targets.batch import TargetBatch

WEIGHTS = {"soft_weight": 0.7, "hard_weight": 0.3}


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distilled(hidden, weight, targets, **objective):
    return linear_distillation(
        hidden,
        Head(weight=weight),
        targets,
        aim=Aim(objective=objective_of(**objective), **WEIGHTS),
    )


def naive(hidden, weight, targets):
    """Forward KL with a bucket and cross-entropy as they are usually written.

    They are in the dtype of the states.
    """
    log_p = functional.linear(hidden, weight).log_softmax(-1)
    tail = log_p.scatter(-1, targets.ids, -math.inf).logsumexp(-1)
    p = torch.cat([log_p.gather(-1, targets.ids), tail[:, None]], -1)
    t = torch.cat([targets.logprobs, targets.tail_logprob[:, None]], -1).to(hidden.dtype)
    soft = (t.exp() * (t - p)).sum(-1)
    return 0.7 * soft - 0.3 * log_p.gather(-1, targets.labels[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_products(dtype):
    """It is compared with float64: float32 to 1e-5.

    bfloat16 is no worse than the naive loss in bfloat16 and a hundredth.
    """
    n, v, d = 96, 500, 48
    hidden, weight, teacher = (
        0.4 * normal(n, d, seed=1),
        normal(v, d, seed=2),
        2 * normal(n, v, seed=4),
    )
    kept, ids = teacher.log_softmax(-1).topk(16, -1)
    tail = teacher.log_softmax(-1).scatter(-1, ids, -math.inf).logsumexp(-1)
    targets = TargetBatch(labels=torch.arange(n), ids=ids, logprobs=kept, tail_logprob=tail)

    def found(loss, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        total = loss(*leaves)
        return [total.detach(), *torch.autograd.grad(total, leaves)]

    def ours(hidden, weight):
        return distilled(hidden, weight, targets).total

    truth = found(lambda h, w: naive(h, w, targets).sum(), torch.float64)
    usual = found(lambda h, w: naive(h, w, targets).sum(), dtype)
    for one, other, right in zip(found(ours, dtype), usual, truth, strict=True):
        error, allowed = ((x.double() - right).norm() / right.norm() for x in (one, other))
        assert error <= (1e-5 if dtype == torch.float32 else allowed + 1e-2)


class TestMemory:
    V, D, K = 4096, 16, 8

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr(fused, "CHUNK_BYTES", 2**20)
        monkeypatch.setattr(passes, "CACHE_BYTES", 2**17)

    def problem(self, n, v=V):
        teacher = normal(n, self.K + 1, seed=4).log_softmax(-1)
        ids = torch.stack(
            [
                torch.randperm(v, generator=torch.Generator().manual_seed(i))[: self.K]
                for i in range(n)
            ]
        )
        targets = TargetBatch(
            labels=torch.arange(n),
            ids=ids,
            logprobs=teacher[:, :-1].contiguous(),
            tail_logprob=teacher[:, -1],
        )
        return (
            normal(n, self.D, seed=1).requires_grad_(),
            normal(v, self.D, seed=2).requires_grad_(),
            targets,
        )

    def full(self, n):
        hidden, weight, targets = self.problem(n)
        whole = normal(n, self.V, seed=4).log_softmax(-1)
        nothing = torch.full((n,), -math.inf)
        return (
            hidden,
            weight,
            TargetBatch(labels=targets.labels, logprobs=whole, tail_logprob=nothing),
        )

    def step(self, hidden, weight, targets, **objective):
        def run():
            loss = linear_distillation(
                hidden,
                Head(weight=weight),
                targets,
                aim=Aim(objective=objective_of(**objective), **WEIGHTS),
            )
            loss.total.backward()

        return run

    def gradients_and_losses(self, n):
        return 4 * (n * self.D + self.V * self.D + 2 * n)

    @pytest.mark.parametrize(
        "objective", [{}, {"temperature": 2.0}, {"divergence": "jsd", "tail": "to_label"}]
    )
    @pytest.mark.parametrize("kind", ["problem", "full"])
    def test_the_peak_is_flat_in_the_tokens(self, kind, objective):
        """Beyond gradients and the losses of the tokens it holds a chunk of logits.

        It does so whatever the number of tokens.
        """
        beyond = []
        for n in (128, 1024):
            most, _ = allocated(self.step(*getattr(self, kind)(n), **objective))
            beyond.append(most - self.gradients_and_losses(n))
        assert max(beyond) < fused.CHUNK_BYTES + 20 * passes.CACHE_BYTES
        assert beyond[1] < 1.1 * beyond[0]

    def test_the_peak_is_a_fraction_of_plain_torch(self):
        hidden, weight, targets = self.problem(2048)
        plain, _ = allocated(lambda: naive(hidden, weight, targets).sum().backward())
        hidden.grad = weight.grad = None
        ours, _ = allocated(self.step(hidden, weight, targets))
        gradients = self.gradients_and_losses(2048)
        assert plain - gradients > 3 * 4 * 2048 * self.V  # three times the logits, at the least
        assert ours - gradients < (plain - gradients) / 6

    def test_what_waits_for_the_backward_pass_is_the_gradients(self):
        for v in (1024, 4096):
            problem = self.problem(512, v)
            _, left = allocated(lambda problem=problem: distilled(*problem))
            assert left <= 4 * (512 * self.D + v * self.D + 2 * 512) + 1024
