"""Held-out rows of several spans.

Every scored token is measured once, and the last span is what is asked.
"""

from pathlib import Path

import pytest
from tiny_llama import WORDS, save_tiny_llama
from tiny_store import (
    in_spans,
    make_job,
    make_recipe,
    make_store,
    random_texts,
    snapshot_of,
    teacher_targets,
)
from transformers import AutoModelForCausalLM

from stillroom.stages.evaluate.causal_lm import Measuring
from stillroom.stages.evaluate.held_out import HeldOut
from stillroom.stages.evaluate.metrics import Tally
from stillroom.stages.evaluate.quiz.answers import prepare_quiz
from stillroom.stages.evaluate.views import Views
from stillroom.stages.models.inputs.token_text import Pieces
from stillroom.storage.errors import IntegrityError
from stillroom.storage.snapshots.snapshot import Snapshot
from stillroom.storage.store.store import Store

TEXTS = random_texts(3, shortest=14, longest=20)
SPANS = {0: [[2, 2], [6, 1], [9, 5]], 1: [[3, 4], [8, 2]]}
SCORED = [in_spans(SPANS.get(n, [[2, len(text) - 2]])) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    folder = tmp_path_factory.mktemp("held_out")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
    return teacher, make_store(folder / "store", teacher, texts=TEXTS, spans=SPANS)


def job_of(world: tuple[Path, Store], folder: Path, snapshot: Snapshot):
    teacher, store = world
    return make_job(
        make_recipe(store, teacher, data={"format": "completion"}), folder, test=snapshot.id
    )


@pytest.mark.parametrize("table", ["soft_targets", "generations"])
def test_every_scored_token_is_measured(
    world: tuple[Path, Store], tmp_path: Path, table: str
) -> None:
    teacher, store = world
    snapshot = snapshot_of(store, table)
    job = job_of(world, tmp_path, snapshot)
    held_out = HeldOut(store, snapshot, job.clock)
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    tally, views = Tally(), Views(kept=None, pieces=Pieces(None))
    measure = Measuring(job, held_out).of_student(model)
    for row in held_out.targets():
        measure(row, tally, views.arm("student"))
    assert tally.tokens == sum(map(len, SCORED))
    targets = [teacher_targets(model, ids, of, 6) for ids, of in zip(TEXTS, SCORED, strict=True)]
    nats = sum(-float(one.token_logprob.sum()) for one in targets) / tally.tokens
    assert tally.results()["cross_entropy"] == pytest.approx(nats, rel=1e-5)


def test_a_question_is_what_stands_before_the_last_span(
    world: tuple[Path, Store], tmp_path: Path
) -> None:
    _, store = world
    snapshot = snapshot_of(store)
    job = job_of(world, tmp_path, snapshot)
    quiz = prepare_quiz(job, store, HeldOut(store, snapshot, job.clock).spans())
    assert quiz is not None
    asked = {tuple(question.prompt_ids): question for question in quiz.questions}
    starts = [SPANS[0][-1][0], SPANS[1][-1][0], 2]
    assert asked.keys() == {tuple(ids[:start]) for ids, start in zip(TEXTS, starts, strict=True)}
    for number in (0, 1):
        start, n = SPANS[number][-1]
        answer = asked[tuple(TEXTS[number][:start])]
        words = " ".join(WORDS[i - 4] for i in TEXTS[number][start : start + n])
        assert answer.reference == answer.teacher == words


def test_a_generation_that_the_store_lacks_is_named(
    world: tuple[Path, Store], tmp_path: Path
) -> None:
    _, store = world
    snapshot = snapshot_of(store)
    job = job_of(world, tmp_path, snapshot)
    rows = [
        row | {"generation_key": b"?" * 16} for row in HeldOut(store, snapshot, job.clock).spans()
    ]
    named = f"row of prompt [0-9a-f]{{32}} names the generation {'3f' * 16}, and no commit holds it"
    with pytest.raises(IntegrityError, match=named):
        prepare_quiz(job, store, rows)
