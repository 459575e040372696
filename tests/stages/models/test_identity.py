"""Identity: content decides, names and paths do not; a weight file is read once."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stillroom.stages.models.identity import FileHashes, find_model, identify, identify_unseen
from stillroom.storage.errors import UsageError


@pytest.fixture
def hashes(tmp_path: Path) -> FileHashes:
    return FileHashes(tmp_path / "store", remember=True)


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_copy_elsewhere_is_the_same_model(
    tiny_llama: Callable[..., Path], tmp_path: Path, hashes: FileHashes
) -> None:
    folder = tiny_llama()
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "renamed"))
    edit(
        copy / "config.json",
        transformers_version="0.0",
        _name_or_path="/x",
        text={"_name_or_path": "/home/me/t"},
    )
    edit(folder / "config.json", text={})
    paths = {
        "tokenizer_file": "/home/me/tokenizer.json",
        "special_tokens_map_file": "/home/me/map.json",
    }
    edit(copy / "tokenizer_config.json", **paths)
    assert "/home/me" not in str(identify(copy, dtype="auto", hashes=hashes).parts)
    assert (
        identify(folder, dtype="auto", hashes=hashes).id
        == identify(copy, dtype="auto", hashes=hashes).id
    )


@pytest.mark.parametrize("part", ["weights", "config", "tokenizer", "template", "end", "dtype"])
def test_every_part_of_a_model_is_part_of_its_identity(
    tiny_llama: Callable[..., Path], hashes: FileHashes, part: str
) -> None:
    folder = tiny_llama()
    before = identify(folder, dtype="auto", hashes=hashes).id
    dtype = "auto"
    if part == "weights":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    elif part == "config":
        edit(folder / "config.json", rms_norm_eps=1e-3)
    elif part == "tokenizer":
        edit(
            folder / "tokenizer.json",
            truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0},
        )
    elif part == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    elif part == "end":
        edit(folder / "generation_config.json", eos_token_id=[1, 2])
    else:
        dtype = "bfloat16"
    assert identify(folder, dtype=dtype, hashes=hashes).id != before


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_files_that_only_name_tokens_are_part_of_the_tokenizer(
    tiny_llama: Callable[..., Path], hashes: FileHashes, name: str
) -> None:
    folder = tiny_llama()
    (folder / name).write_text('{"eos_token": "</s>"}')
    before = identify(folder, dtype="auto", hashes=hashes)
    assert name in before.files_to_keep()
    (folder / name).write_text('{"eos_token": "<pad>"}')
    after = identify(folder, dtype="auto", hashes=hashes)
    assert (before.id != after.id, before.tokenizer_id != after.tokenizer_id) == (True, True)


def test_an_adapter_is_its_tensors_and_what_its_config_makes_of_them(
    tiny_llama: Callable[..., Path], tmp_path: Path, hashes: FileHashes
) -> None:
    folder, adapter = tiny_llama(), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"tensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 8, "peft_version": "1"})
    )

    def identity() -> str:
        return identify(folder, dtype="auto", hashes=hashes, adapter=adapter).id

    before = identity()
    edit(
        adapter / "adapter_config.json",
        base_model_name_or_path="/x",
        revision="y",
        auto_mapping={},
        peft_version="2",
    )
    assert identity() == before
    edit(adapter / "adapter_config.json", lora_alpha=64)
    assert identity() != before


def test_auto_is_the_checkpoints_own_dtype(
    tiny_llama: Callable[..., Path], hashes: FileHashes
) -> None:
    folder = tiny_llama()
    assert (
        identify(folder, dtype="auto", hashes=hashes).id
        == identify(folder, dtype="float32", hashes=hashes).id
    )


def test_weights_are_read_once_per_file_and_again_when_they_change(
    tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama()
    identify(folder, dtype="auto", hashes=FileHashes(tmp_path / "store", remember=True))
    monkeypatch.setattr(FileHashes, "_hash", lambda *_: pytest.fail("read again"))
    identify(folder, dtype="auto", hashes=FileHashes(tmp_path / "store", remember=True))
    monkeypatch.undo()
    file = folder / "model.safetensors"
    before = FileHashes(tmp_path / "store", remember=True).sha256(file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    assert FileHashes(tmp_path / "store", remember=True).sha256(file) != before


@pytest.mark.parametrize(
    ("config", "given", "found"),
    [
        ({"vocab_size": 64, "text_config": None}, None, 64),
        ({"vocab_size": 64}, 48, 48),
        ({"model_type": "none-such", "vocab_size": 64}, 48, 48),
    ],
)
def test_an_unseen_teacher_has_the_ids_that_its_config_says(
    tiny_llama: Callable[..., Path],
    hashes: FileHashes,
    config: dict[str, object],
    given: int | None,
    found: int,
) -> None:
    folder = tiny_llama()
    edit(folder / "config.json", **config)
    assert identify_unseen(folder, "api", hashes=hashes, vocab_size=given).vocab_size == found


def test_an_unseen_teacher_of_an_unknown_type_needs_its_size(
    tiny_llama: Callable[..., Path], hashes: FileHashes
) -> None:
    folder = tiny_llama()
    edit(folder / "config.json", model_type="none-such")
    with pytest.raises(UsageError, match=r"there is no --vocab-size.*model_type 'none-such'"):
        identify_unseen(folder, "api", hashes=hashes)


def test_looking_writes_nothing(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    identify(tiny_llama(), dtype="auto", hashes=FileHashes(tmp_path / "store", remember=False))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("breakage", "expected"),
    [
        (lambda f: (f / "config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    ],
)
def test_a_broken_folder_is_named_with_the_field(
    tiny_llama: Callable[..., Path],
    hashes: FileHashes,
    breakage: Callable[[Path], object],
    expected: str,
) -> None:
    folder = tiny_llama()
    breakage(folder)
    with pytest.raises(UsageError, match=rf"teacher\.model: .*{expected}"):
        identify(folder, dtype="auto", hashes=hashes)


@pytest.mark.parametrize("name", ["none", "./none", "/none/at/all", "a/b/c"])
def test_a_missing_folder_is_a_clear_error(name: str) -> None:
    with pytest.raises(UsageError, match=r"teacher\.model: no folder"):
        find_model(name, None, field="teacher.model", download=False)


def test_a_hub_id_that_is_not_here_says_so() -> None:
    with pytest.raises(UsageError, match="neither a folder nor downloaded"):
        find_model("someone/some-model", None, field="teacher.model", download=False)


def test_all_templates_of_a_model_are_known_and_kept(
    tiny_llama: Callable[..., Path], tmp_path: Path, hashes: FileHashes
) -> None:
    from transformers import AutoTokenizer

    folder = tiny_llama()
    (folder / "chat_template.jinja").write_text("one")
    alone = identify(folder, dtype="auto", hashes=hashes)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("two")
    several = identify(folder, dtype="auto", hashes=hashes)
    assert several.template_id != alone.template_id
    kept = tmp_path / "kept"
    kept.mkdir()
    for name, content in several.files_to_keep().items():
        (kept / name).write_bytes(content)
    assert AutoTokenizer.from_pretrained(kept).chat_template == {
        "default": "one",
        "tool_use": "two",
    }
