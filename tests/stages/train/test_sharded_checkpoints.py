"""Checkpoints of several ranks are the same whoever writes them.

They are whole or not there whenever somebody is killed.
"""

import json
import shutil
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
from sharded_training import (
    damaged,
    failing,
    go_on,
    killed_while_saving,
    read_weights,
    write_earlier,
)
from together import start, together

from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.stages.train.shards import pieces_of
from stillroom.storage.files.local import LocalFiles

pytestmark = pytest.mark.numeric


def files_of(folder: Path, step: int) -> list[Path]:
    return sorted(folder.glob(f"checkpoints/step-{step:08d}/*/*.pt"))


def assert_same_but_for_rounding(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Hold trainings together but for rounding.

    A fused step rounds the last few numbers of a shard as it does those of a whole tensor's end.
    """
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path: Path) -> None:
    """Training goes through 1, 2, 4, 2 and 1 ranks, sharded and not.

    What is read is what was written, bit for bit.
    """
    ((_, expected),) = together(go_on, "alone", tmp_path / "undisturbed", 12, ranks=1)
    folder = tmp_path / "moved"
    ways = [(1, "alone"), (2, "fsdp2"), (4, "fsdp2"), (2, "ddp"), (2, "fsdp2"), (1, "alone")]
    state = None
    for number, (ranks, how) in enumerate(ways, 1):
        found = together(go_on, how, folder, 2 * number, ranks=ranks)
        assert all(begun == state for begun, _ in found) or state is None
        state = found[0][1]
        assert all(then == state for _, then in found)
        written = files_of(folder, 2 * number)
        assert len(written) <= ranks
        pieces = [piece for file in written for piece in pieces_of(file)]
        numbers = sum(np.size(values) for values in state.values())
        assert sum(p.values.numel() for p in pieces) == numbers, "what all ranks have, once"
        (name,) = (f.name for f in (folder / "checkpoints").iterdir())
        assert name == f"step-{2 * number:08d}"
        assert Checkpoints(LocalFiles(folder)).state(2 * number) == {"last": 2 * number, "of": 0}
    assert state is not None
    assert_same_but_for_rounding(state, expected)
    for ranks, how in ((1, "alone"), (2, "fsdp2")):
        for weights in together(read_weights, how, folder, 12, ranks=ranks):
            assert weights == {name: state[name] for name in weights}


def test_ranks_go_on_from_a_checkpoint_of_before(tmp_path: Path) -> None:
    """Whole tensors, the optimizer's by number: they become shards, by name."""
    (state,) = together(write_earlier, tmp_path, ranks=1)
    for begun, _ in together(go_on, "fsdp2", tmp_path, 3, ranks=2):
        assert begun == state


def test_a_rank_that_is_killed_leaves_the_checkpoint_before_whole(tmp_path: Path) -> None:
    """Each rank is killed after each thing that it does on disk.

    The new checkpoint is whole or not there.
    """
    states = {n: together(go_on, "fsdp2", tmp_path / f"to {n}", n, ranks=2)[0][1] for n in (1, 2)}
    seen = set()
    for victim in (0, 1):
        for primitive in range(1, 99):
            folder = tmp_path / f"{victim}-{primitive}"
            shutil.copytree(tmp_path / "to 1", folder)
            group = start(killed_while_saving, folder, victim, primitive, ranks=2)
            group.join()
            if group.codes == [0, 0]:  # there was nothing left to be killed in
                break
            assert group.codes[victim] == -SIGKILL
            there = Checkpoints(LocalFiles(folder)).steps()
            seen.add((victim, there[-1]))
            ((begun, then),) = together(go_on, "alone", folder, 2, ranks=1)
            assert begun == states[there[-1]]
            assert_same_but_for_rounding(then, states[2])
            if there == [1]:
                names = [file.name for file in (folder / "checkpoints").rglob("*.*")]
                assert len(names) == len(named(folder)) + 1, "nothing half written is left"
    assert seen == {(0, 1), (0, 2), (1, 1)}, "each rank was killed before, and the first after"


def named(folder: Path) -> list[str]:
    (state,) = folder.glob("checkpoints/*/state.json")
    return [file["name"] for file in json.loads(state.read_text())["files"]]


def test_all_ranks_say_what_fails_on_one(tmp_path: Path) -> None:
    for kind, said in together(failing, tmp_path / "full", 1, ranks=2):
        assert kind == "StillroomError"
        assert "the disk is full" in said
    assert Checkpoints(LocalFiles(tmp_path / "full")).steps() == []
    together(go_on, "fsdp2", tmp_path / "run", 1, ranks=2)
    names = named(tmp_path / "run")
    path = tmp_path / "run" / names[-1]
    path.write_bytes(path.read_bytes()[:-1])
    for kind, said in together(damaged, tmp_path / "run", ranks=2):
        assert kind == "IntegrityError"
        assert f"{path}: the checkpoint is damaged" in said
