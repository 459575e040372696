"""Masks: which tokens of a text are hidden from who reads it, and what stands in their place.

A pure function of the text's token ids, by the name of the text: it depends on no batch, no order
and no other text, and teacher and student read the same. Of n tokens that are not special max(1,
round(0.15 n)) are hidden. Where one is, stands (Devlin et al. 2019, arXiv 1810.04805, section 3.1)

    bert    the mask token with a chance of 0.8, another token with 0.1, the token itself with 0.1
    all     the mask token

What a target is about stands in `labels`, and where it is said in `alignment.py`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ...storage.errors import RowError, UsageError, answered
from ...storage.tables.row_builders import text_key
from ...storage.tables.spans import positions, spans_of
from ..recipe.sections import Recipe
from .alignment import spans_at

SHARE = 0.15
"""Of the tokens that are not special, those that are hidden."""
_MASK_TOKEN, _ANOTHER = 0.8, 0.9
"""`bert`: the chance of the mask token; of it or another token."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Masked:
    """A text as it is read."""

    token_ids: np.ndarray
    """[T] int32."""
    spans: np.ndarray
    """[S, 2] start and tokens of what is hidden."""
    labels: np.ndarray
    """[N] int32 the tokens that are hidden."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Masks:
    """How the tokens of one tokenizer are hidden."""

    rule: str
    """`data.masks`."""
    mask: int
    """The mask token."""
    special: np.ndarray
    """Ids that are never hidden."""
    others: np.ndarray
    """Ids that may stand in another's place."""

    @classmethod
    def of(cls, folder: Path, rule: str, *, name: str) -> Self:
        """By the tokenizer in a folder; `name`: of its model, for messages.

        Raises:
            UsageError: it has no mask token.
        """
        from transformers import AutoTokenizer

        with answered(f"{folder}: the tokenizer does not load", "Save the model again."):
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if tokenizer.mask_token_id is None:
            raise UsageError(
                f"teacher.model: the tokenizer of {name} ({type(tokenizer).__name__}) has no mask "
                "token, so nothing can be hidden from this model. Use a masked language model with "
                "its own tokenizer."
            )
        special = np.unique(tokenizer.all_special_ids)
        known = np.unique(list(tokenizer.get_vocab().values()))
        others = np.setdiff1d(known, special)
        return cls(rule=rule, mask=tokenizer.mask_token_id, special=special, others=others)

    def plain(self, ids: np.ndarray) -> np.ndarray:
        """Indices of the tokens that can be hidden."""
        return np.flatnonzero(~np.isin(ids, self.special))

    def hide(self, token_ids: Sequence[int] | np.ndarray) -> Masked:
        """A text with some of its tokens hidden.

        Raises:
            RowError: it has none that can be.
        """
        ids = np.asarray(token_ids, np.int32)
        plain = self.plain(ids)
        if not len(plain):
            raise RowError("empty", "no token but special ones: nothing to hide")
        order, fate, other = _uniform(text_key(ids), len(plain))
        indices = np.sort(plain[np.argsort(order)[: max(1, round(SHARE * len(plain)))]])
        read, labels = ids.copy(), ids[indices]
        read[indices] = self._instead(labels, fate, other)
        return Masked(token_ids=read, spans=spans_at(indices), labels=labels)

    def _instead(self, labels: np.ndarray, fate: np.ndarray, other: np.ndarray) -> np.ndarray:
        """[N] what stands in place of hidden tokens; `fate` and `other` are uniform in [0, 1)."""
        if self.rule == "all":
            return np.full_like(labels, self.mask)
        n = len(labels)
        another = self.others[(other[:n] * len(self.others)).astype(np.int64)]
        instead = np.where(fate[:n] < _ANOTHER, another, labels)
        return np.where(fate[:n] < _MASK_TOKEN, self.mask, instead)


def masks_of(recipe: Recipe, folder: Path) -> Masks | None:
    """How a recipe hides tokens, by the tokenizer of its teacher; None: it hides none.

    Raises:
        UsageError: the tokenizer has no mask token.
    """
    return (
        None if recipe.masks is None else Masks.of(folder, recipe.masks, name=recipe.teacher.model)
    )


def put_back(row: Mapping[str, Any]) -> np.ndarray:
    """[T] the text of a row of targets with its hidden tokens where they were."""
    ids = np.array(row["token_ids"])
    ids[positions(spans_of(row))] = row["labels"]
    return ids


def _uniform(key: bytes, n: int) -> np.ndarray:
    """[3, n] float64 in [0, 1) that the key alone decides, no library of random numbers."""
    digest = hashlib.shake_256(key).digest(3 * 8 * n)
    # 53 bits: as many as a float64 has.
    return (np.frombuffer(digest, ">u8") >> np.uint64(11)).reshape(3, n) / 2.0**53
