"""The tensors of a checkpoint in files.

torch.distributed.checkpoint says which rank writes and reads which piece. Each rank writes one
file, with its own shards and with its part of what all ranks have alike. A piece says which part of
which tensor it is, so any number of ranks, sharded in any way, finds what it needs. The library's
own storage keeps a pickle beside the tensors, which can run code as it is read. These files hold
tensors, names and numbers alone, and are opened as such (`weights_only`).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ...storage.bounds import integer, string
from ...storage.errors import IntegrityError
from ...storage.files.base import Content

BY_NUMBER = "optimizer by number/"
"""Begins the names of an optimizer's tensors where a single process of before wrote them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A part of a tensor, or all of it."""

    name: str
    size: torch.Size
    """Of the whole tensor."""
    offsets: torch.Size
    """Where in it this part begins."""
    values: Tensor

    @classmethod
    def whole(cls, name: str, values: Tensor) -> Self:
        """All of a tensor."""
        return cls(
            name=name, size=values.shape, offsets=torch.Size([0] * values.ndim), values=values
        )

    @classmethod
    def read(cls, record: Any) -> Self:
        """As `record` has it; one of `NOT_AS_WRITTEN` where it is something else."""
        values = record["values"]
        size, offsets = (
            torch.Size([integer(n) for n in record[name]]) for name in ("size", "offsets")
        )
        ends = [start + n for start, n in zip(offsets, values.shape, strict=True)]
        if any(end > n for end, n in zip(ends, size, strict=True)):
            raise ValueError(f"a piece of {record['name']} ends beyond it")
        return cls(name=string(record["name"]), size=size, offsets=offsets, values=values)

    def record(self) -> dict[str, Any]:
        """As a file holds it."""
        values = self.values.detach()
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.to("cpu", copy=True)  # else all that it is a view of would be written
        return {
            "name": self.name,
            "size": list(self.size),
            "offsets": list(self.offsets),
            "values": values,
        }


class Stored:
    """The tensors of a checkpoint, to be read into those of a training."""

    def __init__(self, pieces: Iterable[Piece], *, folder: Path, alone: bool) -> None:
        """Take the pieces of all files.

        `folder`: the checkpoint's, for messages. `alone`: there is one rank.
        """
        self._folder, self._alone = folder, alone
        self._pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            self._pieces[piece.name].append(piece)
        for name, parts in self._pieces.items():
            found, all_of_it = sum(part.values.numel() for part in parts), parts[0].size.numel()
            if found != all_of_it:
                raise self._error(f"{name} has {found} numbers, expected {all_of_it}")

    def names(self, start: str = "") -> list[str]:
        """Of the tensors, those that begin so."""
        return [name for name in self._pieces if name.startswith(start)]

    def size(self, name: str) -> torch.Size:
        """Of a whole tensor."""
        return self._pieces[name][0].size

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy what is stored under their names into these tensors, or this rank's shards of them.

        All ranks call it, with the same names.

        Raises:
            IntegrityError: the checkpoint has no such tensor, or one of another shape or type.
        """
        for name, tensor in tensors.items():
            self._refuse_other(name, tensor)
        into = {name: tensor.detach() for name, tensor in tensors.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _plainly():
            load(into, storage_reader=_Reader(self._pieces), planner=planner, no_dist=self._alone)

    def _refuse_other(self, name: str, tensor: Tensor) -> None:
        if name not in self._pieces:
            raise self._error(f"{name} is missing")
        found = self._pieces[name][0]
        if (found.size, found.values.dtype) != (tensor.shape, tensor.dtype):
            raise self._error(
                f"{name} is {found.values.dtype} {list(found.size)}, expected {tensor.dtype} "
                f"{list(tensor.shape)}"
            )

    def _error(self, what: str) -> IntegrityError:
        return IntegrityError(
            f"{self._folder}: is no checkpoint of this training ({what}). Delete it to go on from "
            "an earlier one, or from the start."
        )


def write(
    tensors: Mapping[str, Tensor],
    put: Callable[[Callable[[Path], object]], Content],
    *,
    prepare: Callable[[], object],
    finish: Callable[[list[dict[str, str]]], object],
    alone: bool,
) -> None:
    """Write what several ranks hold; all call it, and all raise what any of them does.

    Args:
        tensors: By name; the same names on all ranks.
        put: Puts a rank's file in place, once it is whole and synced.
        prepare: Called on the first rank before any rank writes.
        finish: Called on the first rank with `name` and `sha256` of all files, once they are there.
        alone: There is one rank.
    """
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    writer = _Writer(put, prepare, finish)
    with _plainly():
        save(dict(tensors), storage_writer=writer, planner=planner, no_dist=alone)


def pieces_of(path: Path) -> list[Piece]:
    """The pieces in a file, mapped and not yet read.

    Raises:
        UnpicklingError: it holds more than tensors, names and numbers.
        ValueError, LookupError, TypeError ...: it holds something else than pieces.
    """
    return [Piece.read(record) for record in _opened(path)]


def earlier_pieces_of(path: Path) -> list[Piece]:
    """The same of a file that a single process of before wrote.

    Its tensors are whole, and the optimizer's go by number.
    """
    groups = dict(_opened(path))
    optimizer = groups.pop("optimizer", {"state": {}})["state"]
    groups |= {f"{BY_NUMBER}{number}": state for number, state in optimizer.items()}
    return [
        Piece.whole(f"{group}/{name}", values)
        for group, tensors in groups.items()
        for name, values in tensors.items()
    ]


def _opened(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:  # not in the form that torch.save gives a file
        raise UnpicklingError(str(error)) from error


@contextmanager
def _plainly() -> Iterator[None]:
    """Raise what a rank raised, in place of what the library wraps it in.

    The note that one rank is alone is left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        first, _ = error.failures[min(error.failures)]
        raise first from None


class _Writer(StorageWriter):
    """One file a rank."""

    def __init__(
        self,
        put: Callable[[Callable[[Path], object]], Content],
        prepare: Callable[[], object],
        finish: Callable[[list[dict[str, str]]], object],
    ) -> None:
        self._put, self._prepare, self._finish = put, prepare, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        """One is made for each checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **more: Any) -> None:
        """Before the plans are dealt out, so before anything is written."""
        if is_coordinator:
            self._prepare()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._written(plan, planner) if plan.items else [])
        return done

    def _written(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        records = []
        for item in plan.items:
            values, about = planner.resolve_data(item), item.tensor_data
            assert isinstance(values, Tensor)
            assert about is not None
            piece = Piece(
                name=item.index.fqn,
                size=about.size,
                offsets=about.chunk.offsets,
                values=values,
            )
            records.append(piece.record())

        def to(path: Path) -> None:
            # Into a file of our own: torch.save by path hides what the disk said.
            with path.open("wb") as file:
                torch.save(records, file)

        content = self._put(to)
        named = {"name": content.name, "sha256": content.sha256}
        index = MetadataIndex(content.name)
        return [WriteResult(index=index, size_in_bytes=content.bytes, storage_data=named)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._finish([file.storage_data for of_rank in results for file in of_rank])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """It is never chosen by a path."""
        return False


class _Reader(StorageReader):
    """Pieces that were opened before."""

    def __init__(self, pieces: Mapping[str, list[Piece]]) -> None:
        self._pieces = pieces
        self._at = {
            MetadataIndex(name, part.offsets): part.values
            for name, parts in pieces.items()
            for part in parts
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        """One is made for each reading."""

    def read_metadata(self, *args: Any, **more: Any) -> Metadata:
        return Metadata({name: _described(parts) for name, parts in self._pieces.items()})

    def set_up_storage_reader(self, *args: Any, **more: Any) -> None:
        """Everything is there."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        for item in plan.items:
            part = self._at[item.storage_index]
            where = zip(item.storage_offsets, item.lengths, strict=True)
            values = part[tuple(slice(start, start + length) for start, length in where)]
            planner.resolve_tensor(item).copy_(values)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """It is never chosen by a path."""
        return False


def _described(parts: list[Piece]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=parts[0].values.dtype),
        size=parts[0].size,
        chunks=[ChunkStorageMetadata(part.offsets, part.values.shape) for part in parts],
    )
