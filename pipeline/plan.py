"""What a run would do and why: every stage's books, from recipe and store alone. Writes nothing, needs no torch.

The runner asks for a plan before each stage, so what `plan` prints is what `run` does.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from ..stages.data import survey
from ..stages.job import Arm, Split
from ..stages.requests import (
    Ledger,
    Place,
    TargetRequest,
    generation_ledger,
    given_rows,
    held_out_first,
    prompt_splits,
    selected_generations,
    target_bytes,
    target_ledger,
)
from ..stages.sections import Recipe
from ..stages.tokenizers import refuse_other_tokenizer
from ..stages.train import arm_loss
from ..storage.errors import UsageError
from ..storage.keys import content_id
from ..storage.schema import TableName
from ..storage.snapshot import Snapshot, load_snapshot, make_snapshot
from ..storage.store import Store
from .binding import Bound, bind, student_id
from .recipe import changed_fields

State = Literal["done", "to do", "waits"]
STAGES = ("data", "generate", "score", "train", "baseline", "evaluate")


GENERATION_BYTES = 6  # a token's id and its share of text and keys: 5 to 6 bytes in the stores measured so far


@dataclass(kw_only=True, slots=True)
class StagePlan:
    """One line of the plan."""

    name: str
    state: State
    planned: int = 0
    committed: int = 0
    rejected: int = 0
    pending: int = 0
    tokens: int = 0
    tokens_to_do: int = 0
    """Of the pending rows; an upper bound where they are still to be written."""
    bytes_to_do: int = 0
    """Estimate of what they will take on disk."""
    why: str = ""


@dataclass(kw_only=True, slots=True)
class Plan:
    """All lines, and what the stages need to know of one another."""

    bound: Bound
    write: bool
    """Whether models may be downloaded and hashes remembered."""
    stages: list[StagePlan] = field(default_factory=list)
    train_dirs: dict[Arm, Path] = field(default_factory=dict)
    snapshots: dict[Split, Snapshot] = field(default_factory=dict)
    settings: dict[Arm, dict[str, Any]] = field(default_factory=dict)
    evaluation_id: str = ""

    def stage(self, name: str) -> StagePlan | None:
        """The line of a stage, None where the recipe has no such stage."""
        return next((s for s in self.stages if s.name == name), None)


def make_plan(recipe: Recipe, *, write: bool = False) -> Plan:
    """Work out every stage's state.

    Args:
        recipe: The recipe.
        write: Let file hashes be remembered and models be downloaded (`run`); `plan` only looks.

    Raises:
        UsageError: a model or the source is not there.
    """
    plan = Plan(bound=bind(recipe, write=write), write=write)
    _refuse_early(recipe, plan.bound)
    store = _open(recipe)
    inputs = _plan_data(recipe, plan, store)
    upstream = plan.stages[-1].state == "done"
    if recipe.generate is not None:
        upstream = _plan_generate(recipe, plan, store, inputs) and upstream
    rows: list[dict[str, Any]] = []
    if store is not None and store.inputs(plan.bound.binding.data_id) is not None:
        binding = plan.bound.binding
        rows = selected_generations(
            store,
            recipe,
            author_id=binding.author_id,
            data_id=binding.data_id,
            context_tokens=binding.author_context_tokens,
        )
    if recipe.score is not None:
        upstream = _plan_score(recipe, plan, store, rows, upstream=upstream)
    elif upstream and store is not None:
        _text_snapshots(recipe, plan, store, rows)
    _plan_students(recipe, plan, ready=upstream)
    return plan


def _refuse_early(recipe: Recipe, bound: Bound) -> None:
    """What would only fail after the teacher's work, and can be seen in small files before it."""
    if bound.teacher is None or bound.author is None:
        return
    if recipe.data.format in ("messages", "instruction") and not bound.author.parts["chat_template"]:
        raise UsageError(
            f"data.format: {recipe.data.format!r} needs a chat template, and {bound.author.folder} has none. "
            "Save one in the model's folder (chat_template.jinja), or use format 'prompt' or 'completion'."
        )
    if recipe.student.model is not None and Path(recipe.student.model).is_dir():
        refuse_other_tokenizer(recipe, Path(recipe.student.model), bound.teacher.folder)


def _open(recipe: Recipe) -> Store | None:
    """The store, None where its folder is still to be made."""
    folder = Path(recipe.storage.dir)
    return Store.open(folder) if folder.is_dir() and any(folder.iterdir()) else None


def _plan_data(recipe: Recipe, plan: Plan, store: Store | None) -> pa.Table:
    """The inputs, read from the store where they are recorded, else from the source."""
    data_id = plan.bound.binding.data_id
    inputs = store.inputs(data_id) if store else None
    if inputs is not None and store is not None:
        pending = _lost(store, inputs, plan.bound.binding.author_id if recipe.generate is None else None)
        rejected = int((store.inputs_about(data_id) or {})["rejected"])
        state: State = "to do" if pending else "done"
        line = StagePlan(name="data", state=state, pending=pending, rejected=rejected, committed=len(inputs) - pending)
        line.planned = len(inputs) + rejected
    else:
        inputs, rejected = survey(recipe)
        why = "the source or the data section changed" if store and store.files.names("inputs") else "new"
        planned = len(inputs) + rejected
        line = StagePlan(name="data", state="to do", planned=planned, pending=planned, why=why)
    plan.stages.append(line)
    return inputs


def _lost(store: Store, inputs: pa.Table, given_author: str | None) -> int:
    """Inputs whose prompts row, or whose rows of given text, the store no longer has."""
    prompts = set(store.index("prompts", ["key"])["key"].to_pylist())
    windows = given_rows(store, given_author) if given_author is not None else None
    wanted = zip(inputs["key"].to_pylist(), inputs["windows"].to_pylist(), strict=True)
    return sum(key not in prompts or (windows is not None and windows[key] < count) for key, count in wanted)


def _plan_generate(recipe: Recipe, plan: Plan, store: Store | None, inputs: pa.Table) -> bool:
    assert recipe.generate is not None
    binding = plan.bound.binding
    prompts = prompt_splits(inputs)
    if store is None:
        count = len(prompts) * recipe.generate.samples
        line = StagePlan(name="generate", state="to do", planned=count, pending=count, why=f"{count} new")
        line.tokens_to_do = count * recipe.generate.max_tokens
        line.bytes_to_do = line.tokens_to_do * GENERATION_BYTES
        plan.stages.append(line)
        return False
    ledger = generation_ledger(
        store,
        recipe,
        author_id=binding.author_id,
        prompts=prompts,
        context_tokens=binding.author_context_tokens,
    )
    line = _line("generate", ledger)
    line.tokens_to_do = line.pending * recipe.generate.max_tokens
    line.bytes_to_do = line.tokens_to_do * GENERATION_BYTES
    plan.stages.append(line)
    return not ledger.pending


def _line(name: str, ledger: Ledger, *, upstream: bool = True) -> StagePlan:
    why = _reasons(ledger.why, ledger.rejected)
    return StagePlan(
        name=name,
        state="to do" if ledger.pending else "done" if upstream else "waits",
        planned=ledger.planned,
        committed=len(ledger.committed),
        rejected=ledger.rejected.total(),
        pending=len(ledger.pending),
        tokens=ledger.tokens,
        why=why if upstream else ", ".join(part for part in (why, "more after the text") if part),
    )


def _reasons(why: Counter[str], rejected: Counter[str]) -> str:
    parts = [f"{count} {reason}" for reason, count in why.most_common()]
    return ", ".join(parts + [f"{count} rejected: {reason}" for reason, count in rejected.most_common()])


def _plan_score(recipe: Recipe, plan: Plan, store: Store | None, rows: list[dict[str, Any]], *, upstream: bool) -> bool:
    if store is None:
        plan.stages.append(StagePlan(name="score", state="waits", why="for the text"))
        return False
    binding = plan.bound.binding
    ledger, requests = target_ledger(
        store,
        recipe,
        teacher_id=binding.teacher_id,
        vocab_size=binding.vocab_size,
        generations=rows,
        limit=binding.context_tokens,
    )
    line = _line("score", ledger, upstream=upstream)
    line.tokens_to_do = sum(r.span_tokens for r in ledger.pending)
    line.bytes_to_do = sum(int(r.span_tokens * target_bytes(r)) for r in ledger.pending)
    plan.stages.append(line)
    ready = upstream and not ledger.pending
    if ready:
        _target_snapshots(recipe, plan, store, ledger, requests)
    return ready


def _target_snapshots(recipe: Recipe, plan: Plan, store: Store, ledger: Ledger, requests: list[TargetRequest]) -> None:
    """White-box: train and judge on soft targets."""
    done = [r for r in requests if r.reuse_key in ledger.committed]
    rows = [(r.split, r.prompt_key, ledger.committed[r.reuse_key]) for r in done]
    _snapshots(recipe, plan, store, "soft_targets", rows)


def _text_snapshots(recipe: Recipe, plan: Plan, store: Store, generations: list[dict[str, Any]]) -> None:
    """Black-box: train and judge on the generations themselves."""
    chosen = held_out_first(generations, recipe.evaluate.tokens)
    held_out = {r["token_ids"].tobytes() for r in chosen if r["split"] == "test"}
    chosen = [r for r in chosen if r["split"] == "test" or r["token_ids"].tobytes() not in held_out]
    rows = [(r["split"], r["prompt_key"], (r["shard"], r["row"])) for r in chosen]
    _snapshots(recipe, plan, store, "generations", rows)


def _snapshots(
    recipe: Recipe, plan: Plan, store: Store, table: TableName, rows: list[tuple[str, bytes, Place]]
) -> None:
    """Split rows into train, validation and test; no prompt that a pinned snapshot trains on is judged on."""
    validation = _validation_prompts(recipe, {prompt for split, prompt, _ in rows if split == "train"})
    pinned = _pinned_prompts(recipe, plan, store, table)
    places: dict[Split, dict[str, list[int]]] = {}
    for split, prompt, (shard, row) in rows:
        name: Split = "test" if split == "test" else "validation" if prompt in validation else "train"
        if name == "train" or prompt not in pinned:
            places.setdefault(name, {}).setdefault(shard, []).append(row)
    for name, by_shard in places.items():
        about = {"split": name, "teacher_id": plan.bound.binding.teacher_id}
        plan.snapshots[name] = make_snapshot(store, table, by_shard, about)


def _pinned_prompts(recipe: Recipe, plan: Plan, store: Store, table: TableName) -> set[bytes]:
    """Prompts in the snapshot that `train.snapshot` names; none if it names none."""
    if recipe.train.snapshot is None:
        return set()
    snapshot = load_snapshot(store, recipe.train.snapshot)
    teacher = snapshot.about.get("teacher_id")
    if snapshot.table != table or teacher != plan.bound.binding.teacher_id:
        raise UsageError(
            f"train.snapshot: {snapshot.id} holds {snapshot.table} of teacher {teacher}; this recipe trains on {table} "
            f"of {plan.bound.binding.teacher_id}. Name a snapshot of this teacher, or leave it out."
        )
    places = {shard.sha256: shard.rows for shard in snapshot.shards}
    return {row["prompt_key"] for row in store.rows(table, places, ["prompt_key"])}


def _validation_prompts(recipe: Recipe, prompts: set[bytes]) -> set[bytes]:
    """Prompts that training sets aside to validate on: those with the smallest hashes, a random sample."""
    if recipe.train.evaluate_every_tokens is None:
        return set()
    return set(sorted(prompts)[: recipe.train.validation_prompts])


def _plan_students(recipe: Recipe, plan: Plan, *, ready: bool) -> None:
    arms: list[Arm] = ["student", "baseline"] if recipe.evaluate.baseline and recipe.score else ["student"]
    names: dict[Arm, str] = {"student": "train", "baseline": "baseline"}
    pinned = recipe.train.snapshot
    snapshot = pinned or (plan.snapshots["train"].id if "train" in plan.snapshots else None)
    for arm in arms:
        if not ready or snapshot is None:
            why = "for the rows before it" if not ready else "for training rows: all were rejected or set aside"
            plan.stages.append(StagePlan(name=names[arm], state="waits", why=why))
            continue
        settings = train_settings(recipe, snapshot, arm)
        settings["student"]["identity"] = _student_identity(recipe, plan, settings)
        folder = Path(recipe.run.dir) / f"train-{content_id('train', **settings)[:8]}"
        plan.settings[arm], plan.train_dirs[arm] = settings, folder
        plan.stages.append(_student_line(names[arm], recipe, folder, settings))
    _plan_evaluate(recipe, plan)


def train_settings(recipe: Recipe, snapshot: str, arm: Arm) -> dict[str, Any]:
    """What decides a student: its hash names the folder, and a change in it is why a student is trained again."""
    loss = arm_loss(recipe, arm).model_dump(mode="json")
    if loss["soft_weight"] == 0:
        loss = {name: loss[name] for name in ("soft_weight", "hard_weight")}
    train = recipe.train.model_dump(
        mode="json", exclude={"snapshot", "checkpoint_every_seconds", "checkpoint_every_steps"}
    )
    return {
        "snapshot": snapshot,
        "student": recipe.student.model_dump(mode="json"),
        "loss": loss,
        "train": train,
        "run": {"seed": recipe.run.seed},
        "score": {"k": recipe.score.k} if recipe.score and arm == "student" else None,
    }


def _student_identity(recipe: Recipe, plan: Plan, settings: dict[str, Any]) -> str | None:
    """Of the student named now; where it is gone, of the one that a run with these settings began with."""
    try:
        return student_id(recipe, write=plan.write)
    except UsageError:
        for file in Path(recipe.run.dir).glob("train-*/settings.json"):
            begun = json.loads(file.read_text())["settings"]
            identity = begun["student"].pop("identity", None)
            if begun == settings:
                return str(identity)
        if plan.write:
            raise
        return None


def _student_line(name: str, recipe: Recipe, folder: Path, settings: dict[str, Any]) -> StagePlan:
    done = folder / "train.json"
    if done.is_file():
        facts = json.loads(done.read_text())
        return StagePlan(
            name=name, state="done", planned=facts["samples"], committed=facts["samples"], tokens=facts["tokens"]
        )
    if (folder / "settings.json").is_file():
        return StagePlan(name=name, state="to do", why="was interrupted: goes on from its last checkpoint")
    return StagePlan(name=name, state="to do", why=_what_changed(Path(recipe.run.dir), settings) or "new")


def _what_changed(run_dir: Path, settings: dict[str, Any]) -> str:
    """Against the nearest finished student of this run folder: the fields that differ."""
    differences = []
    for file in run_dir.glob("train-*/settings.json"):
        changes = changed_fields(json.loads(file.read_text())["settings"], settings)
        differences.append(changes)
    nearest = min(differences, key=len, default=[])
    return ", ".join(nearest[:4]) + (f" and {len(nearest) - 4} more" if len(nearest) > 4 else "")


def _plan_evaluate(recipe: Recipe, plan: Plan) -> None:
    if recipe.data.holdout == 0:
        return
    trained = [s for s in plan.stages if s.name in ("train", "baseline")]
    if any(s.state == "waits" for s in trained) or "test" not in plan.snapshots:
        lacks = "for held-out rows: all were rejected or left out"
        why = "for the student" if any(s.state == "waits" for s in trained) else lacks
        plan.stages.append(StagePlan(name="evaluate", state="waits", why=why))
        return
    test = plan.snapshots["test"]
    folders = {arm: path.name for arm, path in plan.train_dirs.items()}
    how = recipe.evaluate.model_dump(mode="json")
    references = plan.bound.binding.data_id if recipe.evaluate.generate else None
    plan.evaluation_id = content_id("evaluate", test=test.id, arms=folders, how=how, references=references)
    ready = all(s.state == "done" for s in trained)
    file = plan.train_dirs["student"] / "evaluation.json"
    if ready and file.is_file() and json.loads(file.read_text())["id"] == plan.evaluation_id:
        plan.stages.append(StagePlan(name="evaluate", state="done", planned=test.rows, committed=test.rows))
        return
    why = "" if ready else "the student is trained first"
    plan.stages.append(StagePlan(name="evaluate", state="to do", planned=test.rows, pending=test.rows, why=why))
