"""The sentences of sst2 that a teacher learns, is chosen by and is judged on.

sst2's own test split judges; which of its training rows are for choosing is decided by the
product's own hash of a text. So the teacher has seen no row that `stillroom run
pipeline/recipes/sst2.yaml` validates on or holds out.
"""

from collections.abc import Sequence

from small_teacher import Sentences

from stillroom.storage.keys import content_key

NAMES = ("negative", "positive")
VALIDATION = 872
"""Rows for choosing, as many as sst2's own; the recipe says the same."""


def split(train: Sentences, test: Sentences, *, validation: int) -> dict[str, Sentences]:
    """What the recipe judges on, what it validates on, and the rest.

    The smallest hashes come first, as in the recipe.

    A text that is in both splits is not trained on.
    """
    judging, keys = set(prompt_keys(test.texts)), prompt_keys(train.texts)
    choosing = set(sorted(set(keys) - judging)[:validation])
    rows: dict[str, list[int]] = {"validation": [], "train": []}
    for row, key in enumerate(keys):
        if key not in judging:
            rows["validation" if key in choosing else "train"].append(row)
    return {"test": test, **{name: train.take(found) for name, found in rows.items()}}


def prompt_keys(texts: Sequence[str]) -> list[bytes]:
    """The store's names of texts."""
    return [content_key("prompt", text=text, messages=None, pair=None) for text in texts]
