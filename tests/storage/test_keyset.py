"""A set of keys in 16 bytes each behaves as a set."""

import random

from stillroom.storage.keys import KeySet


def test_it_is_a_set():
    rng = random.Random(0)
    few = [bytes([a, 0, 0, 0, 0, 0, 0, 0]) for a in range(3)]
    keys = [rng.choice(few) + bytes([b] * 8) for b in range(200)]  # halves that repeat
    keys += [rng.randbytes(16) for _ in range(70_000)]
    chosen = keys[::2]
    known = KeySet(b"".join(chosen[:50]))
    for start in range(50, len(chosen), 1000):
        known.update(b"".join(chosen[start : start + 1000]))
    truth = set(chosen)
    assert [key in known for key in keys] == [key in truth for key in keys]


def test_an_empty_one():
    assert bytes(16) not in KeySet()
