"""The heads of teachers: what a target is over, which tokens have one, and where it is said.

A shard names its head; one row each. Which models have it: `stages/recipe/tasks.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import IntegrityError


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """What the rows of one head consist of."""

    classes: bool = False
    """A target is over the classes that the shard names; else over the vocabulary."""
    whole_text: bool = False
    """A row has one target, of the whole text, at its last token. Else each token of its spans has
    one."""
    shifted: bool = False
    """A token's target is said at the position before it, where the token is not read yet. Else it
    is said at its own."""
    masked: bool = False
    """A token that has a target is hidden, or another one stands in its place. `token_ids` are what
    the teacher read; `labels` hold what was there, known of each."""
    images: bool = False
    """A row is an image, which stands for a text of one token; else a text."""

    @property
    def first_scored(self) -> int:
        """Index of the first token that may have a target: nothing predicts the first of a text."""
        return 1 if self.shifted else 0

    @property
    def in_labels(self) -> bool:
        """Whether what is there stands in `label` or `labels`; else it is the token itself."""
        return self.classes or self.masked


HEADS = {
    "lm": Head(shifted=True),
    "classes": Head(classes=True, whole_text=True),
    "token_classes": Head(classes=True),
    "masked_lm": Head(masked=True),
    "image_classes": Head(classes=True, whole_text=True, images=True),
}


def head_of(about: Mapping[str, Any]) -> Head:
    """Of a shard, by what it says of itself.

    Raises:
        IntegrityError: this version knows no such head.
    """
    name = about.get("head", "lm")
    if not isinstance(name, str) or name not in HEADS:
        raise IntegrityError(f"head {name!r}, expected one of {', '.join(HEADS)}.")
    return HEADS[name]
