"""The blocks of a model, and the states that they hand on in a forward pass.

Layer i is the output of block i, the first block being 0. It is raw: no norm that follows the last
block has been applied. For all blocks but the last it is `hidden_states[i + 1]` of transformers; of
models with a final norm their `hidden_states[-1]` is another tensor.

Letters: B rows, T tokens, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ....storage.errors import UsageError, in_short
from ...models.device import evaluating

_TOKENS = 8


def blocks_of(model: Any) -> nn.ModuleList:
    """The blocks that a text goes through, one after another.

    Raises:
        UsageError: there is not one list of them.
    """
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    count = getattr(plain.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in plain.modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists or getattr(plain.config, "is_encoder_decoder", False):
        raise UsageError(
            f"{_name(plain)}: it has not one row of blocks ({count} by its config), so none can be "
            "named by a number. Leave features of it out."
        )
    # Lists of as many experts, or of parts of the blocks, have fewer parameters.
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def named_blocks(model: Any, layers: Sequence[int]) -> dict[int, nn.Module]:
    """Some blocks by their numbers.

    Raises:
        UsageError: one is not there.
    """
    if not layers:
        return {}
    blocks = blocks_of(model)
    if beyond := [layer for layer in layers if not 0 <= layer < len(blocks)]:
        raise UsageError(
            f"{_name(model)}: layer {beyond[0]} is asked for, it has {len(blocks)} blocks, 0 to "
            f"{len(blocks) - 1}."
        )
    return {layer: blocks[layer] for layer in layers}


@contextmanager
def states_of(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Layer -> its states [B, T, D], of the forward pass that is made inside.

    Autograd goes through them.

    Raises:
        UsageError: a block is not there.
    """
    found: dict[int, Tensor] = {}
    blocks = named_blocks(model, layers)
    hooks = []
    try:
        for layer, block in blocks.items():

            def keep(_: nn.Module, __: Any, output: Any, layer: int = layer) -> None:
                found[layer] = output[0] if isinstance(output, tuple | list) else output

            hooks.append(block.register_forward_hook(keep))
        yield found
    finally:
        # Before the backward pass: a block that is computed again there is not kept again.
        for hook in hooks:
            hook.remove()


def check_blocks(model: Any, layers: Sequence[int]) -> None:
    """Compare what the blocks hand on with transformers' own hidden states, on eight tokens.

    Raises:
        UsageError: they differ, or this model shows none: its layers cannot be captured.
    """
    if not layers:
        return
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(_TOKENS, device=device) % vocabulary)[None]
    advice = "Leave features of it out."
    asked = {"input_ids": ids, "output_hidden_states": True, "return_dict": True}
    if "use_cache" in signature(model.forward).parameters:  # as texts are read
        asked["use_cache"] = False
    try:
        with evaluating(model), torch.no_grad(), states_of(model, layers) as found:
            shown = model(**asked).hidden_states
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{_name(model)}: the states of its blocks cannot be read ({in_short(error)}). {advice}"
        ) from error
    last = len(blocks_of(model)) - 1
    for layer in layers:
        expected, state = shown[layer + 1], found.get(layer)
        fits = state is not None and state.shape == expected.shape
        # A norm may follow the last one: only its shape is known.
        if not fits or not (layer == last or torch.equal(found[layer], expected)):
            raise UsageError(
                f"{_name(model)}: what block {layer} hands on is not hidden_states[{layer + 1}] of "
                f"transformers, so its layers cannot be told apart. {advice}"
            )


def _name(model: Any) -> str:
    kind = type(model).__name__
    path = model.config.name_or_path
    return f"{path} ({kind})" if path else kind
