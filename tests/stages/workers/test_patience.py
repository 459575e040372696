"""A rank that works is waited for, however long; one that hangs, dies or fails is named.

Four groups wait side by side: more would take too long to meet on two cores.
"""

from typing import Any

import pytest
from patient import waited_for
from together import start

pytestmark = pytest.mark.numeric

SECONDS = 6.0
CASES = {
    "first busy": ("by_first", 0, "busy"),
    "one busy": ("each", 1, "busy"),
    "one busy, in turn": ("in_turn", 0, "busy"),
    "first idle": ("by_first", 0, "idle"),
    "first stopped": ("by_first", 0, "stop"),
    "one idle, in turn": ("in_turn", 1, "idle"),
    "one stopped, in turn": ("in_turn", 1, "stop"),
    "one killed, in turn": ("in_turn", 1, "kill"),
    "one cannot, in turn": ("in_turn", 1, "alone"),
    "one without memory": ("each", 1, "memory"),
}


@pytest.fixture(scope="module")
def told() -> dict[str, list[Any]]:
    """What each of three ranks was told."""
    found: dict[str, list[Any]] = {}
    for first in range(0, len(CASES), 4):
        groups = {
            name: start(waited_for, SECONDS, *case, ranks=3, seconds=SECONDS)
            for name, case in list(CASES.items())[first : first + 4]
        }
        found |= {name: group.join() for name, group in groups.items()}
    return found


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == "busy"])
def test_a_rank_that_works_is_waited_for(told: dict[str, list[Any]], name: str) -> None:
    right = {"by_first": [0, 0, 0], "each": [[0, 1, 2]] * 3, "in_turn": [0, 1, 2]}
    assert [one["found"] for one in told[name]] == right[CASES[name][0]]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("first idle", "computed nothing"),
        ("one idle, in turn", "computed nothing"),
        ("one stopped, in turn", "shown no sign of life"),
        ("one killed, in turn", "shown no sign of life"),
    ],
)
def test_a_rank_that_hangs_is_named(told: dict[str, list[Any]], name: str, why: str) -> None:
    victim = CASES[name][1]
    others = [one for rank, one in enumerate(told[name]) if rank != victim]
    assert told[name][victim] is None
    named = [one["lost"] for one in others]
    assert any(f"rank {victim} (process " in text for text in named), named
    assert any(f"hangs: its process has {why}, and the others" in text for text in named), named
    if "in turn" in name:
        assert [one["began"] for one in others] == [[0], []]


def test_a_rank_that_hangs_with_the_store_is_named(told: dict[str, list[Any]]) -> None:
    victim, *others = told["first stopped"]
    assert victim is None
    assert any("rank 0 hangs: it keeps the store" in one["lost"] for one in others), others


def test_what_one_fails_with_all_raise_and_none_begins(told: dict[str, list[Any]]) -> None:
    ranks = told["one cannot, in turn"]
    assert {(one["error"], one["said"]) for one in ranks} == {
        ("NotTogether", "compute.processes: has a norm. Set it to 1.")
    }
    assert [one["began"] for one in ranks] == [[0], [1], []]
    first, failed, last = told["one without memory"]
    assert failed["error"] == "MemoryError"
    assert first["lost"] == last["lost"] == "rank 1 of 3 has failed (MemoryError: no room)"
