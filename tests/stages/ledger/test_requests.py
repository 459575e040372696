"""What names a request."""

from stillroom.stages.ledger.requests import sampling_settings
from stillroom.stages.recipe.engines import Generate
from stillroom.stages.recipe.sections import Data

DATA = Data(source="x", format="prompt")


def test_settings_hold_what_changes_the_text_and_nothing_else() -> None:
    def settings(**fields: object) -> dict[str, object]:
        return sampling_settings(Generate.model_validate(fields), DATA)

    assert settings() != settings(temperature=0.5)
    assert settings() != settings(seed=1)
    assert settings(temperature=0) == settings(temperature=0, seed=1, top_p=0.5)
    assert settings() == settings(
        max_tokens=9, samples=3, engine="vllm", engine_args={"max_num_seqs": 4}
    )
    assert settings() != settings(engine_args={"quantization": "fp8"})
    assert settings(stop=["a", "b"]) == settings(stop=["b", "a"])
