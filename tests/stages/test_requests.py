"""Which stored generation serves which request."""

import pytest

from stillroom.stages.requests import sampling_settings, serves
from stillroom.stages.sections import Data, Generate

DATA = Data(source="x", format="prompt")


@pytest.mark.parametrize(
    ("reason", "completion", "wanted", "context", "expected"),
    [
        ("stop", 5, 8, 100, True),
        ("stop", 8, 8, 100, True),
        ("stop", 9, 8, 100, False),  # would have been cut
        ("stop", 5, 8, 12, False),  # would have been cut by the context
        ("length", 8, 8, 100, True),
        ("length", 8, 9, 100, False),  # would have gone on
        ("length", 8, 7, 100, False),
        ("length", 6, 8, 16, True),  # the context cut it, and still does
        ("length", 6, 8, 17, False),  # the context has grown
    ],
)
def test_a_row_serves_what_would_have_come_out_the_same(
    reason: str, completion: int, wanted: int, context: int, expected: bool
) -> None:
    row = {"finish_reason": reason, "completion_tokens": completion, "prompt_tokens": 10}
    assert serves(row, wanted, context) is expected


def test_settings_hold_what_changes_the_text_and_nothing_else() -> None:
    def settings(**fields: object) -> dict[str, object]:
        return sampling_settings(Generate.model_validate(fields), DATA)

    assert settings() != settings(temperature=0.5)
    assert settings() != settings(seed=1)
    assert settings(temperature=0) == settings(temperature=0, seed=1, top_p=0.5)
    assert settings() == settings(max_tokens=9, samples=3, engine="hf", engine_args={"max_num_seqs": 4})
    assert settings() != settings(engine_args={"quantization": "fp8"})
    assert settings(stop=["a", "b"]) == settings(stop=["b", "a"])
