"""What a config says: its class's defaults and names, and the positions that can be used.

No torch is needed for it.
"""

import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from stillroom.stages.models.fit.config import (
    POSITIONS_FROM_PADDING,
    UNLIMITED,
    config_facts,
    usable_positions,
)
from stillroom.stages.models.fit.light import class_names_of


@pytest.mark.parametrize(
    ("config", "vocab_size", "context"),
    [
        ({"model_type": "mpt"}, 50368, 2048),
        ({"model_type": "mpt", "max_seq_len": 512}, 50368, 512),
        ({"model_type": "gpt2", "n_positions": 77}, 50257, 77),
        ({"model_type": "llama"}, 32000, 2048),
        ({"model_type": "gemma3", "text_config": {}}, 262208, 131072),
        ({"model_type": "xlnet"}, 32000, UNLIMITED),
        ({"model_type": "bloom"}, 250880, UNLIMITED),
        ({"model_type": "mamba"}, 50280, UNLIMITED),
        ({"model_type": "roberta", "max_position_embeddings": 514}, 50265, 512),
        (
            {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 0},
            30522,
            513,
        ),
        ({"model_type": "opt"}, 50272, 2048),
    ],
)
def test_what_is_not_written_down_is_what_the_class_says(
    config: dict[str, Any], vocab_size: int, context: int
) -> None:
    facts = config_facts(config, where="x")
    assert (facts.vocab_size, facts.context_tokens) == (vocab_size, context)


def test_some_read_ids_that_they_never_write() -> None:
    facts = config_facts({"model_type": "mllama"}, where="x")
    assert facts.rows == facts.vocab_size + 8


def test_the_dtype_may_stand_with_the_text() -> None:
    inside = {"model_type": "gemma3", "text_config": {"dtype": "bfloat16"}}
    assert config_facts(inside, where="x").dtype == "bfloat16"
    assert (
        config_facts({"model_type": "llama", "torch_dtype": "float16"}, where="x").dtype
        == "float16"
    )


SMALL = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 12,
}


@pytest.mark.parametrize(
    "kind", ["roberta", "mpnet", "camembert", "opt", "biogpt", "bert", "nystromformer"]
)
def test_a_text_of_all_usable_positions_fits_and_a_longer_one_does_not(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, **SMALL, max_position_embeddings=16, pad_token_id=1, bos_token_id=0, eos_token_id=2
    )
    model, most = AutoModel.from_config(config).eval(), usable_positions(config)
    assert most is not None
    with torch.no_grad():
        model(torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 5))


def test_every_type_whose_positions_begin_behind_padding_is_known() -> None:
    """By the code of the installed transformers; TrOCR makes room for its padding."""
    name = import_module("transformers.models.auto.configuration_auto").model_type_to_module_name
    behind = re.compile(r"padding_idx \+ |\+ (self\.)?padding_idx|position_ids_from_input_ids")
    found = set()
    for kind in {*class_names_of("CAUSAL_LM"), *class_names_of("SEQUENCE_CLASSIFICATION")}:
        package = find_spec(f"transformers.models.{name(kind)}")
        for folder in package.submodule_search_locations if package else []:
            files = [f for f in Path(folder).glob("modeling_*.py") if "vision" not in f.name]
            if any(behind.search(file.read_text("utf-8")) for file in files):
                found.add(kind)
    assert found - {"trocr"} == POSITIONS_FROM_PADDING


def test_reading_a_config_loads_no_torch_and_spoils_no_later_import() -> None:
    code = (
        "import logging, sys\n"
        "from stillroom.stages.models.fit.config import config_facts\n"
        "config_facts({'model_type': 'llama'}, where='x')\n"
        "config_facts({'model_type': 'gpt2'}, where='x')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "from transformers.utils import is_torch_available\n"
        "assert is_torch_available() and 'transformers.configuration_utils' not in sys.modules\n"
        "assert len(logging.getLogger('transformers').handlers) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
