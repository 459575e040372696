"""Checkpoints of a training run: one folder per step, complete once its `state.json` is there.

    checkpoints/step-00000120/<2 hex>/<32 hex>.pt    tensors, one file of each rank, named by
                                                     their sha256
    checkpoints/step-00000120/state.json             those names, and the integers and lists that
                                                     a run goes on from

All ranks write and sync their files first; then the first rank writes `state.json`. A run that was
killed while writing has no such checkpoint. Every method is called by all ranks together.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor

from ...storage.bounds import NOT_AS_WRITTEN, hexdigest, inside, mapping, parsed
from ...storage.errors import IntegrityError, in_short
from ...storage.files.base import Content, file_sha256
from ...storage.files.local import LocalFiles
from ..recipe.run_folder import CHECKPOINTS, COMPLETE
from ..workers.ranks import Ranks
from .shards import Piece, Stored, earlier_pieces_of, pieces_of, write

_GO_ON = "to go on from an earlier one, or from the start"


class Checkpoints:
    """The checkpoints below a run's folder."""

    def __init__(self, files: LocalFiles, ranks: Ranks | None = None) -> None:
        self._files, self._ranks = files, ranks or Ranks()

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending; as the first rank sees them."""
        folders = self._files.path(CHECKPOINTS).glob("step-*")
        there = [int(f.name.removeprefix("step-")) for f in folders if (f / COMPLETE).is_file()]
        found: list[int] = self._ranks.told(sorted(there))
        return found

    def save(self, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; one of the same step stays as it is.

        Args:
            step: Its number.
            tensors: By name; of a sharded one each rank writes its part.
            state: What is kept beside them; the first rank's.
        """
        folder = self._folder(step)
        if step in self.steps():
            return

        def put(to: Callable[[Path], object]) -> Content:
            return self._files.put_content(folder, to, suffix=".pt")

        def prepare() -> None:
            for name, _, _ in self._files.walk(folder):  # of a run that was killed while writing
                self._files.remove(name)

        def finish(found: list[dict[str, str]]) -> None:
            record = {"files": found, "state": state}
            self._files.put_if_absent(f"{folder}/{COMPLETE}", json.dumps(record, indent=1).encode())

        write(
            tensors,
            put,
            prepare=prepare,
            finish=finish,
            alone=self._ranks.count == 1,
        )

    def state(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the tensors."""
        state: dict[str, Any] = self._record(step)["state"]
        return state

    def tensors(self, step: int) -> Stored:
        """The tensors of a checkpoint, checked and not yet read.

        Raises:
            IntegrityError: they are not what was written.
        """
        record = self._record(step)
        earlier = "tensors" in record
        files = (
            [{"name": record["tensors"], "sha256": record["sha256"]}]
            if earlier
            else record["files"]
        )
        self._refuse_damaged(step, files)
        opened = earlier_pieces_of if earlier else pieces_of
        pieces = [piece for file in files for piece in self._pieces(step, file["name"], opened)]
        folder = self._files.path(self._folder(step))
        return Stored(pieces, folder=folder, alone=self._ranks.count == 1)

    def keep(self, *steps: int | None) -> None:
        """Delete all other checkpoints, and what killed runs left half written."""
        if not self._ranks.first:
            return
        kept = {self._files.path(self._folder(step)) for step in steps if step is not None}
        for folder in self._files.path(CHECKPOINTS).glob("step-*"):
            if folder.is_symlink():  # what it leads to is not of this run
                folder.unlink()
            elif folder not in kept:
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder)

    def _refuse_damaged(self, step: int, files: list[dict[str, str]]) -> None:
        """Each rank reads its part of the files; all raise where one of them is damaged."""

        def damaged() -> list[Path]:
            mine = [files[number] for number in self._ranks.part(len(files))]
            paths = [(self._files.path(file["name"]), file["sha256"]) for file in mine]
            return [p for p, right in paths if not p.is_file() or file_sha256(p) != right]

        # One file of one process may be all there is: others wait for whoever reads it.
        for path in (path for of_rank in self._ranks.each(damaged) for path in of_rank):
            raise IntegrityError(
                f"{path}: the checkpoint is damaged (its sha256 is not the recorded one). Delete "
                f"{self._files.path(self._folder(step))} {_GO_ON}."
            )

    def _pieces(self, step: int, name: str, opened: Callable[[Path], list[Piece]]) -> list[Piece]:
        path, folder = self._files.path(name), self._files.path(self._folder(step))
        try:
            return opened(path)
        except UnpicklingError as error:
            raise IntegrityError(
                f"{path}: holds more than tensors, and none of it was run. Delete {folder} "
                f"{_GO_ON}."
            ) from error
        except NOT_AS_WRITTEN as error:
            raise IntegrityError(
                f"{path}: not as a run writes it ({in_short(error)}). Delete {folder} {_GO_ON}."
            ) from error

    def _record(self, step: int) -> dict[str, Any]:
        name = f"{self._folder(step)}/{COMPLETE}"
        try:
            record = mapping(parsed(self._files.read(name)))
            for file in record["files"] if "files" in record else [record]:
                inside(mapping(file)["name" if "files" in record else "tensors"])
                hexdigest(file["sha256"])
            return record
        except NOT_AS_WRITTEN as error:
            raise IntegrityError(
                f"{self._files.path(name)}: not as a run writes it ({in_short(error)}). Delete its "
                "folder to go on without it."
            ) from error

    def _folder(self, step: int) -> str:
        return f"{CHECKPOINTS}/step-{step:08d}"
