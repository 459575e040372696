"""Measures per token of how good a model's distribution is and how near to the teacher's.

They are summed over rows. Every arm is measured on the same tokens, a chunk of logits at a time.
Per token, with t the teacher's distribution, p the model's and x the token that is there:

    cross_entropy   -log p(x), nats; perplexity is exp of its mean
    kl_teacher      KL(t || p) = sum_i t_i (log t_i - log p_i), nats
    tv_teacher      total variation, 1/2 sum_i |t_i - p_i|, 0 to 1
    acceptance      sum_i min(t_i, p_i) = 1 - tv_teacher: how often the teacher accepts a token
                    that the model proposes in speculative decoding
                    (Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5 and corollary 3.6)
    top1_agreement  1 if the model's best id is the teacher's best (ids that tie in the stored
                    targets are all best)
    ece             expected calibration error of the model's best id: 15 equal-width bins of its
                    probability (Guo et al. 2017, arXiv 1706.04599, equation 3)

On `full` targets all of them are exact. On entries and a tail, t and p are seen through the entries
and one bucket for all other ids. KL and total variation are then lower bounds and the acceptance an
upper bound, since merging outcomes never raises a divergence.

A text that is classified may have no label, which is what would be there. Then only the measures
against the teacher are known, and the means of the others are over the texts that have one.

Ids that only the teacher has: the model gives them no probability at all, so KL would be infinite.
Entries with such ids go into the bucket. `full` targets have no bucket, so there the KL is of t
conditioned on the ids that both have; total variation is finite and counts them. What they hold is
reported as `unshared_mass`. Ids that only the model has need nothing: t is 0 there.

Letters: N tokens of a chunk, V the model's vocabulary, W the teacher's, K entries of a soft target.
"""

import math
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...storage.errors import StillroomError
from ...storage.tables.soft_targets import SoftTargets
from ..losses.divergences import forward_kl, total_variation
from .by_class.confusion import Confusion
from .by_class.entities import Entities

BINS = 15
CHUNK_BYTES = 64 * 2**20

JUDGED = (
    "cross_entropy",
    "accuracy",
    "kl_teacher",
    "tv_teacher",
    "acceptance",
    "top1_agreement",
    "ece",
)
"""Measures that have standard errors, and by which arms are compared."""

# Columns of a row of bin sums.
_COUNT, _CONFIDENCE, _CORRECT = range(3)
# Measured at each token, but not a mean of their own: they make the calibration error and the
# confusion matrix.
_NO_MEANS = ("confidence", "correct", "there", "best")


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose float32 logits fill one chunk."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def measure(
    logits: Tensor, tokens: Tensor | None, reference: SoftTargets | None = None
) -> dict[str, Tensor]:
    """The measures of a model at N positions.

    Args:
        logits: [N, V] float32.
        tokens: [N] the tokens that are there; None: nobody knows, only what needs none.
        reference: The teacher's targets at these positions; None: only what needs no teacher.

    Returns:
        Name -> [N].

    Raises:
        StillroomError: the logits are not numbers.
    """
    logprobs = logits.float().log_softmax(-1)
    confidence, best = logprobs.max(-1)
    if confidence.isnan().any():
        raise StillroomError(
            "the model's logits are not numbers (NaN): its training diverged. Lower "
            "train.learning_rate."
        )
    found = {}
    if tokens is not None:
        found = {
            "cross_entropy": -logprobs.gather(-1, tokens[:, None]).squeeze(-1),
            "confidence": confidence.exp(),
            "correct": best == tokens,
            "there": tokens,
            "best": best,
        }
    if reference is not None:
        found |= _against_teacher(logprobs, best, reference)
    return found


def measure_teacher(reference: SoftTargets, tokens: Tensor | None) -> dict[str, Tensor]:
    """The measures of the teacher itself at N positions, from what is stored.

    `tokens`: as `measure` has them; -1 where it is not known what is there.
    """
    logprobs = torch.as_tensor(reference.logprobs)
    confidence, best = logprobs.max(-1)
    if reference.ids is not None:
        best = torch.as_tensor(reference.ids).gather(-1, best[:, None]).squeeze(-1)
    found = {
        "entropy": torch.as_tensor(reference.entropy),
        "kl_teacher": torch.zeros_like(confidence),
        "tv_teacher": torch.zeros_like(confidence),
        "acceptance": torch.ones_like(confidence),
        "top1_agreement": torch.ones_like(confidence),
    }
    if tokens is None:
        return found
    known = tokens >= 0
    return found | {
        "cross_entropy": -torch.as_tensor(reference.token_logprob)[known],
        "confidence": confidence.exp()[known],
        "correct": (best == tokens)[known],
        "there": tokens[known],
        "best": best[known],
    }


def _against_teacher(logprobs: Tensor, best: Tensor, reference: SoftTargets) -> dict[str, Tensor]:
    """Distances to the teacher, agreement, and the teacher's mass on ids that the model lacks."""
    vocab_size = logprobs.shape[-1]
    teacher = torch.as_tensor(reference.logprobs, device=logprobs.device)
    if reference.ids is None:
        unshared = teacher[:, vocab_size:].exp().sum(-1)
        shared = functional.pad(
            teacher[:, :vocab_size], (0, max(0, vocab_size - teacher.shape[-1])), value=-torch.inf
        )
        is_best = shared.gather(-1, best[:, None]).squeeze(-1) == shared.amax(-1)
        variation = total_variation(shared, logprobs) + unshared / 2
        kl = forward_kl(
            shared.log_softmax(-1) if teacher.shape[-1] > vocab_size else shared, logprobs
        )
    else:
        ids = torch.as_tensor(reference.ids, device=logprobs.device).long()
        tail = torch.as_tensor(reference.tail_logprob, device=logprobs.device)
        unshared = teacher.masked_fill(ids < vocab_size, -torch.inf).exp().sum(-1)
        is_best = ((ids == best[:, None]) & (teacher == teacher[:, :1])).any(-1)
        outcomes = bucketed(ids, teacher, tail, logprobs=logprobs)
        variation, kl = total_variation(*outcomes), forward_kl(*outcomes)
    return {
        "kl_teacher": kl,
        "tv_teacher": variation,
        "acceptance": 1 - variation,
        "top1_agreement": is_best,
        "unshared_mass": unshared,
    }


def bucketed(
    ids: Tensor, teacher: Tensor, tail: Tensor, *, logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """Teacher and model through the same K + 1 outcomes: the entries, and one bucket.

    The bucket holds every other id.

    Args:
        ids: [N, K] entries; an id of V or more is one that the model lacks, and is moved into the
            bucket; -1 is no entry.
        teacher: [N, K] the teacher's log-probabilities.
        tail: [N] log of the teacher's mass outside the entries.
        logprobs: [N, V] the model's log-probabilities.

    Returns:
        Log-probabilities [N, K + 1] of the teacher and of the model, the bucket last.
    """
    vocab_size = logprobs.shape[-1]
    lacking = (ids >= vocab_size) | (ids < 0)
    tail = torch.cat([tail[:, None], teacher.masked_fill(~lacking, -torch.inf)], -1).logsumexp(
        -1, keepdim=True
    )
    teacher = teacher.masked_fill(lacking, -torch.inf)
    # One more column, of probability 0, stands for every id that the model lacks.
    padded = functional.pad(logprobs, (0, 1), value=-torch.inf)
    ids = ids.masked_fill(lacking, vocab_size)
    entries = padded.gather(-1, ids)
    rest = padded.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([teacher, tail], -1), torch.cat([entries, rest], -1)


class Tally:
    """Sums of measures over rows, in float64.

    A unit is what was drawn independently: a prompt with all of its rows.
    """

    def __init__(self, *, classes: bool = False, entities: Entities | None = None) -> None:
        """Begin with nothing.

        Args:
            classes: The tokens are classes, whose confusion is counted too.
            entities: Where the entities that these classes mark are counted, of texts that are
                added whole; None: they mark none.
        """
        self.confusion = Confusion() if classes else None
        self.entities = entities
        self.teachers: dict[str, Tally] = {}
        """Of several teachers, by name: against each of them, on the texts that it was asked
        for."""
        self._units: dict[bytes, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._counts: dict[bytes, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._bins: dict[bytes, np.ndarray] = defaultdict(lambda: np.zeros((BINS, 3)))

    def of_teacher(self, name: str) -> "Tally":
        """Where measures against one of several teachers go."""
        if name not in self.teachers:
            entities = None if self.entities is None else self.entities.none_yet()
            self.teachers[name] = Tally(classes=self.confusion is not None, entities=entities)
        return self.teachers[name]

    def add(self, unit: bytes, measures: dict[str, Tensor]) -> None:
        """Count the measures of N tokens.

        Tokens that have no outcome have none of the measures that need it.
        """
        sums, counts = self._units[unit], self._counts[unit]
        counts["tokens"] += max(map(len, measures.values()))
        for name, values in measures.items():
            if name not in _NO_MEANS:
                sums[name] += float(values.double().sum())
                counts[name] += len(values)
        if "confidence" in measures:
            self._calibrate(unit, measures)
            counts["ece"] += len(measures["confidence"])
        if "there" in measures and self.confusion is not None:
            for pair in torch.stack([measures["there"], measures["best"]], -1).tolist():
                self.confusion.add(unit, *pair)
        if "there" in measures and self.entities is not None:
            self.entities.add(unit, measures["there"].tolist(), measures["best"].tolist())

    def count(self, noted: "Noted") -> None:
        """Add what was noted elsewhere, in its order."""
        for teacher, unit, measures in noted:
            tally = self if teacher is None else self.of_teacher(teacher)
            tally.add(unit, {name: torch.from_numpy(values) for name, values in measures.items()})

    def _calibrate(self, unit: bytes, measures: dict[str, Tensor]) -> None:
        confidence = measures["confidence"].double().cpu().numpy()
        # Bin m of M covers ((m - 1) / M, m / M].
        index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        correct = measures["correct"].cpu().numpy()
        for column, weights in (
            (_COUNT, np.ones_like(confidence)),
            (_CONFIDENCE, confidence),
            (_CORRECT, correct),
        ):
            self._bins[unit][:, column] += np.bincount(index, weights, BINS)

    @property
    def tokens(self) -> int:
        """Tokens measured."""
        return sum(counts["tokens"] for counts in self._counts.values())

    @property
    def units(self) -> int:
        """Independent units measured."""
        return len(self._units)

    def judged(self, measure: str) -> int:
        """Tokens of which a measure is known."""
        return sum(counts[measure] for counts in self._counts.values() if measure in counts)

    def results(self) -> dict[str, float | int | None]:
        """Means over tokens; `_se` is the standard error of a mean over units."""
        found: dict[str, float | int | None] = {}
        for name in self._names():
            found[name], error = self._mean(name, self._column(name))
            if name in JUDGED:
                found[f"{name}_se"] = error
        mean = found.get("cross_entropy")
        perplexity = None if mean is None or mean >= 700 else math.exp(mean)
        found |= {"perplexity": perplexity, "tokens": self.tokens}
        more = (one.results() for one in (self.confusion, self.entities) if one)
        return found | {name: value for one in more for name, value in one.items()}

    def minus(self, other: "Tally") -> dict[str, float | None]:
        """Mean differences of this arm from another one on the same tokens.

        They come with paired standard errors.
        """
        found: dict[str, float | None] = {}
        for name in [n for n in JUDGED if n in self._names()]:
            gap = self._column(name) - other._column(name)
            found[name], found[f"{name}_se"] = self._mean(name, gap)
        if self.confusion and other.confusion:
            found |= self.confusion.minus(other.confusion)
        if self.entities and other.entities:
            found |= self.entities.minus(other.entities)
        return found

    def ece(self) -> float:
        """sum_m |B_m| / n * |accuracy(B_m) - confidence(B_m)|, as a share (0 to 1)."""
        return self._mean("ece", self._column("ece"))[0]

    def reliability(self) -> list[dict[str, float | int]]:
        """The bins that are not empty: upper edge, tokens, mean confidence, accuracy."""
        if not self._bins:
            return []
        return [
            {
                "up_to": (number + 1) / BINS,
                "tokens": round(count),
                "confidence": float(confidence / count),
                "accuracy": float(correct / count),
            }
            for number, (count, confidence, correct) in enumerate(
                np.sum(list(self._bins.values()), axis=0)
            )
            if count
        ]

    def _names(self) -> list[str]:
        names = dict.fromkeys(name for sums in self._units.values() for name in sums)
        return [*names, *(["ece"] if self._bins else [])]

    def _column(self, name: str) -> np.ndarray:
        """[units that have it] sums of a measure.

        Their total over the number of tokens is that measure.
        """
        if name == "ece":
            # |gap| is sign * gap: each unit's part of it.
            # That is linear in the units while no sign turns.
            # Units stand in the order of their counts, which `_mean` pairs these with.
            bins = np.stack([self._bins[unit] for unit in self._counts if unit in self._bins])
            gaps = bins[..., _CORRECT] - bins[..., _CONFIDENCE]
            return np.asarray(gaps @ np.sign(gaps.sum(0)))
        return np.array([sums[name] for sums in self._units.values() if name in sums])

    def _mean(self, name: str, sums: np.ndarray) -> tuple[float, float | None]:
        """A measure's mean over tokens and its standard error, by the ratio estimator.

        The units are independent.
        """
        counts = [counts[name] for counts in self._counts.values() if name in counts]
        return ratio_mean(sums, np.array(counts, np.float64))


Noted = list[tuple[str | None, bytes, dict[str, np.ndarray]]]
"""A teacher's name, or None for all of them; a unit; its measures."""


class Notes(Tally):
    """What would be added to a tally, to be counted later.

    It is counted where the rows of all ranks come together in their order.
    """

    def __init__(self, noted: Noted | None = None, teacher: str | None = None) -> None:
        super().__init__()
        self.noted: Noted = [] if noted is None else noted
        self._teacher = teacher

    def of_teacher(self, name: str) -> Tally:
        """Where measures against one of several teachers are noted."""
        return Notes(self.noted, name)

    def add(self, unit: bytes, measures: dict[str, Tensor]) -> None:
        """Note them."""
        there = {name: values.cpu().numpy() for name, values in measures.items()}
        self.noted.append((self._teacher, unit, there))


def ratio_mean(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    """A mean over tokens and its standard error, units being independent: the ratio estimator's.

    Args:
        sums: [units] sum over each unit's tokens.
        counts: [units] number of them, above 0.
    """
    units = len(sums)
    mean = sums.sum() / counts.sum()
    spread = ((sums - mean * counts) ** 2).sum()
    error = math.sqrt(units / (units - 1) * spread) / counts.sum() if units > 1 else None
    return float(mean), None if error is None else float(error)
