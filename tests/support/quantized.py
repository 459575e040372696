"""Models that bitsandbytes has quantised, as their authors save them."""

from pathlib import Path
from typing import Any

import pytest

REASON = "bitsandbytes is not installed: pip install 'stillroom[bitsandbytes]'"
HOW: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def needs_bitsandbytes() -> None:
    """Skip a test, or a module of them, where there is none."""
    pytest.importorskip("bitsandbytes", reason=REASON)


def loaded(auto: Any, folder: Path, how: str, **settings: Any) -> Any:
    """A float model as transformers alone loads it into fewer bits, in evaluation mode."""
    import torch
    from transformers import BitsAndBytesConfig

    settings = HOW[how] | {"bnb_4bit_compute_dtype": torch.float32} | settings
    quantization = BitsAndBytesConfig(**settings)
    return auto.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    ).eval()


def saved(folder: Path, base: Path, how: str, **settings: Any) -> Path:
    """A causal model in fewer bits, saved with the tokenizer of its base."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded(AutoModelForCausalLM, base, how, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
