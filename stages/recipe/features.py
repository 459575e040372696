"""What can be captured of a teacher beside its distribution, and what a loss can match of it.

Each has one row.

A new thing to capture is a row of `FEATURES`, and what takes it of a forward pass in
`stages/targets/features/`. A new match is a row of `MATCHES`, its settings as fields of
`FeatureLoss`, and the module of the same name in `stages/losses/features/`.

Layer i is the output of block i, the first block being 0: before the final norm, where there is
one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ...storage.tables.features import (
    HEADED,
    PROJECTED,
    made_kind,
    of_text,
    projected_to,
    what_and_how,
)
from .fields import Layer, Once, Pairs, Scheduled, Section

Bits = Literal[8, 16, 32]
DTYPES: dict[int, str] = {8: "int8", 16: "float16", 32: "float32"}
"""What numbers are stored as (column `dtype` of `features`), by `bits`."""
Pooling = Literal["cls", "mean", "last"]
"""How one vector is made of a text's states, by `stages/targets/features/pooling.py`."""
RELATIONS_NEED = 128
"""Numbers of a projected vector, at least, where relations are learnt: cosines are off by
1/sqrt(d)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureKind:
    """What can be captured."""

    words: str
    """It for people."""
    bits: Bits
    """Of a number, where the recipe says nothing."""
    of_texts: bool = True
    """Of each text, in rows; False: of the teacher itself, kept once."""
    fields: tuple[str, ...] = ()
    """Of a request for it, besides those that all have; each must be given."""
    may: tuple[str, ...] = ()
    """And those that may."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchKind:
    """What is known of one loss on features."""

    settings: tuple[str, ...] = ()
    """Fields of `FeatureLoss` that are its own."""
    needs: tuple[str, ...] = ()
    """What must be captured of each layer: rows of `FEATURES`. None: what its field `of` names."""
    equation: str = ""
    """Of one term, in the words of the function's docstring; with `distance`: see `distances`."""
    distances: Mapping[str, str] = field(default_factory=dict)
    """Values of `distance` -> equation of one position."""
    source: str
    """Who proposed it, and where."""


EMBEDDINGS = "embeddings"
"""The one that is kept once of a teacher."""

FEATURES = {
    "hidden": FeatureKind(words="hidden states of {blocks}", bits=8),
    "queries": FeatureKind(words="queries of {blocks}", bits=16),
    "keys": FeatureKind(words="keys of {blocks}", bits=16),
    "values": FeatureKind(words="values of {blocks}", bits=16, may=("project",)),
    "pooled": FeatureKind(
        words="pooled ({pooling}) states of {blocks}",
        bits=16,
        fields=("pooling",),
    ),
    EMBEDDINGS: FeatureKind(words="input embeddings", bits=16, of_texts=False),
}

# t: the teacher's state, s: the student's after the trained map, both of D numbers.
MATCHES = {
    "hidden": MatchKind(
        settings=("distance",),
        needs=("hidden",),
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
    "attention": MatchKind(
        settings=("heads",),
        needs=("queries", "keys"),
        equation="1/H sum_h KL(a_h of t || a_h of s), a = softmax(scale q . k) over what is seen",
        source="Wang et al. 2020 (MiniLM), arXiv 2002.10957",
    ),
    "relations": MatchKind(
        settings=("of", "relation_heads", "project"),
        equation="1/A sum_a KL(softmax(t_a . t_a / sqrt(d_t)) || softmax(s_a . s_a / sqrt(d_s)))",
        source="Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, eq. 4 to 6",
    ),
    "rkd": MatchKind(
        settings=("pooling", "group"),
        needs=("pooled",),
        equation=(
            "mean over pairs of huber(|s_i - s_j| / mu_s - |t_i - t_j| / mu_t), mu the mean "
            "distance, + 2 x mean over triples of huber(cos at s_j - cos at t_j)"
        ),
        source="Park et al. 2019 (RKD), arXiv 1904.05068, eq. 3 to 6",
    ),
    "similarity": MatchKind(
        settings=("pooling", "group"),
        needs=("pooled",),
        equation="mean over i, j of (g^s_ij - g^t_ij)^2, g_i row i of X X^T over its length",
        source="Tung & Mori 2019 (similarity-preserving), arXiv 1907.09682, eq. 1 to 3",
    ),
    "infonce": MatchKind(
        settings=("pooling", "group", "temperature"),
        needs=("pooled",),
        equation="-log(exp(cos(s_i, t_i) / T) / sum_j exp(cos(s_i, t_j) / T))",
        source=(
            "van den Oord et al. 2018, arXiv 1807.03748, eq. 4; Tian et al. 2020 (CRD), "
            "arXiv 1910.10699"
        ),
    ),
    EMBEDDINGS: MatchKind(
        settings=(),
        needs=(EMBEDDINGS,),
        equation="1/D |W e - t|^2 of the embeddings of each token, W a trained map or none",
        source="Jiao et al. 2020 (TinyBERT), arXiv 1909.10351, eq. 8",
    ),
}

if TYPE_CHECKING:
    What = str
    Match = str
    Multiplied = str
else:
    What = Literal[tuple(FEATURES)]
    Multiplied = Literal[HEADED]
    Match = Literal[tuple(MATCHES)]

_OF_NO_LAYER = "`layers`: embeddings are of no layer. Leave it out"


Name = tuple[str, int]
"""Kind and layer of a feature."""


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Feature:
    """One thing that is stored of each text: of one layer."""

    kind: str
    """Column `kind`: a row of `FEATURES` and how it was made of it: `pooled_mean`, `values_256`."""
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
    def of_text(self) -> bool:
        """One vector a text; else one a token."""
        return of_text(self.kind)

    @property
    def words(self) -> str:
        """It for people."""
        return self.words_of(f"block {self.layer}")

    def words_of(self, blocks: str) -> str:
        """The same of other blocks, or of several."""
        what, how = what_and_how(self.kind)
        words = FEATURES[what].words.format(blocks=blocks, pooling=how)
        return words if projected_to(self.kind) is None else f"{words} in {how} numbers"


class FeatureRequest(Section):
    """Something that is captured in the forward pass of scoring."""

    what: What
    """hidden: the states that a block hands on, at every token. queries, keys, values: what its
    attention multiplies, all heads, after rotation. pooled: one vector a text of the states.
    embeddings: the matrix of the teacher's token embeddings, kept once."""
    layers: Annotated[list[Layer], Once] = Field([])
    """Blocks of the teacher, the first being 0; of embeddings none."""
    bits: Bits | None = None
    """Of a stored number; 8: with a scale per vector; 32: exact. null: 8 of hidden states, else
    16."""
    pooling: Pooling | None = None
    """pooled, needed. mean: over all tokens of the text; cls: its first token's state, of encoders;
    last: its last token's."""
    project: int | None = Field(None, ge=1)
    """values: numbers that a token's are projected to, by a seeded orthonormal matrix that the
    store keeps; fewer than they have, and 128 at least where relations are learnt. null: as they
    are."""

    @model_validator(mode="after")
    def _layers_and_bits(self) -> Self:
        if FEATURES[self.what].of_texts and not self.layers:
            raise ValueError(
                f"`layers` names none. Name layers of the teacher whose {self.what} are stored"
            )
        if self.what == EMBEDDINGS and self.layers:
            raise ValueError(_OF_NO_LAYER)
        if self.what == EMBEDDINGS and self.bits == 8:
            raise ValueError("`bits` 8: embeddings are kept with 16 or 32. Choose one of these")
        return self

    @model_validator(mode="after")
    def _its_own_fields(self) -> Self:
        kind = FEATURES[self.what]
        known = {what: {*one.fields, *one.may} for what, one in FEATURES.items()}
        for name in sorted(set.union(*known.values())):
            given = getattr(self, name) is not None
            if given and name not in known[self.what]:
                others = " or ".join(what for what, names in known.items() if name in names)
                raise ValueError(f"`{name}` is of what: {others}; this is {self.what}. Remove it")
            if not given and name in kind.fields:
                raise ValueError(f"what: {self.what} needs `{name}`. Name one")
        return self

    def features(self) -> list[Feature]:
        """One for each layer: what is stored of each text."""
        bits = self.bits or FEATURES[self.what].bits
        kind = made_kind(self.what, self.pooling or self.project)
        return [Feature(kind=kind, layer=layer, bits=bits) for layer in self.layers]


class FeatureLoss(Section):
    """What the student is asked to match of the teacher's features, besides its distribution."""

    match: Match
    """hidden: the states of its blocks, through a trained linear map where their width is not the
    teacher's. attention: where its tokens look. relations: how alike its queries, keys or values
    are. rkd, similarity: how texts lie to one another. infonce: which text is which. embeddings:
    those of the tokens, through a map as hidden states."""
    layers: Pairs = "last"
    """Teacher's block -> student's block. last: of the stored ones the last, with the student's
    last. uniform: all stored ones, evenly over the student's blocks."""
    weight: Scheduled = 1.0
    """Used as given, of each pair of blocks; a number or a schedule."""
    distance: Literal["mse", "cosine", "smooth_l1"] = "mse"
    """hidden: of two states."""
    heads: Literal["each", "average"] = "each"
    """attention: each of the teacher's heads with the student's of the same number, or the means
    over the heads of each."""
    of: Annotated[list[Multiplied], Once] = Field(list(HEADED), min_length=1)
    """relations: of which vectors, each a part of the loss."""
    relation_heads: int | None = Field(None, ge=1)
    """relations: parts into which the vectors of all heads are cut anew; needed. It divides the
    teacher's width and the student's."""
    project: int | None = None
    """relations of values: which of the teacher's projected ones; null: those that are whole."""
    pooling: Pooling | None = None
    """rkd, similarity, infonce, needed: which of the teacher's pooled vectors; the student's states
    are pooled alike."""
    group: int = Field(32, ge=2)
    """rkd, similarity, infonce: samples that are compared with one another: so many of a step that
    follow each other. Whole groups share a pass. The same in all entries."""
    temperature: float = Field(0.07, gt=0)
    """infonce: what cosines are divided by."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.layers == {}:
            raise ValueError("`layers` is empty. Name a pair of blocks, 'uniform' or 'last'")
        if self.match == EMBEDDINGS and self.layers != "last":
            raise ValueError(_OF_NO_LAYER)
        return self

    @model_validator(mode="after")
    def _its_own(self) -> Self:
        own = self.kind.settings
        others = {n for kind in MATCHES.values() for n in kind.settings if n not in own}
        if foreign := sorted(self.model_fields_set & others):
            whose = " or ".join(
                repr(m) for m, kind in MATCHES.items() if foreign[0] in kind.settings
            )
            raise ValueError(
                f"`{foreign[0]}` belongs to match {whose}; this is {self.match!r}. Remove it"
            )
        if self.match == "relations" and self.relation_heads is None:
            raise ValueError(
                "match 'relations' needs `relation_heads`: how many parts the vectors are cut "
                "into; 12 or 48 of 768 numbers, say"
            )
        if self.project is not None and self.of != [*PROJECTED]:
            raise ValueError(f"`project` is of values alone. Set of: [{', '.join(PROJECTED)}]")
        if self.project is not None and self.relation_heads != 1:
            raise ValueError(
                f"`project` with relation_heads {self.relation_heads}: projected vectors have no "
                "heads, and cannot be cut. Set relation_heads: 1"
            )
        if self.project is not None and self.project < RELATIONS_NEED:
            raise ValueError(
                f"`project` {self.project}: every cosine is off by about 1/sqrt({self.project}), "
                f"and relations need {RELATIONS_NEED} numbers at least. Store and name so many"
            )
        if "pooling" in own and self.pooling is None:
            raise ValueError(
                f"match {self.match!r} needs `pooling`: 'cls', 'mean' or 'last', as score.features "
                "has it"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_others(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without settings of other matches: so a hash knows no match that came after it."""
        others = {n for kind in MATCHES.values() for n in kind.settings} - set(self.kind.settings)
        if self.project is None:  # there was none when the first hashes were made
            others.add("project")
        return {name: value for name, value in whole(self).items() if name not in others}

    @property
    def kind(self) -> MatchKind:
        """What is known of it."""
        return MATCHES[self.match]

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be stored of each layer: values of the column `kind`."""
        how = self.pooling or self.project
        return tuple(made_kind(need, how) for need in self.kind.needs or self.of)

    def pairs(self, stored: Sequence[int], student_blocks: int) -> list[tuple[int, int]]:
        """Teacher's and student's block of each pair, ascending; none of what is of no layer.

        Args:
            stored: Layers of which all that it needs is stored, ascending.
            student_blocks: How many the student has. `uniform` gives the i-th of n stored layers
                the student's block i * student_blocks / n, rounded down, all counted from 1.
        """
        if self.match == EMBEDDINGS:
            return []
        if isinstance(self.layers, dict):
            return sorted(self.layers.items())
        if self.layers == "last":
            return [(stored[-1], student_blocks - 1)]
        n = len(stored)
        return [(layer, i * student_blocks // n - 1) for i, layer in enumerate(stored, start=1)]


def pooling_of(kind: str) -> Pooling:
    """How a pooled kind is pooled."""
    return cast("Pooling", what_and_how(kind)[1])


def captured(requests: Iterable[FeatureRequest]) -> list[Feature]:
    """All that `score.features` asks for, one by one."""
    return [feature for request in requests for feature in request.features()]


def embedding_bits(requests: Iterable[FeatureRequest]) -> Bits | None:
    """Bits of a number of the teacher's embeddings, at least. None: they are not asked for."""
    asked = (one.bits or FEATURES[EMBEDDINGS].bits for one in requests if one.what == EMBEDDINGS)
    return next(asked, None)


def layers_of(requests: Iterable[FeatureRequest], kind: str) -> list[int]:
    """Layers of one kind that are asked for, ascending."""
    return sorted(feature.layer for feature in captured(requests) if feature.kind == kind)


def layers_for(loss: FeatureLoss, requests: Sequence[FeatureRequest]) -> list[int]:
    """Layers of which all is asked for that a loss needs, ascending."""
    of_each = [set(layers_of(requests, kind)) for kind in loss.needs]
    return sorted(set.intersection(*of_each))


def learnt(losses: Iterable[FeatureLoss], requests: Sequence[FeatureRequest]) -> list[Feature]:
    """The stored features that some losses compare with, ascending."""
    named = {(one.kind, one.layer): one for one in captured(requests)}
    found: set[Feature] = set()
    for loss in losses:
        layers = layers_for(loss, requests)
        # Which blocks the student has decides the pairs, not whose teacher's layers they are of.
        for teacher, _ in loss.pairs(layers, student_blocks=len(layers)):
            found.update(named[kind, teacher] for kind in loss.needs)
    return sorted(found)
