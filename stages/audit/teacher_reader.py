"""A teacher that reads stored rows again: each alone, and among others."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.attention.future import check_causal
from ..models.attention.longest import Company
from ..models.causal_lm import load_causal_lm
from ..models.head import check_head, hidden_states, split_head
from ..models.identity import Identity
from .differences import SecondReading, compare
from .numbers import Numbers, entries_alone, measured_numbers, stored_numbers
from .stored_rows import StoredRow


class TeacherReader:
    """A loaded teacher."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_causal_lm(teacher, device_map=device_map)
        check_causal(self._model)
        check_head(self._model)
        self._company = Company(self._model)
        self._head = split_head(self._model)
        self.eps: float = torch.finfo(self._head.weight.dtype).eps
        """Of the dtype that it computes in."""

    def read(self, rows: Sequence[StoredRow]) -> list[SecondReading]:
        """Read each row alone, and all of them together where the teacher lets rows share a pass."""
        texts = [row.token_ids for row in rows]
        lengths = [len(text) for text in texts]
        if self._company.may_share([*lengths, max(lengths) + 1]):
            together = self._states(texts, padding=1)
        else:
            together = [self._states([text])[0] for text in texts]
        return [self._compared(row, states) for row, states in zip(rows, together, strict=True)]

    def numbers(self, row: StoredRow, targets: SoftTargets, *, positions: np.ndarray) -> Numbers:
        """What the teacher, reading a row alone, says of these targets' entries at as many positions."""
        (states,) = self._states([row.token_ids])
        return self._numbers(row, targets, states=states, positions=positions)

    def _compared(self, row: StoredRow, among_others: Tensor) -> SecondReading:
        """A row read alone, compared with what is stored and with its states among others."""
        targets, positions = row.targets, row.predicting
        stored = stored_numbers(targets)
        measured = self.numbers(row, targets, positions=positions)
        again = self._numbers(row, targets, states=among_others, positions=positions)
        entropy = measured["entropy"]
        if row.imported:
            stored, measured, again = (
                entries_alone(numbers, targets, row.scored) for numbers in (stored, measured, again)
            )
        found = compare(stored, measured, again=again, bits=row.columns["mantissa_bits"])
        return SecondReading(row=row, differences=found, entropy=entropy)

    def _numbers(
        self, row: StoredRow, targets: SoftTargets, *, states: Tensor, positions: np.ndarray
    ) -> Numbers:
        # Shifted by one, the last position predicts a token that is not there: any id will do, for
        # its log-probability is then not compared.
        following = np.append(row.token_ids, 0)[positions + 1].astype(np.int64)
        with torch.inference_mode():
            return measured_numbers(
                states[torch.from_numpy(positions).to(states.device)],
                self._head,
                targets=targets,
                following=torch.from_numpy(following),
                draw=row.draw,
            )

    def _states(self, texts: Sequence[np.ndarray], *, padding: int = 0) -> list[Tensor]:
        """[T, D] of each text, read together; the longest has `padding` positions after it, the others more."""
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
        return [states[: len(text)] for states, text in zip(hidden, texts, strict=True)]
