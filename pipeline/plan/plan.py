"""What a run would do and why: every stage's books, from recipe and store alone.

Writes nothing, needs no torch.

A run makes this plan once, before its first stage, and asks again for the lines that a stage may
have changed when it has ended. So what `plan` prints is what `run` does.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ...stages.data.stage import survey
from ...stages.ledger.books import Books, Ledger
from ...stages.ledger.generations import generation_ledger, pending_held_out, published_alike
from ...stages.ledger.requests import GENERATION_BYTES
from ...stages.ledger.splits import choose_features, choose_samples, choose_snapshots
from ...stages.ledger.targets import choose_generations, target_ledger
from ...stages.ledger.teachers import keep_scored, left_out
from ...stages.models.chat.arguments import doubtful_arguments, template_names
from ...stages.recipe.checks.task import refuse_without_labels
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import stage_named
from ...stages.recipe.tasks import TASKS
from ...storage.errors import UsageError
from ...storage.files.opening import open_files
from ...storage.joined import Joined, open_store
from ...storage.published.folder import Published
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from ..printing.numbers import teacher_layers
from .endpoint import endpoint_notes, plan_endpoint, refuse_reading, refuse_without_key
from .engines import engine_notes
from .features import feature_note, image_note, learnt_embeddings, plan_embeddings, teacher_widths
from .lengths import answer_notes, unread_by_student, unseen_by_student, window_notes
from .lineage import found_students
from .lines import Plan, StagePlan, State, equal_texts
from .refusals import refuse_all_aside, refuse_another, refuse_early, student_folder
from .resolve import Bound, bind
from .space import add_unwritten, space_notes
from .students import plan_students
from .teachers import BoundTeacher, bind_teachers, entry_notes, quantized_notes, teacher_notes


def make_plan(recipe: Recipe, *, write: bool = False) -> Plan:
    """Work out every stage's state.

    Args:
        recipe: The recipe.
        write: Let file hashes be remembered and models be downloaded (`run`); `plan` only looks.

    Raises:
        UsageError: a model or the source is not there.
    """
    store = _open(recipe, write=write)
    bound = bind(recipe, store, write=write)
    teachers = bind_teachers(recipe, bound, store, write=write)
    refuse_early(recipe, bound, write=write)
    for one in teachers[1:]:
        refuse_another(one)
    plan = Plan(bound=bound, teachers=teachers, write=write, warning=_warning(teachers))
    plan.note(*filter(None, [plan.warning]), *found_students(recipe), *_notes(recipe, bound))
    plan.note(*teacher_notes(recipe), *quantized_notes(teachers))
    plan.note(*entry_notes(recipe, bound.binding.vocab_size), *answer_notes(recipe, bound))
    plan.note(*endpoint_notes(recipe, bound.binding.author_id, store))
    if recipe.student is not None and recipe.student.from_teacher_layers:
        start = teacher_layers(recipe.student.from_teacher_layers)
        plan.note(f"the student starts from {start}")
    plan.note(*feature_note(recipe, bound), *image_note(recipe, bound))
    _plan_tables(recipe, plan, store)
    plan.note(*space_notes(recipe, plan))
    return _with_students(recipe, plan)


def plan_again(recipe: Recipe, plan: Plan, ended: str) -> Plan:
    """The plan after a stage has ended, with what was resolved before it: teacher, author, data.

    A stage that fills a table of the store changes its own line and the lines after it. A stage
    that trains or evaluates changes no line of a table, and the snapshots stay too.

    Args:
        recipe: The recipe.
        plan: As it was before the stage.
        ended: Name of the stage's line.
    """
    again = Plan(bound=plan.bound, write=plan.write, sources=plan.sources, notes=plan.notes)
    again.warning, again.teachers = plan.warning, plan.teachers
    if stage_named(ended).table is not None:
        _plan_tables(recipe, again, _open(recipe, write=plan.write))
    else:
        again.stages = [line for line in plan.stages if stage_named(line.name).table is not None]
        again.snapshots, again.partners = plan.snapshots, plan.partners
        again.features, again.embeddings = plan.features, plan.embeddings
    return _with_students(recipe, again)


def refuse_impossible(plan: Plan, line: StagePlan) -> None:
    """Refuse a stage that has work to do which nobody can do here.

    Raises:
        UsageError: the text is published and not written again, teacher or data are not here, or
            the student cannot read the rows.
    """
    if line.state != "to do":
        return
    if line.name == "generate" and plan.bound.published is not None:
        raise UsageError(
            f"generate: {line.why}, and what is published is not written again. Leave the section "
            "out to take the text as it is, give the settings that it was written with "
            "(PROVENANCE.json of the published folder), or name the prompts' own source and a "
            "teacher that is here."
        )
    if plan.unread and line.name != "data":
        raise UsageError(plan.unread)
    bound = plan.teacher_of(line.name).bound
    if line.name == "generate":
        refuse_without_key(plan.teachers[0].recipe)
    refuse_reading(plan.teachers[0].recipe, line)
    if stage_named(line.name).table is not None and bound.teacher is None:
        why = f" ({line.why})" if line.why else ""
        raise UsageError(
            f"{line.name}: there is work to do{why}, but teacher or data are not here: "
            f"{bound.missing}"
        )


def _warning(teachers: Sequence[BoundTeacher]) -> str:
    """What is said before all else: whose code is run here."""
    running = [(one, one.bound.teacher) for one in teachers]
    return "; ".join(
        f"the code of {one.recipe.teacher.model} is run here, as teacher.trust_remote_code says: "
        f"{', '.join(teacher.parts['code'])} (hash of all: {teacher.code_id})"
        for one, teacher in running
        if teacher is not None and teacher.runs_code
    )


def _notes(recipe: Recipe, bound: Bound) -> tuple[str, ...]:
    """What becomes of the windows, and of the chat template's arguments."""
    if not recipe.data.records.conversation or bound.author is None:
        return tuple(window_notes(recipe, bound))
    template = bound.author.parts["chat_template"]
    said = doubtful_arguments(template, recipe.data.chat_template_kwargs)
    if len(names := template_names(template)) > 1:
        said.append(
            f"the tokenizer lists the chat templates {', '.join(names)}: tool_use renders "
            "conversations that offer tools, if it is there, and default all others"
        )
    return tuple(said)


def _open(recipe: Recipe, *, write: bool) -> Store | None:
    """The store with its sources, None where there are none and its folder is still to be made."""
    where, sources = recipe.storage.dir, recipe.storage.sources
    if not sources and open_files(where).empty():
        return None
    store = open_store(where, sources, update=True)
    if write and isinstance(store, Joined):
        store.prove(FileHashes(where, remember=True).sha256)
    return store


def _plan_tables(recipe: Recipe, plan: Plan, store: Store | None) -> None:
    """The lines of the stages that fill a table, and the snapshots that these leave."""
    plan.sources = store.pinned if isinstance(store, Joined) else {}
    surveyed = plan.bound.published or _survey(recipe, plan, store)
    if store is None:
        assert isinstance(surveyed, pa.Table)
        _plan_empty(recipe, plan, surveyed)
        return
    data_id = plan.bound.binding.data_id
    with Books(store, recipe, data_id=data_id, surveyed=surveyed, write=plan.write) as books:
        _plan_stored(recipe, plan, books)


def _with_students(recipe: Recipe, plan: Plan) -> Plan:
    if recipe.student is not None:
        plan_students(recipe, plan, ready=all(line.state == "done" for line in plan.stages))
    return plan


def _survey(recipe: Recipe, plan: Plan, store: Store | None) -> pa.Table | None:
    """Begin with the data stage: what its source holds, None where the store has it on record."""
    data_id = plan.bound.binding.data_id
    about = store.inputs_about(data_id) if store else None
    if about is not None:
        rejected, said = int(about["rejected"]), about.get("why_rejected", "")
        line = StagePlan(name="data", state="done", rejected=rejected, why=said)
        line.lengths = about.get("lengths", {})
        plan.stages.append(line)
        plan.note(*about.get("notes", ()))
        return None
    found = survey(recipe, plan.bound.teacher)
    plan.note(*found.notes)
    others = store is not None and bool(store.files.names("inputs"))
    why = "read otherwise so far: another source, data section or tokenizer" if others else "new"
    stale, of = plan.bound.stale
    if stale:
        why = f"answer was tokenized alone: {stale:,} of {of:,}"
    line = StagePlan(name="data", state="to do", pending=len(found.inputs), rejected=found.rejected)
    line.planned = line.pending + line.rejected
    line.why = "; ".join(filter(None, (why, found.why_rejected)))
    plan.stages.append(line)
    return found.inputs


def _plan_empty(recipe: Recipe, plan: Plan, inputs: pa.Table) -> None:
    """Everything is to do."""
    first = inputs.filter(inputs["first"])
    judged = pc.sum(pc.equal(first["split"].cast(pa.string()), "test")).as_py() or 0
    refuse_all_aside(recipe, len(first) - judged)
    count = held_out = 0
    if recipe.generate is not None:
        count, held_out = (n * recipe.generate.samples for n in (len(first), judged))
        tokens = count * recipe.generate.max_tokens
        line = StagePlan(
            name="generate", state="to do", planned=count, pending=count, why=f"{count} new"
        )
        line.tokens_to_do, line.bytes_to_do = tokens, tokens * GENERATION_BYTES
        plan_endpoint(recipe, line)
        plan.stages.append(line)
    if recipe.score is not None:
        for one in plan.teachers:
            line = StagePlan(name=one.line, state="waits", why="for the text")
            _add_unwritten(line, one, count, held_out)
            plan.stages.append(line)


def _add_unwritten(line: StagePlan, one: BoundTeacher, pending: int, held_out: int) -> None:
    """Add what a teacher is asked for of the texts to come; which of them `where` takes is open."""
    if one.asked is None or one.asked.is_plain:
        add_unwritten(line, one.recipe, one.bound, pending=pending, held_out=held_out)


def _plan_stored(recipe: Recipe, plan: Plan, books: Books) -> None:
    """What a store has of each table that the recipe fills."""
    binding, bound = plan.bound.binding, plan.bound
    books.lenient = books.lenient or binding.imported
    if books.published is not None:
        _plan_published(plan, books, books.published)
    data = plan.stages[0]
    if books.published is None:
        of = "SELECT count(*), count(*) FILTER (first AND NOT held_out) FROM inputs"
        ((inputs, to_train_on),) = books.index.rows(of)
        refuse_all_aside(recipe, to_train_on)
    if books.published is None and data.state == "done":
        data.pending = books.lost(binding.author_id if recipe.generate is None else None)
        data.committed, data.planned = inputs - data.pending, inputs + data.rejected
        data.state = "to do" if data.pending else "done"
    unwritten = 0, 0
    if recipe.generate is not None and books.published is None:
        ledger = generation_ledger(
            books,
            author_id=binding.author_id,
            context_tokens=binding.author_context_tokens,
            author_parts=bound.author.parts if bound.author else None,
        )
        plan.stages.append(_line("generate", ledger))
        plan_endpoint(recipe, plan.stages[-1])
        if plan.stages[-1].state == "to do":  # where a budget is spent, nobody writes the rest
            unwritten = ledger.pending, pending_held_out(books)
    choose_generations(books, author_id=binding.author_id)
    if TASKS[recipe.run.task].labelled and data.state == "done":
        refuse_without_labels(recipe, books.labels())
    upstream = all(line.state == "done" for line in plan.stages)
    if upstream:
        folder = student_folder(recipe.student, write=False)
        plan.unread = unread_by_student(recipe, bound, books)
        plan.unread = plan.unread or unseen_by_student(recipe, bound, books, folder)
    if recipe.score is not None:
        upstream = _plan_score(plan, books, unwritten, upstream=upstream)
    if upstream and recipe.several:
        plan.note(*left_out(books, [one.name for one in plan.teachers]))
    if upstream and len(plan.teachers) > 1:
        plan.snapshots, plan.partners = choose_samples(books, binding, len(plan.teachers))
    elif upstream:
        plan.snapshots = choose_snapshots(books, binding)
        plan.features = choose_features(books, binding)
        plan.embeddings = learnt_embeddings(recipe, books.store, binding.teacher_id)


def _plan_score(plan: Plan, books: Books, unwritten: tuple[int, int], *, upstream: bool) -> bool:
    """Plan a line for each teacher, and say whether all are done.

    It leaves the view `scored` behind; of named teachers the views that `keep_scored` keeps.

    Args:
        plan: Its teachers.
        books: After `choose_generations`.
        unwritten: How many texts are still to be written, and how many of them are judged on.
        upstream: Whether the stages before it are done.
    """
    done = upstream
    for number, one in enumerate(plan.teachers):
        binding, teacher = one.bound.binding, one.bound.teacher
        ledger = target_ledger(
            books,
            teacher_id=binding.teacher_id,
            vocab_size=binding.vocab_size,
            limit=binding.context_tokens,
            teacher_parts=teacher.parts if teacher else None,
            teacher_widths=teacher_widths(one.recipe, one.bound),
            route=one.asked,
        )
        plan.note(*engine_notes(one, books, pending=ledger.pending))
        if upstream and one.asked is not None and not ledger.planned:
            plan.note(f"{one.name} is asked for no text: its `where` takes none of the prompts")
        line = _line(one.line, ledger, upstream=upstream)
        _add_unwritten(line, one, *unwritten)
        plan_embeddings(line, one.recipe, one.bound, books.store)
        plan.stages.append(line)
        done = done and line.state == "done"
        if one.asked is not None:
            keep_scored(books, number)
    return done


def _plan_published(plan: Plan, books: Books, published: Published) -> None:
    """Plan prompts and text that are there already, as they are.

    The recipe may say how they were made, or nothing.
    """
    splits = published.manifest.splits.items()
    rows = sum(split.rows for _, split in splits)
    why = f"as published: {', '.join(f'{split.rows} {name}' for name, split in splits)}"
    plan.stages.append(StagePlan(name="data", state="done", planned=rows, committed=rows, why=why))
    if books.recipe.generate is not None:
        alike = published_alike(books, author_id=plan.bound.binding.author_id)
        line = StagePlan(
            name="generate", state="done", planned=rows, committed=alike, pending=rows - alike
        )
        if line.pending:
            line.state, line.why = "to do", f"{line.pending} published from other settings"
        plan.stages.append(line)


def _line(name: str, ledger: Ledger, *, upstream: bool = True) -> StagePlan:
    served = [f"{count} from {source}" for source, count in ledger.sources.items()]
    new = [f"{count} {reason}" for reason, count in ledger.why.most_common()]
    refused = [f"{count} rejected: {reason}" for reason, count in ledger.rejected.most_common()]
    equal = [equal_texts(ledger.equal)] if ledger.equal else []
    why = ", ".join(served + new + refused + equal)
    if not upstream:
        why = ", ".join(filter(None, [why, "more after the stages before it"]))
    state: State = "done" if upstream else "waits"
    return StagePlan(
        name=name,
        state="to do" if ledger.pending else state,
        planned=ledger.planned,
        committed=ledger.committed,
        rejected=ledger.rejected.total(),
        pending=ledger.pending,
        tokens=ledger.tokens,
        tokens_to_do=ledger.tokens_to_do,
        bytes_to_do=ledger.bytes_to_do,
        equal=ledger.equal,
        sources=ledger.sources,
        why=why,
    )
