"""What the source held becomes the inputs table: each key once, first prompts marked, the split by hash."""

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
