"""LoRA adapters of classifiers: logits are PEFT's own, and classes have their names.

What does not fit is refused.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_adapter import NAMES, TEXTS, save_adapter, save_base
from tiny_llama import save_tiny_llama
from tiny_models import CLASSES
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stillroom.stages.models.classification import load_teacher
from stillroom.stages.models.fit.adapter import refuse_adapter
from stillroom.stages.models.identity import FileHashes, Identity, identify
from stillroom.storage.errors import UsageError
from stillroom.storage.store.store import Store


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body, the same with a head, and an adapter of each."""
    folder = tmp_path_factory.mktemp("bases")
    save_adapter(folder / "of-body", save_base(folder / "body"))
    save_adapter(folder / "of-head", save_base(folder / "head", head=True), config=False)
    return folder


@pytest.fixture
def hashes(tmp_path: Path) -> FileHashes:
    return FileHashes(Store.open(tmp_path / "store", create=True).root, remember=True)


def found(base: Path, adapter: Path, hashes: FileHashes, dtype: str = "auto") -> Identity:
    return identify(base, dtype=dtype, hashes=hashes, adapter=adapter)


@pytest.mark.parametrize("kind", ["body", "head"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_are_those_of_peft(bases: Path, hashes: FileHashes, kind: str, dtype: str) -> None:
    """In float64 logits are those of PEFT without a merge.

    In float32, where a merge rounds, they are those of its merge.
    """
    base, adapter = bases / kind, bases / f"of-{kind}"
    refuse_adapter(adapter, base, task="classification", name=str(base))
    identity = found(base, adapter, hashes, dtype)
    assert identity.class_names == CLASSES
    ours = load_teacher(identity)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base, **NAMES, dtype=getattr(torch, dtype)
    )
    theirs: Any = PeftModel.from_pretrained(plain, adapter).eval()
    inputs = AutoTokenizer.from_pretrained(base)(list(TEXTS), padding=True, return_tensors="pt")
    with torch.no_grad():
        with theirs.disable_adapter():
            without = theirs(**inputs).logits
        if dtype == "float32":
            theirs = theirs.merge_and_unload()
        expected = theirs(**inputs).logits
        assert (ours(**inputs).logits - expected).abs().max() < 1e-6
    assert (without - expected).abs().max() > 0.1, "the adapter changes what the model says"
    assert tuple(ours.config.id2label.values()) == CLASSES


def test_its_files_are_those_of_a_classifier(bases: Path, hashes: FileHashes) -> None:
    """What a store keeps names the classes.

    Students need it that are made when base and adapter are gone.
    """
    kept = json.loads(
        found(bases / "body", bases / "of-body", hashes).files_to_keep()["config.json"]
    )
    assert kept["architectures"] == ["BertForSequenceClassification"]
    assert [kept["id2label"][str(index)] for index in range(3)] == list(CLASSES)
    assert "id2label" not in json.loads((bases / "body" / "config.json").read_text())


def test_the_identity_covers_weights_and_names(
    bases: Path, hashes: FileHashes, tmp_path: Path
) -> None:
    base = bases / "body"
    before = found(base, bases / "of-body", hashes).id
    assert before == found(base, save_adapter(tmp_path / "again", base), hashes).id
    assert before != found(base, save_adapter(tmp_path / "more", base, steps=5), hashes).id
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config["id2label"]["0"] = "awful"
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    assert before != found(base, tmp_path / "again", hashes).id
    assert before != identify(bases / "head", dtype="auto", hashes=hashes).id


def test_bfloat16_computes_near_peft_in_float32(bases: Path, hashes: FileHashes) -> None:
    identity = found(bases / "body", bases / "of-body", hashes, "bfloat16")
    ours = load_teacher(identity)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


def refusal(base: Path, adapter: Path, task: str = "classification") -> str:
    with pytest.raises(UsageError) as refused:
        refuse_adapter(adapter, base, task=task, name=base.name)
    assert str(refused.value).startswith("teacher.adapter: ")
    return str(refused.value)


def test_an_adapter_of_another_task_is_refused(bases: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "causal", bases / "body")
    edit(tmp_path / "causal", task_type="CAUSAL_LM")
    said = refusal(bases / "body", tmp_path / "causal")
    assert "is an adapter for CAUSAL_LM" in said
    assert "run.task classification needs one for SEQ_CLS" in said
    save_tiny_llama(tmp_path / "llama")
    said = refusal(tmp_path / "llama", bases / "of-body", "causal_lm")
    assert "is an adapter for SEQ_CLS" in said
    edit(tmp_path / "causal", task_type="SEQ_CLS", peft_type="IA3")
    assert "is of the kind IA3" in refusal(bases / "body", tmp_path / "causal")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"hidden_size": 32}, "attention.self.query (16 x 16), which is 32 x 32 there"),
        ({"num_hidden_layers": 1}, "layer.1.attention.self.query (16 x 16), which is not there"),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    bases: Path, tmp_path: Path, other: dict[str, Any], said: str
) -> None:
    base = save_base(tmp_path / "other", **other)
    found = refusal(base, bases / "of-body")
    assert "was made for another model than other" in found
    assert said in found


def test_an_adapter_without_its_head_is_refused(
    bases: Path, hashes: FileHashes, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases / "body")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if "lora_" in n}, file)
    assert "has no classification head, and body has none either" in refusal(
        bases / "body", adapter
    )
    # With a tensor too few or too many PEFT loads it, and says nothing.
    lost = next(name for name in tensors if "lora_B" in name)
    save_file({n: t for n, t in tensors.items() if n != lost}, file)
    with pytest.raises(UsageError, match=rf"lacks {lost}"):
        load_teacher(found(bases / "body", adapter, FileHashes(tmp_path, remember=False)))
    extra = lost.replace("layer.0", "layer.7")
    save_file(tensors | {extra: torch.zeros(3)}, file)
    with pytest.raises(UsageError, match=rf"it has {extra}"):
        load_teacher(found(bases / "body", adapter, FileHashes(tmp_path, remember=False)))


def test_what_neither_has_is_not_drawn_at_random(
    bases: Path, hashes: FileHashes, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"pooler.*are in neither the adapter nor"):
        load_teacher(found(base, bases / "of-body", hashes))


def test_classes_without_names_are_refused(bases: Path, hashes: FileHashes, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", bases / "body", config=False)
    with pytest.raises(UsageError, match=r"nothing says what the classes of .* are called \(3 of"):
        found(bases / "body", adapter, hashes)
    few = save_base(tmp_path / "two", head=True, classes=CLASSES[:2])
    with pytest.raises(UsageError, match=r"has 3 classes, and the teacher's config.json names 2"):
        found(few, adapter, hashes)
    # Beside the head DistilBERT has a `pre_classifier`, which PEFT saves too.
    file = adapter / "adapter_model.safetensors"
    before = {"base_model.model.pre_classifier.weight": torch.zeros(8, 8)}
    save_file(load_file(file) | before, file)
    with pytest.raises(UsageError, match=r"has 3 classes, and the teacher's config.json names 2"):
        found(few, adapter, FileHashes(tmp_path, remember=False))


def edit(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
