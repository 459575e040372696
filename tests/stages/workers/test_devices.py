"""GPUs are shared out in groups, each to one worker; what is visible already is what there is."""

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.stages.recipe.engines import gpus_of
from stillroom.stages.workers import devices
from stillroom.stages.workers.devices import THREADS, VISIBLE, one_each, shared_out, visible_gpus
from stillroom.storage.errors import UsageError

EIGHT = [str(number) for number in range(8)]


@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 40))
def test_each_worker_has_as_many_as_it_needs_and_none_that_another_has(
    gpus: int, each: int, most: int
) -> None:
    names = [f"GPU-{number:x}" for number in range(gpus)]
    found = shared_out("auto", names, each=each, most=most)
    assert len(found) == max(1, min(gpus // each, most))
    if found == [{}]:  # it sees what the runner sees
        assert each >= gpus
        return
    shares = [one[VISIBLE].split(",") for one in found]
    assert all(len(share) == each for share in shares)
    given_out = [name for share in shares for name in share]
    assert given_out == names[: len(given_out)]


@pytest.mark.parametrize(
    ("asked", "each", "expected"),
    [
        ("auto", 1, EIGHT),
        ("auto", 4, ["0,1,2,3", "4,5,6,7"]),
        ("auto", 3, ["0,1,2", "3,4,5"]),
        (2, 1, ["0", "1"]),
        (1, 1, ["0"]),
    ],
)
def test_eight_gpus(asked: Any, each: int, expected: list[str]) -> None:
    found = shared_out(asked, EIGHT, each=each, most=None)
    assert [one[VISIBLE] for one in found] == expected


def test_a_teacher_that_is_spread_over_all_has_all() -> None:
    assert shared_out("auto", EIGHT, each=None, most=None) == [{}]


def test_more_workers_than_gpus_are_refused_by_name() -> None:
    with pytest.raises(
        UsageError, match=r"^compute\.workers: 5 workers with 2 GPUs each .* for 4\."
    ):
        shared_out(5, EIGHT, each=2, most=None)
    with pytest.raises(UsageError, match=r"compute\.workers: 2 workers with 8 GPUs each"):
        shared_out(2, EIGHT, each=16, most=None)


def test_without_a_gpu_one_is_the_default_and_several_share_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert shared_out("auto", [], each=4, most=None) == [{}]
    assert shared_out(2, [], each=4, most=None) == [{THREADS: "3"}] * 2
    assert shared_out(9, [], each=4, most=None) == [{THREADS: "1"}] * 9
    monkeypatch.setenv(THREADS, "5")  # somebody has decided
    assert shared_out(2, [], each=4, most=None) == [{}, {}]


@pytest.mark.parametrize(
    ("named", "counted", "expected"),
    [
        (None, 3, ["0", "1", "2"]),
        ("2,0", 2, ["2", "0"]),
        ("GPU-4f1a, MIG-77", 2, ["GPU-4f1a", "MIG-77"]),
        ("0,1,7", 2, ["0", "1"]),  # torch ends at the first that is not there
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_what_is_visible_is_called_as_it_was(
    monkeypatch: pytest.MonkeyPatch, named: str | None, counted: int, expected: list[str]
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    if named is not None:
        monkeypatch.setenv(VISIBLE, named)
    monkeypatch.setattr(devices, "_counted", lambda found: counted if found == named else -1)
    assert visible_gpus() == expected


def test_torch_is_asked_where_there_is_a_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(devices, "_COUNT", "print('a warning'); print(3)")
    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path / "none"),))
    assert devices._counted.__wrapped__("0") == 0
    monkeypatch.setattr(devices, "_DRIVERS", (str(tmp_path),))
    assert devices._counted.__wrapped__("0,1,2,3") == devices._counted.__wrapped__(None) == 3
    assert devices._counted.__wrapped__("") == 0
    monkeypatch.setattr(devices, "_COUNT", "raise ImportError")
    assert devices._counted.__wrapped__(None) == 0


def test_an_engine_says_how_many_it_needs() -> None:
    assert gpus_of({}) == 1
    assert gpus_of({"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "max_num_seqs": 9}) == 8
    assert gpus_of({"tensor_parallel_size": "four"}) == 1  # the engine says what is wrong


def test_processes_that_meet_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one[VISIBLE] for one in one_each("auto", EIGHT)] == EIGHT
    assert one_each(2, ["GPU-a", "GPU-b", "GPU-c"]) == [{VISIBLE: "GPU-a"}, {VISIBLE: "GPU-b"}]
    assert one_each(1, EIGHT) == one_each("auto", []) == one_each("auto", ["0"]) == [{}]
    with pytest.raises(
        UsageError, match=r"^compute\.processes: 3 processes .* 2 GPUs are visible \(0, 1\)"
    ):
        one_each(3, ["0", "1"])
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert one_each(3, []) == [{THREADS: "2"}] * 3
