"""The folder a student ends up in: its weights as trained, all else as its base had it.

Others read it right.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import reads_older
import torch
from safetensors.torch import load_file
from tiny_llama import tiny_tokenizer
from tiny_store import make_recipe
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo3Config,
    Phi3Config,
    PhiConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from stillroom.stages.models.causal_lm import KIND
from stillroom.stages.models.students.config_file import NotInOlderWords, with_older_words
from stillroom.stages.models.students.saving import save_student
from stillroom.stages.models.students.student import initial_student
from stillroom.storage.errors import StillroomError

OLDER = os.environ.get("STILLROOM_TRANSFORMERS_457")


class Root:
    """Stands for a store where only its folder is asked for."""

    root = "nowhere"


def saved(base, out, *, teacher=None, **student):
    """(recipe's student as it began, what saving said); the folder is `out`."""
    teacher = teacher or base
    recipe = make_recipe(Root(), teacher, student={"model": str(base)} | student)
    model = initial_student(recipe, teacher)
    return model, save_student(model, recipe, teacher_dir=teacher, folder=out)


def said(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def change(folder, name, **fields):
    (folder / name).write_text(json.dumps(said(folder, name) | fields))


class TestGeneration:
    def test_no_generation_config_stops_the_weights(self, tiny_llama, tmp_path):
        """Beside this one transformers saves no model.

        The base's own file says what its maker said.
        """
        base = tiny_llama()
        settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
        (base / "generation_config.json").write_text(json.dumps(settings))
        model = AutoModelForCausalLM.from_pretrained(base)
        with pytest.raises(ValueError, match="temperature"):
            model.save_pretrained(tmp_path / "as-it-is")
        _, about = saved(base, tmp_path / "out")
        assert said(tmp_path / "out", "generation_config.json") == settings
        assert (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature
            == 0.6
        )
        assert about.notes == []

    def test_nor_do_settings_of_generation_in_the_models_config(self, tiny_llama, tmp_path):
        base = tiny_llama()
        change(base, "config.json", do_sample=False, temperature=0.6)
        (base / "generation_config.json").unlink()
        saved(base, tmp_path / "out")
        assert "temperature" not in said(tmp_path / "out")
        assert said(tmp_path / "out", "generation_config.json")["temperature"] == 0.6


class TestNumbers:
    def test_weights_are_stored_as_the_base_had_them(self, tiny_llama, tmp_path):
        base = tiny_llama("base", tie_word_embeddings=True)
        AutoModelForCausalLM.from_pretrained(base).bfloat16().save_pretrained(base)
        recipe = make_recipe(Root(), base, student={"model": str(base)})
        model = initial_student(recipe, base)
        with torch.no_grad():
            model.lm_head.weight.add_(0.01)
        about = save_student(model, recipe, teacher_dir=base, folder=tmp_path / "out")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert "lm_head.weight" not in stored
        assert about.dtype == said(tmp_path / "out")["dtype"] == "bfloat16"
        # What is judged is what is stored.
        judged = KIND.student(tmp_path / "out").lm_head.weight
        assert torch.equal(judged, model.lm_head.weight.bfloat16().float())
        _, about = saved(base, tmp_path / "full", save_dtype="float32")
        assert about.dtype == said(tmp_path / "full")["dtype"] == "float32"
        half, full = (
            (tmp_path / name / "model.safetensors").stat().st_size for name in ("out", "full")
        )
        assert half < 0.7 * full

    def test_numbers_that_do_not_fit_are_refused(self, tiny_llama, tmp_path):
        base = tiny_llama()
        recipe = make_recipe(Root(), base, student={"model": str(base), "save_dtype": "float16"})
        model = initial_student(recipe, base)
        with torch.no_grad():
            model.lm_head.weight[0, 0] = 1e6
        with pytest.raises(StillroomError, match=r"lm_head\.weight has numbers up to 1e\+06, more"):
            save_student(model, recipe, teacher_dir=base, folder=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_merge_that_changes_the_student_is_said_and_nothing_is_saved(
    tiny_llama, tmp_path, monkeypatch
):
    base = tiny_llama()
    recipe = make_recipe(Root(), base, student={"model": str(base), "lora": {"rank": 2}})
    model = initial_student(recipe, base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    # A merge that forgets the update.
    monkeypatch.setattr(model, "merge_and_unload", model.unload)
    with pytest.raises(StillroomError, match=r"logits differ by up to .*its checkpoint is kept"):
        save_student(model, recipe, teacher_dir=base, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class TestTokenizer:
    def test_files_and_class_are_those_of_the_base(self, tiny_llama, tmp_path):
        base = tiny_llama()
        change(
            base,
            "tokenizer_config.json",
            tokenizer_class="LlamaTokenizerFast",
            name_or_path="/home/somebody/base",
        )
        (base / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
        (base / "tokenizer.model").write_bytes(b"sentencepiece")
        saved(base, tmp_path / "out")
        for name in ("tokenizer.json", "tokenizer.model", "special_tokens_map.json"):
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        config = said(tmp_path / "out", "tokenizer_config.json")
        assert config["tokenizer_class"] == "LlamaTokenizerFast"
        assert "name_or_path" not in config

    def test_the_teachers_template_takes_the_place_of_the_bases(self, tiny_llama, tmp_path):
        base, teacher = tiny_llama("base"), tiny_llama("teacher")
        change(base, "tokenizer_config.json", chat_template="of the base")
        (teacher / "chat_template.jinja").write_text("of the teacher")
        saved(base, tmp_path / "out", teacher=teacher)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "of the teacher"
        assert "of the base" not in (tmp_path / "out" / "tokenizer_config.json").read_text()

    def test_what_5_calls_otherwise_is_written_as_4_57_calls_it(self, tiny_llama, tmp_path):
        base = tiny_llama()
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["<pad>", "cat"]})
        tokenizer.save_pretrained(base)
        change(base, "tokenizer_config.json", tokenizer_class="TokenizersBackend")
        saved(base, tmp_path / "out")
        config = said(tmp_path / "out", "tokenizer_config.json")
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["additional_special_tokens"] == ["<pad>", "cat"]
        before, after = (AutoTokenizer.from_pretrained(f) for f in (base, tmp_path / "out"))
        assert after.all_special_tokens == before.all_special_tokens
        assert after("the cat sat")["input_ids"] == before("the cat sat")["input_ids"]


SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
GEMMA = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e6,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
HALF = {"partial_rotary_factor": 0.5}
LAYERS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
TURNED = {
    "llama": LlamaConfig(**SIZES, rope_parameters=PLAIN),
    "qwen3": Qwen3Config(**SIZES, rope_parameters=YARN),
    "gpt_neox": GPTNeoXConfig(**SIZES, rope_parameters=PLAIN | HALF),
    "gemma3_text": Gemma3TextConfig(**SIZES | LAYERS, rope_parameters=GEMMA),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=2, rope_parameters=PLAIN),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        rope_parameters=PLAIN,
    ),
    "olmo3": Olmo3Config(
        **SIZES | LAYERS,
        rope_parameters={"full_attention": YARN, "sliding_attention": PLAIN},
    ),
    "phi": PhiConfig(**SIZES, rope_parameters=PLAIN | HALF, partial_rotary_factor=0.5),
    "phi3": Phi3Config(
        **SIZES,
        pad_token_id=None,
        original_max_position_embeddings=4,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e6,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.0, 2.0, 3.0],
        },
    ),
}


def turned(name, folder):
    """A model whose logits turn with its positions: weights far from 0."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(TURNED[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"rope_theta": 1e6, "rope_scaling": None}),
        ("gpt_neox", {"rotary_emb_base": 1e6, "rotary_pct": 0.5}),
        ("qwen3_moe", {"rope_theta": 1e6, "num_experts": 4}),
        ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4}),
    ],
)
def test_positions_are_written_for_4_57_too(tmp_path, name, fields):
    base = turned(name, tmp_path / "base")
    _, about = saved(base, tmp_path / "out")
    assert about.notes == []
    assert fields.items() <= said(tmp_path / "out").items()
    one, other = (AutoConfig.from_pretrained(f) for f in (base, tmp_path / "out"))
    assert one.rope_parameters == other.rope_parameters
    assert torch.equal(reads_older.logits(base), reads_older.logits(tmp_path / "out"))


def test_positions_that_4_57_has_no_words_for_are_named():
    rope = GEMMA | {"sliding_attention": YARN}
    for model_type, parameters in (("gemma3_text", rope), ("laguna", GEMMA)):
        with pytest.raises(NotInOlderWords):
            with_older_words({"model_type": model_type, "rope_parameters": parameters})


@pytest.mark.skipif(
    not OLDER, reason="STILLROOM_TRANSFORMERS_457 names no folder with transformers 4.57"
)
def test_transformers_4_57_computes_the_same(tmp_path):
    """Of every student that 4.57 knows, logits and token ids are those of 5.

    4.57 computes them in a process of its own.
    """
    folders = []
    for name in TURNED:
        base = turned(name, tmp_path / f"{name}-base")
        change(base, "tokenizer_config.json", tokenizer_class="TokenizersBackend")
        saved(base, tmp_path / name)
        folders.append(tmp_path / name)
    here = {folder: reads_older.logits(folder) for folder in folders}
    done = subprocess.run(
        [sys.executable, reads_older.__file__, "the cat sat", *map(str, folders)],
        env=os.environ | {"PYTHONPATH": OLDER},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there["version"].startswith("4.57")
    for folder in folders:
        found = torch.load(folder / "logits.pt")
        largest = float(here[folder].abs().max())
        # One machine and one torch, but other kernels may be chosen: rounding of float32.
        torch.testing.assert_close(found, here[folder], rtol=1e-4, atol=1e-5 * largest)
        assert there["ids"][folder.name] == [1, 4, 6, 8]
