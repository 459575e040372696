"""States of blocks are those of plain transformers, bit by bit for a row alone.

They are the same whatever stands beside a row.
"""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONFIGS, build
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config
from transformers import T5ForConditionalGeneration as T5

from stillroom.stages.recipe.features import Feature
from stillroom.stages.targets.features.blocks import blocks_of, check_blocks, states_of
from stillroom.stages.targets.features.capture import capturing, check_capture
from stillroom.storage.errors import UsageError

LAYERS = (0, 1, 2)
NAMES = ("llama", "qwen3", "gpt2", "bert")
FEATURES = [Feature(kind="hidden", layer=layer, bits=32) for layer in LAYERS]


def model_of(name: str) -> Any:
    """Of three blocks."""
    if name != "bert":
        config = CONFIGS[name].__class__.from_dict(CONFIGS[name].to_dict())
        config.num_hidden_layers = 3
        if hasattr(config, "layer_types"):
            config.layer_types = ["full_attention"] * 3
        return build(config)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config).eval()


def normed(model: Any, states: Tensor) -> Tensor:
    """What transformers shows of the last block: in a model with a final norm, after it."""
    body = model.base_model
    norm = getattr(body, "norm", None) or getattr(body, "ln_f", None)
    return states if norm is None else norm(states)


def texts() -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(4, 24, n)) for n in (9, 5, 12)]


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_what_its_block_hands_on(name: str) -> None:
    model = model_of(name)
    check_capture(model, FEATURES)
    for ids in texts():
        with torch.no_grad(), capturing(model, FEATURES) as taken:
            model(input_ids=ids[None])
        (found,) = taken.rows([len(ids)])
        with torch.no_grad():
            shown = model(input_ids=ids[None], output_hidden_states=True).hidden_states
            last = normed(model, torch.from_numpy(found["hidden", 2]))
        for layer in LAYERS[:-1]:
            np.testing.assert_array_equal(found["hidden", layer], shown[layer + 1][0].numpy())
        np.testing.assert_allclose(last.numpy(), shown[3][0].numpy(), atol=1e-6)


@pytest.mark.numeric
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_pass_have_the_states_that_they_have_alone(name: str) -> None:
    model, rows = model_of(name), texts()
    ids = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    with torch.no_grad(), capturing(model, FEATURES) as taken:
        model(input_ids=ids, attention_mask=mask)
    together = taken.rows([len(text) for text in rows])
    for text, found in zip(rows, together, strict=True):
        with torch.no_grad(), capturing(model, FEATURES) as alone:
            model(input_ids=text[None])
        for layer, states in alone.rows([len(text)])[0].items():
            np.testing.assert_allclose(found[layer], states, atol=2e-5)


def test_gradients_go_through_and_no_hook_stays() -> None:
    model = model_of("llama")
    with states_of(model, [1]) as found:
        model(input_ids=texts()[0][None])
    found[1].sum().backward()
    with_gradient = [p.grad is not None for p in blocks_of(model)[0].parameters()]
    assert all(with_gradient)
    assert not any(p.grad is not None for p in blocks_of(model)[2].parameters())
    assert not any(block._forward_hooks for block in blocks_of(model))


def test_a_block_that_is_computed_again_gives_the_same_gradient() -> None:
    gradients = []
    for again in (False, True):
        model = model_of("llama").train()
        if again:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        with states_of(model, [0, 1]) as found:
            model(input_ids=texts()[0][None], use_cache=False)
        (found[0].square().sum() + found[1].sum()).backward()
        gradients.append(blocks_of(model)[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_layers_that_a_model_has_not_are_refused() -> None:
    model = model_of("llama")
    with pytest.raises(UsageError, match="layer 3 is asked for, it has 3 blocks, 0 to 2"):
        check_blocks(model, [3])
    sizes = {"vocab_size": 24, "d_model": 16, "d_ff": 16, "num_heads": 2, "num_layers": 2}
    with pytest.raises(UsageError, match="it has not one row of blocks"):
        check_blocks(T5(T5Config(**sizes)), [0])


def test_a_model_whose_blocks_hand_on_something_else_is_refused() -> None:
    model = model_of("llama")

    class Wrapped(nn.Module):
        """A block that hands on states in another shape, as a model with streams does."""

        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, states: Tensor, **inputs: Any) -> Tensor:
            return self.block(states, **inputs) + 0.5

    check_blocks(model, [0, 1])
    model.model.layers[1] = Wrapped(model.model.layers[1])
    with pytest.raises(UsageError, match="what block 1 hands on is not hidden_states"):
        check_blocks(model, [0, 1])
