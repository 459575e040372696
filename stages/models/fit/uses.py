"""What kind of model a config describes, by transformers' tables, and whether it sees the future.

It is called inside `light_transformers`, as the tables are asked.
"""

from collections.abc import Mapping
from typing import Any

from ...recipe.tasks import MODELS
from .light import all_class_names, class_names_of
from .parts import text_config

# What a kind is called, and the tables that list it; the first that has a model's class names it,
# else the first that has its type.
_KINDS = (
    (
        "a speech model",
        "SPEECH_SEQ_2_SEQ CTC RNNT TDT AUDIO_CLASSIFICATION AUDIO_FRAME_CLASSIFICATION "
        "AUDIO_XVECTOR TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM",
    ),
    ("an object detector", "OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION"),
    (MODELS["image_classes"].use, MODELS["image_classes"].table),
    (
        "an image model",
        "IMAGE_SEGMENTATION SEMANTIC_SEGMENTATION INSTANCE_SEGMENTATION UNIVERSAL_SEGMENTATION "
        "MASK_GENERATION DEPTH_ESTIMATION KEYPOINT_DETECTION MASKED_IMAGE_MODELING "
        "CAUSAL_IMAGE_MODELING IMAGE_TO_IMAGE VIDEO_CLASSIFICATION BACKBONE",
    ),
    ("an encoder-decoder", "SEQ_TO_SEQ_CAUSAL_LM"),
    *((MODELS[head].use, MODELS[head].table) for head in ("masked_lm", "classes", "token_classes")),
    ("a model that finds answers in a text", "QUESTION_ANSWERING TABLE_QUESTION_ANSWERING"),
    ("a multiple-choice model", "MULTIPLE_CHOICE NEXT_SENTENCE_PREDICTION"),
    (
        "a time series model",
        "TIME_SERIES_PREDICTION TIME_SERIES_CLASSIFICATION TIME_SERIES_REGRESSION",
    ),
    (
        "a model of images and text",
        "IMAGE_TEXT_TO_TEXT MULTIMODAL_LM VISUAL_QUESTION_ANSWERING ZERO_SHOT_IMAGE_CLASSIFICATION",
    ),
)
_WITH_TEXT_INSIDE = ("a model of images and text",)


def heads_of(raw: Mapping[str, Any], config: Any) -> tuple[str, ...]:
    """Of which tasks' heads (`Task.head`) a model has one, or may get one."""
    found = ["lm"] if _continues_text(raw, config) else []
    found += [
        head
        for head, models in MODELS.items()
        if head != "lm" and config.model_type in class_names_of(models.table)
    ]
    return tuple(found)


def use_of(raw: Mapping[str, Any], config: Any) -> str:
    """What kind of model it is, in words."""
    kind = config.model_type
    if _named(raw) & _classes(kind, "CAUSAL_LM"):
        if reads_one_way(config):
            return MODELS["lm"].use
        return "a model that sees later tokens unless is_decoder is set"
    by_type = (name for name, tables in _KINDS if any(_classes(kind, t) for t in tables.split()))
    return _kind_by_class(raw) or next(by_type, "no language model that transformers knows")


def reads_one_way(config: Any) -> bool:
    """Whether a model sees no later token; of types that can do either, the config says it."""
    kind = config.model_type
    either = kind == "bert-generation" or _classes(kind, "MASKED_LM")
    if not either or _classes(kind, "SEQ_TO_SEQ_CAUSAL_LM"):
        return True
    return bool(getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def has_own_code(raw: Mapping[str, Any]) -> bool:
    """Whether a folder brings the class of its model, and transformers has none of that name."""
    brought = raw.get("auto_map") or {}
    if not any(str(name).startswith("AutoModel") for name in brought):
        return False
    known = {name.lower() for name in all_class_names()}  # mosaicml spells MPTForCausalLM
    return not {name.lower() for name in _named(raw)} <= known


def _continues_text(raw: Mapping[str, Any], config: Any) -> bool:
    classes = _classes(config.model_type, "CAUSAL_LM")
    if not classes or not reads_one_way(config):
        return False
    if _named(raw) & classes:  # it names a class that does so
        return True
    if config.is_encoder_decoder:  # such a type does so in a class of its own alone
        return False
    # It names no class, one that no table has, or one that holds a language model.
    return _kind_by_class(raw) in (None, *_WITH_TEXT_INSIDE)


def _kind_by_class(raw: Mapping[str, Any]) -> str | None:
    named = _named(raw)
    if not named:  # a config that names no class is in no table
        return None
    for kind, tables in _KINDS:
        for table in tables.split():
            if any(named & _as_set(names) for names in class_names_of(table).values()):
                return kind
    return None


def _named(raw: Mapping[str, Any]) -> set[str]:
    return {str(name) for name in raw.get("architectures") or ()}


def _classes(kind: str, use: str) -> set[str]:
    return _as_set(class_names_of(use).get(kind, ()))


def _as_set(names: str | tuple[str, ...]) -> set[str]:
    return {names} if isinstance(names, str) else set(names)


def reads_ahead(config: Any) -> str | None:
    """The field of a config that makes its model see the future, as `name: value`.

    None: no field is known to.

    Args:
        config: Of transformers, or anything with its attributes. No weights, no torch.
    """
    for part in (config, text_config(config)):
        found = {name: getattr(part, name, None) for name in ("is_causal", "causal", "is_decoder")}
        if found["is_causal"] is False:
            return "is_causal: false"
        if found["causal"] is False:
            return "causal: false"
        if found["is_decoder"] is False and not reads_one_way(part):
            return "is_decoder: false"
        # "vision": between the patches of an image, of which there are none here.
        if getattr(part, "use_bidirectional_attention", None) in (True, "all"):
            return "use_bidirectional_attention: true"
    return None


def refusal(name: str, found: str) -> str:
    """What is said of a model that sees the future, and what shows it."""
    return (
        f"{name}: sees the future ({found}), expected a causal language model, whose answer "
        "depends on the tokens so far alone. Use another model, or a config that makes this one "
        "causal if it was trained so."
    )
