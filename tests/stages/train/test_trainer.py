"""One step: what its gradient is, and what happens when memory runs out or numbers break."""

import math
from dataclasses import replace

import pytest
import torch
from objectives import objective_of
from references import DIVERGENCES
from tiny_models import CONFIGS, LENGTHS, V, build, make_samples

from stillroom.stages.loader.packing import Packing
from stillroom.stages.loader.prefetch import Prefetch
from stillroom.stages.loader.samples import Cursor, Step
from stillroom.stages.losses.definition import logits_distillation
from stillroom.stages.losses.objective import Aim, aim_at
from stillroom.stages.models.device import device_and_dtype
from stillroom.stages.models.head import hidden_states, split_head
from stillroom.stages.recipe.sections import Loss, Train
from stillroom.stages.targets.batch import TargetBatch
from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.stages.train.together.means import means_of
from stillroom.stages.train.trainer import Trainer
from stillroom.storage.errors import StillroomError, Stopped
from stillroom.storage.files.local import LocalFiles

pytestmark = pytest.mark.numeric


def make_trainer(model=None, *, loss=None, dtype=torch.float32, tokens_per_pass=40, **changes):
    settings = {
        "tokens": 1000,
        "learning_rate": 1e-2,
        "warmup_fraction": 0.0,
        "schedule": "constant",
    } | changes
    return Trainer(
        build(CONFIGS["llama"]) if model is None else model,
        packing=Packing(tokens_per_pass=tokens_per_pass, vocab_size=V),
        loss=loss or Loss(),
        train=Train(**settings),
        dtype=dtype,
    )


def make_step(number=1, lengths=LENGTHS, **more):
    return Step(samples=make_samples(lengths, **more), after=Cursor(step=number))


def expected_gradient(model, step, loss):
    """Each sample alone, its losses summed by hand, over the scored tokens of all."""
    model.zero_grad()
    total = 0.0
    for sample in step.samples:
        hidden = hidden_states(model, input_ids=torch.from_numpy(sample.token_ids[None]).long())[0]
        targets = TargetBatch(
            labels=torch.from_numpy(sample.token_ids[sample.spans[0, 0] :]).long(),
            ids=torch.from_numpy(sample.targets.ids).long(),
            logprobs=torch.from_numpy(sample.targets.logprobs),
            tail_logprob=torch.from_numpy(sample.targets.tail_logprob),
        )
        states = hidden[sample.spans[0, 0] - 1 : -1]
        logits = split_head(model).logits(states)
        parts = logits_distillation(
            logits, targets, objective=objective_of(divergence=loss.divergence)
        )
        total = total + (loss.soft_weight * parts.soft + loss.hard_weight * parts.hard).sum()
    (total / step.scored_tokens).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return float(total.detach()) / step.scored_tokens, gradients


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradient_is_the_mean_over_the_steps_scored_tokens(divergence):
    loss = Loss(divergence=divergence, soft_weight=0.8, hard_weight=0.3)
    trainer, step = make_trainer(loss=loss), make_step()
    value, expected = expected_gradient(trainer.model, step, loss)
    losses = trainer._gradients(step, aim_at(loss, 0.5), lambda: trainer.passes(step, done=0.5))
    assert losses.loss == pytest.approx(value, rel=1e-5)
    assert losses.loss == pytest.approx(0.8 * losses.soft + 0.3 * losses.hard)
    for found, right in zip((p.grad for p in trainer.model.parameters()), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_steps_lower_the_loss_and_validation_changes_nothing():
    trainer, step = make_trainer(), make_step()
    before = trainer.validate([step])
    weights = {name: w.clone() for name, w in trainer.weights().items()}
    assert trainer.validate([step]) == before
    assert all(torch.equal(w, weights[name]) for name, w in trainer.weights().items())
    results = [trainer.step(make_step(n), done=n / 20) for n in range(1, 21)]
    after = trainer.validate([step])
    assert results[0].losses.loss == pytest.approx(before.loss, rel=1e-5)
    assert after.loss < 0.7 * before.loss
    assert after.soft < before.soft


def test_gradient_norm_is_reported_before_clipping_and_clipped():
    weights = []
    for clip in (1e-3, 1e3):
        trainer = make_trainer(clip_norm=clip, betas=(0.0, 0.0), weight_decay=0.0)
        _, gradients = expected_gradient(trainer.model, make_step(), Loss())
        result = trainer.step(make_step(), done=0.5)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        weights.append(trainer.weights())
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_a_schedule_that_never_changes_is_the_number_bit_for_bit():
    def constant(value):
        flat = {"start": value, "end": value}
        return [
            value,
            flat | {"shape": "linear"},
            flat | {"shape": "cosine"},
            flat | {"shape": "wsd", "peak": value},
        ]

    found = []
    for soft, hard, temperature in zip(constant(0.7), constant(0.3), constant(1.0), strict=True):
        trainer = make_trainer(
            loss=Loss(soft_weight=soft, hard_weight=hard, temperature=temperature)
        )
        results = [trainer.step(make_step(n), done=n / 3) for n in (1, 2, 3)]
        found.append(
            ([r.losses for r in results], trainer.validate([make_step()]), trainer.weights())
        )
    for losses, validation, weights in found[1:]:
        assert (losses, validation) == found[0][:2]
        assert all(torch.equal(weight, found[0][2][name]) for name, weight in weights.items())


def test_validations_compare_over_a_schedule():
    """At the settings that the training ends with, whenever it is."""
    moving = {"shape": "linear", "start": 2.0, "end": 0.5}
    trainer = make_trainer(loss=Loss(soft_weight=moving, hard_weight=0.1, temperature=1.0))
    fixed = make_trainer(loss=Loss(soft_weight=0.5, hard_weight=0.1))
    assert trainer.validate([make_step()]) == fixed.validate([make_step()])


def test_cross_entropy_alone_never_reads_the_targets():
    trainer = make_trainer(loss=Loss(soft_weight=0.0, hard_weight=1.0))
    with_targets, without = make_step(), make_step(k=0)
    assert trainer.validate([with_targets]) == trainer.validate([without])
    assert trainer.validate([without]).soft is None


def test_a_mean_that_weighs_nothing_is_left_out():
    sums, objective = torch.tensor([6.0, torch.inf, 3.0], dtype=torch.float64), objective_of()
    found = means_of(sums, 3, Aim(soft_weight=0.5, hard_weight=0.0, objective=objective))
    assert (found.loss, found.soft, found.hard) == (1.0, 2.0, math.inf)
    assert (
        means_of(
            sums[[1, 0, 2]], 3, Aim(soft_weight=0.0, hard_weight=0.5, objective=objective)
        ).loss
        == 1.0
    )


def fail_above(trainer, tokens, error):
    """The forward pass fails where it holds more than so many positions."""
    calls, inner = [], trainer._pass

    def limited(batch, aim):
        calls.append(batch.token_ids.numel())
        if calls[-1] > tokens:
            raise error
        return inner(batch, aim)

    trainer._pass = limited
    return calls


def test_out_of_memory_halves_the_passes_and_retries_the_step():
    undisturbed, trainer = make_trainer(tokens_per_pass=25), make_trainer(tokens_per_pass=100)
    calls = fail_above(trainer, 30, torch.OutOfMemoryError("tried to allocate"))
    expected = undisturbed.step(make_step(), done=0.5)
    result = trainer.step(make_step(), done=0.5)
    assert trainer.tokens_per_pass == 25
    assert calls[0] > 30
    assert result.losses.loss == pytest.approx(expected.losses.loss)
    for name, weight in trainer.weights().items():
        assert torch.equal(weight, undisturbed.weights()[name])


def test_out_of_memory_with_one_sample_is_said():
    trainer = make_trainer()
    fail_above(trainer, 0, torch.OutOfMemoryError("tried to allocate 20.00 GiB"))
    with pytest.raises(
        StillroomError,
        match=r"forward pass of 20 tokens, one sample alone .*gradient_checkpointing",
    ):
        trainer.step(make_step(), done=0.5)


def test_out_of_memory_in_a_validation_halves_the_passes_or_is_said():
    usual, trainer = make_trainer().validate([make_step()]), make_trainer(tokens_per_pass=100)
    fail_above(trainer, 30, torch.OutOfMemoryError("tried to allocate"))
    found = trainer.validate([make_step()])
    assert trainer.tokens_per_pass == 25
    # Passes of 25 tokens instead of 40: other shapes of the same products, a few eps = 1.2e-7 of a
    # loss.
    assert (found.loss, found.soft, found.hard) == pytest.approx(
        (usual.loss, usual.soft, usual.hard), rel=1e-5
    )
    fail_above(trainer, 0, torch.OutOfMemoryError("tried to allocate 20.00 GiB"))
    with pytest.raises(
        StillroomError,
        match=r"forward pass of 20 tokens, one sample alone .*gradient_checkpointing",
    ):
        trainer.validate([make_step()])


@pytest.mark.parametrize("error", [Stopped("stop"), RuntimeError("broken")])
def test_nothing_has_changed_when_a_step_raises(error):
    trainer = make_trainer()
    before = {name: w.clone() for name, w in trainer.weights().items()}

    def raise_at_second(count=[0]):  # noqa: B006
        count[0] += 1
        if count[0] == 2:
            raise error

    with pytest.raises(type(error)):
        trainer.step(make_step(), done=0.5, between_passes=raise_at_second)
    assert all(torch.equal(w, before[name]) for name, w in trainer.weights().items())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[3, 0] = torch.inf
    before = {name: w.clone() for name, w in trainer.weights().items()}
    with pytest.raises(
        StillroomError, match=r"at step 4 the loss is (nan|inf).*Lower train\.learning_rate"
    ):
        trainer.step(make_step(4), done=0.5)
    assert all(torch.equal(w, before[name]) for name, w in trainer.weights().items())


def outputs_of(layer):
    """The dtypes of all that a layer will give."""
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    return seen


def test_bfloat16_passes_keep_float32_weights_and_nearly_the_same_loss():
    exact, half = make_trainer(), make_trainer(dtype=torch.bfloat16)
    made = [outputs_of(t.model.model.layers[0].mlp.down_proj) for t in (exact, half)]
    first = [t.step(make_step(), done=0.5).losses for t in (exact, half)]
    assert first[1].loss == pytest.approx(first[0].loss, rel=2e-2)
    assert [set(dtypes) for dtypes in made] == [{torch.float32}, {torch.bfloat16}]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert {v.dtype for s in half.optimizer.state.values() for v in s.values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing_but_memory():
    plain, saving = make_trainer(), make_trainer()
    saving.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    for trainer in (plain, saving):
        trainer.step(make_step(), done=0.5)
    for name, weight in plain.weights().items():
        torch.testing.assert_close(saving.weights()[name], weight, rtol=1e-6, atol=1e-7)


def test_dropout_is_a_function_of_the_step():
    models = [build(CONFIGS["gpt2"]) for _ in range(2)]
    assert models[0].config.resid_pdrop > 0
    one, two = map(make_trainer, models)
    torch.manual_seed(1)
    first = one.step(make_step(), done=0.5)
    torch.manual_seed(2)
    assert two.step(make_step(), done=0.5) == first


def test_state_goes_on_exactly(tmp_path):
    whole, stopped = make_trainer(), make_trainer()
    for n in (1, 2):
        whole.step(make_step(n), done=n / 9)
        stopped.step(make_step(n), done=n / 9)
    resumed = make_trainer()
    checkpoints = Checkpoints(LocalFiles(tmp_path))
    checkpoints.save(2, stopped.state(), {})
    resumed.load_state(checkpoints.tensors(2))
    for n in (3, 4):
        assert resumed.step(make_step(n), done=n / 9) == whole.step(make_step(n), done=n / 9)
    assert all(torch.equal(w, resumed.weights()[name]) for name, w in whole.weights().items())


def test_where_to_compute(monkeypatch):
    from stillroom.stages.recipe.sections import Student

    def chosen(dtype):
        return device_and_dtype(Student(config={}, dtype=dtype))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen("auto") == (torch.device("cpu"), torch.float32)
    assert chosen("bfloat16") == (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert chosen("auto") == (torch.device("cuda"), torch.bfloat16)
    assert chosen("float32") == (torch.device("cuda"), torch.float32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert chosen("auto") == (torch.device("cuda"), torch.float32)


def fed(trainer, steps, total):
    """The results of some steps whose passes are made ahead."""
    with Prefetch(steps, lambda step: trainer.passes(step, done=step.after.step / total)) as feed:
        return [
            trainer.step(step, done=step.after.step / total, passes=feed.passes) for step in feed
        ]


def test_passes_made_ahead_change_nothing():
    """What is scheduled goes by the step that a pass belongs to.

    It does not go by the time at which the pass is made.
    """
    loss = Loss(temperature={"shape": "linear", "start": 3.0, "end": 1.0})
    plain, ahead = make_trainer(loss=loss), make_trainer(loss=loss)
    for trainer in (plain, ahead):
        trainer._packing = replace(trainer._packing, unstored_temperature="approximate")
    steps = [make_step(n) for n in range(1, 7)]
    assert fed(ahead, steps, 6) == [plain.step(step, done=step.after.step / 6) for step in steps]
    for name, weight in plain.weights().items():
        assert torch.equal(ahead.weights()[name], weight)


def test_out_of_memory_throws_away_what_was_made_ahead():
    """The third step does not fit; passes of the fourth were made in the old size by then."""
    undisturbed, trainer = make_trainer(tokens_per_pass=25), make_trainer(tokens_per_pass=100)
    steps = [make_step(1, LENGTHS[:1]), make_step(2, LENGTHS[:2]), make_step(3), make_step(4)]
    calls = fail_above(trainer, 30, torch.OutOfMemoryError("tried to allocate"))
    found = fed(trainer, steps, 4)
    assert [result.losses for result in found] == [
        undisturbed.step(step, done=step.after.step / 4).losses for step in steps
    ]
    assert sum(call > 30 for call in calls) == 2  # 64 positions, then 32


def test_positions_are_those_of_the_passes_that_counted():
    trainer = make_trainer(tokens_per_pass=100)
    calls = fail_above(trainer, 30, torch.OutOfMemoryError("tried to allocate"))
    result = trainer.step(make_step(), done=0.5)
    assert result.positions == sum(call for call in calls if call <= 30) >= sum(LENGTHS)
