"""Students that begin with layers of their teacher: which layers, unchanged.

What is no such student is refused.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_tokenizer
from tiny_models import CLASSES
from tiny_store import make_recipe
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    ModernBertConfig,
    Qwen3MoeConfig,
)

from stillroom.stages.models.fit.teacher_layers import refuse_uncopied
from stillroom.stages.models.students.copies import kept_tensors
from stillroom.stages.models.students.fresh import refuse_fresh
from stillroom.stages.models.students.same_layers import refuse_other_layers
from stillroom.stages.models.students.saving import save_student
from stillroom.stages.models.students.student import initial_student
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Recipe, Student
from stillroom.storage.errors import UsageError

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
OF_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
OF_CLASSES = {
    "id2label": dict(enumerate(CLASSES)),
    "label2id": dict(zip(CLASSES, range(3), strict=True)),
}
# Config, and where the model has its layers.
TEACHERS = {
    "llama": (LlamaConfig(**FEW), "model.layers"),
    "tied": (LlamaConfig(**FEW, tie_word_embeddings=True), "model.layers"),
    "gpt2": (
        GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, n_positions=32),
        "transformer.h",
    ),
    "qwen3_moe": (Qwen3MoeConfig(**FEW, **OF_EXPERTS), "model.layers"),
    "mixtral": (MixtralConfig(**FEW, num_local_experts=3), "model.layers"),
    "gemma3": (Gemma3TextConfig(**FEW, layer_types=KINDS, sliding_window=2), "model.layers"),
    "bert": (BertConfig(**SIZES, **OF_CLASSES), "bert.encoder.layer"),
    "modernbert": (
        ModernBertConfig(**SIZES, **OF_CLASSES, local_attention=4),
        "model.layers",
    ),
}
IDS = torch.tensor([[1, 5, 9, 4, 6, 7, 2]])


class Root:
    """Stands for a store where only its folder is asked for."""

    root = "nowhere"


def save_teacher(folder: Path, config: Any, **how: Any) -> Any:
    """A random model, its norms too, in evaluation mode; and its folder."""
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if config.label2id.keys() & {*CLASSES} else None
    model = (auto or AutoModelForCausalLM).from_config(deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder, **how)
    tiny_tokenizer().save_pretrained(folder)
    return model


def recipe_for(folder: Path, layers: list[int], **student: Any) -> Recipe:
    classes = json.loads((folder / "config.json").read_text()).get("id2label", {}).get("2")
    return make_recipe(
        Root(),
        folder,
        student={"from_teacher_layers": layers} | student,
        run={"task": "classification" if classes else "causal_lm"},
    )


def started(folder: Path, layers: list[int], **student: Any) -> Any:
    return initial_student(recipe_for(folder, layers, **student), folder).eval()


def logits(model: Any) -> torch.Tensor:
    cache = {} if len(model.config.id2label) == 3 else {"use_cache": False}
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, **cache).logits
    return found


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_has_the_layers_that_are_named_and_all_that_is_no_layer(
    tmp_path: Path, name: str
) -> None:
    config, where = TEACHERS[name]
    chosen = [0, 2] if name == "modernbert" else [1, 3]
    teacher = save_teacher(tmp_path, config)
    student = started(tmp_path, chosen)
    assert type(student) is type(teacher)
    for here, layer in enumerate(chosen):
        theirs = teacher.get_submodule(f"{where}.{layer}").state_dict()
        ours = student.get_submodule(f"{where}.{here}").state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in theirs)
    rest = {n: t for n, t in teacher.state_dict().items() if not n.startswith(where)}
    ours = {n: t for n, t in student.state_dict().items() if not n.startswith(where)}
    assert rest.keys() == ours.keys()
    assert all(torch.equal(ours[part], rest[part]) for part in rest)
    # The teacher without its other layers computes the same, in the order that it has.
    parent = teacher.get_submodule(where.rpartition(".")[0])
    layers = [teacher.get_submodule(f"{where}.{layer}") for layer in chosen]
    setattr(parent, where.rpartition(".")[2], nn.ModuleList(layers))
    if hasattr(teacher.config, "layer_types") and teacher.config.layer_types is not None:
        teacher.config.layer_types = [teacher.config.layer_types[layer] for layer in chosen]
    teacher.config.num_hidden_layers = len(chosen)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_all_layers_are_the_teacher(tmp_path: Path, name: str) -> None:
    teacher = save_teacher(tmp_path, TEACHERS[name][0])
    student = started(tmp_path, [0, 1, 2, 3])
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=1e-6)
    assert student.config.to_diff_dict() == teacher.config.to_diff_dict() | {
        "transformers_version": student.config.to_diff_dict()["transformers_version"]
    }


def test_only_what_is_kept_is_read(tmp_path: Path) -> None:
    """Of several files, and where the names in the files begin otherwise than the model's."""
    teacher = save_teacher(tmp_path, TEACHERS["llama"][0], max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    (tmp_path / "consolidated.safetensors").write_bytes(b"the same by names of another library")
    kept = kept_tensors(tmp_path, "model.layers", [3])
    assert {n for n in kept if ".layers." in n} == {
        n.replace("layers.3", "layers.0") for n in teacher.state_dict() if ".layers.3." in n
    }
    assert torch.equal(
        kept["model.layers.0.mlp.up_proj.weight"],
        teacher.state_dict()["model.layers.3.mlp.up_proj.weight"],
    )
    assert logits(started(tmp_path, [3])).isfinite().all()


def test_names_in_files_may_begin_otherwise(tmp_path: Path) -> None:
    """GPT-2's own files have no `transformer.`; layers of another list keep their numbers."""
    teacher = save_teacher(tmp_path, TEACHERS["gpt2"][0])
    file = tmp_path / "model.safetensors"
    short = {n.removeprefix("transformer."): t for n, t in load_file(file).items()}
    save_file(short | {"next.h.2.weight": torch.ones(1)}, file, {"format": "pt"})
    student = started(tmp_path, [2])
    ours, theirs = student.transformer.h[0], teacher.transformer.h[2]
    assert torch.equal(ours.mlp.c_fc.weight, theirs.mlp.c_fc.weight)
    assert "next.h.2.weight" in kept_tensors(tmp_path, "transformer.h", [3])
    save_file({f"other.h.{n}": t for n, t in short.items()}, file, {"format": "pt"})
    with pytest.raises(UsageError, match=r"files have no layer 2 by the name of transformer\.h"):
        started(tmp_path, [2])


def test_a_student_is_stored_as_the_teacher_is_and_may_be_trained_by_lora(tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_config(deepcopy(TEACHERS["tied"][0])).bfloat16()
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = recipe_for(tmp_path / "teacher", [0, 3], lora={"rank": 2})
    model: Any = initial_student(recipe, tmp_path / "teacher")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    base = model.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    saved = save_student(model, recipe, teacher_dir=tmp_path / "teacher", folder=tmp_path / "out")
    assert saved.dtype == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        again.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight
    )


def test_dropout_may_be_another(tmp_path: Path) -> None:
    save_teacher(tmp_path, TEACHERS["bert"][0])
    changes = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    student = started(tmp_path, [0, 1], config=changes)
    assert student.bert.encoder.layer[0].output.dropout.p == 0.3


@pytest.mark.parametrize(
    ("teacher", "layers", "changes", "said"),
    [
        ("llama", [1, 4], {}, r"the teacher has layers 0 to 3 \(got 4\)"),
        ("llama", [1, 2], {"num_hidden_layers": 3}, "num_hidden_layers: is 3, and .* names 2"),
        ("gpt2", [1, 2], {"n_layer": 3}, "student.config.n_layer: is 3, and .* names 2 layers"),
        (
            "llama",
            [1],
            {"model_type": "gpt2"},
            "copies layers of a llama, and .*model_type is gpt2",
        ),
        ("gemma3", [1], {"layer_types": KINDS[:1]}, "layer_types: has an entry for each layer"),
    ],
)
def test_a_config_that_does_not_go_with_the_layers_is_refused(
    tmp_path: Path, teacher: str, layers: list[int], changes: dict[str, Any], said: str
) -> None:
    TEACHERS[teacher][0].save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=said):
        refuse_fresh(tmp_path, changes, "causal_lm", layers)


def test_the_number_of_layers_may_be_said(tmp_path: Path) -> None:
    save_teacher(tmp_path, TEACHERS["gpt2"][0])
    for name in ("n_layer", "num_hidden_layers"):
        assert len(started(tmp_path, [1, 2], config={name: 2}).transformer.h) == 2


def test_a_part_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    Gemma3Config(text_config=FEW, vision_config={"num_hidden_layers": 1}).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"\(gemma3\) has a model of text as one of its parts"):
        refuse_fresh(tmp_path, {}, "causal_lm", [1])


@pytest.mark.parametrize(
    ("config", "layers", "changes", "said"),
    [
        (
            Qwen3MoeConfig(**FEW, **OF_EXPERTS, mlp_only_layers=[1]),
            [1, 2],
            {},
            "layer 1 as the student's layer 0 would be another one: mlp.class is "
            "Qwen3MoeSparseMoeBlock, and Qwen3MoeMLP in the teacher",
        ),
        (
            GPT2Config(**SIZES, scale_attn_by_inverse_layer_idx=True),
            [0, 2],
            {},
            r"layer 2 as the student's layer 1 .* attn\.scaling is 0\.17.*, and 0\.11.* in the",
        ),
        (
            ModernBertConfig(**SIZES, **OF_CLASSES),
            [1],
            {},
            "layer 1 as the student's layer 0 .* attn_norm",
        ),
        (
            LlamaConfig(**FEW),
            [1],
            {"intermediate_size": 8},
            r"layer 1 .* mlp\.intermediate_size is 8, and 16 in the teacher",
        ),
        (LlamaConfig(**FEW), [1], {"rms_norm_eps": 0.5}, "variance_epsilon is 0.5, and 1e-06"),
        (
            LlamaConfig(**FEW),
            [1],
            {"vocab_size": 40},
            r"the student would be another one: model\.embed_tokens\.weight is \[40, 16\]",
        ),
        (
            LlamaConfig(**FEW),
            [1],
            {"attention_bias": True},
            r"self_attn\.q_proj\.bias is \[16\], and absent in the teacher",
        ),
        (
            AlbertConfig(**SIZES, **OF_CLASSES, embedding_size=8),
            [1],
            {},
            "albert has 4 layers, and none of its parts is a list of as many",
        ),
    ],
)
def test_layers_that_would_be_others_are_refused(
    tmp_path: Path, config: Any, layers: list[int], changes: dict[str, Any], said: str
) -> None:
    if len(config.id2label) == 3:
        config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=said):
        refuse_other_layers(recipe_for(tmp_path, layers, config=changes or None), tmp_path)


def test_weights_that_cannot_be_copied_are_refused(tmp_path: Path) -> None:
    save_teacher(tmp_path, TEACHERS["llama"][0])
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lack weights of the student \(model\.layers\.0\.mlp"):
        started(tmp_path, [1])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"big has its weights in pytorch_model\.bin, expected"):
        refuse_uncopied(tmp_path, "big")
    config = json.loads((tmp_path / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UsageError, match=r"from_teacher_layers: big is quantised \(gptq"):
        refuse_uncopied(tmp_path, "big")


@pytest.mark.parametrize(
    "student",
    [
        {"model": "small", "from_teacher_layers": [0]},
        {"from_teacher_layers": []},
        {"from_teacher_layers": [-1]},
        {"lora": {}, "config": {}},
        {},
    ],
)
def test_a_student_has_one_start(student: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"from_teacher_layers|lora"):
        Student(**student)


@pytest.mark.parametrize(
    ("student", "adapter", "field", "said"),
    [
        ({"from_teacher_layers": [2, 0]}, None, "student.from_teacher_layers", "Write [0, 2]"),
        ({"from_teacher_layers": [0, 0]}, None, "student.from_teacher_layers", "Write [0]"),
        (
            {"from_teacher_layers": [0]},
            "lora",
            "student.from_teacher_layers",
            "Merge the adapter into the teacher first",
        ),
        (
            {"from_teacher_layers": [0], "lora": {"keep_adapter": True}},
            None,
            "student.lora.keep_adapter",
            "copied layers are in no folder",
        ),
    ],
)
def test_what_does_not_go_together(
    student: dict[str, Any], adapter: str | None, field: str, said: str
) -> None:
    recipe = make_recipe(Root(), Path("big"), student=student)
    teacher = recipe.teacher.model_copy(update={"adapter": adapter})
    recipe = recipe.model_copy(update={"teacher": teacher})
    ((where, what),) = [error for error in check_together(recipe) if error[0].startswith("student")]
    assert where == field
    assert said in what
