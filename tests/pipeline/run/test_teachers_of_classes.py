"""Two classifiers teach one student, of texts and of words.

It is tested from the recipe to what the student is judged on.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from kit import last_json, recipe_tree, stillroom, write_jsonl
from tiny_classes import records
from tiny_models import CLASSES, save_tiny_bert
from tiny_words import TAGS, save_tiny_tagger, tagged
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.loader.classification import ClassPasses
from stillroom.stages.loader.samples import Sample, Samples
from stillroom.stages.loader.teachers import find_rows
from stillroom.stages.loader.token_classification import WordPasses
from stillroom.stages.losses.objective import aim_at
from stillroom.stages.models.classification import Inputs
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.run_folder import read_record
from stillroom.stages.targets.teaching import Teaching
from stillroom.storage.store.store import Store
from stillroom.storage.tables.spans import positions

pytestmark = pytest.mark.slow

LONG = "length(text) > 26"


class Kind(NamedTuple):
    """What differs between the tasks."""

    save: Any
    rows: list[dict[str, Any]]
    format: str
    passes: type[ClassPasses]
    auto: Any
    names: tuple[str, ...]


KINDS = {
    "classification": Kind(
        save_tiny_bert, records(40), "labelled", ClassPasses, AutoModelForSequenceClassification,
        tuple(CLASSES),
    ),
    "token_classification": Kind(
        save_tiny_tagger, tagged(40), "tagged", WordPasses, AutoModelForTokenClassification, TAGS
    ),
}  # fmt: skip


def write_recipe(folder: Path, task: str) -> Path:
    """A recipe of teachers `a` and `b`, which is asked for long texts alone."""
    kind, source = KINDS[task], folder / "rows.jsonl"
    tree = recipe_tree(
        folder,
        folder,
        source,
        run={"dir": str(folder / "run"), "task": task},
        storage={"dir": str(folder / "store"), "mantissa_bits": 23},
        data={"source": str(source), "format": kind.format, "holdout": 12},
        generate=None,
        score={"targets": "full"},
        loss={"temperature": 2.0, "hard_weight": 0.5},
        train={"epochs": 1, "tokens_per_step": 128, "learning_rate": 1.0e-2},
    )
    del tree["teacher"]
    tree["teachers"] = [
        {"name": "a", "model": str(folder / "a")},
        {"name": "b", "model": str(folder / "b"), "where": LONG, "weight": 2.0},
    ]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("task", KINDS)
def test_two_classifiers_teach_one(tmp_path: Path, task: str) -> None:
    kind = KINDS[task]
    models = {name: kind.save(tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    write_jsonl(tmp_path / "rows.jsonl", kind.rows)
    recipe = write_recipe(tmp_path, task)
    done = last_json(stillroom("run", recipe, "--json"))
    assert {line["state"] for line in done["stages"].values()} == {"done"}
    judged = read_record(next((tmp_path / "run").glob("train-*/evaluation.json")))["teachers"]
    arms = {"teacher", "student_before", "student"}
    assert {name: set(of["arms"]) for name, of in judged.items()} == {"a": arms, "b": arms}
    asked = [judged[name]["arms"]["student"]["tokens"] for name in "ab"]
    assert asked[0] > asked[1] > 0
    check_loss(recipe, kind, models["a"])
    # Names of classes are what a distribution is over.
    kind.save(models["b"], seed=1, **{_NAMES[task]: kind.names[::-1]})
    refused = stillroom("plan", recipe, expect=2).stderr
    assert f"teachers: model of 'b': {models['b']} does not go with the first teacher" in refused
    assert f"its classes are {', '.join(kind.names[::-1])}" in refused


def test_classes_in_another_order_are_refused_of_a_teacher_that_is_gone(tmp_path: Path) -> None:
    kind = KINDS["classification"]
    kind.save(tmp_path / "a", seed=0)
    kind.save(tmp_path / "b", seed=1, classes=kind.names[::-1])
    write_jsonl(tmp_path / "rows.jsonl", kind.rows)
    both = write_recipe(tmp_path, "classification")
    tree = yaml.safe_load(both.read_text())
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        yaml.safe_dump(tree | {"teachers": [{"name": "b", "model": str(tmp_path / "b")}]})
    )
    stillroom("run", alone, "--until", "data")
    (tmp_path / "b").rename(tmp_path / "gone")
    refused = stillroom("plan", both, expect=2).stderr
    assert f"its classes are {', '.join(kind.names[::-1])}, those of the first" in refused


_NAMES = {"classification": "classes", "token_classification": "tags"}


def check_loss(file: Path, kind: Kind, folder: Path) -> None:
    """The loss of all passes over the samples to train on is its definition.

    The model is none of the arms.
    """
    recipe = load_recipe(file)
    plan, store = make_plan(recipe), Store.open(recipe.storage.dir)
    snapshot, ids = plan.snapshots["train"], [one.id for one in plan.teachers]
    found = find_rows(store, snapshot, plan.partners["train"], ids)
    samples = list(Samples(store, snapshot, soft=True, teachers=found).read(0, snapshot.rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = kind.auto.from_pretrained(folder).eval()
        torch.nn.init.normal_(model.classifier.weight)
    passes = kind.passes(
        tokens_per_pass=64,
        alone=False,
        inputs=Inputs.of(model, folder),
        vocab_size=model.get_input_embeddings().num_embeddings,
        teaching=Teaching.of(recipe),
    )
    aim, total = aim_at(recipe.loss, 1.0), 0.0
    with torch.no_grad():
        for batch in passes.batches(samples, 2.0):
            total += float(passes.losses(model, batch, aim=aim, dtype=torch.float32).total)
        expected = sum(definition(model, passes, sample) for sample in samples)
    assert total == pytest.approx(expected, rel=1e-5)


def definition(model: Any, passes: ClassPasses, sample: Sample) -> float:
    """sum_j w_j T^2 KL(t_j || p) + 0.5 cross-entropy, in float64, for T = 2 and weights 1 and 2."""
    logits = model(**passes.inputs.tensors([sample.token_ids])).logits.double()
    labels = np.array([-1 if sample.label is None else sample.label])
    if logits.dim() == 3:
        logits = logits[0][positions(sample.spans)]
        labels = np.full(len(logits), -1) if sample.labels is None else sample.labels
    student, total = (logits / 2).log_softmax(-1), 0.0
    for number, targets in sample.of_teachers():
        stored = torch.from_numpy(targets.logprobs.astype(np.float64))
        teacher = (stored / 2).log_softmax(-1)
        total += (1.0, 2.0)[number] * 4 * float((teacher.exp() * (teacher - student)).sum())
    known = torch.from_numpy(np.flatnonzero(labels >= 0))
    hard = -logits.log_softmax(-1)[known, torch.from_numpy(labels[labels >= 0]).long()]
    return total + 0.5 * float(hard.sum())
