"""Models in fewer bits, by their small files.

How one is quantised, and whether it can be loaded so here.

A checkpoint names its method in config.json (`quantization_config`), and transformers believes it:
where the weights are floats all the same it loads the float model for some methods, without an
error. So the weights' headers are asked. Or a teacher is quantised while it is loaded
(`teacher.quantize`).

No torch: the plan asks too.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from .files import read_json
from .tensors import stored_tensors

WHILE_LOADING: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    # Its usual threshold of 6 keeps whole columns of a pass in 16 bits that hold one large number:
    # so what is said of a token would depend on those beside and behind it.
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
"""`teacher.quantize` -> what bitsandbytes is told; part of the teacher's identity."""

_BITSANDBYTES = "bitsandbytes"
_NEEDS: dict[str, dict[str, str]] = {
    _BITSANDBYTES: {"bitsandbytes": "stillroom[bitsandbytes]"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "fp8": {},
    "mxfp4": {},
    "torchao": {"torchao": "torchao"},
    "hqq": {"hqq": "hqq"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "auto-round": {"auto_round": "auto-round"},
}
"""Method of a config.json -> modules that transformers needs for it, and what installs each."""

_NOT_FEWER_BITS = frozenset("F64 F32 F16 BF16 I64 BOOL".split())
"""Types of tensors that a float model is stored in, positions and masks among them."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """The method that a config.json names, as transformers reads it.

    None: it names no quantisation.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, Mapping):
        return "unknown"
    old = found.get("load_in_8bit") or found.get("load_in_4bit")
    return str(found.get("quant_method") or (_BITSANDBYTES if old else "unknown"))


def by_bitsandbytes(parts: Mapping[str, Any]) -> bool:
    """Whether bitsandbytes quantises a model while it is loaded, or has before.

    The parts of its identity say so.
    """
    return "quantization" in parts or method_of(parts.get("config") or {}) == _BITSANDBYTES


def quantized_words(parts: Mapping[str, Any]) -> str:
    """How a model is quantised, by the parts of its identity; empty: it is not."""
    named, saved = parts.get("quantization"), method_of(parts.get("config") or {})
    if isinstance(named, Mapping):
        return f"{named.get('name')} ({_BITSANDBYTES}, while it is loaded)"
    if saved == _BITSANDBYTES:
        return f"{_bitsandbytes_words(parts['config']['quantization_config'])} ({saved}, as saved)"
    return f"{saved}, as saved" if saved else ""


def _bitsandbytes_words(config: Mapping[str, Any]) -> str:
    return str(config.get("bnb_4bit_quant_type")) if config.get("load_in_4bit") else "int8"


def refuse_unquantized(folder: Path, quantize: str | None = None, *, field: str, name: str) -> None:
    """Refuse what is not quantised as it says, or cannot be loaded so here.

    Args:
        folder: Of the model.
        quantize: `teacher.quantize`.
        field: Where the recipe names it.
        name: As the recipe names it.

    Raises:
        UsageError: a package is missing, nobody knows the method, or the weights are floats.
    """
    saved, where = method_of(read_json(folder / "config.json", field)), f"{field}: {name}"
    if quantize is not None and saved is not None:
        raise UsageError(
            f"teacher.quantize: {name} is quantised already ({saved} in its config.json), and "
            f"{quantize} quantises float weights. Remove teacher.quantize, or name the float model."
        )
    if quantize is not None:
        _refuse_missing(_BITSANDBYTES, f"teacher.quantize: {quantize}")
    if saved is not None:
        _refuse_missing(saved, f"{where} is quantised by {saved} (config.json), which")
        _refuse_floats(folder, saved, where=where)


def _refuse_missing(method: str, what: str) -> None:
    if method not in _NEEDS:
        known = ", ".join(_NEEDS)
        raise UsageError(
            f"{what} is not supported. Known are {known}. Name the model in one of these, or in "
            "floats."
        )
    lacking = [pip for module, pip in _NEEDS[method].items() if not _installed(module)]
    if lacking:
        raise UsageError(
            f"{what} needs a package that is not installed here. Install {' and '.join(lacking)}, "
            "or use float weights."
        )


def _installed(module: str) -> bool:
    first, _, rest = module.partition(".")
    return find_spec(first) is not None and (not rest or find_spec(module) is not None)


def _refuse_floats(folder: Path, method: str, *, where: str) -> None:
    """Refuse weights that are floats; what is pickled shows when it is loaded."""
    stored = {tensor.dtype for tensor in stored_tensors(folder, where=where).values()}
    if stored and stored <= _NOT_FEWER_BITS:
        raise UsageError(
            f"{where} is not quantised: its config.json names {method} (quantization_config), and "
            f"all of its weights are stored in {', '.join(sorted(stored))}. {REPAIR}"
        )


REPAIR = (
    "Name the folder that holds the quantised weights; or take quantization_config out of "
    "config.json, and it is the float model."
)
"""What to do where a config names a quantisation that the weights have not."""
