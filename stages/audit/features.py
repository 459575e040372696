"""Deep verification of features: the teacher reads texts again.

Its states are compared with those that are stored. Over all numbers of a row, two sets of vectors
are apart by e = |x' - x| / |x|, x' as read back. A stored row may be off by the sum of

    1.25 r          r its `rounding_error`, as the row states it
    4 d             d how far apart the row's states are read alone and beside another text,
                    padded
    0.001
    4 eps           of the teacher's dtype

States of another token, another text or another layer are about 1 apart. A pooled row is one
vector, which is compared as rows of many are. What a row's matrix made narrower is compared with
the teacher's vectors times that matrix.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ...storage.errors import IntegrityError
from ...storage.store.store import Store
from ...storage.tables.features import POOLED, Rounded, of_text, projected_to, what_and_how
from ...storage.tables.heads import HEADS, head_of
from ...storage.tables.shard import text_keys
from .. import models
from ..models.attention.longest import changes_beyond
from ..models.causal_lm import load_causal_lm
from ..models.classification import Inputs, class_logits
from ..models.head import hidden_states
from ..models.identity import Identity
from ..recipe.features import Feature, Name
from ..recipe.tasks import module_of, task_of
from ..targets.features.blocks import blocks_of
from ..targets.features.capture import Found, capturing
from ..targets.features.shown import embeddings_of
from ..workers.job import Progress
from .matrices import MatrixRead, StoredMatrix, compared, made_again

FeatureFault = Literal[
    "shifted by one position",
    "another layer's",
    "pooled otherwise",
    "another text's",
    "other numbers",
]
_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StoredFeature:
    """A stored row of features that is read again."""

    key: str
    shard: str
    number: int
    head: str
    """Of the model that it was captured of (`Task.head`)."""
    name: Name
    states: np.ndarray
    """[T, D] float32, as read back; of pooled states [1, D]."""
    rounding_error: float
    matrix: np.ndarray | None
    """[D, d] by which they were made narrower; None: they are whole."""
    token_ids: np.ndarray | None
    """[T] its text; None: the store has no text of this name."""

    @property
    def text(self) -> np.ndarray:
        """[T] of a row whose text is there."""
        assert self.token_ids is not None
        return self.token_ids


@dataclass(frozen=True, kw_only=True, slots=True)
class OffFeature:
    """A row whose states are not what the teacher says."""

    key: str
    shard: str
    row: int
    kind: str
    layer: int
    error: float
    """e, as above."""
    allowed: float
    fault: FeatureFault
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesRead:
    """What was read of a teacher's features."""

    rows: int
    worst: float
    """Largest e of the rows that are right."""
    off: list[OffFeature]
    without_text: int = 0
    """Not read: rows whose text the store has no more."""
    matrices: list[MatrixRead] = field(default_factory=list)
    """The teacher's embeddings, and the projections."""

    @property
    def ok(self) -> bool:
        """Whether all that was read is right."""
        return not self.off and not any(matrix.off for matrix in self.matrices)


def choose_features(
    store: Store, teacher_id: str, *, rows: int, seed: int, damaged: Collection[str] = ()
) -> list[StoredFeature]:
    """Random rows of a teacher's features, up to `rows`; `damaged`: files that are left out.

    Rows whose matrix cannot be read are left out too: `verify` names them.
    """
    shards = []
    for commit in store.commits("features"):
        if commit.shard.name in damaged:
            continue
        try:
            file = store.shard("features", commit.shard.sha256)
            head_of(file.about)
        except IntegrityError:
            continue
        if file.about["teacher_id"] == teacher_id:
            shards.append((commit.shard, file))
    edges = np.cumsum([0, *(shard.rows for shard, _ in shards)])
    count = min(rows, int(edges[-1]))
    chosen = np.sort(np.random.default_rng(seed).choice(edges[-1], count, replace=False))
    read = []
    for number, (shard, file) in enumerate(shards):
        mine = chosen[(edges[number] <= chosen) & (chosen < edges[number + 1])] - edges[number]
        read += [(shard.name, file.about, n, r) for n, r in zip(mine, file.take(mine), strict=True)]
    texts = _texts(store, {row["text_key"] for *_, row in read})
    matrices = _matrices(store, {row["projection"] for *_, row in read} - {None})
    return [
        StoredFeature(
            key=row["key"].hex(),
            shard=name,
            number=int(n),
            head=str(about.get("head", "lm")),
            name=(row["kind"], row["layer"]),
            states=Rounded.from_row(row).restored(),
            rounding_error=float(row["rounding_error"]),
            matrix=matrices.get(row["projection"]),
            token_ids=texts.get(row["text_key"]),
        )
        for name, about, n, row in read
        if row["projection"] is None or row["projection"] in matrices
    ]


def _matrices(store: Store, ids: Collection[str]) -> dict[str, np.ndarray]:
    """Those that can be read."""
    found = {}
    for matrix_id in ids:
        with suppress(IntegrityError):
            found[matrix_id] = store.matrix(matrix_id)
    return found


def _texts(store: Store, wanted: Collection[bytes]) -> dict[bytes, np.ndarray]:
    """The tokens of some texts, by name; one shard of `generations` in memory at a time."""
    found: dict[bytes, np.ndarray] = {}
    for commit in store.commits("generations"):
        shard = store.shard("generations", commit.shard.sha256)
        keys = text_keys(shard, shard.numbers).to_pylist()
        rows = [row for row, key in enumerate(keys) if key in wanted and key not in found]
        for row, text in zip(rows, shard.take(rows, ["token_ids"]), strict=True):
            found[keys[row]] = text["token_ids"]
    return found


def read_again(
    teacher: Identity,
    rows: Sequence[StoredFeature],
    *,
    device_map: str | None,
    progress: Progress,
    matrices: Sequence[StoredMatrix] = (),
) -> FeaturesRead:
    """Read the texts of some rows again and compare, and some matrices.

    Args:
        teacher: Whose they are.
        rows: By `choose_features`.
        device_map: As the recipe's `teacher.device_map`.
        progress: Where to say how far it is.
        matrices: By `stored_matrices`.

    Raises:
        UsageError: the teacher does not load, or its layers cannot be captured.
    """
    there = [row for row in rows if row.token_ids is not None]
    without_text = len(rows) - len(there)
    of_teacher = [one for one in matrices if one.of_teacher]
    read = [made_again(one) for one in matrices if not one.of_teacher]
    heads = [row.head for row in there] + [one.head for one in of_teacher]
    if not heads:
        return FeaturesRead(rows=0, worst=0, off=[], without_text=without_text, matrices=read)
    progress.say(f"loading {teacher.folder}")
    reader = _Reader(teacher, heads[0], device_map)
    read += [reader.compared(one) for one in of_teacher]
    progress.start(total=len(there), unit="rows of features")
    worst, off = 0.0, []
    for row in there:
        (right,) = reader.states([row.text], [row.name], row.matrix)
        noise = reader.noise(row)
        allowed = 1.25 * row.rounding_error + 4 * noise + _FLOOR + 4 * reader.eps
        error = apart(row.states, right[row.name])
        if error <= allowed:
            worst = max(worst, error)
        else:
            off.append(_off(row, error, allowed, reader=reader, others=there))
        progress.advance()
    return FeaturesRead(
        rows=len(there), worst=worst, off=off, without_text=without_text, matrices=read
    )


def apart(stored: np.ndarray, right: np.ndarray) -> float:
    """|x' - x| / |x|; infinite where the shapes differ."""
    if stored.shape != right.shape:
        return float("inf")
    missed = float(np.linalg.norm(stored.astype(np.float64) - right))
    return missed / max(float(np.linalg.norm(right.astype(np.float64))), 1e-30)


def _off(
    row: StoredFeature,
    error: float,
    allowed: float,
    *,
    reader: "_Reader",
    others: Sequence[StoredFeature],
) -> OffFeature:
    found = next(_faults(row, allowed, reader=reader, others=others), None)
    fault, message = found or (
        "other numbers",
        "neither of the positions beside their own nor of another layer or another text that was "
        "read: another teacher's under this one's id, or damaged before they were written",
    )
    return OffFeature(
        key=row.key,
        shard=row.shard,
        row=row.number,
        kind=row.name[0],
        layer=row.name[1],
        error=error,
        allowed=allowed,
        fault=fault,
        message=message,
    )


def _faults(
    row: StoredFeature, allowed: float, *, reader: "_Reader", others: Sequence[StoredFeature]
) -> Iterator[tuple[FeatureFault, str]]:
    """What the states may be in place of their own, the likeliest first."""
    kind, _ = row.name
    kinds = POOLED if of_text(kind) else [kind]
    names = [(k, n) for k in kinds for n in range(reader.layers)]
    (every,) = reader.states([row.text], names, row.matrix)
    mine = every[row.name]
    if len(mine) > 2:
        # What stands at the ends may be anything: there was nothing to put there.
        if apart(row.states[1:-1], mine[2:]) <= allowed:
            yield "shifted by one position", "the teacher's at the position after their own"
        if apart(row.states[1:-1], mine[:-2]) <= allowed:
            yield "shifted by one position", "the teacher's at the position before their own"
    for (other_kind, other), states in every.items():
        if (other_kind, other) == row.name or apart(row.states, states) > allowed:
            continue
        if other_kind == kind:
            yield "another layer's", f"the teacher's of layer {other}"
        else:
            yield "pooled otherwise", f"the teacher's {other_kind} of layer {other}"
    for one in others:
        if one.key == row.key:
            continue
        theirs = reader.states([one.text], [row.name], row.matrix)[0][row.name]
        n = min(len(theirs), len(row.states))
        if (n > 1 or of_text(kind)) and apart(row.states[:n], theirs[:n]) <= allowed:
            yield "another text's", f"those of the text of row {one.key}"


def _whole(kind: str) -> str:
    """What a projected kind was made of; of others itself."""
    return kind if projected_to(kind) is None else what_and_how(kind)[0]


def _narrowed(vectors: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Vectors [T, D] by a matrix [D, d]; as they are where it is of others."""
    if matrix is None or vectors.shape[1] != len(matrix):
        return vectors
    narrowed: np.ndarray = vectors @ matrix
    return narrowed


class _Reader:
    """A loaded teacher, whatever its head."""

    def __init__(self, teacher: Identity, head: str, device_map: str | None) -> None:
        self._inputs = None
        if not HEADS[head].classes:
            self._model: Any = load_causal_lm(teacher, device_map=device_map)
        else:
            room = module_of(task_of(head), models.__name__)
            self._model = room.load_teacher(teacher, device_map=device_map)
            self._inputs = Inputs.of(self._model, teacher.folder)
        self._limit = teacher.context_tokens
        self._merged = teacher.adapter is not None
        self.layers = len(blocks_of(self._model))
        self.eps: float = torch.finfo(self._model.dtype).eps

    def compared(self, one: StoredMatrix) -> MatrixRead:
        """The embeddings that are kept against the teacher's own."""
        weight = embeddings_of(self._model).detach()
        return compared(
            one,
            tuple(weight.shape),
            lambda rows: weight[rows].float().cpu().numpy(),
            source="the teacher's",
            relative=4 * self.eps if self._merged else 0.0,
        )

    def noise(self, row: StoredFeature) -> float:
        """How far apart a row's states are, read alone and beside a longer text.

        Beside it the row is padded, unless that changes its states.
        """
        longer = np.append(row.text, row.text[-1])
        alike = len(longer) > self._limit or changes_beyond(self._model.config) is not None
        both = [row.text, row.text if alike else longer]
        alone, beside = (
            self.states(texts, [row.name], row.matrix)[0][row.name] for texts in (both[:1], both)
        )
        return apart(beside, alone)

    def states(
        self, texts: Sequence[np.ndarray], names: Sequence[Name], matrix: np.ndarray | None = None
    ) -> list[Found]:
        """The features of these names of some texts, read together.

        Those of projected kinds are narrowed by this matrix.
        """
        whole = {name: (_whole(name[0]), name[1]) for name in names}
        features = [Feature(kind=kind, layer=layer, bits=32) for kind, layer in whole.values()]
        inputs = self._tensors(texts)
        with torch.inference_mode(), capturing(self._model, features) as taken:
            if self._inputs is None:
                hidden_states(self._model, **inputs)
            else:
                class_logits(self._model, inputs)
        rows = taken.rows([len(text) for text in texts])
        return [
            {name: _narrowed(row[of], None if name == of else matrix) for name, of in whole.items()}
            for row in rows
        ]

    def _tensors(self, texts: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        device = next(self._model.parameters()).device
        if self._inputs is not None:
            made = self._inputs.tensors(texts)
        else:
            ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
                mask[row, : len(text)] = 1
            made = {"input_ids": ids, "attention_mask": mask}
        return {name: tensor.to(device) for name, tensor in made.items()}
