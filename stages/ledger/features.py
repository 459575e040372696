"""The books of features.

They say which stored row has what a recipe asks of a text, what features take, and what they are
called.

A feature is of the token ids alone (`text_key`): another label or span finds what is there. A
stored layer is found by any request for it; numbers of more bits serve where fewer are asked for,
not the other way round. Only rows to train on have any: nobody is judged on them.
"""

from collections.abc import Mapping, Sequence

import pyarrow as pa

from ...storage.errors import UsageError
from ...storage.keys import content_id, content_key
from ...storage.store.matrices import KeptMatrix
from ...storage.store.store import Store
from ...storage.tables.features import projected_to, what_and_how
from ...storage.tables.schema import KEY
from ...storage.tables.shard import text_keys
from ..recipe.features import DTYPES, EMBEDDINGS, Feature
from .books import Books

SCALE_BYTES = 4
"""Of the scale of a vector at 8 bits."""
NAME_BYTES = 60
"""Bytes of the names of a row and its error, beside the vector of a text. In rows of many vectors
they are nothing."""


Widths = Mapping[str, int]
"""Numbers of a vector, by kind of feature; of a kind that is left out nothing is known."""


def feature_bytes(feature: Feature, widths: Widths) -> int:
    """What a feature takes on disk of a token, or of a text that has one vector.

    Its numbers are not compressed.
    """
    scale = SCALE_BYTES if feature.bits == 8 else 0
    numbers = projected_to(feature.kind) or widths.get(feature.kind, 0)
    vector = numbers * feature.bits // 8 + scale
    return vector + NAME_BYTES * feature.of_text


def check_narrower(feature: Feature, width: int) -> None:
    """See that a projected feature has fewer numbers than the teacher's vectors.

    Nothing is checked where those are not known.

    Raises:
        UsageError: it has not.
    """
    to = projected_to(feature.kind)
    if to is not None and 0 < width <= to:
        raise UsageError(
            f"score.features: project {to}: the teacher's {what_and_how(feature.kind)[0]} of block "
            f"{feature.layer} have {width} numbers, and become no fewer. Set project below "
            f"{width}, or leave it out."
        )


def feature_key(teacher_id: str, text: bytes, feature: Feature) -> bytes:
    """Reuse key of a row of `features`: the teacher, the text, what of which layer."""
    return content_key(
        "features", teacher=teacher_id, text=text, kind=feature.kind, layer=feature.layer
    )


def feature_row_key(teacher_id: str, text: bytes, feature: Feature) -> bytes:
    """Key of the row that would be made for a feature."""
    reuse_key = feature_key(teacher_id, text, feature)
    return content_key("features_row", reuse_key=reuse_key, dtype=feature.dtype)


def capture_id(teacher_id: str, features: Sequence[Feature]) -> str:
    """The name, in its rejects, of a teacher that is asked for these features too.

    Other features may still be had of it.
    """
    named = [[one.kind, one.layer, one.bits] for one in sorted(features)]
    return content_id("capture", teacher=teacher_id, features=named)


def embeddings_name(teacher_id: str, dtype: str) -> str:
    """Name of the matrix of a teacher's embeddings in the store."""
    return content_id("matrix", what=EMBEDDINGS, teacher=teacher_id, dtype=dtype)


def find_embeddings(store: Store, teacher_id: str, bits: int) -> KeptMatrix | None:
    """The teacher's embeddings with so many bits a number or more, here or in a source.

    It is None where they are not kept.
    """
    names = (embeddings_name(teacher_id, name) for b, name in DTYPES.items() if b >= max(bits, 16))
    return next(filter(None, map(store.matrix_named, names)), None)


def name_texts(books: Books) -> None:
    """Make the view `named`, after `choose_generations`.

    It has `key` and `text_key` of the rows to train on.
    """
    texts = _texts(books) if books.published is None else books.published.texts()
    books.index.register("named_texts", texts)
    books.index.execute(
        "CREATE OR REPLACE VIEW named AS SELECT key::UUID AS key, text_key::UUID AS text_key "
        "FROM named_texts"
    )


def _texts(books: Books) -> pa.Table:
    rows = books.index.table("SELECT DISTINCT place FROM chosen WHERE NOT held_out")
    schema = pa.schema([("key", KEY), ("text_key", KEY)])
    parts = [schema.empty_table()]
    for sha256, numbers in books.index.places("generations", rows["place"].to_numpy()).items():
        shard = books.store.shard("generations", sha256)
        keys = shard.select(numbers, ["key"])["key"].combine_chunks()
        parts.append(pa.Table.from_arrays([keys, text_keys(shard, numbers)], schema=schema))
    return pa.concat_tables(parts)


class FeatureSql:
    """Parts of the query of `scored` for the features that a recipe asks for.

    They are empty where it asks for none.
    """

    def __init__(self, features: Sequence[Feature], *, teacher_id: str, places: int) -> None:
        """`places`: by which a rank is multiplied, so that a row's place stands below it."""
        self._features = list(features)
        self._teacher_id, self._places = teacher_id, places

    @property
    def columns(self) -> list[str]:
        """Names of the columns that hold the place of each feature's row."""
        return [f"feature_{number}" for number in range(len(self._features))]

    @property
    def tables(self) -> str:
        """SQL of `feature_rows`.

        It has of each text the best row of each feature, and whether one has too few bits.
        """
        if not self._features:
            return ""
        best = ", ".join(
            f"min({_bits()} * {self._places}::HUGEINT + place) FILTER ({_is(one)} AND "
            f"dtype IN {_names(one.dtypes)}) AS {column}"
            for one, column in zip(self._features, self.columns, strict=True)
        )
        fewer = " OR ".join(
            f"({_is(one)} AND dtype NOT IN {_names(one.dtypes)})" for one in self._features
        )
        return (
            f", feature_rows AS NOT MATERIALIZED (SELECT text_key, {best}, bool_or({fewer}) AS "
            f"fewer FROM features WHERE teacher_id = '{self._teacher_id}' GROUP BY text_key)"
        )

    @property
    def selected(self) -> str:
        """Columns of `scored`: the places, the text, whether all is there."""
        if not self._features:
            return ", NULL::UUID AS text_key, true AS complete, false AS fewer"
        places = ", ".join(f"({c} % {self._places})::BIGINT AS {c}" for c in self.columns)
        complete = " AND ".join(f"{c} IS NOT NULL" for c in self.columns)
        return (
            f", {places}, named.text_key, held_out OR ({complete}) AS complete, "
            "coalesce(fewer, false) AS fewer"
        )

    @property
    def joined(self) -> str:
        """How the columns are found."""
        if not self._features:
            return ""
        return (
            "LEFT JOIN named ON named.key = requests.key "
            "LEFT JOIN feature_rows ON feature_rows.text_key = named.text_key"
        )

    def to_do(self, widths: Widths) -> str:
        """Bytes of what a row of `scored` lacks, of a teacher with vectors of these widths."""
        parts = [
            f"CASE WHEN {column} IS NULL THEN {feature_bytes(one, widths)} ELSE 0 END"
            + ("" if one.of_text else " * tokens")
            for one, column in zip(self._features, self.columns, strict=True)
        ]
        return f"CASE WHEN held_out THEN 0 ELSE {' + '.join(['0', *parts])} END"


def _is(feature: Feature) -> str:
    return f"kind = '{feature.kind}' AND layer = {feature.layer}"


def _bits() -> str:
    return "CASE dtype WHEN 'int8' THEN 8 WHEN 'float16' THEN 16 ELSE 32 END"


def _names(names: Sequence[str]) -> str:
    return f"({', '.join(map(repr, names))})"
