"""Loading a model in the class of transformers that its task asks for: as it was identified, or as a student."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ...storage.errors import NotLoaded, UsageError, answered
from .attention.cap import attend_capped
from .attention.longest import forget_lengths
from .fit.teacher_layers import FIELD
from .identity import Identity


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
        """A model in evaluation mode, in the dtype that it was identified with, and the weights that its folder lacks.

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
                **fields,
            )
        return _ready(model), sorted(report["missing_keys"])

    def student(self, folder: Path) -> PreTrainedModel:
        """A saved or downloaded model, in float32; a body without a head over classes gets a new one.

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
        """A model of this config without memory for its weights: names, shapes and classes alone."""
        with torch.device("meta"):
            model: PreTrainedModel = self.auto.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        return model

    def copied(self, config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
        """A model of this config with these weights, by the names that files have for them; in float32.

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


def placed(model: Any, device_map: str | None) -> PreTrainedModel:
    """In evaluation mode, on the GPU if there is one and nothing else was asked for."""
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    model.eval()
    loaded: PreTrainedModel = model
    return loaded
