"""Features in the forward pass of scoring.

It is tested what is stored, what is reused, what is missing and made.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from kit import prompts, recipe_tree, write_jsonl
from planting import rows_of
from tiny_classes import World, records, words
from tiny_jobs import done_until_score, teacher_job
from tiny_llama import save_tiny_llama
from tiny_models import save_tiny_bert
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.data import stage as data
from stillroom.stages.generate import stage as generate
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Rounded
from stillroom.storage.tables.row_builders import text_key

WIDTH = 16
SUPPORT = str(Path(__file__).parents[2] / "support")


class Scored:
    """A recipe whose text the teacher wrote.

    It is scored with what features it names, as often as it is asked to.
    """

    def __init__(self, folder: Path, teacher: Path) -> None:
        self.folder, self.teacher = folder, teacher
        self.source = write_jsonl(folder / "prompts.jsonl", prompts(16))

    def recipe(self, features: list[dict[str, Any]], **sections: Any) -> Recipe:
        score = {"k": 4, "features": features} | sections.pop("score", {})
        tree = recipe_tree(
            self.folder,
            self.teacher,
            self.source,
            generate={"engine": "hf", "temperature": 1.0, "max_tokens": 16},
            score=score,
            **sections,
        )
        return Recipe.model_validate(tree)

    def plan(self, features: list[dict[str, Any]], **sections: Any) -> Any:
        return make_plan(self.recipe(features, **sections)).line("score")

    def run(self, features: list[dict[str, Any]], **sections: Any) -> Store:
        store, _ = done_until_score(self.recipe(features, **sections))
        return store


@pytest.fixture
def scored(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Scored:
    return Scored(tmp_path, tiny_llama(num_hidden_layers=3))


def hidden(*layers: int, bits: int = 8) -> list[dict[str, Any]]:
    return [{"what": "hidden", "layers": list(layers), "bits": bits}]


def features_of(store: Store) -> dict[tuple[bytes, int, str], dict[str, Any]]:
    return {
        (row["text_key"], row["layer"], row["dtype"]): row for row in rows_of(store, "features")
    }


def trained_texts(store: Store) -> dict[bytes, np.ndarray]:
    """The token ids of the texts to train on; those to judge have whole distributions."""
    rows = [row for row in rows_of(store) if row["kind"] == "topk"]
    return {text_key(row["token_ids"]): row["token_ids"] for row in rows}


@pytest.mark.numeric
def test_what_is_stored_is_what_plain_transformers_shows(scored: Scored) -> None:
    store = scored.run(hidden(0, 1, bits=32))
    texts, found = trained_texts(store), features_of(store)
    assert {key for key, _, _ in found} == texts.keys(), "rows that are judged on have none"
    assert len(found) == 2 * len(texts)
    model = AutoModelForCausalLM.from_pretrained(scored.teacher).eval()
    for text, ids in texts.items():
        with torch.no_grad():
            tensor = torch.from_numpy(ids.astype(np.int64))[None]
            shown = model(input_ids=tensor, output_hidden_states=True).hidden_states
        for layer in (0, 1):
            states = Rounded.from_row(found[text, layer, "float32"]).restored()
            # Padding of a pass: `batch_tokens` lets rows share one.
            np.testing.assert_allclose(states, shown[layer + 1][0].numpy(), atol=1e-5)
    assert verify(store).ok


@pytest.mark.numeric
def test_an_encoder_has_a_state_at_every_token(tmp_path: Path) -> None:
    teacher = save_tiny_bert(tmp_path / "teacher")
    score = {"targets": "full", "features": hidden(1, bits=32)}
    world = World(tmp_path, teacher, records(20), score=score).scored()
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    found = features_of(world.store)
    train = world.plan().snapshots["train"]
    rows = [r for s in train.shards for r in world.store.rows("soft_targets", {s.sha256: s.rows})]
    assert {text_key(row["token_ids"]) for row in rows} == {key for key, _, _ in found}
    for row in rows:
        stored = found[text_key(row["token_ids"]), 1, "float32"]
        assert stored["vectors"] == len(row["token_ids"])
        ids = torch.from_numpy(row["token_ids"].astype(np.int64))[None]
        separators = (ids == 3).long()  # [SEP]; a second one ends a pair
        kinds = (separators.cumsum(1) - separators).clamp(max=1)
        with torch.no_grad():
            shown = model(input_ids=ids, token_type_ids=kinds, output_hidden_states=True)
        np.testing.assert_allclose(
            Rounded.from_row(stored).restored(), shown.hidden_states[2][0].numpy(), atol=2e-5
        )


def test_the_plan_says_what_is_missing_and_score_makes_that_alone(scored: Scored) -> None:
    store = scored.run([])
    before = {row["key"] for row in rows_of(store)}
    tokens = sum(map(len, trained_texts(store).values()))
    assert scored.plan([]).state == "done"
    line = scored.plan(hidden(1))
    judged = len(before) - len(trained_texts(store))
    assert (line.state, line.committed) == ("to do", judged)
    assert line.why == f"{len(trained_texts(store))} stored without features"
    assert line.bytes_to_do == tokens * (WIDTH + 4)

    scored.run(hidden(1))
    assert {row["key"] for row in rows_of(store)} == before, "targets that are there stay"
    assert len(features_of(store)) == len(trained_texts(store))
    measured = sum(len(r["values"]) + 4 * r["vectors"] for r in rows_of(store, "features"))
    assert measured == line.bytes_to_do
    assert scored.plan(hidden(1)).state == "done"

    line = scored.plan(hidden(0, 1, 2))
    assert line.bytes_to_do == tokens * 2 * (WIDTH + 4), "a layer that is there is not made again"
    scored.run(hidden(0, 1, 2))
    assert len(features_of(store)) == 3 * len(trained_texts(store))
    assert [scored.plan(hidden(*layers)).state for layers in ((2,), (0, 2), (2, 1, 0))] == [
        "done"
    ] * 3


def test_more_bits_serve_fewer_and_not_the_other_way_round(scored: Scored) -> None:
    store = scored.run(hidden(1))
    line = scored.plan(hidden(1, bits=16))
    assert "stored with features of fewer bits" in line.why
    tokens = sum(map(len, trained_texts(store).values()))
    assert line.bytes_to_do == tokens * 2 * WIDTH
    scored.run(hidden(1, bits=16))
    assert {dtype for _, _, dtype in features_of(store)} == {"int8", "float16"}
    assert scored.plan(hidden(1)).state == scored.plan(hidden(1, bits=16)).state == "done"
    scored.run(hidden(2, bits=16))
    assert scored.plan(hidden(2)).state == "done", "16 bits serve a request for 8"
    assert scored.plan(hidden(2, bits=32)).state == "to do"


def test_targets_that_are_asked_for_later_leave_the_features_alone(scored: Scored) -> None:
    store = scored.run(hidden(1))
    stored = {row["key"] for row in rows_of(store, "features")}
    line = scored.plan(hidden(1), score={"k": 8})
    assert line.state == "to do"
    scored.run(hidden(1), score={"k": 8})
    assert {row["key"] for row in rows_of(store, "features")} == stored
    assert sum(row["kind"] == "topk" for row in rows_of(store)) == 2 * len(trained_texts(store))


def test_another_label_needs_no_features_again(tmp_path: Path) -> None:
    teacher, rows = save_tiny_bert(tmp_path / "teacher"), records(20)
    score = {"targets": "full", "features": hidden(1)}
    world = World(tmp_path, teacher, rows, score=score).scored()
    before = {row["key"] for row in world.rows("features")}
    relabelled = [
        row | {"label": (row["label"] == 0) * 1} for row in rows if row["label"] is not None
    ]
    world = World(tmp_path, teacher, relabelled, score=score)
    world.scored()
    texts = {row["text_key"] for row in world.rows() if row["key"]}
    assert len(world.rows()) > 20, "targets of another label are another row"
    # Which rows are judged on is drawn by the prompt, so none has become one to train on.
    assert {row["key"] for row in world.rows("features")} == before
    assert {row["text_key"] for row in world.rows("features")} <= texts


def test_rows_of_format_1_are_named_by_their_tokens(
    scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no `text_key`."""
    from stillroom.storage.tables import row_builders

    whole = row_builders.generation_row
    recipe = scored.recipe(hidden(1))
    with monkeypatch.context() as patched:
        patched.setattr(
            "stillroom.stages.generate.stage.generation_row",
            lambda **columns: whole(**columns) | {"text_key": None},
        )
        store, _ = done_until_score(recipe)
    assert {row["text_key"] for row in rows_of(store, "generations")} == {None}
    assert {key for key, _, _ in features_of(store)} == trained_texts(store).keys()
    assert make_plan(recipe).line("score").state == "done"


def test_what_cannot_be_stored_is_rejected_with_its_features_alone(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    """A number beyond float16: the text may still be had without features, or with 8 bits."""
    folder = tiny_llama(num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.embed_tokens.weight.data[5] *= 1e8
    model.save_pretrained(folder)
    scored = Scored(tmp_path, folder)
    store = scored.run(hidden(0, bits=16))
    rejects = rows_of(store, "rejects")
    texts = [row["token_ids"] for row in rows_of(store, "generations")]
    assert 0 < len(rejects) < len(texts)
    assert all("beyond what float16 holds" in row["message"] for row in rejects)
    assert not any(5 in ids for ids in trained_texts(store).values())
    line = scored.plan(hidden(0, bits=16))
    assert (line.state, line.rejected) == ("done", len(rejects))
    for other in ([], hidden(0)):
        line = scored.plan(other)
        assert (line.rejected, line.pending > 0) == (0, True)
    scored.run(hidden(0))
    assert scored.plan([]).state == scored.plan(hidden(0)).state == "done"


@pytest.mark.parametrize(
    ("features", "loss", "said"),
    [
        (hidden(3), [], "hidden of layer 3, but the teacher .* has 3 blocks, 0 to 2"),
        (hidden(0), [{"match": "hidden", "layers": {0: 1}}], "block 1 of the student, which has 1"),
        (hidden(0, 1), [{"match": "hidden", "layers": "uniform"}], "2 stored layers a block"),
    ],
)
def test_layers_that_there_are_not_are_refused_by_the_plan(
    scored: Scored, features: list[Any], loss: list[Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        make_plan(scored.recipe(features, loss={"features": loss}))


def test_the_plan_says_bytes_a_token(scored: Scored) -> None:
    plan = make_plan(scored.recipe(hidden(0, 1) + hidden(2, bits=16)))
    said = [
        f"features: {2 * (WIDTH + 4) + 2 * WIDTH} bytes a token of the rows to train on",
        "  hidden states of blocks 0, 1: 40 bytes a token, int8",
        "  hidden states of block 2: 32 bytes a token, float16",
    ]
    assert [note for note in plan.notes if "a token" in note] == said
    assert not [note for note in make_plan(scored.recipe([])).notes if "features" in note]


@pytest.mark.parametrize(("bits", "said"), [(8, 388), (16, 768)])
def test_a_file_takes_what_the_plan_says(tmp_path: Path, bits: int, said: int) -> None:
    """Windows of text, with D = 384.

    What is said is of the features' numbers, and holds within a tenth for the file.
    """
    teacher = save_tiny_llama(tmp_path / "teacher", hidden_size=384, intermediate_size=16)
    rng = np.random.default_rng(0)
    source = write_jsonl(
        tmp_path / "texts.jsonl", [{"text": words(rng, 200, 201)} for _ in range(12)]
    )
    tree = recipe_tree(
        tmp_path, teacher, source, generate=None, student=None, train=None, loss=None
    )
    tree["data"] = {"source": str(source), "format": "text", "holdout": 0, "window_tokens": 100}
    tree["storage"]["commit_rows"] = 256
    tree["evaluate"] = {}
    tree["score"] = {"k": 4, "features": hidden(0, 1, bits=bits)}
    recipe = Recipe.model_validate(tree)
    store, job, identity = teacher_job(recipe)
    data.run(job)
    plan = make_plan(recipe)
    assert f"features: {2 * said:,} bytes a token" in next(n for n in plan.notes if "features" in n)
    score.run(job, identity)
    (commit,) = store.commits("features")
    (targets,) = store.commits("soft_targets")
    texts = trained_texts(store).values()
    assert commit.tokens == 2 * sum(map(len, texts)) > 4000
    assert commit.shard.bytes / commit.tokens == pytest.approx(said, rel=0.03)
    planned = plan.line("score").bytes_to_do
    assert planned == pytest.approx(commit.shard.bytes + targets.shard.bytes, rel=0.1)
    assert bits > 8 or commit.shard.bytes / commit.tokens <= 400


KILLED = """
import os, sys
import yaml
from pathlib import Path
from stillroom.storage.store.commits import CommitLog
from stillroom.stages.data import stage as data
from stillroom.stages.generate import stage as generate
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from tiny_jobs import teacher_job
from stillroom.stages.score import stage as score

recipe, table, moment = sys.argv[1:]
whole, made = CommitLog.append, []

def append(log, *arguments, **more):
    if log.table != table:
        return whole(log, *arguments, **more)
    made.append(1)
    if len(made) == 2 and moment == "before":
        os.kill(os.getpid(), 9)
    found = whole(log, *arguments, **more)
    if len(made) == 2:
        os.kill(os.getpid(), 9)
    return found

CommitLog.append = append
_, job, teacher = teacher_job(Recipe.model_validate(yaml.safe_load(Path(recipe).read_text())))
score.run(job, teacher)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "moment", "features"),
    [
        ("features", "before", hidden(0, 2)),
        ("features", "after", hidden(0, 2)),
        ("soft_targets", "after", hidden(0, 2)),
        # One vector a text: eight times as many rows in a commit.
        ("features", "after", [{"what": "pooled", "layers": [0, 1, 2], "pooling": "mean"}]),
    ],
)
def test_killed_between_its_commits_nothing_is_lost_and_nothing_is_there_twice(
    scored: Scored, table: str, moment: str, features: list[dict[str, Any]]
) -> None:
    """Targets and features of a text come in commits of their own.

    Either may be there without the other.
    """
    rows = 2 if features[0]["what"] == "pooled" else 4
    storage = {"dir": str(scored.folder / "store"), "commit_rows": rows}
    recipe = scored.recipe(features, storage=storage)
    _, job, teacher = teacher_job(recipe)
    data.run(job)
    generate.run(job, teacher)
    path = scored.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), SUPPORT]),
    }
    words = [sys.executable, "-c", KILLED, str(path), table, moment]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == -9, done.stderr
    store = Store.open(scored.folder / "store")
    before = {
        name: {r["key"] for r in rows_of(store, name)} for name in ("soft_targets", "features")
    }
    line = make_plan(recipe).line("score")
    # Two writers commit, in whatever order: of no text need both be there yet.
    assert line.pending
    assert any(before.values())
    score.run(job, teacher)
    assert make_plan(recipe).line("score").state == "done"
    texts, found = trained_texts(store), features_of(store)
    layers = features[0]["layers"]
    assert {(key, layer) for key, layer, _ in found} == {(t, n) for t in texts for n in layers}
    assert len(rows_of(store, "features")) == len(layers) * len(texts)
    for name, keys in before.items():
        assert keys <= {row["key"] for row in rows_of(store, name)}
    assert verify(store).ok
