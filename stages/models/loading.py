"""Loading a model in the class of transformers that its task asks for.

It is loaded as it was identified, or as a student.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ...storage.errors import NotLoaded, UsageError, answered
from .attention.cap import attend_capped
from .attention.longest import forget_lengths
from .device import evaluating
from .fit.quantized import REPAIR, WHILE_LOADING
from .fit.teacher_layers import FIELD
from .fit.tensors import stored_tensors
from .identity import Identity

_NOT_FEWER_BITS = frozenset(
    (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
)
"""What a float model consists of, positions and masks among them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelKind:
    """What a task's models are to transformers and PEFT."""

    auto: Any
    """The class of transformers that makes and loads them."""
    adapter: str
    """What PEFT calls the task."""
    classes: Sequence[str] = ()
    """Names of the classes, in the order of the logits; (): the vocabulary."""
    example: Mapping[str, Tensor] = field(
        default_factory=lambda: {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    )
    """What such a model takes."""

    def teacher(
        self, identity: Identity, *, device_map: str | None, **fields: Any
    ) -> tuple[PreTrainedModel, list[str]]:
        """A model in evaluation mode, in its identity's dtype, and the weights its folder lacks.

        Args:
            identity: Folder and dtype.
            device_map: `auto` spreads the layers over all GPUs (accelerate); None leaves the model
                where transformers puts it.
            fields: Of its config, in place of what the folder says.

        Raises:
            UsageError: the folder does not hold such a model.
        """
        what = f"{identity.folder}: the model does not load"
        with answered(what, "Check the folder.", NotLoaded):
            model, report = self.auto.from_pretrained(
                identity.folder,
                dtype=getattr(torch, identity.dtype),
                device_map=device_map,
                output_loading_info=True,
                trust_remote_code=identity.runs_code,
                weights_only=True,  # of pickles, nothing but tensors
                **fields | self._quantization(identity, fields),
            )
        _refuse_floats(model, identity)
        if identity.quantized:
            _refuse_idle(model, identity)
        return _ready(model), sorted(report["missing_keys"])

    def _quantization(self, identity: Identity, fields: Mapping[str, Any]) -> dict[str, Any]:
        """What transformers is told of weights that are quantised while they are loaded.

        Of others it is told nothing.
        """
        if identity.quantize is None:
            return {}
        # It says for each product that int8 casts what is multiplied to float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        how = BitsAndBytesConfig(
            **WHILE_LOADING[identity.quantize],
            bnb_4bit_compute_dtype=getattr(torch, identity.dtype),
            llm_int8_skip_modules=self._class_heads(identity, fields),
        )
        return {"quantization_config": how}

    def _class_heads(self, identity: Identity, fields: Mapping[str, Any]) -> list[str] | None:
        """Modules on the body of a classifier, which stay in floats.

        None: transformers finds the output layer.

        It takes a classifier's last layer for one that stays only where it has no bias.
        """
        if identity.runs_code:
            return None
        config = AutoConfig.from_pretrained(identity.folder, trust_remote_code=False, **fields)
        model = self.empty(config)
        if model.get_output_embeddings() is not None:
            return None
        return [name for name, _ in model.named_children() if name != model.base_model_prefix]

    def student(self, folder: Path) -> PreTrainedModel:
        """A saved or downloaded model, in float32.

        A body without a head over classes gets a new one.

        Raises:
            UsageError: the folder holds none, or not all of its weights.
        """
        with answered(f"{folder}: the student does not load", "Check the folder."):
            model, report = self.auto.from_pretrained(
                folder,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
                **self._named(),
            )
        body = f"{model.base_model_prefix}."
        lacking = [
            name
            for name in sorted(report["missing_keys"])
            # A head over classes may be new, with the pooler under it; one over the vocabulary not.
            if not self.classes or (name.startswith(body) and "pooler" not in name)
        ]
        if lacking:
            raise UsageError(
                f"{folder}: the student lacks weights ({', '.join(lacking[:3])}), which "
                "transformers would draw at random. Name a model that was saved whole."
            )
        return _ready(model)

    def fresh(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Fresh weights, in float32."""
        config.update(self._named())
        model: PreTrainedModel = self.auto.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        return _ready(model)

    def empty(self, config: PreTrainedConfig) -> PreTrainedModel:
        """A model of this config without memory for its weights: names, shapes, classes alone."""
        with torch.device("meta"):
            model: PreTrainedModel = self.auto.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        return model

    def copied(self, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """A model of this config with these weights, in float32.

        Weights have the names that files have for them.

        Raises:
            UsageError: some of its weights are not there.
        """
        config.update(self._named())
        # The class itself, for it reads weights that are in no folder, and converts their names.
        own_class: Any = type(self.empty(config))
        model, report = own_class.from_pretrained(
            None,
            config=config,
            state_dict={**weights},
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        if lacking := sorted(report["missing_keys"]):
            raise UsageError(
                f"{FIELD}: the teacher's files lack weights of the student "
                f"({', '.join(lacking[:3])}), which transformers would draw at random. Save the "
                "teacher again, whole."
            )
        return _ready(model)

    def _named(self) -> dict[str, Any]:
        """Fields of a config that say which classes there are."""
        if not self.classes:
            return {}
        return {
            "id2label": dict(enumerate(self.classes)),
            "label2id": {name: index for index, name in enumerate(self.classes)},
        }


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """With the attention that its config asks for, and no memory of the texts that it has read."""
    attend_capped(model)
    forget_lengths(model)
    return model


def _refuse_floats(model: nn.Module, identity: Identity) -> None:
    """Refuse a model that is named as quantised and was loaded in floats.

    transformers does that without a word.

    Some methods are made floats again while they are loaded; then the files hold fewer bits, which
    `refuse_unquantized` has seen.
    """
    if not identity.quantized or in_fewer_bits(model):
        return
    if identity.quantize is not None:
        raise UsageError(
            f"teacher.quantize: {identity.quantize} found nothing in {identity.folder} to "
            f"quantise: of {type(model).__name__} no weight is in fewer bits. Remove it."
        )
    files = stored_tensors(identity.folder, where=str(identity.folder))
    if not files:
        raise UsageError(
            f"{identity.folder}: is named as quantised ({identity.quantized}), and all of its "
            f"weights are loaded in floats. {REPAIR}"
        )


@torch.no_grad()
def _refuse_idle(model: nn.Module, identity: Identity) -> None:
    """Refuse layers whose kernel here takes no such size, before each row fails.

    One layer of each size is run.
    """
    layers = {
        (type(layer), layer.in_features, layer.out_features): layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear) and layer.weight.dtype not in _NOT_FEWER_BITS
    }
    dtype, model_name = getattr(torch, identity.dtype), f"{identity.folder} ({identity.quantized})"
    for (kind, wide, out), layer in layers.items():
        what = f"{model_name}: a {kind.__name__} from {wide} to {out} numbers does not run here"
        with answered(what, "Quantise the teacher in another way, or not."), evaluating(layer):
            layer(torch.zeros(1, 2, wide, dtype=dtype, device=layer.weight.device))


def in_fewer_bits(model: nn.Module) -> bool:
    """Whether a loaded model holds weights in fewer bits than floats have."""
    held = [*model.parameters(), *model.buffers()]
    # A tensor of a class of its own (torchao) calls itself a float.
    return any(t.dtype not in _NOT_FEWER_BITS or type(t.data) is not Tensor for t in held)


@contextmanager
def adapter_on(model: Any, identity: Identity) -> Iterator[Any]:
    """A teacher's model with its adapter on it, not merged yet.

    Raises:
        UsageError: PEFT cannot put it there, or the caller finds that it does not fit.
    """
    from peft import PeftModel

    what = f"teacher.adapter: {identity.adapter} does not fit {identity.folder}"
    with answered(what, "Name an adapter of this model, or the model of this adapter."):
        yield PeftModel.from_pretrained(model, str(identity.adapter))


def with_its_adapter(adapted: Any) -> Any:
    """The model with its adapter in it: merged, or beside weights in fewer bits.

    Merging would round those again.
    """
    base = adapted.get_base_model()
    return base if in_fewer_bits(base) else adapted.merge_and_unload()


def placed(model: Any, device_map: str | None) -> PreTrainedModel:
    """In evaluation mode, on the GPU if there is one and nothing else was asked for."""
    # What bitsandbytes has quantised there may not be moved, and is there.
    if device_map is None and torch.cuda.is_available() and model.device.type != "cuda":
        model = model.to("cuda")
    model.eval()
    loaded: PreTrainedModel = model
    return loaded
