"""Stage `evaluate`: teacher and students on the same held-out tokens.

The teacher is never loaded: its numbers come from the stored targets. Only one model is in memory.
Rows go through it one by one and its logits a chunk of tokens at a time, so memory grows with one
row and not with the held-out set. `evaluation.json` is written last: that it exists means that the
evaluation is done.

Several ranks have rows and prompts dealt out, each with a whole model: none is sharded here.
Gradients, the check of all rows before and the files are the first rank's.
"""

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ...storage.joined import open_store
from ...storage.snapshots.snapshot import load_snapshot
from ...storage.store.store import Store
from ...storage.tables.kinds import STRUCTURES
from ..audit.every_row import check_rows
from ..models.fit.classes import names_in
from ..recipe.run_folder import EVALUATED, STUDENT
from ..recipe.tasks import TASKS
from ..targets.spec import wanted
from ..workers.job import Job, StageResult
from .by_class.confusion import AVERAGES, SHARES
from .held_out import HeldOut
from .measure import Arms, Measured, measure_arms
from .quiz.answers import Quiz, prepare_quiz

if TYPE_CHECKING:
    from .metrics import Tally
    from .views import Views


NUMBERS = (
    "cross_entropy",
    "perplexity",
    "kl_teacher",
    "tv_teacher",
    "acceptance",
    "top1_agreement",
    "ece",
    "rows",
    "tokens",
)
"""What is known of an arm; null where it is not."""

CLASS_NUMBERS = (
    "accuracy",
    *(f"{share}_{average}" for average in AVERAGES for share in SHARES),
)
"""The same of a classifier, on texts with a label."""


def run(job: Job) -> StageResult:
    """Measure every arm on the held-out rows, and write `evaluation.json`.

    The file goes into the student's training run.
    """
    started = time.monotonic()
    store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
    snapshot = load_snapshot(store, job.snapshots["test"])
    task = TASKS[job.recipe.run.task]
    with job.clock.span("start"):
        from .teachers import HeldOutTeachers

        teachers = HeldOutTeachers.of(job, store, snapshot)
    held_out = HeldOut(
        store,
        snapshot,
        job.clock,
        labelled=task.labelled,
        images=task.structure.images,
        teachers=teachers,
    )
    if not held_out.rows:
        named = job.recipe.evaluate.names_rows
        raise UsageError(
            f"{'evaluate' if named else 'data.holdout'}: no held-out rows, so nothing to evaluate "
            "on. "
            f"{'Name other rows' if named else 'Set data.holdout higher, or to 0: no evaluation'}."
        )
    # As the training was: it is paid for, and was said to go on.
    train = job.recipe.train
    lenient = train is not None and train.audit == "warn"

    def check() -> None:
        check_rows(store, [snapshot], job, lenient=lenient)

    job.ranks.by_first(check)
    with job.clock.span("start"):
        quiz = prepare_quiz(job, store, held_out.spans())
        found = Measured(views=_views(job, held_out, store))
        students = _students(job, store)
    measure_arms(job, held_out, students, quiz=quiz, found=found)
    details: dict[str, Any] = {}
    if job.ranks.first:
        content = _content(job, held_out, found, quiz=quiz)
        content["seconds"] = round(time.monotonic() - started, 3)
        encoded = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        files = LocalFiles(job.train_dirs["student"])
        with job.clock.span("disk"):
            # In place of one that was asked for differently.
            files.replace(EVALUATED, encoded.encode())
        details = {name: content[name] for name in ("results", "measured_on")}
    details = job.ranks.told_in_time(details)
    measured = details.pop("measured_on")
    return StageResult(rows=measured["rows"], tokens=measured["tokens"], details=details)


def _students(job: Job, store: Store) -> Arms:
    """The student as training begins, and what became of it."""
    from ..models.students.student import initial_student, load_student

    teacher_dir = store.teacher_dir(job.teacher_id)
    arms: Arms = {"student_before": partial(initial_student, job.recipe, teacher_dir)}
    for arm in ("baseline", "student"):
        if arm in job.train_dirs:
            folder = job.train_dirs[arm] / STUDENT
            arms[arm] = partial(load_student, job.recipe, teacher_dir, folder)
    return arms


def _views(job: Job, held_out: HeldOut, store: Store) -> "Views":
    """Where what the report shows is gathered; it has the lengths already."""
    from ..models.inputs.token_text import Pieces
    from .views import Views

    score, teacher_dir = job.recipe.score, store.teacher_dir(job.teacher_id)
    kept = None
    if score is not None and held_out.scored and not held_out.labelled:
        kept = wanted(score, max(k for _, k in held_out.references()))
    views = Views(kept=kept, pieces=Pieces.of_folder(teacher_dir))
    for row in () if held_out.images else held_out.spans():
        views.add_length(len(row["token_ids"]) if held_out.labelled else row["span_tokens"])
    return views


def _content(job: Job, held_out: HeldOut, found: Measured, *, quiz: Quiz | None) -> dict[str, Any]:
    """What `evaluation.json` holds."""
    tallies, unit = found.tallies, TASKS[job.recipe.run.task].unit
    results = {
        arm: _result(tallies.get(arm), held_out) for arm in ("teacher", *found.answers, *tallies)
    }
    answers = None
    if quiz and quiz.scored:
        unfinished = quiz.unfinished(found.answers, job)
        for arm, score in quiz.scores(found.answers).items():
            results[arm]["answers"] = score
        for arm, prompts in unfinished.items():
            job.progress.say(
                f"warning: evaluate.generate.pattern came to no end with {len(prompts)} texts of "
                f"{arm}: they count as unanswered"
            )
            results.get(arm, {})["unanswered"] = len(prompts)
        answers = quiz.about(found.answers) | ({"unanswered": unfinished} if unfinished else {})
    others = [arm for arm in ("student_before", "baseline") if arm in tallies]
    more = {"teachers": _by_teacher(job, tallies)} if held_out.teachers else {}
    return more | {
        "id": job.evaluation_id,
        "results": results,
        "differences": {arm: tallies["student"].minus(tallies[arm]) for arm in others},
        "reliability": {arm: tally.reliability() for arm, tally in tallies.items()},
        "gradient": found.gradients if any(found.gradients.values()) else None,
        "classes": _classes(job, tallies) if held_out.labelled else None,
        "measured_on": _measured_on(held_out, tallies["student"], unit),
        "arms": {arm: folder.name for arm, folder in job.train_dirs.items()},
        "answers": answers,
        "samples": quiz.samples(found.answers) if quiz else [],
        "views": found.views.content(),
    }


def _result(tally: "Tally | None", held_out: HeldOut) -> dict[str, Any]:
    """An arm's numbers; all null for a teacher of whom no distribution is stored."""
    names = NUMBERS + CLASS_NUMBERS if held_out.labelled else NUMBERS
    numbers: dict[str, Any] = dict.fromkeys(names)
    return numbers if tally is None else numbers | tally.results() | {"rows": held_out.rows}


def _by_teacher(job: Job, tallies: "dict[str, Tally]") -> dict[str, Any]:
    """Of each teacher, every arm on the held-out texts that it was asked for."""
    return {
        name: {
            "id": teacher_id,
            "arms": {
                arm: tally.teachers[name].results()
                for arm, tally in tallies.items()
                if name in tally.teachers
            },
        }
        for name, teacher_id in job.teachers.items()
    }


def _classes(job: Job, tallies: "dict[str, Tally]") -> dict[str, Any]:
    """The classes by name, and for each arm its numbers by class and its confusion matrix."""
    store = open_store(job.recipe.storage.dir, job.recipe.storage.sources)
    names = names_in(store.teacher_dir(job.teacher_id))
    arms: dict[str, Any] = {}
    for arm, tally in tallies.items():
        if tally.confusion:
            arms[arm] = tally.confusion.by_class(len(names)) | {
                "confusion": tally.confusion.cells()
            }
        if tally.entities:
            arms[arm]["entities"] = tally.entities.by_type()
    return {"names": names, "arms": arms}


def _measured_on(held_out: HeldOut, tally: "Tally", unit: str) -> dict[str, Any]:
    from .metrics import BINS

    references = sorted(held_out.references())
    return {
        "snapshot": held_out.snapshot.id,
        "table": held_out.snapshot.table,
        "rows": held_out.rows,
        "prompts": tally.units,
        "tokens": tally.tokens,
        **({"labelled": tally.judged("accuracy")} if held_out.labelled else {}),
        "reference": "+".join(dict.fromkeys(kind for kind, _ in references)) or None,
        "k": min((k for _, k in references), default=None),
        "kl_is_lower_bound": any(not STRUCTURES[kind].whole for kind, _ in references),
        "ece_bins": BINS,
        "of": f"{unit}s",
    }
