"""The fused loss.

Gradients made in the forward pass are tested against float64 autograd of the definition, and so is
what it holds.
"""

import math
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from kit import ENVIRONMENT
from objectives import objective_of
from references import DIVERGENCES, cross_entropy, softmax, token_losses
from sharded_head import RANKS, TOKENS, Student, gradients
from torch import nn
from torch.nn import functional

from stillroom.stages.losses.definition import logits_distillation
from stillroom.stages.losses.fused_linear import linear_distillation
from stillroom.stages.losses.objective import Aim
from stillroom.stages.models.head import Head, LowRank
from stillroom.stages.targets.batch import TargetBatch
from stillroom.storage.errors import UsageError

pytestmark = pytest.mark.numeric

N, V, D, R = 6, 11, 4, 2
HEADS = {"plain": {}, "changed": {"scale": 1.5, "softcap": 4.0}}
# As in test_tails.py: infinite where a teacher gives nothing to what is outside its entries.
PERMITTED = [
    (divergence, tail)
    for divergence, tail in product(DIVERGENCES, ("bucket", "drop", "renormalize", "to_label"))
    if tail in ("bucket", "renormalize") or divergence not in ("reverse_kl", "adaptive_kl")
]


WEIGHTS = {"soft_weight": 0.7, "hard_weight": 0.3}


def distilled(hidden, weight, targets, **objective):
    return linear_distillation(
        hidden,
        Head(weight=weight),
        targets,
        aim=Aim(objective=objective_of(**objective), **WEIGHTS),
    )


def usual():
    """States, head and targets with ragged entries."""
    return leaf(N, D, seed=1), leaf(V, D, seed=2), ragged(2 * normal(N, V, seed=4))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape, seed):
    return normal(*shape, seed=seed).requires_grad_()


def ragged(teacher, *, temperature=1.0, empty=False):
    """Entries as a nucleus has them: 1 to 5 in a row, -1 in between.

    The labels are in and out of them.
    """
    logprobs = (teacher.double() / temperature).log_softmax(-1)
    kept, ids = logprobs.topk(5, -1)
    absent = torch.arange(5)[None] > torch.arange(len(ids))[:, None] % 5
    if empty:
        absent[0] = True
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    kept, ids = (
        kept.masked_fill(absent, -math.inf)[:, shuffled],
        ids.masked_fill(absent, -1)[:, shuffled],
    )
    outside = [[i for i in range(V) if i not in row] for row in ids.tolist()]
    tail = torch.stack(
        [row[others].logsumexp(-1) for row, others in zip(logprobs, outside, strict=True)]
    )
    labels = torch.where(torch.arange(len(ids)) % 2 == 0, ids.amax(-1).clamp_min(0), 7)
    return TargetBatch(labels=labels, ids=ids, logprobs=kept.float(), tail_logprob=tail.float())


def sampled(teacher, *, temperature=1.0):
    """Shares of draws of ids, with what is no draw among them."""
    ids = torch.stack(
        [
            torch.randperm(V, generator=torch.Generator().manual_seed(i))[:4]
            for i in range(len(teacher))
        ]
    )
    shares = normal(len(ids), 4, seed=8).softmax(-1).masked_fill(torch.arange(4)[None] == 2, 0.0)
    log_t = (teacher / temperature).log_softmax(-1)
    return TargetBatch(
        labels=torch.arange(len(ids)),
        ids=ids.masked_fill(torch.arange(4)[None] == 2, -1),
        probabilities=shares,
        entropy=-(log_t.exp() * log_t).sum(-1),
    )


def reference_logits(hidden, weight, bias, head):
    logits = (hidden @ weight.T + bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def assert_is_the_definition(targets, objective, head, define):
    """Value and gradients are those of the definition, at chunks of all sizes.

    `define(logits [V], token)` gives soft and hard of one token.
    """
    hidden, weight, bias = leaf(N, D, seed=1), leaf(V, D, seed=2), leaf(V, seed=3)
    head = Head(weight=weight, bias=bias, **head)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    logits = reference_logits(*leaves, head)
    soft, hard = map(
        torch.stack, zip(*(define(row, n) for n, row in enumerate(logits)), strict=True)
    )
    right = torch.autograd.grad((0.7 * soft + 0.3 * hard).sum(), leaves)
    for chunk in (1, 4, None):
        aim = Aim(objective=objective, **WEIGHTS)
        found = linear_distillation(hidden, head, targets, aim=aim, chunk_tokens=chunk)
        torch.testing.assert_close(found.soft.double(), soft.detach(), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found.hard.double(), hard.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.total.double(), (0.7 * soft + 0.3 * hard).sum(), rtol=1e-5, atol=1e-5
        )
        for one, other in zip(
            torch.autograd.grad(found.total, [hidden, weight, bias]), right, strict=True
        ):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_a_teacher_of_weight_0_adds_nothing_where_its_divergence_is_infinite():
    """Every other token has a draw that the student rules out (a bias of -inf).

    Elsewhere the divergence counts.
    """
    silent, drawn = torch.arange(N) % 2 == 0, torch.stack([torch.arange(N), torch.arange(N) + 1], 1)
    drawn[silent, 1] = V - 1
    targets = TargetBatch(
        labels=torch.arange(N),
        ids=drawn,
        probabilities=torch.full((N, 2), 0.5),
        entropy=torch.full((N,), 0.1),
        weights=torch.where(silent, 0.0, 0.5),
    )
    bias = torch.where(torch.arange(V) == V - 1, -math.inf, 0.0)
    hidden, weight = leaf(N, D, seed=1), leaf(V, D, seed=2)
    logprobs = (hidden @ weight.T + bias).log_softmax(-1)
    hard = -logprobs[torch.arange(N), torch.arange(N)]
    soft = -0.5 * logprobs[~silent][:, :V].gather(-1, drawn[~silent]).sum(-1) - 0.1
    expected = torch.autograd.grad(0.3 * hard.sum() + 0.7 * 0.5 * soft.sum(), [hidden, weight])
    aim = Aim(objective=objective_of(), **WEIGHTS)
    dense = logits_distillation(hidden @ weight.T + bias, targets, objective=aim.objective)
    fused = linear_distillation(hidden, Head(weight=weight, bias=bias), targets, aim=aim)
    for found, total in ((dense, dense.summed(aim).total), (fused, fused.total)):
        assert (found.soft[silent] == 0).all()
        torch.testing.assert_close(found.soft[~silent].detach(), 0.5 * soft.detach())
        for mine, true in zip(torch.autograd.grad(total, [hidden, weight]), expected, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("divergence", "tail"), PERMITTED)
def test_ragged_entries_value_and_gradient(divergence, tail, temperature):
    teacher = 2 * normal(N, V, seed=4)
    targets = ragged(teacher, temperature=temperature, empty=tail == "bucket")
    settings = {"divergence": divergence, "tail": tail, "temperature": temperature}
    t = [softmax(row / temperature) for row in teacher]

    def define(row, n):
        return token_losses(
            row,
            t[n],
            [i for i in targets.ids[n].tolist() if i >= 0],
            int(targets.labels[n]),
            **settings,
        )

    for head in HEADS.values():
        assert_is_the_definition(targets, objective_of(**settings), head, define)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", HEADS)
def test_sampled_targets_value_and_gradient(head, temperature):
    targets = sampled(normal(N, V, seed=4), temperature=temperature)

    def define(row, n):
        log_p = softmax(row / temperature).log()
        drawn = zip(targets.ids[n].tolist(), targets.probabilities[n].double(), strict=True)
        soft = (
            -torch.stack([share * log_p[i] for i, share in drawn if i >= 0]).sum()
            - targets.entropy[n]
        )
        return temperature**2 * soft, cross_entropy(row, n)

    assert_is_the_definition(targets, objective_of(temperature=temperature), HEADS[head], define)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_full_targets_value_and_gradient(divergence, temperature):
    teacher = 2 * normal(N, V, seed=4)
    nothing = torch.full((N,), -math.inf)
    logprobs = (teacher / temperature).log_softmax(-1)
    targets = TargetBatch(labels=torch.arange(N), logprobs=logprobs, tail_logprob=nothing)
    settings = {"divergence": divergence, "tail": "bucket", "temperature": temperature}

    def define(row, n):
        return token_losses(row, softmax(teacher[n] / temperature), range(V), n, **settings)

    for head in HEADS.values():
        assert_is_the_definition(targets, objective_of(**settings), head, define)


def test_a_pass_is_the_sum_of_its_tokens():
    """Any split into passes has the same gradient: 2 x 3 tokens and 6 x 1 as 1 x 6."""
    hidden, weight, targets = usual()
    found = []
    for size in (6, 3, 1):
        hidden.grad = weight.grad = None
        for start in range(0, N, size):
            distilled(
                hidden[start : start + size], weight, targets.rows(start, start + size)
            ).total.backward()
        found.append((hidden.grad, weight.grad))
    for one, other in pairwise(found):
        torch.testing.assert_close(one, other)


def test_the_upstream_gradient_scales_all():
    hidden, weight, targets = usual()
    totals = [distilled(hidden, weight, targets).total for _ in range(2)]
    plain = torch.autograd.grad(totals[0], [hidden, weight])
    through = torch.autograd.grad((-3.0 * totals[1]).square(), [hidden, weight])
    for one, other in zip(plain, through, strict=True):
        torch.testing.assert_close(18.0 * totals[1].detach() * one, other)


def test_the_gradient_can_be_taken_once():
    hidden, weight, targets = usual()
    total = distilled(hidden, weight, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before and is gone"):
        total.backward()


def test_a_tied_weight_gets_both_gradients():
    embedding, targets = leaf(V, D, seed=2), ragged(2 * normal(N, V, seed=4))
    ids = torch.arange(N)
    hidden = torch.tanh(functional.embedding(ids, embedding))
    distilled(hidden, embedding, targets).total.backward()
    apart = [embedding.detach().clone().requires_grad_() for _ in range(2)]
    hidden = torch.tanh(functional.embedding(ids, apart[0]))
    distilled(hidden, apart[1], targets).total.backward()
    torch.testing.assert_close(embedding.grad, apart[0].grad + apart[1].grad)


def products_of(function):
    """Matrix products of a function, by the names of torch's operators."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        function()
    events = record.key_averages()
    return sum(
        event.count for event in events if event.key in ("aten::mm", "aten::addmm", "aten::addmm_")
    )


def test_only_what_trains_costs_a_product():
    """Three with a head that trains, two with a frozen one, one where nothing is to be learnt."""
    targets = ragged(2 * normal(N, V, seed=4))

    def step(hidden_trains, head_trains):
        hidden = normal(N, D, seed=1).requires_grad_(hidden_trains)
        weight = normal(V, D, seed=2).requires_grad_(head_trains)
        total = distilled(hidden, weight, targets).total
        if hidden_trains or head_trains:
            total.backward()
        return hidden.grad, weight.grad, total

    assert [
        products_of(lambda a=a, b=b: step(a, b)) for a, b in product((True, False), repeat=2)
    ] == [3, 2, 2, 1]
    both, frozen, evaluated = step(True, True), step(True, False), step(False, False)
    torch.testing.assert_close(both[0], frozen[0])
    assert frozen[1] is None
    assert not evaluated[2].requires_grad
    torch.testing.assert_close(both[2], evaluated[2])


def test_without_gradients_there_is_one_product():
    with torch.no_grad():
        assert products_of(lambda: distilled(*usual())) == 1


class TestLowRank:
    def problem(self, base_trains):
        parts = {
            "hidden": normal(N, D, seed=1),
            "down": normal(R, D, seed=5),
            "up": normal(V, R, seed=6),
        }
        parts |= {"weight": normal(V, D, seed=2), "bias": normal(V, seed=3)}
        return {
            k: v.requires_grad_(base_trains or k not in ("weight", "bias"))
            for k, v in parts.items()
        }

    @pytest.mark.parametrize("base_trains", [False, True])
    @pytest.mark.parametrize("settings", HEADS)
    def test_value_and_gradients(self, settings, base_trains):
        parts, targets = self.problem(base_trains), ragged(2 * normal(N, V, seed=4))
        low_rank = LowRank(down=parts["down"], up=parts["up"], scale=0.5, dropout=nn.Identity())
        head = Head(
            weight=parts["weight"], bias=parts["bias"], low_rank=low_rank, **HEADS[settings]
        )
        found = linear_distillation(
            parts["hidden"],
            head,
            targets,
            aim=Aim(objective=objective_of(divergence="jsd"), **WEIGHTS),
            chunk_tokens=4,
        )
        exact = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in parts.items()}
        weight = exact["weight"] + 0.5 * exact["up"] @ exact["down"]
        logits = reference_logits(exact["hidden"], weight, exact["bias"], head)
        total = 0.0
        for n, row in enumerate(logits):
            t, ids = (
                softmax(2 * normal(N, V, seed=4)[n]),
                [i for i in targets.ids[n].tolist() if i >= 0],
            )
            sides = {"divergence": "jsd", "tail": "bucket", "temperature": 1.0}
            soft, hard = token_losses(row, t, ids, int(targets.labels[n]), **sides)
            total = total + 0.7 * soft + 0.3 * hard
        names = [k for k, v in parts.items() if v.requires_grad]
        right = torch.autograd.grad(total, [exact[k] for k in names])
        gradients = torch.autograd.grad(found.total, [parts[k] for k in names])
        for one, other in zip(gradients, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)

    def test_of_a_model_with_an_adapter(self):
        """PEFT's own layer, with its dropout on.

        The same seed gives the same logits, and so the same gradients.
        """
        from peft import LoraConfig, get_peft_model
        from tiny_models import CONFIGS, build

        from stillroom.stages.models.head import hidden_states, split_head

        config = LoraConfig(target_modules=["q_proj", "lm_head"], r=3, lora_dropout=0.3)
        model = get_peft_model(build(CONFIGS["llama"]), config).train()
        vocab = split_head(model).vocab_size
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        ids, labels = torch.arange(9)[None], torch.arange(9) % vocab
        found = []
        for own in (True, False):
            model.zero_grad()
            torch.manual_seed(3)
            if own:
                hidden = hidden_states(model, input_ids=ids)[0]
                targets = TargetBatch(labels=labels)
                aim = Aim(objective=None, soft_weight=0.0, hard_weight=1.0)
                linear_distillation(hidden, split_head(model), targets, aim=aim).total.backward()
            else:
                functional.cross_entropy(
                    model(input_ids=ids).logits[0], labels, reduction="sum"
                ).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert any("lm_head.lora_B" in name for name in found[0])
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_head_that_is_sharded_over_two_ranks(tmp_path: Path) -> None:
    """FSDP2 on two processes.

    The mean over the ranks is what one process finds, for the head as for the body.
    """
    script = Path(__file__).parents[2] / "support" / "sharded_head.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), tmp_path], env=ENVIRONMENT, stderr=subprocess.PIPE
        )
        for rank in range(RANKS)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, errors
    expected = gradients(Student(), slice(0, TOKENS))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    torch.testing.assert_close(
        torch.cat([rank.pop("hidden") for rank in found]), expected.pop("hidden")
    )
    for rank in found:
        assert rank.keys() == expected.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient * RANKS, expected[name])


def test_float32_weights_under_bfloat16_states_get_float32_gradients():
    hidden, weight = normal(N, D, seed=1).bfloat16().requires_grad_(), leaf(V, D, seed=2)
    targets = ragged(2 * normal(N, V, seed=4))
    distilled(hidden, weight, targets).total.backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_has_no_say():
    hidden, weight, targets = usual()
    plain = distilled(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distilled(hidden, weight, targets)
    assert torch.equal(plain.total, inside.total)
    assert torch.equal(*(torch.autograd.grad(loss.total, weight)[0] for loss in (plain, inside)))


def test_no_tokens_are_no_loss():
    hidden, weight, bias = leaf(0, D, seed=1), leaf(V, D, seed=2), leaf(V, seed=3)
    targets = ragged(2 * normal(N, V, seed=4)).rows(0, 0)
    head = Head(weight=weight, bias=bias)
    found = linear_distillation(hidden, head, targets, aim=Aim(objective=objective_of(), **WEIGHTS))
    found.total.backward()
    assert float(found.total.detach()) == 0
    assert found.soft.shape == found.hard.shape == (0,)
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("definition", [False, True])
def test_a_part_that_weighs_nothing_may_be_infinite(full, definition):
    """A label has probability 0, or a divergence is from what is nowhere.

    Total and gradient are those of the other part.
    """
    hidden, weight, bias = leaf(N, D, seed=1), leaf(V, D, seed=2), normal(V, seed=3)
    bias[7] = -math.inf
    teacher = 2 * normal(N, V, seed=4)
    teacher[:, 7] = -50.0
    sides = {"logprobs": teacher.log_softmax(-1), "tail_logprob": torch.full((N,), -math.inf)}
    if not full:
        found = ragged(teacher)
        sides = {name: getattr(found, name) for name in ("ids", "logprobs", "tail_logprob")}
    infinite, finite = (
        TargetBatch(labels=torch.arange(start, start + N), **sides) for start in (2, 0)
    )

    def found(asked, soft_weight, hard_weight, objective):
        if definition:
            parts = logits_distillation(hidden @ weight.T + bias, asked, objective=objective)
            total = parts.weighted(soft_weight, hard_weight).sum()
        else:
            weights = {"soft_weight": soft_weight, "hard_weight": hard_weight}
            total = linear_distillation(
                hidden,
                Head(weight=weight, bias=bias),
                asked,
                aim=Aim(objective=objective, **weights),
            ).total
        return total, *torch.autograd.grad(total, [hidden, weight])

    soft = objective_of(divergence="total_variation")  # finite, wherever the two have their mass
    for one, other in zip(
        found(infinite, 1.0, 0.0, soft), found(finite, 1.0, 0.0, soft), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other)
    assert not any(part.any() for part in found(infinite, 0.0, 0.0, soft))
    if not full:
        endless = objective_of(divergence="reverse_kl", tail="drop")
        for one, other in zip(
            found(finite, 0.0, 1.0, endless), found(finite, 0.0, 1.0, soft), strict=True
        ):
            assert other.any()
            torch.testing.assert_close(one, other)


def test_a_kernel_that_cannot_run_is_refused_by_name():
    hidden, weight, targets = usual()
    settings = {"aim": Aim(objective=objective_of(), **WEIGHTS)}
    with pytest.raises(
        UsageError, match=r"train\.kernel: triton cannot run, the model is on .* 'cpu', expected an"
    ):
        linear_distillation(hidden, Head(weight=weight), targets, kernel="triton", **settings)
    named = linear_distillation(hidden, Head(weight=weight), targets, kernel="torch", **settings)
    assert torch.equal(named.total, distilled(hidden, weight, targets).total)
