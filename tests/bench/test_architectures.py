"""The bench of architectures.

None of a choice is wrong, and each of its columns can say that one is.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.numeric

REFUSED = {
    "llama, is_causal: false": "sees the future (its config says is_causal: false)",
    "gemma3_text, bidirectional": "(its config says use_bidirectional_attention: true)",
    "bert-generation": "sees the future (its config says is_decoder: false)",
    "xlm": "sees the future (its config says causal: false)",
    "electra, decoder, narrow": "its logits cannot be made of its hidden states",
    "modernbert-decoder": "its logits are not softcap(scale * (hidden W^T + b))",
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield importlib.import_module("architectures")
    for name in ("architectures", "tiny_architectures"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_no_architecture_is_wrong(bench: Any) -> None:
    rows = {case: bench.measured(case) for case in bench.TINY}
    assert {case for case, row in rows.items() if row.verdict != "Right"} == REFUSED.keys()
    for case, words in REFUSED.items():
        assert rows[case].verdict == "Refused"
        assert words in rows[case].said
    assert "| llama4_text |" in bench.table(list(rows.values()))


def nothing(*_: Any) -> None:
    pass


PLANTED = {
    "one that peeks": (
        "llama, is_causal: false",
        {"score.causal_lm.check_causal": nothing, "loader.causal_lm.check_causal": nothing},
        ("peek",),
    ),
    "one that mixes": (
        "llama, dynamic rope",
        {"models.attention.longest.Company.may_share": lambda *_: True},
        ("score", "batch", "train"),
    ),
    "one that remembers": (
        "llama, dynamic rope",
        {"models.loading.forget_lengths": nothing},
        ("score",),
    ),
    "one that drops its cap": (
        "gemma2, cap 2",
        {"models.loading.attend_capped": nothing},
        ("score", "train"),
    ),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_model_fails(plant: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the product does about it is taken away.

    So the model is scored and trained without a word.
    """
    case, away, shows = PLANTED[plant]
    for name, stand_in in away.items():
        monkeypatch.setattr(f"stillroom.stages.{name}", stand_in)
    row = bench.measured(case)
    assert row.verdict == "Wrong"
    bars = {"score": bench.SCORE, "batch": bench.SCORE, "train": bench.TRAIN, "peek": bench.PEEK}
    assert {column for column, bar in bars.items() if getattr(row, column) > bar} >= set(shows)
