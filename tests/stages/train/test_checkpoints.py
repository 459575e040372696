"""Checkpoints: complete or not there, checked when read."""

import json
import pickle

import pytest
import torch
from torch import nn

from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.storage.errors import IntegrityError
from stillroom.storage.files.base import file_sha256
from stillroom.storage.files.local import LocalFiles


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(LocalFiles(tmp_path))


def folder(tmp_path, step):
    return tmp_path / "checkpoints" / f"step-{step:08d}"


def test_what_is_saved_comes_back(checkpoints):
    assert checkpoints.steps() == []
    rows = torch.randn(4, 3)
    tensors = {
        "weights/a": nn.Parameter(torch.randn(3)),
        "weights/part": rows[1:3],
        "optimizer/weights/a/step": torch.tensor(2.0),
        "averages/n": torch.tensor([5]),
    }
    checkpoints.save(7, tensors, {"tokens": 70})
    checkpoints.save(12, {}, {"tokens": 120})
    assert checkpoints.steps() == [7, 12]
    assert checkpoints.state(7) == {"tokens": 70}
    stored = checkpoints.tensors(7)
    assert stored.names("weights/") == ["weights/a", "weights/part"]
    assert stored.size("weights/part") == (2, 3)
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    stored.read(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert checkpoints.tensors(12).names() == []


def test_the_first_of_a_step_stays(checkpoints):
    checkpoints.save(7, {}, {"tokens": 70})
    checkpoints.save(7, {}, {"tokens": 71})
    assert checkpoints.state(7) == {"tokens": 70}


def test_only_the_named_are_kept(checkpoints, tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {}, {})
    folder(tmp_path, 9).mkdir()
    checkpoints.keep(4, 2)
    checkpoints.keep(4, 2, None)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_half_written_ones_do_not_exist(checkpoints, tmp_path):
    checkpoints.save(3, {}, {"tokens": 30})
    checkpoints.save(5, {}, {"tokens": 50})
    (folder(tmp_path, 5) / "state.json").unlink()  # as a kill between tensors and state leaves it
    assert checkpoints.steps() == [3]
    checkpoints.save(5, {}, {"tokens": 51})
    assert checkpoints.state(5) == {"tokens": 51}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found(checkpoints, tmp_path, damage):
    checkpoints.save(3, {"weights/a": torch.randn(100)}, {})
    (path,) = folder(tmp_path, 3).glob("*/*.pt")
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // 3] if damage == "truncate" else data)
    with pytest.raises(
        IntegrityError, match=r"checkpoint is damaged .* Delete .*step-00000003 to go on"
    ):
        checkpoints.tensors(3)


def test_unreadable_state_is_said(checkpoints, tmp_path):
    checkpoints.save(3, {}, {})
    (folder(tmp_path, 3) / "state.json").write_text('{"tensors": ')
    with pytest.raises(IntegrityError, match=r"state\.json: not as a run writes it"):
        checkpoints.state(3)


class Planted:
    """A pickle that makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def planted(tmp_path, content, *, write=torch.save, earlier=False):
    """Whoever can write into a run's folder can write the hash, too."""
    here = folder(tmp_path, 3)
    here.mkdir(parents=True)
    with (here / "a.pt").open("wb") as file:
        write(content, file)
    name = {"name": "checkpoints/step-00000003/a.pt", "sha256": file_sha256(here / "a.pt")}
    record = {"tensors": name["name"], "sha256": name["sha256"]} if earlier else {"files": [name]}
    (here / "state.json").write_text(json.dumps(record | {"state": {}}))


@pytest.mark.parametrize("write", [torch.save, pickle.dump])
@pytest.mark.parametrize("earlier", [False, True])
def test_code_in_a_checkpoint_is_not_run(checkpoints, tmp_path, write, earlier):
    content = {"weights": Planted(tmp_path / "ran")}
    planted(tmp_path, content if earlier else [content], write=write, earlier=earlier)
    with pytest.raises(IntegrityError, match=r"holds more than tensors.* Delete .*step-00000003"):
        checkpoints.tensors(3)
    assert not (tmp_path / "ran").exists()


PIECE = {"name": "weights/a", "size": [4], "offsets": [0], "values": torch.zeros(4)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (3, "not as a run writes it"),
        ([{"weights/a": torch.zeros(4)}], "not as a run writes it"),
        ([PIECE | {"offsets": [1]}], "ends beyond it"),
        ([PIECE | {"offsets": [-1]}], "not a whole number"),
        ([PIECE | {"values": [0.0]}], "not as a run writes it"),
        ([PIECE | {"size": [5]}], "has 4 numbers, expected 5"),
        ([PIECE, PIECE], "has 8 numbers, expected 4"),
        ([PIECE, PIECE | {"name": "weights/b"}], None),
        ([PIECE | {"name": "weights/b"}], "weights/a is missing"),
        ([PIECE | {"values": torch.zeros(4, dtype=torch.int32)}], "is torch.int32"),
        ([PIECE | {"size": [4, 1], "offsets": [0, 0], "values": torch.zeros(4, 1)}], "expected"),
    ],
)
def test_what_no_run_writes_is_refused_by_name(checkpoints, tmp_path, content, said):
    planted(tmp_path, content)
    into = {"weights/a": torch.ones(4)}
    if said is None:
        checkpoints.tensors(3).read(into)
        assert not into["weights/a"].any()
        return
    with pytest.raises(IntegrityError, match=f"{said}.*Delete"):
        checkpoints.tensors(3).read(into)


def test_a_link_among_checkpoints_goes_and_what_it_leads_to_stays(checkpoints, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("{}")
    checkpoints.save(3, {}, {})
    folder(tmp_path, 4).symlink_to(outside)
    checkpoints.keep(3)
    assert checkpoints.steps() == [3]
    assert (outside / "state.json").read_text() == "{}"
