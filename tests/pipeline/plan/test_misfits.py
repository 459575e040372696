"""Models that a recipe cannot use are refused by `plan`.

The refusal is one line with the true reason, before anything is paid for.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import prompts, stillroom, write_jsonl, write_recipe

Folder = Callable[..., Path]


def kind(model_type: Any, *architectures: str, **more: Any) -> Callable[[Path], None]:
    """Make a folder one of another kind of model, without a tokenizer as most such have none."""

    def make(folder: Path) -> None:
        config = {"model_type": model_type, "architectures": architectures} | more
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").unlink()

    return make


def edit(file: str, **fields: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        (folder / file).write_text(json.dumps(content | fields))

    return make


def add_token(folder: Path) -> None:
    """Add a 41st id to the tokenizer of a model with 32 rows.

    `add_tokens` without `resize_token_embeddings` leaves it like that.
    """
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 40, "content": "<|im_end|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lfs_pointer(folder: Path) -> None:
    """What `git clone` leaves in place of weights where Git LFS is not installed."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
    (folder / "model.safetensors").write_text(pointer)


def cut_short(folder: Path) -> None:
    """What is left of a download that broke off."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def index(name: Any, file: str = "model.safetensors") -> Callable[[Path], None]:
    """An index that has a tensor read from this file."""
    return edit(f"{file}.index.json", weight_map={"model.norm.weight": name})


OF_ANOTHER_KIND = [
    (kind("t5", "T5ForConditionalGeneration"), "is an encoder-decoder (t5)"),
    (kind("bart", "BartForConditionalGeneration"), "is an encoder-decoder (bart)"),
    (kind("whisper", "WhisperForConditionalGeneration"), "is a speech model (whisper)"),
    (kind("detr", "DetrForObjectDetection"), "is an object detector (detr)"),
    (kind("vit", "ViTForImageClassification"), "is an image classifier (vit)"),
    (kind("distilbert", "DistilBertForMaskedLM"), "is a masked language model (distilbert)"),
    (kind("bert", "BertLMHeadModel"), "sees later tokens unless is_decoder is set (bert)"),
    (kind("llama", "LlamaForTokenClassification"), "is a token classifier (llama)"),
    (kind("llama", "LlamaForSequenceClassification"), "is a text classifier (llama)"),
]
OF_NO_USE = [
    *[(make, f"{said}, which run.task causal_lm cannot distil.") for make, said in OF_ANOTHER_KIND],
    (
        kind("own", auto_map={"AutoConfig": "own.Own"}),
        "(model_type 'own') asks for code of its own",
    ),
    (
        kind("llama", "OwnForCausalLM", auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"}),
        "(model_type 'llama') asks for code of its own",
    ),
    (kind(["llama"]), "names model_type ['llama'], which transformers"),
    (kind("none-such"), "model_type 'none-such', which transformers"),
    (edit("config.json", num_hidden_layers="many"), "does not read its config.json as llama"),
    (
        edit("config.json", vocab_size=64),
        "asks for 64 rows (vocab_size), but model.embed_tokens.weight",
    ),
    (lfs_pointer, "model.safetensors is not readable as safetensors (SafetensorError"),
    (cut_short, "model.safetensors is not readable as safetensors (SafetensorError"),
    (add_token, "the tokenizer has ids up to 40, but the table of token embeddings has 32 rows"),
    (index("../other/w.safetensors"), "names weights in '../other/w.safetensors', expected"),
    (index("inner/w.safetensors"), "model.safetensors.index.json names weights in 'inner/w"),
    (index("w.bin"), "names weights in 'w.bin', expected a file in the folder itself that ends in"),
    (index(3), "names weights in 3, expected a file"),
    (index("/w.bin", "pytorch_model.bin"), "pytorch_model.bin.index.json names weights in '/w.bin"),
    (edit("config.json", transformers_weights="inner/w.safetensors"), "config.json names weights"),
    (edit("config.json", pad_token_id=32), "pad_token_id in config.json is 32"),
    (
        edit("generation_config.json", eos_token_id=[2, 99]),
        "eos_token_id in generation_config.json is 99",
    ),
]


@pytest.fixture
def planned(tmp_path: Path, tiny_llama: Folder) -> Callable[..., str]:
    """What `plan` says of a recipe with these sections, in one line."""
    source = write_jsonl(tmp_path / "p.jsonl", prompts(6))

    def plan(**sections: Any) -> str:
        teacher = sections.pop("folder", None) or tiny_llama("good")
        recipe = write_recipe(tmp_path, teacher, source, **sections)
        (line,) = stillroom("plan", recipe, expect=2).stderr.splitlines()
        assert not (tmp_path / "store").exists()
        return line

    return plan


@pytest.mark.parametrize(("make", "said"), OF_NO_USE)
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_model_that_does_not_fit_is_refused_by_what_it_is(
    tiny_llama: Folder,
    planned: Callable[..., str],
    make: Callable[[Path], None],
    said: str,
    who: str,
) -> None:
    folder = tiny_llama("bad")
    make(folder)
    line = planned(folder=folder) if who == "teacher" else planned(student={"model": str(folder)})
    assert line.startswith(f"error: {who}.model: {folder}")
    assert said in line
    assert "holds no tokenizer" not in line


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_quantised_student_is_refused(
    tiny_llama: Folder, planned: Callable[..., str], lora: dict[str, int] | None
) -> None:
    folder = tiny_llama("bad")
    edit("config.json", quantization_config={"quant_method": "bitsandbytes"})(folder)
    line = planned(student={"model": str(folder), "lora": lora})
    assert f"student.model: {folder} is quantised (bitsandbytes" in line


def test_what_only_the_weights_of_a_student_show(
    tiny_llama: Folder, planned: Callable[..., str]
) -> None:
    folder = tiny_llama("student")
    line = planned(student={"model": str(folder), "lora": {"target_modules": ["query", "value"]}})
    assert (
        "student.lora.target_modules: the student has no module query or value. Name some" in line
    )
    assert "k_proj, o_proj, q_proj" in line
    (folder / "model.safetensors").unlink()
    line = planned(student={"model": str(folder)})
    assert f"student.model: {folder} holds no weights (*.safetensors)" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "bert"}, "student.config.model_type: bert is a masked language model"),
        (
            {"model_type": "lama"},
            "student.config.model_type: transformers has no 'lama'. Did you mean llama?",
        ),
        (
            {"model_type": "gpt2", "n_head": "two"},
            "student.config: {'model_type': 'gpt2', 'n_head': 'two'} does not hold",
        ),
        (
            {"model_type": "gpt2", "num_key_value_heads": 1},
            "num_key_value_heads: not a field of a gpt2 config",
        ),
        (
            {"num_hiden_layers": 1},
            "not a field of a llama config. Did you mean num_hidden_layers?",
        ),
        ({"vocab_size": 8}, "student.config.vocab_size: the tokenizer has ids up to 23, but"),
    ],
)
def test_fresh_weights_that_cannot_be_made_are_refused(
    planned: Callable[..., str], config: dict[str, Any], said: str
) -> None:
    assert said in planned(student={"config": config})


def test_a_token_that_no_text_has_needs_no_row(tmp_path: Path, tiny_llama: Folder) -> None:
    """A model of text alone with the tokenizer of its family, whose pictures have a token."""
    folder = tiny_llama("teacher")
    add_token(folder)
    edit("tokenizer_config.json", image_token="<|im_end|>")(folder)
    source = write_jsonl(tmp_path / "p.jsonl", prompts(6))
    stillroom("plan", write_recipe(tmp_path, folder, source))
