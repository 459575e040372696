"""A student's LoRA: where an adapter may go, and the merge that leaves the plain model.

A merge writes W + s B A in place of W. That is right only where W is one layer's alone: where two
layers share it (tied embeddings), the adapter changes one of them and the merge both.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....storage.errors import StillroomError, UsageError
from ...recipe.sections import Lora
from ..device import evaluating

# Of the largest logit, in float32: W x + s B (A x) and (W + s B A) x differ by rounding alone,
# which stays below 1e-4 through tens of layers. An update that is lost or counted twice differs by
# the update itself.
_MERGED_TOLERANCE = 1e-3
_TOKENS = 8
"""How many tokens the merged model is asked about."""


def with_lora(model: PreTrainedModel, lora: Lora, task: str) -> Any:
    """The model with an adapter to train, everything else frozen.

    Args:
        model: Changed in place.
        lora: Where the adapter goes, and how large it is.
        task: What PEFT calls the task.

    Raises:
        UsageError: no module has this name, or one whose weight another layer shares.
    """
    from peft import LoraConfig, get_peft_model

    everywhere = lora.target_modules == "all-linear"
    config = LoraConfig(
        r=lora.rank,
        # PEFT divides by r: any number will do
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,  # a new head over classes trains whole
        # PEFT keeps adapters from a head over classes of texts by itself, not from one of words.
        exclude_modules=["classifier", "score"] if everywhere and task == "TOKEN_CLS" else None,
    )
    owners = _owners(model)
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:  # TypeError: it names the head, which trains whole
        raise UsageError(
            f"student.lora.target_modules: {lora.target_modules} does not fit the model ({error}). "
            "Name modules below its head, or write all-linear."
        ) from error
    _refuse_shared(adapted, owners, lora)
    return adapted


def merged(model: Any) -> PreTrainedModel:
    """The plain model: LoRA is added to the weights for good."""
    plain: PreTrainedModel = (
        model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    )
    return plain


def merged_as_trained(model: Any) -> PreTrainedModel:
    """`merged`, if it says of a few tokens what the unmerged model says.

    Raises:
        StillroomError: it says something else.
    """
    if not hasattr(model, "merge_and_unload"):
        return merged(model)
    before = _few_logits(model)
    plain = merged(model)
    apart = float((_few_logits(plain) - before).abs().max())
    largest = float(before.abs().max())
    if not apart <= _MERGED_TOLERANCE * largest:  # nor where it is no number
        raise StillroomError(
            "student.lora: with the adapter merged into the weights, the student's logits differ "
            f"by up to {apart:.3g} (of {largest:.3g}) from those it was trained with, expected "
            f"less than {_MERGED_TOLERANCE:g} of them. It was not saved; its checkpoint is kept. "
            "Name other target_modules, or leave student.lora out: PEFT cannot merge this adapter "
            "here."
        )
    return plain


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that lie in each piece of memory."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[_memory(parameter)].append(name)
    return owners


def _refuse_shared(adapted: nn.Module, owners: dict[int, list[str]], lora: Lora) -> None:
    for weight in _adapted_weights(adapted):
        names = owners[_memory(weight)]
        if len(names) > 1:
            first, *others = names
            raise UsageError(
                f"student.lora.target_modules: {lora.target_modules} names {first}, which is "
                f"{' and '.join(others)} too (tied weights); merged into it, the update would "
                "change both. Leave these modules out."
            )


def _adapted_weights(adapted: nn.Module) -> Iterator[nn.Parameter]:
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            base: Any = module.get_base_layer()  # type: ignore[operator]
            yield from base.parameters(recurse=False)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _few_logits(model: Any) -> Tensor:
    """Logits of one text, by transformers' own attention.

    That of the training wants to know where samples end.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    vocab_size = plain.config.get_text_config().vocab_size
    ids = torch.arange(_TOKENS, device=next(model.parameters()).device) % vocab_size
    attention = plain.config._attn_implementation
    if attention not in (None, "eager", "sdpa"):
        plain.set_attn_implementation("eager")
    with evaluating(model), torch.no_grad():
        logits: Tensor = model(input_ids=ids[None]).logits.float()
    if plain.config._attn_implementation != attention:
        plain.set_attn_implementation(attention)
    return logits
