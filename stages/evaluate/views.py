"""What a report shows of held-out rows besides means.

It shows distributions, the KL by position, and a few rows token by token. All of it is sums and a
handful of rows: its size does not grow with the held-out set. Bin edges are fixed, so that runs can
be laid over one another. Bin i holds edges[i] <= x < edges[i + 1], and the last one whatever is
beyond as well.

Letters: n tokens of a chunk, V the model's vocabulary, K entries of a soft target.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.inputs.token_text import Pieces
from ..targets.alignment import scored_tokens
from ..targets.best_entries import ENTRIES
from ..targets.spec import Kept
from ..workers.ranks import Ranks
from .metrics import ratio_mean

ROWS, CONTEXT, TOKENS, BEST = 4, 48, 80, 5
"""Rows shown, unscored tokens before each span, scored ones, and entries of each distribution."""
MASS_TOKENS = 4_096
"""Tokens on which kept mass is measured, at most, as it sorts: every second, third ... token of
more."""
POSITION_EDGES = (0, *(2**i for i in range(20)))
ENTROPY_EDGES = tuple(0.25 * i for i in range(57))
MASS_EDGES = (*(n / 10 for n in range(10)), 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
LENGTH_BINS = 24
LADDER = tuple(2**i for i in range(9))
DIGITS = 4
_MEASURES = ("kl_teacher", "cross_entropy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Of some scored tokens of a row."""

    key: bytes
    unit: bytes
    """The row's prompt."""
    start: int
    """Number of the first of them."""
    measure: str
    values: np.ndarray
    tokens: dict[str, list[Any]] | None
    """To be shown; None: the row is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OfTeacher:
    """Of a row of the teacher's."""

    key: bytes
    unit: bytes
    """The row's prompt."""
    entropy: np.ndarray
    mass: np.ndarray | None
    """Of tokens by their kept mass; None: nothing of it is kept."""
    ladder: np.ndarray | None
    shown: dict[str, Any] | None
    """To be shown; None: its rank has offered enough."""


class ArmViews:
    """What is gathered of one arm."""

    def __init__(self, shown: Mapping[bytes, Any]) -> None:
        self._shown = shown
        self._sums: dict[bytes, np.ndarray] = {}
        self.measure = ""
        self.rows: dict[bytes, list[dict[str, list[Any]]]] = {}

    def add(
        self, row: Mapping[str, Any], start: int, *, measures: Mapping[str, Tensor], logits: Tensor
    ) -> None:
        """Count scored tokens `start`, `start` + 1, ... of a row, through all its spans.

        Args:
            row: Has `key` and `prompt_key`.
            start: Number of the first of these among the scored tokens.
            measures: Of `metrics.measure`, each [n].
            logits: [n, V] they were made of.
        """
        measure = next(name for name in _MEASURES if name in measures)
        tokens = None
        if row["key"] in self._shown and start < TOKENS:
            part = slice(0, TOKENS - start)
            kept = {name: measures[name][part] for name in _MEASURES}
            tokens = _tokens(kept, logits[part].float().log_softmax(-1))
        self.count(
            Seen(
                key=row["key"],
                unit=row["prompt_key"],
                start=start,
                measure=measure,
                values=measures[measure].double().cpu().numpy(),
                tokens=tokens,
            )
        )

    def count(self, seen: Seen) -> None:
        """Count what was seen of some tokens."""
        self.measure = seen.measure
        start, values = seen.start, seen.values
        bins = in_bins(np.arange(start, start + len(values)), POSITION_EDGES)
        sums = self._sums.setdefault(seen.unit, np.zeros((2, len(POSITION_EDGES))))
        sums[0] += np.bincount(bins, values, len(POSITION_EDGES))
        sums[1] += np.bincount(bins, minlength=len(POSITION_EDGES))
        if seen.tokens is not None:
            self.rows.setdefault(seen.key, []).append(seen.tokens)

    def notes(self) -> "ViewNotes":
        """Where what is seen is noted only."""
        return ViewNotes(self._shown)

    def by_position(self) -> list[dict[str, float | int | None]]:
        """Give each bin's tokens, its mean and its standard error over prompts.

        The last bin is the last that has tokens.
        """
        sums = np.stack(list(self._sums.values()))
        last = int(np.flatnonzero(sums[:, 1].sum(0)).max(initial=-1))
        found: list[dict[str, float | int | None]] = []
        for number in range(last + 1):
            there = sums[sums[:, 1, number] > 0, :, number]
            mean, error = ratio_mean(there[:, 0], there[:, 1]) if len(there) else (None, None)
            found.append({"tokens": round(float(there[:, 1].sum())), "mean": mean, "se": error})
        return found


class ViewNotes(ArmViews):
    """What would be gathered, to be counted later.

    It is counted where the rows of all ranks come together in their order.
    """

    def __init__(self, shown: Mapping[bytes, Any]) -> None:
        super().__init__(shown)
        self.noted: list[Seen] = []

    def count(self, seen: Seen) -> None:
        """Note it."""
        self.noted.append(seen)


def _tokens(measures: Mapping[str, Tensor], logprobs: Tensor) -> dict[str, list[Any]]:
    """Per token: the KL, the probability of the token that is there, the best entries."""
    best = logprobs.topk(min(BEST, logprobs.shape[-1]), dim=-1)
    return {
        "kl": rounded(measures["kl_teacher"]),
        "token": rounded((-measures["cross_entropy"]).exp()),
        "ids": best.indices.tolist(),
        "probabilities": rounded(best.values.exp()),
    }


class Views:
    """What is gathered of all arms."""

    def __init__(self, *, kept: Kept | None, pieces: Pieces) -> None:
        """`kept`: what the recipe keeps of the teacher; None: nothing, or classes."""
        self._kept, self._pieces = kept, pieces
        self._arms: dict[str, ArmViews] = {}
        self._shown: dict[bytes, dict[str, Any]] = {}
        self._prompts: set[bytes] = set()
        self._offered: set[bytes] = set()
        self._entropy = np.zeros(len(ENTROPY_EDGES), np.int64)
        self._mass = np.zeros(len(MASS_EDGES), np.int64)
        self._ladder = np.zeros(len(LADDER))
        self._lengths: list[int] = []
        self._before: list[int] = []
        self._tokens = 0

    def arm(self, name: str) -> ArmViews:
        """Where a student's rows go."""
        return self._arms.setdefault(name, ArmViews(self._shown))

    def add_length(self, tokens: int) -> None:
        """Count a row; all of them, before anything else."""
        self._lengths.append(tokens)
        self._before.append(self._tokens)
        self._tokens += tokens

    def of_teacher(self, row: Mapping[str, Any], targets: SoftTargets) -> OfTeacher:
        """What is gathered of a row of the teacher's: `full` or `topk` targets, normalised.

        `row` has its `number` among those whose lengths were added.
        """
        bins = in_bins(targets.entropy, ENTROPY_EDGES)
        mass = ladder = shown = None
        if self._kept is not None:
            stride = -(-self._tokens // MASS_TOKENS)
            passed = self._before[row["number"]]
            some = targets.positions(slice(-passed % stride, None, stride))
            mass, ladder = self._mass_of(some, self._kept)
            if self._may_be_shown(row):
                self._offered.add(row["prompt_key"])
                shown = _shown(row, targets.positions(slice(0, TOKENS)))
        return OfTeacher(
            key=row["key"],
            unit=row["prompt_key"],
            entropy=np.bincount(bins, minlength=len(ENTROPY_EDGES)),
            mass=mass,
            ladder=ladder,
            shown=shown,
        )

    def _may_be_shown(self, row: Mapping[str, Any]) -> bool:
        """Whether it is one of the first few of this rank: those of all ranks are among these."""
        if len(self._offered) == ROWS or row["prompt_key"] in self._offered:
            return False
        middle: int = sorted(self._lengths)[len(self._lengths) // 2]
        return bool(row["span_tokens"] >= middle)

    def add_teacher(self, found: OfTeacher) -> None:
        """Count a row of the teacher's, the rows of all ranks in their order.

        Shown are the first few, of different prompts, that are no shorter than half of all rows.
        """
        self._entropy += found.entropy
        if found.mass is not None and found.ladder is not None:
            self._mass += found.mass
            self._ladder += found.ladder
        taken = len(self._shown) == ROWS or found.unit in self._prompts
        if found.shown is not None and not taken:
            self._prompts.add(found.unit)
            self._shown[found.key] = found.shown

    def tell(self, ranks: Ranks) -> None:
        """Let all ranks know what the first one shows of the teacher's rows."""
        self._shown.update(ranks.told(self._shown))

    def _mass_of(self, targets: SoftTargets, kept: Kept) -> tuple[np.ndarray, np.ndarray]:
        """Tokens by their kept mass, and the mass of the best ids."""
        assert targets.logprobs is not None
        asked = kept.k if kept.structure.has_tail else 1
        most = min(max(asked, LADDER[-1]), targets.logprobs.shape[1])
        best = (
            torch.as_tensor(targets.logprobs)
            .topk(most, dim=-1)
            .values.double()
            .exp()
            .cumsum(-1)
            .numpy()
        )
        ladder = best[:, [min(k, most) - 1 for k in LADDER]].sum(0)
        bins = in_bins(kept_mass(best, kept), MASS_EDGES)
        return np.bincount(bins, minlength=len(MASS_EDGES)), ladder

    def content(self) -> dict[str, Any]:
        """What `evaluation.json` holds of it; parts of which nothing is known are left out."""
        found: dict[str, Any] = {"lengths": lengths(self._lengths)} if self._lengths else {}
        if self._entropy.any():
            found["entropy"] = {"edges": list(ENTROPY_EDGES), "tokens": self._entropy.tolist()}
        if tokens := int(self._mass.sum()):
            assert self._kept is not None
            if self._kept.structure.has_tail:
                kept = {"kind": self._kept.kind, "k": self._kept.k, "p": self._kept.p}
                found["kept_mass"] = kept | {
                    "edges": list(MASS_EDGES),
                    "tokens": self._mass.tolist(),
                }
            best = [
                {"k": k, "mass": float(m)}
                for k, m in zip(LADDER, self._ladder / tokens, strict=True)
            ]
            found["mass_by_k"] = {"tokens": tokens, "best": best}
        if counted := {name: arm for name, arm in self._arms.items() if arm.measure}:
            arms = {name: arm.by_position() for name, arm in counted.items()}
            measure = next(iter(counted.values())).measure
            found["by_position"] = {"measure": measure, "edges": list(POSITION_EDGES), "arms": arms}
        return found | self._rows()

    def _rows(self) -> dict[str, Any]:
        rows = []
        for key, shown in self._shown.items():
            parts = {name: arm.rows[key] for name, arm in self._arms.items() if key in arm.rows}
            arms = {name: _joined(part) for name, part in parts.items()}
            rows.append({"key": key.hex(), **shown, "arms": arms})
        ids = {i for row in rows for i in (*row["before"], *row["token_ids"])}
        ids |= {i for row in rows for gap in row["between"] for i in gap["token_ids"]}
        ids |= {
            i
            for row in rows
            for party in (row["teacher"], *row["arms"].values())
            for e in party["ids"]
            for i in e
        }
        return (
            {"rows": rows, "pieces": {str(i): self._pieces[i] for i in sorted(ids)}} if rows else {}
        )


def _joined(parts: Sequence[Mapping[str, list[Any]]]) -> dict[str, list[Any]]:
    """The chunks of a row as one."""
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


@dataclass(frozen=True, slots=True)
class _Unscored:
    """What stands before a span and is not scored."""

    after: int
    """Scored tokens before it."""
    cut: int
    """Of its tokens, those that are not shown."""
    part: slice
    """The others, in the row."""


def _unscored(spans: np.ndarray, n: int) -> Iterator[_Unscored]:
    """Before each span that begins among the first n scored tokens."""
    after = end = 0
    for start, tokens in spans.tolist():
        if after < n:
            first = max(end, start - CONTEXT)
            yield _Unscored(after, first - end, slice(first, start))
        after, end = after + tokens, start + tokens


def _shown(row: Mapping[str, Any], targets: SoftTargets) -> dict[str, Any]:
    """A row of the teacher's for people, cut to what is shown.

    It has scored tokens, the unscored ones before each span, and what the teacher says.
    """
    ids, n = row["token_ids"], len(targets.token_logprob)
    before, *between = _unscored(row["spans"], n)
    best = torch.as_tensor(targets.logprobs).topk(min(BEST, targets.probabilities.shape[1]), dim=-1)
    named = (
        best.indices
        if targets.ids is None
        else torch.as_tensor(targets.ids).long().gather(-1, best.indices)
    )
    there, probabilities = (named >= 0).sum(-1).tolist(), rounded(best.values.exp())
    return {
        "before": ids[before.part].tolist(),
        "cut_before": before.cut,
        "between": [
            {"after": gap.after, "cut": gap.cut, "token_ids": ids[gap.part].tolist()}
            for gap in between
        ],
        "token_ids": _there(row)[:n].tolist(),
        "cut_after": row["span_tokens"] - n,
        "teacher": {
            "token": rounded(np.exp(targets.token_logprob)),
            # A position may have fewer: the best come first.
            "ids": [ids[:n] for ids, n in zip(named.tolist(), there, strict=True)],
            "probabilities": [held[:n] for held, n in zip(probabilities, there, strict=True)],
        },
    }


def _there(row: Mapping[str, Any]) -> np.ndarray:
    """[N] the tokens that are scored; of those that are hidden from the teacher, what was there."""
    hidden: np.ndarray | None = row.get("labels")
    return scored_tokens(row["token_ids"], row["spans"]) if hidden is None else hidden


def kept_mass(best: np.ndarray, kept: Kept) -> np.ndarray:
    """[n] mass of the entries that a recipe keeps.

    `best` [n, m] is the mass of the 1, 2, ... m best ids.
    """
    best = best[:, : kept.k]
    if kept.kind not in ENTRIES:
        return best[:, -1]
    entries = ENTRIES[kept.kind](best, kept)
    return np.asarray(np.take_along_axis(best, entries[:, None] - 1, 1)[:, 0])


def in_bins(values: np.ndarray, edges: Sequence[float]) -> np.ndarray:
    """Each value's bin; what is below the first edge is in the first bin."""
    return np.clip(
        np.searchsorted(np.asarray(edges, np.float64), values, side="right") - 1, 0, len(edges) - 1
    )


def lengths(tokens: Sequence[int]) -> dict[str, Any]:
    """Histogram of scored tokens per row: at most 25 bins of a round width from 0, and the mean."""
    wanted = (max(tokens) + 1) / LENGTH_BINS
    power = 10.0 ** math.floor(math.log10(max(wanted, 1)))
    width = max(1, round(next(f * power for f in (1, 2, 5, 10) if f * power >= wanted)))
    edges = list(range(0, max(tokens) + width, width))
    counts = np.bincount(np.asarray(tokens) // width, minlength=len(edges))
    return {"edges": edges[: len(counts)], "rows": counts.tolist(), "mean": float(np.mean(tokens))}


def rounded(values: Any) -> list[Any]:
    """Nested lists with four significant digits."""
    if isinstance(values, Tensor | np.ndarray):
        return rounded(values.tolist())
    return [rounded(v) if isinstance(v, list) else float(f"{v:.{DIGITS}g}") for v in values]
