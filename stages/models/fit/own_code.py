"""Code that a model's folder brings along (`auto_map`).

It finds which files that is, and what the config says without it.

It is run for a teacher alone, and only where the recipe says so. Nothing here runs it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from .files import read_json
from .light import knows
from .uses import has_own_code

NEVER_RUN = (
    "which is run for a teacher alone, where its recipe says teacher.trust_remote_code: true. Use "
    "a model whose class transformers has"
)
_LENGTHS = (
    "max_position_embeddings max_seq_len max_sequence_length seq_length n_positions n_ctx".split()
)
"""Names under which a config may say how many tokens a model reads at once."""
_MODEL = "AutoModelForCausalLM"
_GENERATES = "custom_generate/generate.py"


def asks_for_code(raw: Mapping[str, Any]) -> bool:
    """Whether transformers loads this model by code of the folder alone.

    It is to be called inside `light_transformers`.
    """
    unknown = not knows(raw.get("model_type")) and bool(raw.get("auto_map"))
    return unknown or has_own_code(raw)


def code_files(folder: Path, raw: Mapping[str, Any], *, where: str) -> list[Path]:
    """The code of a teacher that may run it.

    Args:
        folder: Of the model.
        raw: Its config.json.
        where: Field and folder, for messages.

    Raises:
        UsageError: it brings none, no causal language model, a `generate` or a tokenizer of its
            own, or code of another repository, which no hash would cover.
    """
    named = raw.get("auto_map")
    if not isinstance(named, Mapping) or _MODEL not in named:
        raise UsageError(
            f"teacher.trust_remote_code: {where} brings no code of its own for a causal language "
            f"model (its config.json has no auto_map with {_MODEL}). Remove it."
        )
    foreign = [str(name) for name in named.values() if "--" in str(name)]
    if foreign:
        raise UsageError(
            f"{where}: its config.json asks for code of another repository ({foreign[0]}), which "
            "its identity would not cover. Copy that code into the folder, and take what stands "
            "before -- out of auto_map."
        )
    if (folder / _GENERATES).exists():
        raise UsageError(
            f"{where}: brings its own way of writing text ({_GENERATES}), which would write "
            "otherwise than the recipe says. Remove that file from the folder."
        )
    if "auto_map" in read_json(folder / "tokenizer_config.json", where, missing={}):
        raise UsageError(
            f"{where}: its tokenizer_config.json asks for code of its own (auto_map), which an "
            "engine may run with the model's. Take auto_map out of it."
        )
    files = sorted(folder.rglob("*.py"))
    if not files:
        raise UsageError(
            f"{where}: its config.json asks for code of its own, and no *.py is there. Fetch the "
            "whole folder."
        )
    return files


def said_of_text(raw: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """What stands in a config.json: `vocab_size`, `context_tokens`, `blocks` and `width`.

    `context_tokens` is None where no limit is named; `blocks` and `width` may be 0.

    Raises:
        UsageError: there is no vocabulary size.
    """
    part = raw.get("text_config") or raw
    size = part.get("vocab_size")
    if type(size) is not int or size < 1:
        raise UsageError(
            f"{where}: its config.json names no vocab_size, expected how many ids its code tells "
            f"apart (got {size!r}). Add it."
        )
    said = {name: number for name, number in part.items() if type(number) is int and number > 0}
    lengths = [said[name] for name in _LENGTHS if name in said]
    return {
        "vocab_size": size,
        "context_tokens": lengths[0] if lengths else None,
        "blocks": said.get("num_hidden_layers", 0),
        "width": said.get("hidden_size", 0),
    }
