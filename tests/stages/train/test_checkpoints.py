"""Checkpoints: complete or not there, checked when read."""

import pytest
import torch

from stillroom.stages.train.checkpoints import Checkpoints
from stillroom.storage.errors import IntegrityError
from stillroom.storage.files.local import LocalFiles


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(LocalFiles(tmp_path))


def folder(tmp_path, step):
    return tmp_path / "checkpoints" / f"step-{step:08d}"


def test_what_is_saved_comes_back(checkpoints):
    assert checkpoints.steps() == []
    tensors = {
        "weights": {"a": torch.randn(3)},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": []},
    }
    checkpoints.save(7, tensors, {"tokens": 70})
    checkpoints.save(12, {"weights": {}}, {"tokens": 120})
    assert checkpoints.steps() == [7, 12]
    assert checkpoints.state(7) == {"tokens": 70}
    assert torch.equal(checkpoints.tensors(7)["weights"]["a"], tensors["weights"]["a"])


def test_the_first_of_a_step_stays(checkpoints):
    checkpoints.save(7, {"weights": {}}, {"tokens": 70})
    checkpoints.save(7, {"weights": {}}, {"tokens": 71})
    assert checkpoints.state(7) == {"tokens": 70}


def test_only_the_named_are_kept(checkpoints, tmp_path):
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"weights": {}}, {})
    folder(tmp_path, 9).mkdir()
    checkpoints.keep(4, 2)
    checkpoints.keep(4, 2, None)
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_half_written_ones_do_not_exist(checkpoints, tmp_path):
    checkpoints.save(3, {"weights": {}}, {"tokens": 30})
    checkpoints.save(5, {"weights": {}}, {"tokens": 50})
    (folder(tmp_path, 5) / "state.json").unlink()  # as a kill between tensors and state leaves it
    assert checkpoints.steps() == [3]
    checkpoints.save(5, {"weights": {}}, {"tokens": 51})
    assert checkpoints.state(5) == {"tokens": 51}


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found(checkpoints, tmp_path, damage):
    checkpoints.save(3, {"weights": {"a": torch.randn(100)}}, {})
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
    checkpoints.save(3, {"weights": {}}, {})
    (folder(tmp_path, 3) / "state.json").write_text('{"tensors": ')
    with pytest.raises(IntegrityError, match=r"state\.json: not as a run writes it"):
        checkpoints.state(3)


class Planted:
    """A pickle that makes a file where it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_not_run(checkpoints, tmp_path):
    """Whoever can write into a run's folder can write the hash, too."""
    checkpoints.save(3, {"weights": Planted(tmp_path / "ran")}, {"tokens": 30})
    with pytest.raises(IntegrityError, match=r"holds more than tensors.* Delete .*step-00000003"):
        checkpoints.tensors(3)
    assert not (tmp_path / "ran").exists()


def test_a_link_among_checkpoints_goes_and_what_it_leads_to_stays(checkpoints, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "state.json").write_text("{}")
    checkpoints.save(3, {"weights": {}}, {})
    folder(tmp_path, 4).symlink_to(outside)
    checkpoints.keep(3)
    assert checkpoints.steps() == [3]
    assert (outside / "state.json").read_text() == "{}"
