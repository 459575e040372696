"""The formats of records.

To add one, write a row here, and what its records become in `stages/data/formats.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """What a recipe names as `data.format`."""

    required: tuple[str, ...]
    """Our names for what a record must have ..."""
    optional: tuple[str, ...] = ()
    """... and for what it may have."""
    brings_text: Literal["always", "perhaps", "never"]
    """Whether a record brings the text that is scored. Where it does not, `generate` writes it."""
    conversation: bool = False
    """Whether a record becomes messages, which the chat template renders."""
    document: bool = False
    """Whether all of it is scored, in windows: it has no prompt."""
    labelled: bool = False
    """Whether classes are learnt, of a text, its words or an image: no token is predicted."""
    words: bool = False
    """Whether a text comes as a list of words, each with a class or none."""
    image: bool = False
    """Whether a record is an image; it has no text."""
    other_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """What others call a column of ours."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All names that `data.columns` knows."""
        return self.required + self.optional


FORMATS = {
    "text": Format(required=("text",), brings_text="always", document=True),
    "prompt": Format(required=("prompt",), optional=("reference",), brings_text="never"),
    "completion": Format(required=("prompt", "completion"), brings_text="always"),
    "messages": Format(
        required=("messages",),
        optional=("tools", "system", "reference"),
        brings_text="perhaps",
        conversation=True,
        other_names={"messages": ("conversations",)},
    ),
    "instruction": Format(
        required=("instruction",),
        optional=("input", "output", "system", "history", "reference"),
        brings_text="perhaps",
        conversation=True,
    ),
    "labelled": Format(
        required=("text",),
        optional=("text_pair", "label"),
        brings_text="always",
        labelled=True,
    ),
    "tagged": Format(
        required=("words",),
        optional=("labels",),
        brings_text="always",
        labelled=True,
        words=True,
        other_names={"words": ("tokens",), "labels": ("tags", "ner_tags")},
    ),
    "images": Format(
        required=("image",),
        optional=("label",),
        brings_text="always",
        labelled=True,
        image=True,
        other_names={"image": ("img",)},
    ),
}

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]
