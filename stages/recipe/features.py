"""What can be captured of a teacher beside its distribution, and what a loss can match of it: one row each.

A new thing to capture is a row of `FEATURES`, and what takes it of a forward pass in
`stages/targets/features/`. A new match is a row of `MATCHES`, its settings as fields of `FeatureLoss`,
and the module of the same name in `stages/losses/features/`.

Layer i is the output of block i, the first block being 0: before the final norm, where there is
one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from .fields import Scheduled, Section

Bits = Literal[8, 16, 32]
DTYPES: dict[int, str] = {8: "int8", 16: "float16", 32: "float32"}
"""What numbers are stored as (column `dtype` of `features`), by `bits`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureKind:
    """What can be captured."""

    words: str
    """It for people."""
    bits: Bits
    """Of a number, where the recipe says nothing."""
    of_texts: bool = True
    """Of each text, in rows; False: of the teacher itself, kept once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchKind:
    """What is known of one loss on features."""

    needs: str
    """What must be captured: a row of `FEATURES`."""
    distances: Mapping[str, str] = field(default_factory=dict)
    """Values of `distance` -> equation of one position, in the words of the function's docstring."""
    source: str
    """Who proposed it, and where."""


EMBEDDINGS = "embeddings"
"""The one that is kept once of a teacher."""

FEATURES = {
    "hidden": FeatureKind(words="hidden states of block {layer}", bits=8),
    "queries": FeatureKind(words="queries of block {layer}", bits=16),
    "keys": FeatureKind(words="keys of block {layer}", bits=16),
    "values": FeatureKind(words="values of block {layer}", bits=16),
    EMBEDDINGS: FeatureKind(words="input embeddings", bits=16, of_texts=False),
}
ATTENTION = ("queries", "keys", "values")
"""Kinds that are what attention multiplies, after rotation and after any norm of their own."""

# t: the teacher's state, s: the student's after the trained map, both of D numbers.
MATCHES = {
    "hidden": MatchKind(
        needs="hidden",
        distances={
            "mse": "1/D sum_d (s_d - t_d)^2",
            "cosine": "1 - s.t / (|s| |t|)",
            "smooth_l1": "1/D sum_d h(s_d - t_d), h(x) = x^2 / 2 where |x| < 1, else |x| - 1/2",
        },
        source=(
            "Romero et al. 2015 (FitNets), arXiv 1412.6550, eq. 3; Sanh et al. 2019 (DistilBERT), "
            "arXiv 1910.01108; Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 7"
        ),
    ),
    EMBEDDINGS: MatchKind(
        needs=EMBEDDINGS,
        distances={"mse": "1/D sum_d (s_d - t_d)^2, of the embedding of each token of a pass"},
        source="Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 8",
    ),
}

if TYPE_CHECKING:
    What = str
    Match = str
else:
    What = Literal[tuple(FEATURES)]
    Match = Literal[tuple(MATCHES)]

Layer = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Feature:
    """One thing that is stored of each text: of one layer."""

    kind: str
    layer: int
    bits: int
    """Of a number, at least: what is stored with more serves too."""

    @property
    def dtype(self) -> str:
        """What it is stored as where it is made."""
        return DTYPES[self.bits]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What serves, the least first."""
        return tuple(name for bits, name in DTYPES.items() if bits >= self.bits)

    @property
    def words(self) -> str:
        """It for people."""
        return FEATURES[self.kind].words.format(layer=self.layer)


class FeatureRequest(Section):
    """Something that is captured in the forward pass of scoring."""

    what: What
    """hidden: the states that a block hands on, at every token. embeddings: the matrix of the
    teacher's token embeddings, kept once."""
    layers: list[Layer] = Field([])
    """Blocks of the teacher, the first being 0; of embeddings none."""
    bits: Bits | None = None
    """Of a stored number; 8: with a scale per vector; 32: exact. null: 8."""

    @model_validator(mode="after")
    def _layers_and_bits(self) -> Self:
        if FEATURES[self.what].of_texts and not self.layers:
            raise ValueError(
                f"`layers` names none. Name layers of the teacher whose {self.what} are stored"
            )
        if self.what == EMBEDDINGS and self.layers:
            raise ValueError(f"`layers` {self.layers}: embeddings are of no layer. Leave it out")
        if self.what == EMBEDDINGS and self.bits == 8:
            raise ValueError("`bits` 8: embeddings are kept with 16 or 32. Choose one of these")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"`layers` {self.layers} names one twice. Name each once")
        return self

    def features(self) -> list[Feature]:
        """One for each layer: what is stored of each text."""
        bits = self.bits or FEATURES[self.what].bits
        return [Feature(kind=self.what, layer=layer, bits=bits) for layer in self.layers]


class FeatureLoss(Section):
    """What the student is asked to match of the teacher's features, besides its distribution."""

    match: Match
    """hidden: the states of its blocks; embeddings: those of the tokens of a pass. Through a trained
    linear map where their width is not the teacher's."""
    layers: dict[Layer, Layer] | Literal["uniform", "last"] = "last"
    """Teacher's block -> student's block. last: of the stored ones the last, with the student's
    last. uniform: all stored ones, evenly over the student's blocks."""
    weight: Scheduled = 1.0
    """Used as given, of each pair of blocks; a number or a schedule."""
    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    """Of two states."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.layers == {}:
            raise ValueError("`layers` is empty. Name a pair of blocks, 'uniform' or 'last'")
        if self.match == EMBEDDINGS and self.layers != "last":
            raise ValueError("`layers`: embeddings are of no layer. Leave it out")
        if self.distance not in MATCHES[self.match].distances:
            raise ValueError(
                f"`distance` {self.distance}: match {self.match} has no such. Leave it out"
            )
        return self

    @property
    def kind(self) -> str:
        """What must be stored for it."""
        return MATCHES[self.match].needs

    def pairs(self, stored: Sequence[int], student_blocks: int) -> list[tuple[int, int]]:
        """Teacher's and student's block of each pair, ascending; none of what is of no layer.

        Args:
            stored: Layers of its kind that `score.features` names, ascending.
            student_blocks: How many the student has. `uniform` gives the i-th of n stored layers,
                i = 1 .. n, the student's block i * student_blocks / n, rounded down, counted from 1.
        """
        if self.match == EMBEDDINGS:
            return []
        if isinstance(self.layers, dict):
            return sorted(self.layers.items())
        if self.layers == "last":
            return [(stored[-1], student_blocks - 1)]
        n = len(stored)
        return [(layer, i * student_blocks // n - 1) for i, layer in enumerate(stored, start=1)]


def captured(requests: Iterable[FeatureRequest]) -> list[Feature]:
    """All that `score.features` asks for, one by one."""
    return [feature for request in requests for feature in request.features()]


def embedding_bits(requests: Iterable[FeatureRequest]) -> Bits | None:
    """Of a number of the teacher's embeddings, at least; None: they are not asked for."""
    asked = (one.bits or FEATURES[EMBEDDINGS].bits for one in requests if one.what == EMBEDDINGS)
    return next(asked, None)


def layers_of(requests: Iterable[FeatureRequest], kind: str) -> list[int]:
    """Layers of one kind that are asked for, ascending."""
    return sorted(feature.layer for feature in captured(requests) if feature.kind == kind)


def learnt(losses: Iterable[FeatureLoss], requests: Sequence[FeatureRequest]) -> list[Feature]:
    """Of what is stored, what some losses compare with, ascending."""
    found: set[Feature] = set()
    for loss in losses:
        mine = {one.layer: one for one in captured(requests) if one.kind == loss.kind}
        # Which blocks the student has decides the pairs, not whose teacher's layers they are of.
        pairs = loss.pairs(sorted(mine), student_blocks=len(mine))
        found.update(mine[teacher] for teacher, _ in pairs)
    return sorted(found)
