"""Checkpoints of a training run: one folder per step, complete once its `state.json` is there.

    checkpoints/step-00000120/<2 hex>/<32 hex>.pt    weights and optimizer, named by their sha256
    checkpoints/step-00000120/state.json             that name, and the integers and lists a run goes on from

The tensors are written and synced first, `state.json` last: a run that was killed while writing has
no such checkpoint.
"""

import json
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ...storage.bounds import NOT_AS_WRITTEN, inside, mapping, parsed
from ...storage.errors import IntegrityError, in_short
from ...storage.files.base import file_sha256
from ...storage.files.local import LocalFiles

_FOLDER = "checkpoints"
_STATE = "state.json"


class Checkpoints:
    """The checkpoints below a run's folder."""

    def __init__(self, files: LocalFiles) -> None:
        self._files = files

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        folders = self._files.path(_FOLDER).glob("step-*")
        return sorted(int(f.name.removeprefix("step-")) for f in folders if (f / _STATE).is_file())

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write a checkpoint; one of the same step stays as it is."""
        folder = self._folder(step)
        if step in self.steps():
            return

        def write(path: Path) -> None:
            # Into a file of our own: torch.save by path hides what the disk said.
            with path.open("wb") as file:
                torch.save(tensors, file)

        content = self._files.put_content(folder, write, suffix=".pt")
        record = {"tensors": content.name, "sha256": content.sha256, "state": state}
        self._files.put_if_absent(f"{folder}/{_STATE}", json.dumps(record, indent=1).encode())

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the tensors."""
        state: dict[str, Any] = self._record(step)["state"]
        return state

    def tensors(self, step: int) -> dict[str, Any]:
        """The tensors of a checkpoint, on the CPU.

        Raises:
            IntegrityError: they are not what was written.
        """
        record = self._record(step)
        path = self._files.path(record["tensors"])
        if not path.is_file() or file_sha256(path) != record["sha256"]:
            raise IntegrityError(
                f"{path}: the checkpoint is damaged (its sha256 is not the recorded one). Delete "
                f"{self._files.path(self._folder(step))} to go on from an earlier one, or from "
                "the start."
            )
        try:
            tensors: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise IntegrityError(
                f"{path}: holds more than tensors, and none of it was run. Delete "
                f"{self._files.path(self._folder(step))} to go on from an earlier one, or from "
                "the start."
            ) from error
        return tensors

    def keep(self, *steps: int | None) -> None:
        """Delete all other checkpoints, and what killed runs left half written."""
        kept = {self._files.path(self._folder(step)) for step in steps if step is not None}
        for folder in self._files.path(_FOLDER).glob("step-*"):
            if folder.is_symlink():  # what it leads to is not of this run
                folder.unlink()
            elif folder not in kept:
                (folder / _STATE).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def _record(self, step: int) -> dict[str, Any]:
        name = f"{self._folder(step)}/{_STATE}"
        try:
            record = mapping(parsed(self._files.read(name)))
            inside(record["tensors"])
            return record
        except NOT_AS_WRITTEN as error:
            raise IntegrityError(
                f"{self._files.path(name)}: not as a run writes it ({in_short(error)}). Delete its "
                "folder to go on without it."
            ) from error

    def _folder(self, step: int) -> str:
        return f"{_FOLDER}/step-{step:08d}"
