"""What a model shows of a pass beside its distribution.

That is states of blocks, what attention multiplies, and embeddings.

A need is what of a model, and of which block: the same of a teacher that is captured and of a
student that is compared with it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ....storage.errors import UsageError
from ...models.attention.recorded import Recorded, attention_layers, recording
from ...models.device import evaluating
from .blocks import check_blocks, named_blocks, states_of

Need = tuple[Literal["hidden", "attention", "embeddings"], int]
"""What is read of a model's forward pass, and of which block; of embeddings 0."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What was shown of a pass of B rows of T positions; after the pass."""

    hidden: Mapping[int, Tensor]
    """Block -> its states [B, T, D]."""
    _kept: Mapping[nn.Module, Recorded]
    _blocks: Mapping[int, nn.Module]
    embeddings: Tensor | None = None
    """[V, D] the weight of the input embeddings."""

    def attention(self, block: int) -> Recorded:
        """What the attention of a block multiplied."""
        within = set(self._blocks[block].modules())
        return next(one for layer, one in self._kept.items() if layer in within)


@contextmanager
def showing(model: nn.Module, needs: Iterable[Need]) -> Iterator[Shown]:
    """What the forward pass inside shows; autograd goes through it.

    Raises:
        UsageError: a block is not there.
    """
    hidden, looked = layers_of(needs, "hidden"), named_blocks(model, layers_of(needs, "attention"))
    embeddings = embeddings_of(model) if layers_of(needs, "embeddings") else None
    if not looked:
        with states_of(model, hidden) as states:
            yield Shown(states, {}, {}, embeddings)
        return
    within = {module for block in looked.values() for module in block.modules()}
    with states_of(model, hidden) as states, recording(model, within) as kept:
        yield Shown(states, kept, looked, embeddings)


def embeddings_of(model: Any) -> Tensor:
    """[V, D] the weight of the input embeddings, a row an id.

    Raises:
        UsageError: they are not one matrix of numbers in memory.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        weight = None
    if weight is None or not weight.is_floating_point():
        raise UsageError(
            f"{model.config.name_or_path or type(model).__name__}: its input embeddings are not "
            "one matrix of numbers in memory. Leave embeddings out."
        )
    return weight


def layers_of(needs: Iterable[Need], what: str) -> list[int]:
    """Blocks of which this is needed, ascending."""
    return sorted({layer for kind, layer in needs if kind == what})


def glimpse(model: Any, needs: Iterable[Need]) -> Shown:
    """What a model shows of two tokens: its heads, and what they see."""
    ids = torch.arange(2, device=next(model.parameters()).device)[None]
    with evaluating(model), torch.no_grad(), showing(model, needs) as shown:
        model(input_ids=ids % model.get_input_embeddings().num_embeddings)
    return shown


def check_shown(model: nn.Module, needs: Iterable[Need]) -> None:
    """See that a model shows what is needed of it, before any row or step.

    Raises:
        UsageError: it does not; names the model and says why.
    """
    needs = list(needs)
    if layers_of(needs, "embeddings"):
        embeddings_of(model)
    check_blocks(model, layers_of(needs, "hidden"))
    looked = named_blocks(model, layers_of(needs, "attention"))
    layers = attention_layers(model) if looked else []
    for layer, block in looked.items():
        if layers[layer] not in set(block.modules()):
            raise UsageError(
                f"the attention of block {layer} cannot be told from that of other blocks. Use "
                "hidden states instead."
            )
