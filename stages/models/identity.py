"""Who a model is: hashes of weights, config, tokenizer, template, adapter, dtype, quantisation.

It has no path and no name.

Nothing here imports torch: the plan asks for identities too. Weights are hashed once per file, and
a store remembers that (`storage/store/hashes.py`), so a second run does not read an 8B teacher
again.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...storage.errors import UsageError
from ...storage.keys import canonical_json, content_id
from ...storage.store.hashes import FileHashes
from ..recipe.run_folder import named_run, trained_student
from ..recipe.tasks import TASKS
from .fit.adapter import ADAPTER_CONFIG, adapter_classes
from .fit.classes import class_names, head_over_classes
from .fit.config import UNLIMITED, config_facts
from .fit.files import read_json
from .fit.own_code import code_files
from .fit.processor import PROCESSOR, processor_config
from .fit.quantized import WHILE_LOADING, quantized_words
from .fit.tensors import refuse_elsewhere, tensor_files
from .fit.token_ids import highest_id

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
# No tokenizer by themselves, but they change what one does: the end token may stand here alone.
_TOKEN_FILES = ("special_tokens_map.json", "added_tokens.json")
KEPT_FILES = (*_TOKENIZER_FILES, *_TOKEN_FILES, "tokenizer_config.json", "chat_template.jinja")
# Fields that say where a file came from or which version wrote it, not what the model computes.
_NOT_CONTENT = {
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "name_or_path",
    "local_files_only",
} | {
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "tokenizer_file",
    "special_tokens_map_file",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A model that was found on disk and hashed."""

    id: str
    tokenizer_id: str
    template_id: str
    folder: Path
    adapter: Path | None
    dtype: str
    vocab_size: int
    class_names: tuple[str, ...] = ()
    """Of a model whose head is over classes."""
    context_tokens: int
    parts: dict[str, Any]
    class_fields: dict[str, Any] = field(default_factory=dict)
    """Of its config, where not its folder says what its classes are but the adapter."""

    @property
    def runs_code(self) -> bool:
        """Whether code of its own loads it: what transformers calls `trust_remote_code`."""
        return "code" in self.parts

    @property
    def quantize(self) -> str | None:
        """How its float weights are quantised while they are loaded, or None."""
        return self.parts["quantization"]["name"] if "quantization" in self.parts else None

    @property
    def quantized(self) -> str:
        """How its weights are quantised, in words, while they are loaded or before, or empty."""
        return quantized_words(self.parts)

    @property
    def code_id(self) -> str:
        """Hash of all of that code."""
        return content_id("code", files=self.parts["code"])

    def outcomes(self, task: str) -> int:
        """What a distribution of this model is over: its vocabulary, or its classes."""
        return len(self.class_names) if TASKS[task].labelled else self.vocab_size

    def files_to_keep(self) -> dict[str, bytes]:
        """What a store keeps of this model: with it its rows are read and trained from."""
        names = [*KEPT_FILES, "config.json", "generation_config.json"]
        names += [PROCESSOR] if PROCESSOR in self.parts["tokenizer"] else []
        files = {n: (self.folder / n).read_bytes() for n in names if (self.folder / n).is_file()}
        if self.class_fields:
            whole = read_json(self.folder / "config.json", "teacher.model") | self.class_fields
            files["config.json"] = canonical_json(whole)
        if isinstance(self.parts["chat_template"], list):
            # A store keeps no folders of a model: all templates in the one file that can list them.
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            config["chat_template"] = self.parts["chat_template"]
            files["tokenizer_config.json"] = canonical_json(config)
            files.pop("chat_template.jinja", None)
        return files | {"identity.json": canonical_json(self.parts)}


def find_model(
    model: str, revision: str | None, *, field: str, download: bool, weights: bool = True
) -> Path:
    """The folder of a model named by folder, Hub id or the run that trained it.

    Args:
        model: Folder, Hub id, or `run:RUN_DIR`.
        revision: Of the Hub.
        field: The recipe's field, for messages.
        download: Fetch from the Hub what is not here.
        weights: Fetch them too, and not the small files alone.

    Raises:
        UsageError: no such folder, and not (yet) downloaded from the Hub either.
    """
    if named_run(model) is not None:
        return trained_student(model, field=field)
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"{field}: {model} holds no config.json, so it is not a model folder. Name "
                "another folder."
            )
        return folder
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_like_path:
        raise UsageError(
            f"{field}: no folder {model} (looked in {Path.cwd()}). Name a model folder or a Hub id."
        )
    from huggingface_hub import snapshot_download

    # Code is data until it is run.
    patterns = ["*.json", "*.jinja", "tokenizer.model", "*.txt", "*.py"]
    patterns += ["*.safetensors"] if weights else []
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, local_files_only=not download
            )
        )
    except Exception as error:
        action = (
            "could not be downloaded from the Hub"
            if download
            else "is neither a folder nor downloaded yet"
        )
        raise UsageError(
            f"{field}: {model} {action} ({type(error).__name__}). "
            "Check the name and the network, or name a local folder."
        ) from error


def is_here(model: str) -> bool:
    """Whether a name is that of a folder of this machine, or of a run's student, and no Hub id."""
    return named_run(model) is not None or Path(model).expanduser().is_dir()


def identify(
    folder: Path,
    *,
    dtype: str,
    hashes: FileHashes,
    adapter: Path | None = None,
    field: str = "teacher.model",
    trusted: bool = False,
    quantize: str | None = None,
) -> Identity:
    """Hash the model in a folder.

    Args:
        folder: Holds config.json, weights and a tokenizer.
        dtype: `auto` stands for the dtype of the checkpoint.
        hashes: Where file hashes are remembered.
        adapter: Folder of a LoRA adapter, part of the identity.
        field: The recipe's field, for messages.
        trusted: Whether its own code may be run, which is then part of the identity.
        quantize: How its float weights are quantised while they are loaded.

    Raises:
        UsageError: something is missing or unreadable.
    """
    config = read_json(folder / "config.json", field)
    class_fields = adapter_classes(config, adapter) if adapter else {}
    config |= class_fields
    weights = _weights(folder, hashes, field)
    tokenizer_config = read_json(folder / "tokenizer_config.json", field, missing={})
    template = _template(folder, tokenizer_config)
    facts = config_facts(config, where=f"{field}: {folder}", trusted=trusted)
    images = head_over_classes(config) == "image_classes" or facts.heads == ("image_classes",)
    # In place of a tokenizer; an image counts as a text of one token, the only one there is.
    tokenizer = (_processor if images else _tokenizer)(folder, hashes, field)
    end_tokens = read_json(folder / "generation_config.json", field, missing={}).get("eos_token_id")
    more = _code(folder, config, hashes) if trusted else {}
    if quantize is not None:
        more["quantization"] = {"name": quantize, **WHILE_LOADING[quantize]}
    stored_dtype = str(
        config.pop("dtype", config.pop("torch_dtype", None)) or facts.dtype or "float32"
    )
    parts = {
        "weights": weights,
        "config": _content(config),
        "tokenizer": tokenizer | {"config": _content(tokenizer_config)},
        "chat_template": template,
        "end_tokens": end_tokens,
        "adapter": _adapter(adapter, hashes) if adapter else None,
        "dtype": stored_dtype if dtype == "auto" else dtype,
    } | more
    return Identity(
        id=content_id("model", **parts),
        tokenizer_id=content_id("tokenizer", files=parts["tokenizer"]),
        template_id=content_id("template", template=template),
        folder=folder,
        adapter=adapter,
        dtype=str(parts["dtype"]),
        vocab_size=1 if images else facts.vocab_size,
        class_names=class_names(config),
        context_tokens=facts.context_tokens,
        parts=parts,
        class_fields=class_fields,
    )


def identify_unseen(
    folder: Path, name: str, *, hashes: FileHashes, vocab_size: int | None = None
) -> Identity:
    """A teacher whose weights are not here, known by its tokenizer and the name it is given.

    Two teachers of one name and tokenizer are one teacher here; nothing can tell them apart.

    Args:
        folder: Holds the tokenizer, and the config if there is one.
        name: What to call the teacher.
        hashes: Where file hashes are remembered.
        vocab_size: Of the teacher; None: as the config says, else as many ids as the tokenizer has.

    Raises:
        UsageError: there is no tokenizer, or no way to tell how large the vocabulary is.
    """
    field = "--tokenizer"
    config = read_json(folder / "config.json", field, missing={})
    tokenizer_config = read_json(folder / "tokenizer_config.json", field, missing={})
    template = _template(folder, tokenizer_config)
    if config and vocab_size is None:
        vocab_size = config_facts(
            config, where=f"{field} (there is no --vocab-size): {folder}"
        ).vocab_size
    found = vocab_size or _tokenizer_size(folder)
    parts = {
        "unseen": name,
        "vocab_size": int(found),
        "config": _content(config),
        "end_tokens": read_json(folder / "generation_config.json", field, missing={}).get(
            "eos_token_id"
        ),
        "tokenizer": _tokenizer(folder, hashes, field) | {"config": _content(tokenizer_config)},
        "chat_template": template,
    }
    return Identity(
        id=content_id("model", **parts),
        tokenizer_id=content_id("tokenizer", files=parts["tokenizer"]),
        template_id=content_id("template", template=template),
        folder=folder,
        adapter=None,
        dtype="",
        vocab_size=int(found),
        context_tokens=UNLIMITED,
        parts=parts,
    )


def _template(folder: Path, tokenizer_config: dict[str, Any]) -> Any:
    """The chat template, taken out of a tokenizer's config. Several have a name each."""
    template = tokenizer_config.pop("chat_template", None)
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if not others:
        return template
    first = [] if template is None else [{"name": "default", "template": template}]
    return first + [{"name": path.stem, "template": path.read_text()} for path in others]


def _tokenizer_size(folder: Path) -> int:
    highest = highest_id(folder, "--tokenizer")
    if highest is None:
        raise UsageError(
            f"--tokenizer: {folder} does not say how many ids there are. Give --vocab-size."
        )
    return highest + 1


def _weights(folder: Path, hashes: FileHashes, field: str) -> dict[str, str]:
    refuse_without_weights(folder, field)
    return {f.name: hashes.sha256(f) for f in tensor_files(folder)}


def refuse_without_weights(folder: Path, field: str) -> None:
    """Refuse a folder whose weights are not there, cannot be read, or lie elsewhere."""
    refuse_elsewhere(folder, where=f"{field}: {folder}")
    files = tensor_files(folder)
    if not files:
        raise UsageError(
            f"{field}: {folder} holds no weights (*.safetensors). Name a complete model folder."
        )
    unreadable = [f for f in files if not os.access(f, os.R_OK)]
    if unreadable:
        raise UsageError(f"{field}: {unreadable[0]} cannot be read. Check its permissions.")


def _tokenizer(folder: Path, hashes: FileHashes, field: str) -> dict[str, str]:
    if not any((folder / n).is_file() for n in _TOKENIZER_FILES):
        raise UsageError(
            f"{field}: {folder} holds no tokenizer ({', '.join(_TOKENIZER_FILES)}). Save one "
            "beside it."
        )
    names = (*_TOKENIZER_FILES, *_TOKEN_FILES)
    return {n: hashes.sha256(folder / n) for n in names if (folder / n).is_file()}


def _processor(folder: Path, hashes: FileHashes, field: str) -> dict[str, str]:
    """Of a model that reads images, in place of a tokenizer."""
    processor_config(folder, field)  # refuses what cannot be used
    return {PROCESSOR: hashes.sha256(folder / PROCESSOR)}


def _code(folder: Path, config: dict[str, Any], hashes: FileHashes) -> dict[str, Any]:
    files = code_files(folder, config, where=str(folder))
    return {"code": {f.relative_to(folder).as_posix(): hashes.sha256(f) for f in files}}


def _adapter(folder: Path, hashes: FileHashes) -> dict[str, Any]:
    """What an adapter adds (tensors), and how strongly and where (lora_alpha, rank, modules)."""
    config = read_json(folder / ADAPTER_CONFIG, "teacher.adapter")
    return {"weights": _weights(folder, hashes, "teacher.adapter"), "config": _content(config)}


def _content(config: dict[str, Any]) -> dict[str, Any]:
    """A config without those fields, at any depth: configs of parts have them too."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if name not in _NOT_CONTENT}
        return [kept(part) for part in value] if isinstance(value, list) else value

    return dict(kept(config))
