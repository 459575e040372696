"""Angle and norm ratio of gradients.

Those of vectors are tested by geometry, those of a small transformer by plain autograd in float64.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from objectives import objective_of
from tiny_models import CONFIGS, V, build

from stillroom.stages.evaluate.gradients import angle_and_ratio, compare_gradients, kept_of
from stillroom.stages.loader.packing import Packing
from stillroom.stages.losses.objective import Objective
from stillroom.stages.targets.spec import Kept
from stillroom.storage.tables.soft_targets import SoftTargets

pytestmark = pytest.mark.numeric

PACKING = Packing(tokens_per_pass=1, shared_rows=False, vocab_size=V)
FORWARD_KL = objective_of()


def held_out_row(length: int, *, start: int, seed: int, k: int | None = None) -> dict[str, object]:
    """A row with random reference targets: full, or the best k and a tail."""
    rng = np.random.default_rng(seed)
    span = length - start
    logprobs = torch.from_numpy(2 * rng.normal(size=(span, V))).log_softmax(-1)
    nothing = np.zeros(span, np.float32)
    row = {
        "generation_key": bytes([seed]) * 16,
        "token_ids": rng.integers(0, V, length).astype(np.int32),
        "spans": np.array([[start, span]]),
        "span_tokens": span,
        "k": V if k is None else k,
        "token_logprob": nothing,
        "entropy": nothing,
    }
    if k is None:
        return row | {
            "ids": None,
            "logprobs": logprobs.float().numpy().reshape(-1),
            "tail_logprob": nothing - np.inf,
        }
    kept, ids = logprobs.topk(k)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1).float().numpy()
    entries = {"ids": ids.int().numpy().reshape(-1), "logprobs": kept.float().numpy().reshape(-1)}
    return row | entries | {"tail_logprob": tail}


def rows(k: int | None = None) -> list[dict[str, object]]:
    return [held_out_row(n, start=2, seed=seed, k=k) for seed, n in enumerate((9, 5, 14, 7))]


def compared(model, kept: Kept, objective: Objective = FORWARD_KL, found=None) -> dict[str, float]:
    return compare_gradients(
        model, found or rows(), kept=kept, objective=objective, packing=PACKING
    )


def test_angle_and_ratio_of_vectors_whose_geometry_is_known() -> None:
    a = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert angle_and_ratio(a, a) == (0.0, 1.0)
    assert angle_and_ratio(-2 * a, a) == (180.0, 2.0)
    for degrees in (1e-7, 0.01, 30.0, 60.0, 90.0, 179.0, 180 - 1e-7):
        turned = torch.tensor(
            [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], dtype=torch.float64
        )
        angle, ratio = angle_and_ratio(5e-20 * turned, 1e-20 * torch.tensor([1.0, 0.0]).double())
        assert angle == pytest.approx(degrees, rel=1e-6)
        assert ratio == pytest.approx(5.0)


def test_a_gradient_in_parts_is_the_same_as_all_of_it_flat() -> None:
    one, other = (
        torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )
    whole = angle_and_ratio(one, other)
    assert angle_and_ratio([one[:3], one[3:]], [other[:3], other[3:]]) == pytest.approx(whole)
    cosine = float((one * other).sum() / one.norm() / other.norm())
    assert whole[0] == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-5)


def test_an_angle_with_nothing_is_not_a_number() -> None:
    nothing, something = torch.zeros(3), torch.ones(3)
    assert math.isnan(angle_and_ratio(nothing, something)[0])
    assert angle_and_ratio(nothing, something)[1] == 0.0
    assert all(map(math.isnan, angle_and_ratio(something, nothing)))
    assert math.isnan(angle_and_ratio(torch.tensor([math.inf, 1.0, 1.0]), something)[0])


def bucket(t: torch.Tensor, log_p: torch.Tensor, best: list[int], label: int) -> torch.Tensor:
    rest = [i for i in range(V) if i not in best]
    kept = sum(t[i] * (t[i].log() - log_p[i]) for i in best)
    return kept + t[rest].sum() * (t[rest].sum().log() - log_p[rest].exp().sum().log())


def drop(t: torch.Tensor, log_p: torch.Tensor, best: list[int], label: int) -> torch.Tensor:
    return sum(t[i] / t[best].sum() * ((t[i] / t[best].sum()).log() - log_p[i]) for i in best)


def to_label(t: torch.Tensor, log_p: torch.Tensor, best: list[int], label: int) -> torch.Tensor:
    target = {i: t[i] for i in best}
    target[label] = target.get(label, 0.0) + 1 - t[best].sum()
    return sum(value * (value.log() - log_p[i]) for i, value in target.items())


@pytest.mark.parametrize("loss", [bucket, drop, to_label])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_angle_is_that_of_plain_autograd_on_the_whole_model(
    loss: Callable[..., torch.Tensor], temperature
) -> None:
    model = build(CONFIGS["llama"])
    kept = Kept(kind="topk", k=4, temperatures=() if temperature == 1.0 else (temperature,))
    objective = objective_of(tail=loss.__name__, temperature=temperature)  # type: ignore[arg-type]
    found = compared(model, kept, objective)

    exact = build(CONFIGS["llama"]).double()
    sparse, full = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for row in rows():
        ids, start = torch.tensor(row["token_ids"]).long(), int(row["spans"][0, 0])
        logits = exact(input_ids=ids[None]).logits[0]
        teacher = torch.tensor(row["logprobs"]).double().reshape(-1, V)
        for n, z in enumerate(teacher):
            t, log_p = (
                (z / temperature).softmax(-1),
                (logits[start - 1 + n] / temperature).log_softmax(-1),
            )
            sparse = sparse + loss(
                t, log_p, z.argsort(descending=True)[:4].tolist(), int(ids[start + n])
            )
            full = full + (t * (t.log() - log_p)).sum()
    one, other = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(total, list(exact.parameters()), retain_graph=True)
            ]
        )
        for total in (sparse, full)
    )
    angle = math.degrees(math.acos(float(one @ other / one.norm() / other.norm())))
    assert found["angle_degrees"] == pytest.approx(angle, rel=1e-4)
    assert found["norm_ratio"] == pytest.approx(float(one.norm() / other.norm()), rel=1e-4)
    assert angle > 1  # something to be measured
    assert found["tokens"] == sum(row["span_tokens"] for row in rows())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_has_one_even_after_passes_without_gradients(name: str) -> None:
    model = build(CONFIGS[name])
    with torch.inference_mode():  # what a model keeps of such a pass must not be in the way
        model(input_ids=torch.arange(12)[None])
    found = compared(model, Kept(kind="topk", k=4), objective_of(tail="drop"), rows()[:2])
    assert 0.1 < found["angle_degrees"] < 179
    assert found["norm_ratio"] > 0.1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_with_every_entry_kept_nothing_turns(divergence) -> None:
    model, objective = build(CONFIGS["llama"]), objective_of(divergence=divergence)
    for kept in (Kept(kind="topk", k=V), Kept(kind="topp", k=V, p=1.0, k_min=V)):
        found = compared(model, kept, objective)
        assert found["angle_degrees"] < 1e-3
        assert found["norm_ratio"] == pytest.approx(1.0, abs=1e-5)
    whole = compared(model, Kept(kind="full", k=V), objective)
    assert (whole["angle_degrees"], whole["norm_ratio"]) == (0.0, 1.0)


def test_more_draws_turn_the_gradient_less_and_the_same_seeds_turn_it_the_same() -> None:
    model = build(CONFIGS["llama"])

    def of(rounds: int) -> dict[str, float]:
        return compared(model, Kept(kind="sampled", k=rounds, draw="multinomial", proposal=1.0))

    few, many = of(4), of(400)
    assert few == of(4)
    assert few["angle_degrees"] > 3 * many["angle_degrees"]  # a tenth is expected
    assert many["norm_ratio"] == pytest.approx(1.0, abs=0.1)


def test_it_leaves_the_model_as_it_was() -> None:
    model = build(CONFIGS["llama"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compared(model, Kept(kind="topk", k=4), found=rows()[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_entries_and_a_tail_the_teacher_is_conditioned_on_the_entries() -> None:
    model, k = build(CONFIGS["llama"]), 9
    assert compared(model, Kept(kind="topk", k=k), found=rows(k))["angle_degrees"] < 1e-3
    stored = [
        row
        | {
            "temperatures": np.float32([2.0]),
            "tempered_tails": np.zeros(row["span_tokens"], np.float32),
        }
        for row in rows(k)
    ]
    tempered = compared(
        model, Kept(kind="topk", k=k, temperatures=(2.0,)), objective_of(temperature=2.0), stored
    )
    assert tempered["angle_degrees"] < 1e-3
    found = compared(model, Kept(kind="topk", k=3), objective_of(tail="drop"), rows(k))
    conditioned = []
    for row in rows(k):
        n = row["span_tokens"]
        wide = torch.full((n, V), -torch.inf)
        ids, values = (torch.tensor(row[name]).reshape(n, k) for name in ("ids", "logprobs"))
        wide.scatter_(-1, ids.long(), values.log_softmax(-1))
        none = np.full(n, -np.inf, np.float32)
        full = {"ids": None, "logprobs": wide.numpy().reshape(-1), "tail_logprob": none, "k": V}
        conditioned.append(row | full)
    expected = compared(model, Kept(kind="topk", k=3), objective_of(tail="drop"), conditioned)
    assert found["angle_degrees"] == pytest.approx(expected["angle_degrees"], rel=1e-4)
    assert found["angle_degrees"] > 1


def test_draws_are_of_the_ids_that_the_entries_have() -> None:
    row: dict[str, Any] = dict(rows(5)[0])
    n = row["span_tokens"]
    ids, values = row["ids"].reshape(n, 5), row["logprobs"].reshape(n, 5)
    reference = SoftTargets(ids, values, row["tail_logprob"], row["token_logprob"], row["entropy"])
    drawn = kept_of(
        reference, Kept(kind="sampled", k=4000, draw="systematic", proposal=1.0), seed=3
    )
    assert drawn.ids is not None
    share = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    for position in range(n):
        found = dict(
            zip(drawn.ids[position].tolist(), drawn.probabilities[position].tolist(), strict=True)
        )
        for i, probability in zip(ids[position].tolist(), share[position], strict=True):
            assert found.get(i, 0.0) == pytest.approx(probability, abs=1 / 4000)
