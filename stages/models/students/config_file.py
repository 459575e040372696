"""config.json in words that transformers 4.57 and 5 both read right.

transformers 5 keeps what rotary positions need in one place, `rope_parameters`. 4.57 does not know
it, and falls back to its defaults without a word: other positions, so another model. Where it looks
instead, the same numbers are written once more; so is what else has another name there.
"""

from typing import Any

from ..fit.parts import parts_of

_USUAL = ("rope_theta", "partial_rotary_factor")
# Names under which 4.57 looks for the base frequency and the share of dimensions that turn.
_FLAT = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# The base frequencies where layers of two kinds have their own: (full, sliding attention).
_BY_LAYER = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "gemma3n_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
    "modernbert-decoder": ("global_rope_theta", "local_rope_theta"),
    "olmo3": ("rope_theta", "rope_theta"),
}
# Whose `rope_scaling` holds its type, these two and nothing else.
_FACTORS = {
    "phi3": ("short_factor", "long_factor"),
    "phi4_multimodal": ("short_factor", "long_factor"),
}
_LENGTH = "original_max_position_embeddings"
_RENAMED = {"qwen3_moe": {"num_experts": "num_local_experts"}}
_LAYERS = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
# Whose kinds of layers 4.57 does not read: every third layer is one of full attention there.
_EVERY_THIRD = {"modernbert"}


class NotInOlderWords(Exception):
    """4.57 has no words for it."""


def with_older_words(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes, with what 4.57 reads beside it.

    The parts of a composite model get it too.

    Raises:
        NotInOlderWords: layers differ in a way that 4.57 has no fields for.
    """
    parts = {name: with_older_words(part) for name, part in parts_of(config).items()}
    model_type, rope = config.get("model_type", ""), config.get("rope_parameters")
    return config | parts | _names(config, model_type) | (_rope(rope, model_type) if rope else {})


def _names(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    older = {
        name: config[now] for name, now in _RENAMED.get(model_type, {}).items() if now in config
    }
    layers = config.get("layer_types") or []
    if model_type in _LAYERS:
        older["layer_types"] = [_LAYERS[model_type].get(kind, kind) for kind in layers]
    full = [kind == "full_attention" for kind in layers]
    if model_type in _EVERY_THIRD and full != [index % 3 == 0 for index in range(len(full))]:
        raise NotInOlderWords("not every third of its layers is one of full attention")
    return older


def _rope(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    if model_type in _BY_LAYER:
        return _by_layer(rope, *_BY_LAYER[model_type])
    if any(isinstance(part, dict) for part in rope.values()):
        raise NotInOlderWords("its layers have rotary positions of several kinds")
    theta, share = _FLAT.get(model_type, _USUAL)
    older = {theta: rope["rope_theta"]} | _scaling(rope, model_type)
    if "partial_rotary_factor" in rope:
        older[share] = rope["partial_rotary_factor"]
    return older


def _by_layer(rope: dict[str, Any], full_theta: str, sliding_theta: str) -> dict[str, Any]:
    """Only layers of full attention are scaled there, and all dimensions turn."""
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    thetas = {full_theta: full["rope_theta"], sliding_theta: sliding["rope_theta"]}
    shares = {part.get("partial_rotary_factor", 1.0) for part in (full, sliding)}
    plain = _scaling(sliding, "")["rope_scaling"] is None and shares == {1.0}
    if not plain or thetas[full_theta] != full["rope_theta"]:  # one name for two numbers
        raise NotInOlderWords("its layers of sliding attention have rotary positions of their own")
    return thetas | _scaling(full, "")


def _scaling(rope: dict[str, Any], model_type: str) -> dict[str, Any]:
    """`rope_scaling`, what stretches the positions; None: nothing does."""
    scaling = {name: value for name, value in rope.items() if name not in _USUAL}
    if scaling == {"rope_type": "default"}:
        return {"rope_scaling": None}
    if model_type not in _FACTORS:
        return {"rope_scaling": scaling}
    factors = _FACTORS[model_type]
    if scaling.keys() - {"type", "rope_type", _LENGTH, *factors}:
        raise NotInOlderWords(f"its rope_type {scaling['rope_type']!r} has no more settings there")
    named = {"type": scaling["rope_type"]} | {name: scaling[name] for name in factors}
    length = {_LENGTH: scaling[_LENGTH]} if _LENGTH in scaling else {}
    return {"rope_scaling": named} | length
