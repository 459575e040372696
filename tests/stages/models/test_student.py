"""Where students come from, and the folders they end up in."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import tiny_tokenizer
from tiny_store import make_recipe
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Qwen3Config,
)

from stillroom.stages.models.causal_lm import KIND
from stillroom.stages.models.classification import of_classes
from stillroom.stages.models.head import check_head, hidden_states, split_head
from stillroom.stages.models.students.fresh import refuse_fresh
from stillroom.stages.models.students.saving import save_student
from stillroom.stages.models.students.stored_tensors import refuse_lora
from stillroom.stages.models.students.student import (
    check_vocabulary,
    initial_student,
    student_tokenizer,
)
from stillroom.storage.errors import StillroomError, UsageError


class Root:
    """Stands for a store where only its folder is asked for."""

    root = "nowhere"


def recipe_for(teacher, student, seed=0):
    return make_recipe(Root(), teacher, student=student, run={"seed": seed})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def logits(model, ids):
    with torch.no_grad():
        return split_head(model).logits(hidden_states(model, input_ids=ids)[0])


IDS = torch.tensor([[1, 5, 9, 4, 2]])


def test_a_damaged_generation_config_of_the_teacher_is_named(tiny_llama):
    teacher = tiny_llama("teacher")
    (teacher / "generation_config.json").write_text("[")
    with pytest.raises(UsageError, match=r"generation_config.json: not readable"):
        initial_student(recipe_for(teacher, {"config": {"hidden_size": 8}}), teacher)


def test_fresh_weights_are_a_function_of_the_seed(tiny_llama):
    teacher = tiny_llama("teacher", num_hidden_layers=3)
    student = {"config": {"num_hidden_layers": 1, "hidden_size": 8, "tie_word_embeddings": True}}
    one, same, other = (
        initial_student(recipe_for(teacher, student, seed), teacher) for seed in (5, 5, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    assert (one.config.num_hidden_layers, one.config.hidden_size, one.config.vocab_size) == (
        1,
        8,
        32,
    )
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight


def test_the_callers_random_state_is_left_alone(tiny_llama):
    teacher = tiny_llama()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    initial_student(recipe_for(teacher, {"config": {}}), teacher)
    assert torch.equal(torch.rand(3), expected)


def test_layer_patterns_follow_the_number_of_layers(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "head_dim": 8, "intermediate_size": 16}
    Qwen3Config(
        **sizes, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=4
    ).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["layer_types"]) == 4
    model = initial_student(recipe_for(tmp_path, {"config": {"num_hidden_layers": 2}}), tmp_path)
    assert len(model.base_model.layers) == 2
    check_head(model)


@pytest.mark.parametrize("width", ["n_embd", "hidden_size"])
def test_fresh_weights_of_another_architecture_are_of_its_class(tiny_llama, width):
    teacher = tiny_llama(eos_token_id=7)
    config = {"model_type": "gpt2", width: 8, "n_layer": 1, "n_head": 2}
    student = initial_student(recipe_for(teacher, {"config": config}), teacher)
    assert type(student).__name__ == "GPT2LMHeadModel"
    assert (student.config.n_embd, student.config.n_positions) == (8, 1024)
    assert (student.config.vocab_size, student.config.bos_token_id) == (32, 1)
    assert (student.config.eos_token_id, student.generation_config.eos_token_id) == (7, 7)
    check_head(student)


def test_an_unknown_field_is_refused_with_the_nearest(tiny_llama):
    teacher = tiny_llama()
    with pytest.raises(
        UsageError,
        match=r"student\.config\.num_hiden_layers: not a field .* Did you mean num_hidden_layers",
    ):
        initial_student(recipe_for(teacher, {"config": {"num_hiden_layers": 1}}), teacher)


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": "two"}, {"num_attention_heads": 4, "num_key_value_heads": 3}]
)
def test_a_config_that_does_not_hold_together_is_refused(tiny_llama, change):
    teacher = tiny_llama()
    with pytest.raises(UsageError, match=r"student\.config: .* does not hold together"):
        initial_student(recipe_for(teacher, {"config": change}), teacher)


def test_a_missing_folder_is_refused(tiny_llama, tmp_path):
    with pytest.raises(UsageError, match=r"student\.model: no folder"):
        initial_student(recipe_for("unused", {"model": str(tmp_path / "nothing")}), tiny_llama())


def test_a_student_that_lacks_its_output_layer_is_refused(tiny_llama, tmp_path):
    AutoModel.from_pretrained(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"the student lacks weights \(lm_head.weight\)"):
        KIND.student(tmp_path)


def test_a_tied_output_layer_is_in_no_file_and_lacks_nothing(tiny_llama):
    folder = tiny_llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    KIND.student(folder)


def test_only_the_head_of_a_classifier_may_be_new(tmp_path):
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    BertForMaskedLM(
        BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    of_classes(["bad", "good"]).student(tmp_path)
    file = tmp_path / "model.safetensors"
    held = load_file(file)
    del held["bert.encoder.layer.0.output.dense.weight"]
    save_file(held, file, {"format": "pt"})
    with pytest.raises(
        UsageError, match=r"lacks weights \(bert.encoder.layer.0.output.dense.weight"
    ):
        of_classes(["bad", "good"]).student(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "student.config: sees the future .it says use_bidirectional_attention: true",
        ),
        ({"pad_token_id": 100_000}, "student.config: pad_token_id is 100000, but .* has 32 rows"),
        ({"model_type": ["llama"]}, r"student.config.model_type: transformers has no \['llama'\]"),
    ],
)
def test_fresh_weights_that_cannot_serve_are_refused(tiny_llama, config, said):
    with pytest.raises(UsageError, match=said):
        refuse_fresh(tiny_llama(), config, "causal_lm")


def test_half_precision_weights_become_float32(tiny_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama("full")).bfloat16()
    model.save_pretrained(tmp_path / "half")
    student = initial_student(
        recipe_for("unused", {"model": str(tmp_path / "half")}), tmp_path / "full"
    )
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_save_and_load_keep_the_function(tiny_llama, tmp_path, tied, lora):
    folder = tiny_llama(tie_word_embeddings=tied)
    recipe = recipe_for(folder, {"model": str(folder), "lora": lora})
    model = initial_student(recipe, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, IDS)
    before = logits(KIND.student(folder), IDS)
    save_student(model, recipe, teacher_dir=folder, folder=tmp_path / "out")
    found = logits(KIND.student(tmp_path / "out"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert not (tmp_path / "out.part").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"] == [1, 4, 6]


def test_an_adapter_kept_by_itself_is_the_student_on_its_initial_model(tiny_llama, tmp_path):
    """PEFT loads the adapter onto the model that the recipe names.

    The student's own folder has it merged in.
    """
    from peft import PeftModel

    folder = tiny_llama()
    recipe = recipe_for(folder, {"model": str(folder), "lora": {"rank": 2, "keep_adapter": True}})
    model = initial_student(recipe, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model, IDS)
    save_student(
        model,
        recipe,
        teacher_dir=folder,
        folder=tmp_path / "student",
        adapter=tmp_path / "adapter",
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    for path in (*(tmp_path / "adapter").iterdir(), *(tmp_path / "student").iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    onto = PeftModel.from_pretrained(KIND.student(folder), tmp_path / "adapter").merge_and_unload()
    for found in (onto, KIND.student(tmp_path / "student")):
        torch.testing.assert_close(logits(found, IDS), expected, rtol=1e-4, atol=1e-5)


def test_lora_trains_the_adapter_only_and_starts_as_the_model(tiny_llama):
    folder = tiny_llama()
    student = {"model": str(folder), "lora": {"rank": 2}}
    model = initial_student(recipe_for(folder, student), folder)
    assert {"lora_" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert torch.equal(logits(model, IDS), logits(KIND.student(folder), IDS))
    again = initial_student(recipe_for(folder, student), folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(model).values(), weights(again).values(), strict=True)
    )


def test_the_output_layer_may_have_a_lora_unless_it_is_the_embedding(tiny_llama, tmp_path):
    lora = {"rank": 2, "target_modules": ["q_proj", "lm_head"]}
    folder = tiny_llama("untied", tie_word_embeddings=False)
    recipe = recipe_for(folder, {"model": str(folder), "lora": lora})
    model = initial_student(recipe, folder)
    assert not split_head(model).weight.requires_grad
    with torch.no_grad():
        split_head(model).low_rank.up.normal_()
    before = logits(model.eval(), IDS)
    save_student(model, recipe, teacher_dir=folder, folder=tmp_path / "student")
    torch.testing.assert_close(logits(KIND.student(tmp_path / "student"), IDS), before)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_lora_on_a_weight_that_two_layers_share_is_refused(tiny_llama, module):
    """Merged, it would change both; trained, it changed one."""
    lora = {"rank": 2, "target_modules": ["q_proj", module]}
    folder = tiny_llama("tied", tie_word_embeddings=True)
    recipe = recipe_for(folder, {"model": str(folder), "lora": lora})
    with pytest.raises(
        UsageError, match=r"names model\.embed_tokens\.weight, which is lm_head\.weight too"
    ):
        initial_student(recipe, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(UsageError, match=f"{module} shares its weight with another layer"):
        refuse_lora(recipe, folder)
    folder = tiny_llama("untied", tie_word_embeddings=False)
    recipe = recipe_for(folder, {"model": str(folder), "lora": lora})
    refuse_lora(recipe, folder)
    initial_student(recipe, folder)


def test_lora_modules_that_are_not_there_are_refused(tiny_llama):
    folder = tiny_llama()
    lora = {"rank": 2, "target_modules": ["query_key_value"]}
    with pytest.raises(UsageError, match=r"student\.lora\.target_modules"):
        initial_student(recipe_for(folder, {"model": str(folder), "lora": lora}), folder)


def test_a_full_disk_is_said_and_leaves_no_student(tiny_llama, tmp_path, monkeypatch):
    folder = tiny_llama()
    model = KIND.student(folder)

    def full(folder, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(
        StillroomError,
        match=r"out: cannot write the student .*No space left.*its checkpoint is kept",
    ):
        save_student(
            model,
            recipe_for(folder, {"model": str(folder)}),
            teacher_dir=folder,
            folder=tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


class TestTokenizer:
    def test_a_student_of_the_same_family_passes(self, tiny_llama):
        teacher, student = tiny_llama("teacher"), tiny_llama("student", seed=1, vocab_size=40)
        check_vocabulary(recipe_for(teacher, {"model": str(student)}), teacher)
        check_vocabulary(recipe_for(teacher, {"config": {}}), teacher)

    def test_another_tokenizer_is_refused_with_both_names(self, tiny_llama):
        teacher, student = tiny_llama("teacher"), tiny_llama("student")
        path = student / "tokenizer.json"
        path.write_text(path.read_text().replace('"cat": 6', '"lynx": 6'))
        with pytest.raises(
            UsageError,
            match=r"student is not that of the teacher .*teacher: id 6 is 'cat' in the first",
        ):
            check_vocabulary(recipe_for(teacher, {"model": str(student)}), teacher)

    def test_the_teachers_template_goes_with_the_student(self, tiny_llama):
        teacher, student = tiny_llama("teacher"), tiny_llama("student")
        with_template = tiny_tokenizer()
        with_template.chat_template = "{{ messages[0].content }}"
        with_template.save_pretrained(teacher)
        found = student_tokenizer(recipe_for(teacher, {"model": str(student)}), teacher)
        assert found.chat_template == "{{ messages[0].content }}"


@pytest.mark.assets
def test_a_real_model_is_its_own_student(assets, tmp_path):
    folder = assets / "models" / "stories260k-llama-hd32"
    recipe = recipe_for(folder, {"model": str(folder)})
    check_vocabulary(recipe, folder)
    model = initial_student(recipe, folder)
    check_head(model)
    expected = logits(model, IDS)
    save_student(model, recipe, teacher_dir=folder, folder=tmp_path / "out")
    assert torch.equal(logits(KIND.student(tmp_path / "out"), IDS), expected)
