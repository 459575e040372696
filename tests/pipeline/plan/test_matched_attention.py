"""A student that cannot match the teacher's attention is refused by `plan`.

It is refused before the teacher is paid for.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from tiny_classes import records
from tiny_llama import save_tiny_llama
from tiny_models import CLASSES, save_tiny_bert
from transformers import AutoConfig, GPT2Config, GPT2ForSequenceClassification

from stillroom.storage.store.store import Store

QUERIES_AND_KEYS = [{"what": what, "layers": [1]} for what in ("queries", "keys")]
ATTENTION = {"match": "attention", "layers": {1: 0}}
WINDOWED = {"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 8}
WINDOWED |= {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture
def causal(tmp_path: Path) -> Callable[..., Path]:
    """A recipe of a Llama of two heads, whose student is asked for these.

    The text is in the file.
    """
    teacher = save_tiny_llama(tmp_path / "teacher")
    texts = [record | {"completion": "the cat sat"} for record in prompts(24)]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)

    def recipe(student: dict[str, Any], loss: dict[str, Any] = ATTENTION) -> Path:
        return write_recipe(
            tmp_path,
            teacher,
            source,
            data={"source": str(source), "format": "completion", "holdout": 4},
            generate=None,
            score={"k": 4, "features": QUERIES_AND_KEYS},
            loss={"features": [loss]},
            student=student,
        )

    return recipe


def test_a_window_that_is_narrower_than_what_the_teacher_sees(
    causal: Callable[..., Path], tmp_path: Path
) -> None:
    """Once the rows say that one is longer; not where all are as short as the window."""
    narrow = causal({"config": WINDOWED | {"sliding_window": 4}})
    stillroom("plan", narrow)  # no text is in the store yet
    refused = stillroom("run", narrow, expect=2).stderr
    said = (
        "loss.features.0: block 0 of the student sees tokens less than 4 away, "
        "layer 1 of the teacher"
    )
    assert said in refused
    store = Store.open(tmp_path / "store")
    assert store.commits("generations")
    assert not store.commits("soft_targets") + store.commits("features")
    assert said in stillroom("plan", narrow, expect=2).stderr

    for student in ({"sliding_window": 64}, {"sliding_window": None}):
        stillroom("plan", causal({"config": WINDOWED | student}))
    folder = save_tiny_llama(tmp_path / "student", hidden_size=8)
    AutoConfig.for_model(**WINDOWED | {"vocab_size": 32, "sliding_window": 4}).save_pretrained(
        folder
    )
    assert said in stillroom("plan", causal({"model": str(folder)}), expect=2).stderr
    relations = {"match": "relations", "layers": {1: 0}, "of": ["keys"], "relation_heads": 2}
    stillroom("plan", causal({"config": WINDOWED | {"sliding_window": 4}}, relations))


def test_a_teacher_with_the_same_window_needs_no_more(
    causal: Callable[..., Path], tmp_path: Path
) -> None:
    """Which transformers has in Mistral's config, whose weights are a Llama's."""
    recipe = causal({"config": {"hidden_size": 8}})
    folder = tmp_path / "teacher"
    config = AutoConfig.from_pretrained(folder).to_dict()
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    AutoConfig.for_model(**config | {"sliding_window": 4}).save_pretrained(folder)
    outcome = last_json(stillroom("run", recipe, "--json", "--until", "train"))
    assert outcome["stages"]["train"]["state"] == "done"


@pytest.mark.parametrize(
    ("config", "loss", "said"),
    [
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            {},
            "loss.features.0.heads: each pairs head with head, but the teacher has 2 and the "
            "student 4",
        ),
        (
            {"model_type": "gpt_oss", "num_attention_heads": 2, "num_key_value_heads": 1},
            {},
            "the student's attention is not softmax(scale q k^T) alone: it has attention sinks",
        ),
        (
            {"model_type": "gemma2", "num_attention_heads": 2, "num_key_value_heads": 1},
            {},
            "it has soft-capped scores",
        ),
        (
            {"model_type": "bloom", "n_head": 2},
            {},
            "it has position biases in its scores",
        ),
        (
            {"hidden_size": 12, "num_attention_heads": 3, "num_key_value_heads": 3},
            {"match": "relations", "of": ["queries"], "relation_heads": 16},
            "relation_heads: 24 numbers of the student's queries cannot be cut into 16 parts",
        ),
    ],
)
def test_attention_that_cannot_be_paired(
    causal: Callable[..., Path],
    tmp_path: Path,
    config: dict[str, Any],
    loss: dict[str, Any],
    said: str,
) -> None:
    recipe = causal({"config": {"num_hidden_layers": 2} | config}, ATTENTION | loss)
    assert said in stillroom("plan", recipe, expect=2).stderr
    assert not (tmp_path / "store").exists()


def test_a_causal_student_of_a_teacher_that_sees_all(tmp_path: Path) -> None:
    """And not the other way round: who sees all can look where a causal teacher looks."""
    source = write_jsonl(tmp_path / "rows.jsonl", records(24))

    def planned(teacher: Path, student: dict[str, Any], expect: int) -> str:
        recipe = write_recipe(
            tmp_path,
            teacher,
            source,
            run={"dir": str(tmp_path / "run"), "task": "classification"},
            data={"source": str(source), "format": "labelled", "holdout": 4},
            generate=None,
            score={"targets": "full", "features": QUERIES_AND_KEYS},
            loss={"features": [ATTENTION]},
            student={"config": student},
            evaluate={},
        )
        return stillroom("plan", recipe, expect=expect).stderr

    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "pad_token_id": 0}
    gpt2 |= {"bos_token_id": 2, "eos_token_id": 3}
    bert = {"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 8}
    bert |= {"num_attention_heads": 2, "intermediate_size": 16}
    sees_all = save_tiny_bert(tmp_path / "bert")
    said = "the teacher sees all tokens, the student those up to its own"
    assert said in planned(sees_all, gpt2, expect=2)
    assert not (tmp_path / "store").exists()
    planned(sees_all, bert, expect=0)
    causal = shutil.copytree(sees_all, tmp_path / "gpt2")
    names = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {c: n for n, c in enumerate(CLASSES)},
    }
    config = GPT2Config(**gpt2 | {"n_embd": 16}, **names, vocab_size=32, n_positions=48)
    GPT2ForSequenceClassification(config).save_pretrained(causal)
    planned(causal, bert, expect=0)
