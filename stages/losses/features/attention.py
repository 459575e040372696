"""Attention of the student against the teacher's, rebuilt from queries and keys.

    a_i = softmax over the tokens j that i sees of (scale q_i . k_j)

That *is* the attention of architectures that do no more than this (BERT, GPT-2, Llama, Qwen, Gemma
3), with queries and keys as they are multiplied: after rotation and after any norm of their own.
Sinks, soft caps and biases are more.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ....storage.errors import UsageError
from ....storage.tables.features import Layout
from ...models.attention.maps import Scores
from ...recipe.features import Name
from ...targets.features.batch import FeatureTargets
from ...targets.features.shown import Need, Shown
from .kl_of_maps import kl_of_maps
from .part import Part, StepSize, in_heads

Heads = Literal["each", "average"]


class AttentionPart(Part):
    """The attention of one block at all tokens, the teacher's of its stored queries and keys."""

    def __init__(
        self,
        name: str,
        *,
        asked: int,
        need: Need,
        teacher: int,
        layouts: Mapping[Name, Layout],
        heads: Heads,
    ) -> None:
        super().__init__(name, asked=asked, need=need)
        self._queries, self._keys = ("queries", teacher), ("keys", teacher)
        self._layouts, self._heads = layouts, heads

    def forward(self, shown: Shown, targets: FeatureTargets) -> Tensor:
        """The sum over all tokens of a pass."""
        theirs = stored_scores(
            targets.vectors[self._queries],
            targets.vectors[self._keys],
            self._layouts[self._queries],
            key_heads=self._layouts[self._keys].heads or 1,
        )
        mine = shown.attention(self.need[1]).scores(targets.at)
        return attention_kl(theirs, mine, targets.lengths, heads=self._heads).sum()

    def check(self, shown: Shown, longest: int) -> None:
        """Heads that can be paired, and a student that sees as much."""
        queries, keys = (self._layouts[name] for name in (self._queries, self._keys))
        nothing = torch.zeros(0, queries.width), torch.zeros(0, keys.width)
        theirs = stored_scores(*nothing, queries, key_heads=keys.heads or 1)
        mine = shown.attention(self.need[1]).scores(torch.zeros(0, dtype=torch.long))
        check_pair(theirs, mine, longest, heads=self._heads)

    def count(self, size: StepSize) -> int:
        """All tokens."""
        return size.tokens


def stored_scores(queries: Tensor, keys: Tensor, layout: Layout, *, key_heads: int) -> Scores:
    """What the teacher's maps are made of.

    Args:
        queries: [T, H d], as stored.
        keys: [T, h d]
        layout: Of the queries.
        key_heads: h.
    """
    assert layout.heads is not None
    assert layout.score_scale is not None
    return Scores(
        x=in_heads(queries, layout.heads),
        y=in_heads(keys, key_heads),
        scale=layout.score_scale,
        causal=bool(layout.causal),
        window=layout.window,
    )


def attention_kl(
    teacher: Scores, student: Scores, lengths: Sequence[int], *, heads: Heads = "each"
) -> Tensor:
    """Per token i: 1/H sum_h KL(teacher's a_hi || student's a_hi), nats.

    Wang et al. 2020 (MiniLM), arXiv 2002.10957, the transfer of attention distributions; Jiao et
    al. 2020 (TinyBERT), arXiv 1909.10351, compares the scores before the softmax instead.

    It needs queries and keys of one layer. It is to be used where the student is to look where the
    teacher looks, and both have heads that can be paired; with other heads, relations ask for less.

    Args:
        teacher: Queries [H, T, d] as `x`, keys [h, T, d] as `y`, h divides H (grouped keys); the
            model's own scale, mask and window. A constant to the gradient.
        student: The same of the student, of any width.
        lengths: Tokens of each sample; they follow one another, and none sees another.
        heads: `each` pairs head with head. `average` compares the means over the heads, whose
            numbers may differ; what single heads look for is lost.

    Returns:
        [T] float32, for every token of the samples, 0 at equality. The caller divides by their
        number in the whole step.

    Raises:
        UsageError: other numbers of heads are to be paired, or the student cannot see what the
            teacher looks at, where KL is infinite.
    """
    check_pair(teacher, student, max(lengths, default=0), heads=heads)
    return kl_of_maps(teacher, student, lengths, average=heads == "average")


def check_pair(teacher: Scores, student: Scores, longest: int, *, heads: Heads) -> None:
    """Refuse heads that cannot be paired, and a student that sees less.

    `longest` is how many tokens a sample has at most.

    Raises:
        UsageError: as of `attention_kl`.
    """
    if heads == "each" and len(teacher.x) != len(student.x):
        raise UsageError(
            f"attention: heads: each pairs head with head, but the teacher has {len(teacher.x)} "
            f"and the student {len(student.x)}. Use heads: average, or match: relations, which "
            "works with any number of heads."
        )
    nearer = _reach(student, longest) < _reach(teacher, longest)
    if nearer or (student.causal and not teacher.causal):
        raise UsageError(
            f"attention: the teacher sees {_sight(teacher)}, the student {_sight(student)}: KL is "
            "infinite where the teacher looks at what the student cannot see. Choose layers of "
            "which the student's sees as much, or match: relations."
        )


def _reach(scores: Scores, longest: int) -> int:
    """How many tokens far a token sees, in samples of up to `longest`."""
    return longest if scores.window is None else min(scores.window, longest)


def _sight(scores: Scores) -> str:
    far = "" if scores.window is None else f" less than {scores.window} away"
    return ("tokens up to its own" if scores.causal else "all tokens") + far
