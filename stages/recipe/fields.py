"""Kinds of fields that sections of the recipe are made of, beside numbers and words."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ...storage.keys import canonical_json

ADDRESSES = frozenset(
    "run.dir storage.dir storage.sources teacher.model teacher.adapter teachers.model "
    "teachers.adapter student.model data.source generate.model generate.base_url "
    "evaluate.source".split()
)
"""Fields that name a folder, a file, a URL or a model: what may hold `${NAME}`, or a credential."""

Arm = Literal["student", "baseline"]

Split = Literal["train", "validation", "test"]


class Section(BaseModel):
    """Strict and frozen: a misspelt key is an error, not a silent default."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    later: ClassVar[tuple[str, ...]] = ()
    """Fields that there were none of when the first hashes were made."""

    def unhashed(self) -> set[str]:
        """Which of these hashes leave out: those at their default."""
        fields = type(self).model_fields
        return {name for name in self.later if getattr(self, name) == fields[name].default}


def _as_json(options: dict[str, Any]) -> dict[str, Any]:
    try:
        canonical_json(options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"holds a value that JSON does not have ({error}). Put dates in quotes; numbers are "
            "finite"
        ) from error
    return options


Options = Annotated[dict[str, Any], AfterValidator(_as_json)]
"""Passed on as they are, hashed and sent to stages: so JSON, while YAML also has dates and
infinities."""


class Schedule(Section):
    """A setting that changes over the training, by the share of all tokens fed."""

    shape: Literal["linear", "cosine", "wsd"]
    """linear, cosine: from start to end; wsd: linear to peak, stable, cosine to end."""
    start: float = Field(ge=0)
    """Value at the start."""
    end: float = Field(ge=0)
    """Value at the end."""
    peak: float | None = Field(None, ge=0)
    """wsd: value in between."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """wsd: share of the tokens in which it goes from start to peak."""
    decay_fraction: float = Field(0.1, gt=0, le=1)
    """wsd: share of the tokens in which it goes from peak to end."""

    @model_validator(mode="after")
    def _of_its_shape(self) -> Self:
        for name in ("peak", "warmup_fraction", "decay_fraction"):
            if self.shape != "wsd" and getattr(self, name) != Schedule.model_fields[name].default:
                raise ValueError(
                    f"`{name}` belongs to shape 'wsd'; this is {self.shape!r}. Remove it"
                )
        if self.shape == "wsd" and self.peak is None:
            raise ValueError("shape 'wsd' needs a `peak`: the value between warm-up and decay")
        if self.shape == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "`warmup_fraction` and `decay_fraction` together are more than 1. Lower one"
            )
        return self


NUMBER, SCHEDULE = (
    "a number",
    "a schedule",
)  # no field's name: pydantic puts them into an error's path


def _number_or_schedule(value: object) -> str:
    return SCHEDULE if isinstance(value, dict | Schedule) else NUMBER


Scheduled = Annotated[
    Annotated[float, Field(ge=0), Tag(NUMBER)] | Annotated[Schedule, Tag(SCHEDULE)],
    Discriminator(_number_or_schedule),
]
"""A number, or a schedule of numbers."""


def _each_once(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise ValueError(f"{values} names one twice. Name each once")
    return values


Once = AfterValidator(_each_once)
"""Of a list in which nothing stands twice."""

Layer = Annotated[int, Field(ge=0)]
"""A block of a model, the first being 0."""


def _pairs_in_words(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    try:
        return check(value)
    except ValidationError:
        named = value if isinstance(value, list) else [value]
        example = ", ".join(f"{block}: {n}" for n, block in enumerate(named) if type(block) is int)
        raise ValueError(
            f"must be {{teacher's block: student's block}}, as {{{example or '11: 5'}}}, or "
            f"uniform, or last (got {value!r})"
        ) from None


Pairs = Annotated[dict[Layer, Layer] | Literal["uniform", "last"], WrapValidator(_pairs_in_words)]
"""Which block of the teacher is matched with which of the student."""

Tail = Literal["bucket", "drop", "renormalize", "to_label"]
Kernel = Literal["torch", "triton"]


def value_at(setting: float | Schedule, done: float) -> float:
    """The value at the share `done` of all tokens (0 to 1; beyond 1 as at 1).

    A number is its own value.

    A function of nothing but `done`, so a run that was stopped goes on with the values that it
    would have had.
    """
    if not isinstance(setting, Schedule):
        return setting
    done = min(done, 1.0)
    start, end = setting.start, setting.end
    match setting.shape:
        case "linear":
            return start + (end - start) * done
        case "cosine":
            return start + (end - start) * _half_wave(done)
        case "wsd":
            assert setting.peak is not None
            if done < setting.warmup_fraction:
                return start + (setting.peak - start) * (done / setting.warmup_fraction)
            left = max(0.0, done - (1 - setting.decay_fraction))
            return setting.peak + (end - setting.peak) * _half_wave(left / setting.decay_fraction)


def extremes(setting: float | Schedule) -> tuple[float, float]:
    """Least and greatest value that it takes."""
    if not isinstance(setting, Schedule):
        return setting, setting
    named = [value for value in (setting.start, setting.peak, setting.end) if value is not None]
    return min(named), max(named)


def _half_wave(share: float) -> float:
    """0 to 1 as its argument, level at both ends."""
    return (1 - math.cos(math.pi * share)) / 2


# What the stages say to a chat template, and what `apply_chat_template` hands to the tokenizer.
_RENDERING = (
    "add_generation_prompt continue_final_message conversation messages "
    "return_assistant_tokens_mask return_dict strftime_now tokenize tools"
).split()
_TOKENIZER = "max_length padding return_tensors tokenizer_kwargs truncation".split()
NO_TEMPLATE_ARGUMENTS = {
    **dict.fromkeys(_RENDERING, "decided by the stages"),
    **dict.fromkeys(_TOKENIZER, "the tokenizer's"),
}
"""What `data.chat_template_kwargs` may not name, and whose it is."""
