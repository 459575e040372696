"""What the source held becomes the inputs table.

Each key is there once, first prompts are marked, the split is by hash.
"""

import random

from stillroom.stages.data.inputs import Intake


def test_it_agrees_with_its_definition() -> None:
    rng = random.Random()
    pool = [rng.randbytes(16) for _ in range(20)]
    rows = [
        (rng.choice([rng.randbytes(16), *pool]), rng.choice(pool), rng.randrange(1, 4))
        for _ in range(200)
    ]
    intake = Intake()
    for key, prompt, windows in rows:
        intake.add(key, prompt, windows=windows)
    kept: dict[bytes, tuple[bytes, int]] = {}
    for key, prompt, windows in rows:
        kept.setdefault(key, (prompt, windows))
    prompts = [prompt for prompt, _ in kept.values()]
    held_out = set(sorted(set(prompts))[:7])
    table = intake.table(7)
    assert table["key"].to_pylist() == list(kept)
    assert table["prompt_key"].to_pylist() == prompts
    assert table["windows"].to_pylist() == [windows for _, windows in kept.values()]
    assert table["split"].to_pylist() == ["test" if p in held_out else "train" for p in prompts]
    assert table["first"].to_pylist() == [p not in prompts[:i] for i, p in enumerate(prompts)]
    assert (len(intake), intake.prompts()) == (len(kept), len(set(prompts)))
    assert rows[0][0] in intake
    assert bytes(16) not in intake


def test_nothing_held_out() -> None:
    intake = Intake()
    intake.add(b"k" * 16, b"p" * 16)
    assert intake.table(0)["split"].to_pylist() == ["train"]


def test_a_conversation_that_holds_what_is_held_out_is_left_out() -> None:
    def key(name: str) -> bytes:
        return name.encode().ljust(16)

    rows = [  # prompts are held out in the order of their names
        ("held out", "1", ["hi: yes"]),
        ("goes on from it", "5", ["hi: yes", "hi: yes so: no"]),
        ("the same prompt", "5", ["hi: yes", "hi: yes so: maybe"]),
        ("another answer", "6", ["hi: no", "hi: no so: no"]),
        ("held out too", "2", ["hi: no", "hi: no and: yes"]),
        ("no turns", "6", []),
    ]
    intake = Intake()
    for name, prompt, turns in rows:
        intake.add(key(name), key(prompt), turns=[key(turn) for turn in turns])
    table = intake.table(2)
    kept = [name.decode().strip() for name in table["key"].to_pylist()]
    assert kept == ["held out", "another answer", "held out too", "no turns"]
    assert table["split"].to_pylist() == ["test", "train", "test", "train"]
    assert table["first"].to_pylist() == [True, True, True, False]
    (note,) = intake.remarks.notes()
    assert note.startswith("conversations left out of training: 2.")
    # Where nothing is held out all are trained on.
    assert (len(intake.table(0)), intake.remarks.notes()) == (6, [])
