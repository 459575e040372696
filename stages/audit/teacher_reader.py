"""Reading stored rows again: each alone, and among others, so that the difference shows what the arithmetic may do."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...storage.tables.soft_targets import SoftTargets
from ..models.causal_lm import load_causal_lm
from ..models.head import check_head, hidden_states, split_head
from ..models.identity import Identity
from ..targets.alignment import predicting_positions
from .differences import Reading, compare
from .numbers import Numbers, entries_alone, remeasure, stored_numbers
from .stored_rows import Row


class Reader:
    """A teacher that reads rows."""

    def __init__(self, teacher: Identity, *, device_map: str | None = None) -> None:
        self._model = load_causal_lm(teacher, device_map=device_map)
        check_head(self._model)
        self._head = split_head(self._model)
        self.eps: float = torch.finfo(self._head.weight.dtype).eps
        """Of the dtype that it computes in."""

    def read(self, rows: Sequence[Row]) -> list[Reading]:
        """Read each row alone, and all of them together."""
        together = self._states([row.columns["token_ids"] for row in rows], padding=1)
        found = []
        for row, states in zip(rows, together, strict=True):
            measured = self.measured(row, row.targets)
            again = self._measured(row, row.targets, states, row.span[0] - 1)
            three = [stored_numbers(row.targets), measured, again]
            if row.imported:
                start, n = row.span
                following = row.columns["token_ids"][start : start + n]
                three = [entries_alone(numbers, row.targets, following) for numbers in three]
            parts = compare(*three, bits=row.columns["mantissa_bits"])
            found.append(Reading(parts=parts, entropy=measured["entropy"]))
        return found

    def measured(self, row: Row, targets: SoftTargets, *, position: int | None = None) -> Numbers:
        """`remeasure` targets of a row, read alone, from a position on; None: from where the row's own span starts."""
        (states,) = self._states([row.columns["token_ids"]])
        return self._measured(
            row, targets, states, row.span[0] - 1 if position is None else position
        )

    def _measured(self, row: Row, targets: SoftTargets, states: Tensor, position: int) -> Numbers:
        n = len(targets.entropy)
        tokens = row.columns["token_ids"]
        following = torch.from_numpy(
            np.append(tokens, 0)[position + 1 : position + 1 + n].astype(np.int64)
        )
        with torch.inference_mode():
            return remeasure(
                states[predicting_positions(position + 1, n)],
                self._head,
                targets,
                following,
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
