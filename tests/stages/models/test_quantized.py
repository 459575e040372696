"""Quantised teachers: who they are, and what they say by transformers alone.

What is no such teacher is refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import recipe_tree
from peft import LoraConfig, PeftModel, get_peft_model
from quantized import loaded, needs_bitsandbytes, saved
from safetensors.torch import load_file, save_file
from tiny_adapter import save_adapter, save_base
from tiny_classes import World, records
from tiny_images import CLASSES, Pictures, save_tiny_resnet
from tiny_llama import save_tiny_llama
from tiny_masks import save_tiny_masked
from tiny_models import save_tiny_bert
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    ConvNextImageProcessorPil,
    ViTConfig,
)

from stillroom.stages.models import classification, image_classification, masked_lm
from stillroom.stages.models.causal_lm import load_causal_lm
from stillroom.stages.models.fit import quantized
from stillroom.stages.models.fit.quantized import method_of, quantized_words, refuse_unquantized
from stillroom.stages.models.head import check_head, hidden_states, split_head
from stillroom.stages.models.identity import FileHashes, Identity, identify
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError

needs_bitsandbytes()
BOTH = pytest.mark.parametrize("how", ["nf4", "int8"])


@pytest.fixture
def found(tmp_path: Path) -> Callable[..., Identity]:
    """The identity of a folder, loaded as somebody says."""
    hashes = FileHashes(tmp_path / "hashes", remember=False)

    def find(folder: Path, **how: Any) -> Identity:
        return identify(folder, **{"dtype": "auto"} | how, hashes=hashes)

    return find


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, large enough that blocks of 64 weights have more than one scale."""
    folder = tmp_path_factory.mktemp("base") / "base"
    return save_tiny_llama(folder, hidden_size=64, intermediate_size=64)


HEAD = {"llm_int8_skip_modules": ["classifier"]}
"""Of BERT; transformers would quantise it too, since it has a bias."""
IDS = torch.tensor([[1, 5, 9, 4, 12, 7, 20, 6]])


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(inputs or {"input_ids": IDS})).logits
    return found


def test_an_identity_names_how_it_is_quantised_and_is_as_before_where_it_is_not(
    base: Path, found: Callable[..., Identity]
) -> None:
    plain, nf4, int8 = found(base), found(base, quantize="nf4"), found(base, quantize="int8")
    assert len({plain.id, nf4.id, int8.id}) == 3
    assert "quantization" not in plain.parts
    assert nf4.parts == plain.parts | {
        "quantization": {"name": "nf4", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    }
    assert (plain.quantized, nf4.quantize, int8.quantize) == ("", "nf4", "int8")
    assert nf4.quantized == "nf4 (bitsandbytes, while it is loaded)"
    assert nf4.tokenizer_id == plain.tokenizer_id
    assert found(base, quantize="nf4", dtype="bfloat16").id != nf4.id


@BOTH
def test_logits_are_those_of_transformers_whether_quantised_here_or_before(
    base: Path, found: Callable[..., Identity], tmp_path: Path, how: str
) -> None:
    expected = logits(loaded(AutoModelForCausalLM, base, how))
    here = load_causal_lm(found(base, quantize=how))
    before = found(saved(tmp_path / how, base, how))
    assert before.quantized == f"{how} (bitsandbytes, as saved)"
    assert before.id not in (found(base).id, found(base, quantize=how).id)
    refuse_unquantized(before.folder, field="teacher.model", name="x")
    for model in (here, load_causal_lm(before)):
        assert torch.equal(logits(model), expected)
        check_head(model)
        head, states = split_head(model), hidden_states(model, input_ids=IDS)
        torch.testing.assert_close(head.logits(states[0]), expected[0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(logits(load_causal_lm(found(base))), expected)
    # A row alone is as among others and before what follows: no column is kept for all of them.
    others = torch.cat([IDS, IDS.flip(1)])
    torch.testing.assert_close(logits(here, input_ids=others)[:1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(here, input_ids=IDS[:, :3]), expected[:, :3], rtol=1e-5, atol=1e-5
    )


def test_a_head_in_fewer_bits_is_refused_by_name(
    base: Path, found: Callable[..., Identity], tmp_path: Path
) -> None:
    for how, dtype in (("nf4", "uint8"), ("int8", "int8")):
        folder = saved(tmp_path / how, base, how, llm_int8_skip_modules=["none"])
        model = load_causal_lm(found(folder))
        with pytest.raises(UsageError, match=rf"output layer is Linear\w+ \(torch.{dtype}\)"):
            check_head(model)


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "bitsandbytes", "compressed-tensors"])
def test_a_config_that_names_what_its_weights_have_not_is_found_out(
    tmp_path: Path, found: Callable[..., Identity], method: str
) -> None:
    """In the headers; pickled weights have none, and show when they are loaded."""
    folder = save_tiny_llama(tmp_path / "lies")
    named = {"quant_method": method} | ({"load_in_4bit": True} if method == "bitsandbytes" else {})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": named}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"x is not quantised: .* names {method} .* F32"):
        refuse_unquantized(folder, field="teacher.model", name="x")
    if method in ("fp8", "mxfp4"):  # else transformers refuses it
        weights = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "same"))
        torch.save(weights.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        refuse_unquantized(folder, field="teacher.model", name="x")
        with pytest.raises(UsageError, match=rf"as quantised \({method}, as saved\), and all"):
            load_causal_lm(found(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it stays in 8 bits")
def test_what_becomes_floats_again_while_it_is_loaded_is_what_its_files_hold(
    tmp_path: Path, found: Callable[..., Identity]
) -> None:
    """True 8 bit weights of transformers' fp8: no layer holds fewer bits, and it is no lie."""
    folder = save_tiny_llama(tmp_path / "fp8", hidden_size=128, intermediate_size=128)
    stored, exact = {}, load_file(folder / "model.safetensors")
    for name, weight in exact.items():
        stored[name] = weight
        if "proj" in name:
            scale = weight.abs().max() / 448
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    refuse_unquantized(folder, field="teacher.model", name="x")
    identity = found(folder)
    assert identity.quantized == "fp8, as saved"
    layer = dict(load_causal_lm(identity).named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    read = stored[name].float() * stored[f"{name}_scale_inv"]
    torch.testing.assert_close(layer[name], read, rtol=1e-2, atol=1e-4)
    assert not torch.allclose(layer[name], exact[name], rtol=1e-2, atol=1e-4)


def test_what_cannot_be_loaded_here_is_said_with_what_is_missing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_llama(tmp_path / "other")

    def named(method: dict[str, Any]) -> None:
        config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
        (folder / "config.json").write_text(json.dumps(config))

    def refused(quantize: str | None = None, of: Path = folder) -> str:
        with pytest.raises(UsageError) as error:
            refuse_unquantized(of, quantize, field="teacher.model", name="x")
        return str(error.value)

    monkeypatch.setattr(quantized, "_installed", lambda module: False)
    named({"quant_method": "gptq", "bits": 4})
    assert "is quantised by gptq (config.json), which needs a package" in refused()
    assert "Install optimum and gptqmodel" in refused()
    named({"quant_method": "made-up"})
    assert "is quantised by made-up (config.json), which is not supported. Known are" in refused()
    said = refused("nf4", base)
    assert said.startswith("teacher.quantize: nf4 needs a package")
    assert "stillroom[bitsandbytes]" in said
    named({"load_in_8bit": True})
    assert "teacher.quantize: x is quantised already (bitsandbytes" in refused("nf4")
    assert method_of({"quantization_config": "odd"}) == "unknown"
    assert quantized_words({"config": {"quantization_config": {"quant_method": "awq"}}}) == (
        "awq, as saved"
    )


@BOTH
def test_an_adapter_stays_beside_quantised_weights(
    base: Path, found: Callable[..., Identity], tmp_path: Path, how: str
) -> None:
    """As QLoRA trained it: merged into them both would be rounded once more, to another model."""
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    adapted = get_peft_model(plain, lora)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(
        PeftModel.from_pretrained(loaded(AutoModelForCausalLM, base, how), tmp_path / "adapter")
    )
    identity = found(base, quantize=how, adapter=tmp_path / "adapter")
    assert len({identity.id, found(base, quantize=how).id, found(base).id}) == 3
    model = load_causal_lm(identity)
    assert torch.equal(logits(model), expected)
    assert (expected - logits(loaded(AutoModelForCausalLM, base, how))).abs().max() > 1e-3
    check_head(model)


@BOTH
def test_classifiers_and_masked_models_say_what_transformers_says(
    tmp_path: Path, found: Callable[..., Identity], how: str
) -> None:
    bert = save_tiny_bert(tmp_path / "bert", hidden_size=64, intermediate_size=64)
    masked = save_tiny_masked(tmp_path / "masked", hidden_size=64, intermediate_size=64)
    for folder, auto, load in (
        (bert, AutoModelForSequenceClassification, classification.load_teacher),
        (masked, AutoModelForMaskedLM, masked_lm.load_teacher),
    ):
        ours, settings = load(found(folder, quantize=how)), HEAD if folder == bert else {}
        assert torch.equal(logits(ours), logits(loaded(auto, folder, how, **settings)))
        assert not torch.equal(logits(ours), logits(load(found(folder))))


@BOTH
def test_a_classifiers_adapter_brings_its_head_onto_quantised_layers(
    tmp_path: Path, found: Callable[..., Identity], how: str
) -> None:
    body = save_base(tmp_path / "body", head=True, hidden_size=64, intermediate_size=64)
    adapter = save_adapter(tmp_path / "adapter", body)
    ours = classification.load_teacher(found(body, quantize=how, adapter=adapter))
    plain = loaded(AutoModelForSequenceClassification, body, how, **HEAD)
    without = logits(plain)
    expected = logits(PeftModel.from_pretrained(plain, adapter))
    assert torch.equal(logits(ours), expected)
    assert (expected - without).abs().max() > 0.1


def test_an_image_model_with_nothing_to_quantise_is_refused(
    tmp_path: Path, found: Callable[..., Identity]
) -> None:
    resnet = save_tiny_resnet(tmp_path / "resnet")
    with pytest.raises(UsageError, match=r"teacher.quantize: nf4 found nothing in .*resnet"):
        image_classification.load_teacher(found(resnet, quantize="nf4"))
    named = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {c: n for n, c in enumerate(CLASSES)},
    }
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8, **named)
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "vit")
    ConvNextImageProcessorPil(size={"shortest_edge": 16}).save_pretrained(tmp_path / "vit")
    world = Pictures(tmp_path, tmp_path / "vit", 12)
    world.recipe = world.changed(teacher={"model": str(tmp_path / "vit"), "quantize": "int8"})
    world.scored()
    assert len(world.rows()) == 12


def test_a_layer_that_the_kernel_here_does_not_take_is_refused_before_any_row(
    base: Path, found: Callable[..., Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some processors 4 bits need widths that 32 divides."""
    import bitsandbytes as bnb

    def refuse(layer: Any, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", refuse)
    with pytest.raises(UsageError, match=r"Linear4bit from 64 to \d+ numbers does not run here"):
        load_causal_lm(found(base, quantize="nf4"))


def test_features_of_a_quantised_teacher_are_those_of_its_own_pass(tmp_path: Path) -> None:
    bert = save_tiny_bert(tmp_path / "bert", hidden_size=64, intermediate_size=64)
    asked: list[dict[str, Any]] = [
        {"what": "hidden", "layers": [0], "bits": 16},
        {"what": "queries", "layers": [1]},
        {"what": "keys", "layers": [1]},
        {"what": "embeddings"},
    ]
    world = World(tmp_path, bert, records(16))
    world.recipe = world.changed(
        teacher={"model": str(bert), "quantize": "nf4"},
        score={"targets": "full", "features": asked},
    )
    world.scored()
    model = loaded(AutoModelForSequenceClassification, bert, "nf4", **HEAD)
    hidden = [row for row in world.rows("features") if row["kind"] == "hidden"]
    assert {row["kind"] for row in world.rows("features")} == {"hidden", "queries", "keys"}
    for row in hidden:
        ids = next(r["token_ids"] for r in world.rows() if r["text_key"] == row["text_key"])
        inputs = {"input_ids": torch.from_numpy(ids.astype("int64"))[None]}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[1][0]
        kept = torch.frombuffer(bytearray(row["values"]), dtype=torch.float16).float()
        torch.testing.assert_close(kept.view_as(states), states, rtol=5e-3, atol=5e-3)


def test_a_fresh_student_of_a_quantised_teacher_is_a_float_model(
    base: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "nf4", base, "nf4")
    recipe = recipe_tree(tmp_path, folder, tmp_path / "prompts.jsonl")
    student: Any = initial_student(Recipe.model_validate(recipe), folder)
    assert {weight.dtype for weight in student.parameters()} == {torch.float32}
    assert method_of(student.config.to_dict()) is None
