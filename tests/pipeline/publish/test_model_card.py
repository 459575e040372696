"""The student's folder: its model card, and that others generate with it as it is."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from kit import recipe_tree

from stillroom.pipeline.publish.model_card import student_card, write_student_cards
from stillroom.pipeline.report.sections import title
from stillroom.stages.recipe.sections import Recipe

TRAINED = {
    "steps": 10,
    "tokens": 4096,
    "scored_tokens": 3000,
    "epochs": 2.0,
    "snapshot": "5" * 32,
    "parameters": 1234,
    "trained_parameters": 1234,
}
NUMBERS = {
    "cross_entropy": 2.5,
    "perplexity": 12.18,
    "kl_teacher": 0.25,
    "acceptance": 0.9,
    "top1_agreement": 0.8,
    "ece": 0.02,
}
EVALUATION = {
    "results": {"student_before": {**NUMBERS, "kl_teacher": 1.25}, "student": NUMBERS},
    "differences": {"student_before": {"kl_teacher": -1.0, "kl_teacher_se": 0.01}},
    "measured_on": {"tokens": 500, "prompts": 20, "of": "tokens", "kl_is_lower_bound": False},
}


def settings(arm="student", **sections):
    tree = recipe_tree(
        Path("/home/somebody"),
        Path("/home/somebody/big-8b"),
        Path("/home/somebody/prompts.jsonl"),
        **sections,
    )
    return {"recipe": Recipe(**tree).model_dump(mode="json"), "arm": arm, "teacher_id": "t" * 32}


def front(card):
    from huggingface_hub import ModelCard, ModelCardData

    found = ModelCard(card).data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    return found


def test_front_matter_names_the_initial_model_where_the_hub_knows_it():
    known = settings(student={"model": "org/small-1b", "lora": {"rank": 4}})
    found = front(student_card(known, TRAINED, EVALUATION))
    assert found["base_model"] == "org/small-1b"
    assert found["base_model_relation"] == "finetune"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert "knowledge-distillation" in found["tags"]
    for student in ({"model": "/home/somebody/small-1b"}, {"config": {"hidden_size": 8}}):
        found = front(student_card(settings(student=student), TRAINED, EVALUATION))
        assert not {"base_model", "base_model_relation"} & found.keys()


def test_a_classifier_s_numbers_are_in_the_model_index_where_a_text_had_a_label():
    known = settings(
        run={"dir": "run", "task": "classification"},
        data={"source": "/home/somebody/reviews.csv", "format": "labelled"},
        score={"targets": "full"},
        generate=None,
    )
    shares = ("f1_macro", "f1_weighted", "precision_macro", "recall_macro")
    judged = {"accuracy": 0.75, **dict.fromkeys(shares, 0.5)}

    def card(numbers):
        arms = {arm: NUMBERS | numbers for arm in ("student_before", "student")}
        measured = EVALUATION["measured_on"] | {"of": "texts", "rows": 20, "labelled": 12}
        return student_card(known, TRAINED, EVALUATION | {"results": arms, "measured_on": measured})

    result = front(card(judged))["model-index"][0]["results"][0]
    assert "split" not in result["dataset"]
    known["recipe"]["evaluate"] |= {"source": "/home/somebody/others.csv", "split": "validation"}
    (model,) = front(card(judged))["model-index"]
    (result,) = model["results"]
    assert result["task"] == {"type": "text-classification"}
    dataset = {"name": "others.csv, held-out texts", "type": "others.csv", "split": "validation"}
    assert result["dataset"] == dataset
    values = [(metric["name"], metric["value"]) for metric in result["metrics"]]
    assert values[:2] == [("Accuracy", 0.75), ("Macro F1", 0.5)]
    assert "20 held-out prompts, 12 of them with a label" in card(judged)
    assert "model-index" not in front(card(dict.fromkeys(judged)))


def test_datasets_are_those_of_the_hub():
    data = {"source": "org/prompts", "format": "prompt"}
    storage = {"dir": "store", "sources": ["hf://datasets/org/targets", "/home/somebody/mine"]}
    assert front(student_card(settings(data=data, storage=storage), TRAINED, None))["datasets"] == [
        "org/targets",
        "org/prompts",
    ]
    assert "datasets" not in front(student_card(settings(), TRAINED, None))


def test_it_says_what_came_of_it_and_how_without_the_machines_folders():
    card = student_card(settings(), TRAINED, EVALUATION)
    assert (
        "**The distilled student is 1.000 nats closer to the teacher than before training" in card
    )
    assert re.search(r"^\| student \(distilled\) \| 2\.5000 \| .*0\.2500", card, flags=re.MULTILINE)
    assert "On 500 tokens of 20 held-out prompts" in card
    assert "/home/somebody" not in card
    assert "`big-8b`" in card
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, flags=re.DOTALL)[1])
    assert recipe["generate"] == {"engine": "hf", "temperature": 0.0, "max_tokens": 12}
    assert recipe["data"]["source"] == "prompts.jsonl"


def test_before_the_evaluation_it_claims_nothing():
    card = student_card(settings("baseline"), TRAINED, None)
    assert "## Results" not in card
    assert "This is the baseline: cross-entropy alone" in card
    assert "baseline" in front(card)["tags"]


@pytest.mark.parametrize(("data", "asked"), [("messages", "llm.chat"), ("prompt", "llm.generate")])
def test_code_asks_as_the_student_was_taught(data, asked):
    card = student_card(settings(data={"source": "x.jsonl", "format": data}), TRAINED, None)
    assert asked in card


@pytest.mark.parametrize(
    ("task", "data", "asked"),
    [
        ("causal_lm", "messages", "llm.chat([{"),
        ("causal_lm", "prompt", 'llm.generate("Once upon a time", lora_request=adapter)'),
        ("classification", "labelled", "AutoModelForSequenceClassification"),
    ],
)
def test_code_of_an_adapter_asks_as_its_student_was_taught(task, data, asked):
    known = settings(
        run={"dir": "run", "task": task},
        data={"source": "x.jsonl", "format": data},
        student={"model": "org/small-1b", "lora": {}},
    )
    card = student_card(known, TRAINED, None, adapter=True)
    assert asked in card
    assert ("vLLM" in card) == (task == "causal_lm")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_size": 8}, "fresh weights, the teacher's config with `hidden_size` 8,"),
        ({"model_type": "gpt2", "n_embd": 8}, "fresh weights of a gpt2, with `n_embd` 8,"),
        ({"model_type": "gpt2"}, "fresh weights of a gpt2,"),
    ],
)
def test_fresh_weights_are_of_the_architecture_that_the_recipe_names(config, words):
    card = student_card(settings(student={"config": config}), TRAINED, None)
    assert f"A student of `big-8b`: {words} trained by Stillroom" in card


def test_copied_layers_are_derived_from_the_teacher():
    """Its name is the base's where the Hub knows it, and its licence holds."""
    known = settings(student={"from_teacher_layers": [0, 2], "config": {"attention_dropout": 0.1}})
    known["recipe"]["teacher"]["model"] = "org/big-8b"
    card = student_card(known, TRAINED, None)
    words = "starts from layers 0, 2 of the teacher, with `attention_dropout` 0.1,"
    assert f"A student of `org/big-8b`: {words} trained by Stillroom" in card
    assert front(card)["base_model"] == "org/big-8b"
    assert "derived from the teacher's, and the teacher's licence holds for them" in card


def test_cards_lie_in_the_folders_of_students_that_are_done(tmp_path):
    done, begun = tmp_path / "train-1", tmp_path / "train-2"
    for folder in (done, begun):
        (folder / "student").mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(settings()))
    (done / "train.json").write_text(json.dumps(TRAINED))
    write_student_cards([done, begun])
    card = done / "student" / "README.md"
    assert "## Results" not in card.read_text()
    assert not (begun / "student" / "README.md").exists()
    written = card.stat().st_mtime_ns
    write_student_cards([done, begun])
    assert card.stat().st_mtime_ns == written
    (done / "evaluation.json").write_text(json.dumps(EVALUATION))
    write_student_cards([done])
    assert "## Results" in card.read_text()


def test_an_adapter_has_a_card_of_its_own_without_the_machines_folders(tmp_path):
    run = tmp_path / "train-1"
    for name in ("student", "adapter"):
        (run / name).mkdir(parents=True)
    known = settings(student={"model": "/home/somebody/small-1b", "lora": {"rank": 300}})
    (run / "settings.json").write_text(json.dumps(known))
    note = "the balancing loss is left out"
    (run / "train.json").write_text(
        json.dumps(TRAINED | {"saved_dtype": "bfloat16", "notes": [note]})
    )
    write_student_cards([run])
    card, student = ((run / name / "README.md").read_text() for name in ("adapter", "student"))
    assert front(card)["library_name"] == "peft"
    assert "This folder holds its LoRA alone, for `small-1b`" in card
    assert "max_lora_rank=320" in card
    for text in (card, student):
        assert "/home/somebody" not in text
        assert "- The balancing loss is left out." in text
        assert "trained in float32, stored in bfloat16 and judged as stored." in text


@pytest.mark.assets
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_transformers_and_vllm_generate_with_the_saved_student_alike(assets, tmp_path):
    """A LoRA student, moved off its initial model, writes the same greedy text in both.

    It is not the initial model's text.
    """
    import torch
    from tiny_store import make_recipe
    from transformers import pipeline

    from stillroom.stages.engines.base import Request
    from stillroom.stages.engines.vllm import VllmEngine
    from stillroom.stages.models.identity import FileHashes, identify
    from stillroom.stages.models.students.saving import save_student
    from stillroom.stages.models.students.student import initial_student, student_tokenizer
    from stillroom.stages.recipe.engines import Generate
    from stillroom.stages.workers.clock import Clock

    folder = assets / "models" / "stories260k-llama-hd32"

    class Root:
        root = "nowhere"

    recipe = make_recipe(Root(), folder, student={"model": str(folder), "lora": {"rank": 2}})
    model = initial_student(recipe, folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer = student_tokenizer(recipe, folder)
    save_student(model, recipe, teacher_dir=folder, folder=tmp_path / "student")
    (tmp_path / "student" / "README.md").write_text("a card")

    texts = {}
    for place in (folder, tmp_path / "student"):
        generate = pipeline("text-generation", model=str(place), dtype=torch.float32)
        (found,) = generate("Once upon a time", max_new_tokens=12, do_sample=False)
        texts[place] = found["generated_text"]
    assert texts[folder] != texts[tmp_path / "student"]

    hashes = FileHashes(tmp_path / "store", remember=False)
    identity = identify(tmp_path / "student", dtype="float32", hashes=hashes)
    engine = VllmEngine(identity, Generate(engine="vllm", temperature=0.0, max_tokens=12), Clock())
    ids = tokenizer("Once upon a time")["input_ids"]
    (completion,) = engine.generate([Request(0, ids, seed=0)], lambda: None)
    whole = tokenizer.decode([*ids, *completion.token_ids], skip_special_tokens=True)
    assert whole == texts[tmp_path / "student"]
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def test_several_teachers_are_named_with_their_licences_and_no_folders() -> None:
    teachers = [
        {"name": "stories", "model": "/home/somebody/tales", "license": "mit"},
        {"name": "code", "model": "/home/somebody/snakes", "where": "true"},
    ]
    known = settings(teachers=teachers)
    known["teachers"] = {"stories": "1" * 32, "code": "2" * 32}
    card = student_card(known, TRAINED, None)
    assert "A student of `tales` and `snakes`: fresh weights" in card
    said = ("`mit`", "not stated", f"`{'1' * 32}`", f"`{'2' * 32}`", "licences of the teachers")
    assert all(words in card for words in said)
    (shown,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)[-1:]
    assert [one["model"] for one in yaml.safe_load(shown)["teachers"]] == ["tales", "snakes"]
    assert "teacher" not in yaml.safe_load(shown)
    assert "somebody" not in card


def test_where_another_models_text_is_all_there_is_that_one_is_the_teacher():
    asked = {"engine": "openai", "base_url": "https://api.example.com/v1", "model": "org/large"}
    told = student_card(settings(generate=asked, score=None), TRAINED, None)
    assert "distilled from large" in told
    assert "A student of `org/large`" in told
    assert title(settings(generate=asked, score=None)).startswith("large distilled into")
    scored = student_card(settings(generate=asked), TRAINED, None)
    assert "distilled from big-8b" in scored
