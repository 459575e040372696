"""What a model's config says, asked of the class that transformers has for it.

No torch: the plan asks too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ....storage.errors import UsageError, answered
from .light import config_classes, knows, light_transformers, version
from .own_code import NEVER_RUN, asks_for_code, said_of_text
from .parts import text_config
from .uses import heads_of, reads_ahead, use_of

UNLIMITED = 2**31 - 1
"""Tokens that a model reads at once where its config names no limit."""

# Their positions count from behind that of the padding token, and some begin there for good.
POSITIONS_FROM_PADDING = frozenset(
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet prophetnet "
    "roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()
)
# Rows of the table of token embeddings beyond `vocab_size`: ids that are read and never written.
_MORE_ROWS = {"mllama_text_model": 8, "moshi": 1}
# Where a class knows no `max_position_embeddings` under any name: the length of its biases, or of
# what it was trained on.
_OTHER_LENGTHS = ("max_seq_len", "seq_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFacts:
    """What this package asks of a config."""

    model_type: str
    vocab_size: int
    """Ids that it tells apart in what it writes; 0: it knows no vocabulary."""
    rows: int
    """Of its table of token embeddings; 0: it has none."""
    context_tokens: int
    """Tokens of the longest text that has a position for each."""
    dtype: str | None
    """Of the stored weights, where the config says it."""
    use: str
    """What kind of model it is, in words."""
    heads: tuple[str, ...]
    """Of which tasks' heads it has one, or may get one (`Task.head`)."""
    ahead: str | None
    """The field by which it sees the future, as `name: value`."""
    tied: bool
    """Whether its input and output embeddings are one, or the config does not say."""
    blocks: int
    """Blocks that a text goes through, one after another; 0: it has not one row of them."""
    width: int
    """Numbers of the state that a block hands on."""


def config_facts(config: Mapping[str, Any], *, where: str, trusted: bool = False) -> ConfigFacts:
    """What the class of a config.json makes of it.

    Args:
        config: Its content.
        where: Field and folder, for messages.
        trusted: Whether its own code may be run: then the file itself is read, where transformers
            has no class.

    Raises:
        UsageError: transformers has no class for it, or the class refuses it.
    """
    return _facts(json.dumps(config, sort_keys=True), where, trusted=trusted)


def loaded_config(config: Mapping[str, Any], *, where: str) -> Any:
    """The config itself; without torch, only inside `light_transformers`.

    Raises:
        UsageError: as of `config_facts`.
    """
    kind, known = config.get("model_type"), knows(config.get("model_type"))
    if asks_for_code(config):
        raise UsageError(
            f"{where}: its config.json (model_type {kind!r}) asks for code of its own (auto_map), "
            f"{NEVER_RUN}."
        )
    if kind is None:
        raise UsageError(f"{where}: its config.json names no model_type. Save the model again.")
    if not known:
        raise UsageError(
            f"{where}: its config.json names model_type {kind!r}, which transformers {version()} "
            "does not know. Use another model, or a transformers that knows it."
        )
    what = f"{where}: transformers {version()} does not read its config.json as {kind}"
    with answered(what, "Save the model again."):
        found = config_classes()[kind].from_dict(dict(config))
    return found


def usable_positions(config: Any) -> int | None:
    """Tokens of the longest text that has a position for each.

    None: the architecture sets no limit.

    Args:
        config: Of text, as transformers loads it.
    """
    named = (getattr(config, n, None) for n in ("max_position_embeddings", *_OTHER_LENGTHS))
    most = next((n for n in named if n is not None), None)
    if not isinstance(most, int) or most < 1:  # XLNet says -1
        return None
    if config.model_type in POSITIONS_FROM_PADDING:
        return most - (config.pad_token_id or 0) - 1
    return most


def blocks_of(config: Any) -> int:
    """Blocks that a text goes through, one after another.

    It is 0 where there are an encoder and a decoder, or no blocks.

    Args:
        config: Of text, as transformers loads it.
    """
    if getattr(config, "is_encoder_decoder", False):
        return 0
    return int(getattr(config, "num_hidden_layers", None) or 0)


def _tied(config: Any) -> bool:
    return getattr(config, "tie_word_embeddings", None) is not False


@cache
def _facts(text: str, where: str, *, trusted: bool) -> ConfigFacts:
    raw = json.loads(text)
    with light_transformers():
        if trusted and asks_for_code(raw):
            return _as_it_stands(raw, where)
        config = loaded_config(raw, where=where)
        part = text_config(config)
        dtype = getattr(config, "dtype", None) or getattr(part, "dtype", None)
        vocab_size = int(getattr(part, "vocab_size", None) or 0)
        return ConfigFacts(
            model_type=config.model_type,
            vocab_size=vocab_size,
            rows=vocab_size and vocab_size + _MORE_ROWS.get(part.model_type, 0),
            context_tokens=usable_positions(part) or UNLIMITED,
            dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
            use=use_of(raw, config),
            heads=heads_of(raw, config),
            ahead=reads_ahead(config),
            tied=any(_tied(each) for each in (config, part)),
            blocks=blocks_of(part),
            width=int(getattr(part, "hidden_size", None) or 0),
        )


def _as_it_stands(raw: Mapping[str, Any], where: str) -> ConfigFacts:
    """Of a teacher with code of its own, which is not run for this: what its config.json says."""
    said = said_of_text(raw, where=where)
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    return ConfigFacts(
        model_type=str(raw.get("model_type")),
        vocab_size=said["vocab_size"],
        rows=said["vocab_size"],
        context_tokens=said["context_tokens"] or UNLIMITED,
        dtype=str(dtype) if dtype is not None else None,
        use="a causal language model of its own code",
        heads=("lm",),
        ahead=None,  # seen when it is loaded
        tied=raw.get("tie_word_embeddings") is not False,
        blocks=said["blocks"],
        width=said["width"],
    )
