"""A tokenizer's files, as they were in the folder they came from.

Only the chat template may be another.

Saving a loaded tokenizer writes other files than it was loaded from, and another class: what they
say to transformers 4.57, vLLM or tokenizers is then no longer what the teacher's and the student's
makers said.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..identity import KEPT_FILES

_OTHER_FILES = ("spiece.model", "sentencepiece.bpe.model", "tekken.json")
_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates"
# Where the files lay on the machine that saved them.
_LEFT_OUT = (
    *("name_or_path", "tokenizer_file", "special_tokens_map_file", "local_files_only"),
    "auto_map",  # no student has code of its own
)


def copy_tokenizer(source: Path, folder: Path, loaded: PreTrainedTokenizerBase) -> None:
    """Copy a tokenizer's files; where it was loaded with another chat template, write that one.

    Args:
        source: The folder that it came from.
        folder: Where it goes.
        loaded: The tokenizer, with the template that it shall have.
    """
    names = {*KEPT_FILES, *_OTHER_FILES, *loaded.vocab_files_names.values()}
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)
    path = folder / _CONFIG
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    config = _readable(found)
    if loaded.chat_template != _template_of(source):
        config = _with_template(config, folder, loaded.chat_template)
    if config != found:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _readable(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config without this machine's folders, as transformers 4.57 reads it too."""
    config = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    if config.get("tokenizer_class") == "TokenizersBackend":  # one class, two names
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.57: names of tokens, by name
        extra = config.pop("extra_special_tokens")
        config.setdefault("additional_special_tokens", extra)
    return config


def _template_of(folder: Path) -> Any:
    """The template that a folder's own tokenizer has."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).chat_template


def _with_template(config: dict[str, Any], folder: Path, template: Any) -> dict[str, Any]:
    """In place of every other: a single one as a file, several in the config that can list them."""
    (folder / _TEMPLATE).unlink(missing_ok=True)
    shutil.rmtree(folder / _TEMPLATES, ignore_errors=True)
    config = {name: value for name, value in config.items() if name != "chat_template"}
    if isinstance(template, str):
        (folder / _TEMPLATE).write_text(template, "utf-8")
        return config
    listed = [{"name": name, "template": text} for name, text in template.items()]
    return config | {"chat_template": listed}
