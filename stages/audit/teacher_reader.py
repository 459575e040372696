"""A teacher that reads stored rows again: each alone, and among others."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.causal_lm import load_causal_lm
from ..models.classification import Inputs, class_logits, of_each
from ..models.head import Head, check_head, hidden_states, split_head
from ..models.identity import Identity
from ..models.masked_lm import load_teacher as load_masked
from ..models.masked_lm import masked_company, masked_states
from ..models.token_classification import load_teacher, token_company
from .differences import SecondReading, compare, slack_of
from .numbers import Numbers, Says, entries_alone, measured_numbers, stored_numbers
from .stored_rows import StoredRow


class TeacherReader(ABC):
    """A loaded teacher."""

    _company: Company
    _head: Says
    eps: float
    """Of the dtype that it computes in."""

    @abstractmethod
    def _states(self, texts: Sequence[np.ndarray], *, padding: int = 0) -> list[Tensor]:
        """[T, D] of each text, read together.

        The longest has `padding` positions after it, the others more.
        """

    @abstractmethod
    def _there(self, row: StoredRow, positions: np.ndarray) -> np.ndarray:
        """[N] what is there, by the positions that speak of it.

        Where nothing is there it is any id, which is not compared.
        """

    def read(self, rows: Sequence[StoredRow]) -> list[SecondReading]:
        """Read each row alone, and all of them together where the teacher lets rows share one."""
        texts = [row.token_ids for row in rows]
        lengths = [len(text) for text in texts]
        if self._company.may_share([*lengths, max(lengths) + 1]):
            together = self._states(texts, padding=1)
        else:
            together = [self._states([text])[0] for text in texts]
        return [self._compared(row, states) for row, states in zip(rows, together, strict=True)]

    def numbers(self, row: StoredRow, targets: SoftTargets, *, positions: np.ndarray) -> Numbers:
        """What the teacher, reading a row alone, says of these targets' entries there."""
        (states,) = self._states([row.token_ids])
        return self._numbers(row, targets, states=states, positions=positions)

    def _compared(self, row: StoredRow, among_others: Tensor) -> SecondReading:
        """A row read alone, compared with what is stored and with its states among others."""
        targets, positions = row.targets, row.predicting
        stored = stored_numbers(targets)
        measured = self.numbers(row, targets, positions=positions)
        again = self._numbers(row, targets, states=among_others, positions=positions)
        entropy = measured["entropy"]
        if row.entropy_is_bound:
            # The least that it can be: right where it is no more than measured.
            stored["entropy"] = np.maximum(stored["entropy"], entropy)
        if row.imported:
            stored, measured, again = (
                entries_alone(numbers, targets, row.scored) for numbers in (stored, measured, again)
            )
        found = compare(stored, measured, again=again, slack=slack_of(row, stored))
        return SecondReading(row=row, differences=found, entropy=entropy)

    def _numbers(
        self, row: StoredRow, targets: SoftTargets, *, states: Tensor, positions: np.ndarray
    ) -> Numbers:
        following = self._there(row, positions).astype(np.int64)
        with torch.inference_mode():
            return measured_numbers(
                states[torch.from_numpy(positions).to(states.device)],
                self._head,
                targets=targets,
                following=torch.from_numpy(following),
                draw=row.draw,
            )


class LanguageReader(TeacherReader):
    """One that continues text."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_causal_lm(teacher, device_map=device_map)
        check_causal(self._model)
        check_head(self._model)
        self._company = Company(self._model)
        self._head: Head = split_head(self._model)
        self.eps = torch.finfo(self._head.weight.dtype).eps

    def _there(self, row: StoredRow, positions: np.ndarray) -> np.ndarray:
        # Shifted by one, the last position predicts a token that is not there.
        following: np.ndarray = np.append(row.token_ids, 0)[positions + 1]
        return following

    def _states(self, texts: Sequence[np.ndarray], *, padding: int = 0) -> list[Tensor]:
        width = max(map(len, texts)) + padding
        ids = torch.zeros(len(texts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, text in enumerate(texts):
            ids[number, : len(text)] = torch.from_numpy(text.astype(np.int64))
            mask[number, : len(text)] = 1
        device = self._model.device
        with torch.inference_mode():
            hidden = hidden_states(
                self._model, input_ids=ids.to(device), attention_mask=mask.to(device)
            )
        placed = hidden.to(self._head.weight.device)
        return [states[: len(text)] for states, text in zip(placed, texts, strict=True)]


class WordReader(TeacherReader):
    """One that classifies words: its states are its logits."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_teacher(teacher, device_map=device_map)
        self._inputs = Inputs.of(self._model, teacher.folder)
        self._company = token_company(self._model, self._inputs)
        self._head = _AsTheyAre(len(teacher.class_names))
        self.eps = torch.finfo(self._model.dtype).eps

    def _there(self, row: StoredRow, positions: np.ndarray) -> np.ndarray:
        # Of a position that is no word's, the class of the word after it; so of what is hidden.
        word = np.searchsorted(row.predicting, positions).clip(max=row.span_tokens - 1)
        labels: np.ndarray = row.scored[word]
        return labels

    def _states(self, texts: Sequence[np.ndarray], *, padding: int = 0) -> list[Tensor]:
        longer = max(map(len, texts)) + padding
        # What follows the texts is cut off again: the pass has padding for it.
        made = self._inputs.tensors([*texts, np.zeros(longer, np.int64)] if padding else texts)
        there = {name: tensor[: len(texts)].to(self._model.device) for name, tensor in made.items()}
        with torch.inference_mode():
            said = self._said(there)
        return of_each(said, list(map(len, texts)))

    def _said(self, there: dict[str, Tensor]) -> Tensor:
        """[B, T, D] the states of a pass."""
        return class_logits(self._model, there)


class MaskReader(WordReader):
    """One that guesses what is hidden: its states are what its output layer is handed."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_masked(teacher, device_map=device_map)
        self._inputs = Inputs.of(self._model, teacher.folder)
        self._company = masked_company(self._model, self._inputs)
        self._head = split_head(self._model)
        self.eps = torch.finfo(self._model.dtype).eps

    def _said(self, there: dict[str, Tensor]) -> Tensor:
        return masked_states(self._model, **there)


@dataclass(frozen=True, slots=True)
class _AsTheyAre:
    """States that are logits."""

    vocab_size: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Themselves."""
        return hidden


def reader_of(
    teacher: Identity, rows: Sequence[StoredRow], *, device_map: str | None
) -> TeacherReader:
    """The teacher of some rows, loaded as their head asks.

    Raises:
        UsageError: it does not load, or its head is not understood.
    """
    head = rows[0].head
    if head.masked:
        return MaskReader(teacher, device_map=device_map)
    kind = WordReader if head.classes else LanguageReader
    return kind(teacher, device_map=device_map)
