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
    TargetRequest,
    generation_ledger,
    prompt_splits,
    selected_generations,
    target_ledger,
)
from ..stages.sections import Recipe
from ..storage.keys import content_id
from ..storage.snapshot import Snapshot, make_snapshot
from ..storage.store import Store
from .binding import Bound, bind, student_id
from .recipe import changed_fields

State = Literal["done", "to do", "waits"]
STAGES = ("data", "generate", "score", "train", "baseline", "evaluate")


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
    why: str = ""


@dataclass(kw_only=True, slots=True)
class Plan:
    """All lines, and what the stages need to know of one another."""

    bound: Bound
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
    plan = Plan(bound=bind(recipe, write=write))
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
    _plan_students(recipe, plan, ready=upstream, student=student_id(recipe, write=write))
    return plan


def _open(recipe: Recipe) -> Store | None:
    return Store.open(recipe.storage.dir) if (Path(recipe.storage.dir) / "STORE.json").is_file() else None


def _plan_data(recipe: Recipe, plan: Plan, store: Store | None) -> pa.Table:
    """The inputs, read from the store where they are recorded, else from the source."""
    data_id = plan.bound.binding.data_id
    inputs = store.inputs(data_id) if store else None
    if inputs is not None and store is not None:
        there = set(store.index("prompts", ["key"])["key"].to_pylist())
        pending = sum(key not in there for key in inputs["key"].to_pylist())
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


def _plan_generate(recipe: Recipe, plan: Plan, store: Store | None, inputs: pa.Table) -> bool:
    assert recipe.generate is not None
    binding = plan.bound.binding
    prompts = prompt_splits(inputs)
    if store is None:
        count = len(prompts) * recipe.generate.samples
        plan.stages.append(StagePlan(name="generate", state="to do", planned=count, pending=count, why=f"{count} new"))
        return False
    ledger = generation_ledger(
        store,
        recipe,
        author_id=binding.author_id,
        prompts=prompts,
        context_tokens=binding.author_context_tokens,
    )
    plan.stages.append(_line("generate", ledger))
    return not ledger.pending


def _line(name: str, ledger: Ledger, *, upstream: bool = True) -> StagePlan:
    return StagePlan(
        name=name,
        state="to do" if ledger.pending else "done" if upstream else "waits",
        planned=ledger.planned,
        committed=len(ledger.committed),
        rejected=ledger.rejected.total(),
        pending=len(ledger.pending),
        tokens=ledger.tokens,
        why=_reasons(ledger.why, ledger.rejected),
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
    plan.stages.append(_line("score", ledger, upstream=upstream))
    ready = upstream and not ledger.pending
    if ready:
        _target_snapshots(recipe, plan, store, ledger, requests)
    return ready


def _target_snapshots(recipe: Recipe, plan: Plan, store: Store, ledger: Ledger, requests: list[TargetRequest]) -> None:
    done = [r for r in requests if r.reuse_key in ledger.committed]
    validation = _validation_prompts(recipe, {r.prompt_key for r in done if r.split == "train"})
    splits: dict[Split, list[tuple[str, int]]] = {}
    for request in done:
        split: Split = "test" if request.split == "test" else "train"
        split = "validation" if request.prompt_key in validation and split == "train" else split
        splits.setdefault(split, []).append(ledger.committed[request.reuse_key])
    _snapshots(plan, store, "soft_targets", splits)


def _text_snapshots(recipe: Recipe, plan: Plan, store: Store, rows: list[dict[str, Any]]) -> None:
    """Black-box: train and judge on the generations themselves."""
    validation = _validation_prompts(recipe, {r["prompt_key"] for r in rows if r["split"] == "train"})
    splits: dict[Split, list[tuple[str, int]]] = {}
    budget = recipe.evaluate.tokens
    for row in sorted(rows, key=lambda r: (r["prompt_key"], r["key"])):
        split: Split = "test" if row["split"] == "test" else "train"
        split = "validation" if row["prompt_key"] in validation and split == "train" else split
        if split == "test" and budget <= 0:
            continue
        budget -= row["completion_tokens"] if split == "test" else 0
        splits.setdefault(split, []).append((row["shard"], row["row"]))
    _snapshots(plan, store, "generations", splits)


def _validation_prompts(recipe: Recipe, prompts: set[bytes]) -> set[bytes]:
    """Prompts that training sets aside to validate on: those with the smallest hashes, a random sample."""
    if recipe.train.evaluate_every_tokens is None:
        return set()
    return set(sorted(prompts)[: recipe.train.validation_prompts])


def _snapshots(plan: Plan, store: Store, table: Any, splits: dict[Split, list[tuple[str, int]]]) -> None:
    for split, places in splits.items():
        by_shard: dict[str, list[int]] = {}
        for shard, row in places:
            by_shard.setdefault(shard, []).append(row)
        about = {"split": split, "teacher_id": plan.bound.binding.teacher_id}
        plan.snapshots[split] = make_snapshot(store, table, by_shard, about)


def _plan_students(recipe: Recipe, plan: Plan, *, ready: bool, student: str | None) -> None:
    arms: list[Arm] = ["student", "baseline"] if recipe.evaluate.baseline and recipe.score else ["student"]
    names: dict[Arm, str] = {"student": "train", "baseline": "baseline"}
    pinned = recipe.train.snapshot
    snapshot = pinned or (plan.snapshots["train"].id if "train" in plan.snapshots else None)
    for arm in arms:
        if not ready or snapshot is None:
            why = "for the rows before it" if not ready else "no training rows: all were rejected or held out"
            plan.stages.append(StagePlan(name=names[arm], state="waits", why=why))
            continue
        settings = train_settings(recipe, snapshot, arm, student=student)
        folder = Path(recipe.run.dir) / f"train-{content_id('train', **settings)[:8]}"
        plan.settings[arm], plan.train_dirs[arm] = settings, folder
        plan.stages.append(_student_line(names[arm], recipe, folder, settings))
    _plan_evaluate(recipe, plan)


def train_settings(recipe: Recipe, snapshot: str, arm: Arm, *, student: str | None) -> dict[str, Any]:
    """What decides a student: its hash names the folder, and a change in it is why a student is trained again."""
    loss = recipe.loss.model_dump(mode="json")
    if arm == "baseline" or recipe.score is None:
        loss = {"soft_weight": 0.0, "hard_weight": 1.0 if arm == "baseline" else recipe.loss.hard_weight}
    train = recipe.train.model_dump(
        mode="json", exclude={"snapshot", "checkpoint_every_seconds", "checkpoint_every_steps"}
    )
    return {
        "snapshot": snapshot,
        "student": recipe.student.model_dump(mode="json") | {"identity": student},
        "loss": loss,
        "train": train,
        "run": {"seed": recipe.run.seed},
        "score": {"k": recipe.score.k} if recipe.score and arm == "student" else None,
    }


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
    if "test" not in plan.snapshots or any(s.state == "waits" for s in trained):
        plan.stages.append(StagePlan(name="evaluate", state="waits", why="for the student"))
        return
    test = plan.snapshots["test"]
    folders = {arm: path.name for arm, path in plan.train_dirs.items()}
    plan.evaluation_id = content_id("evaluate", test=test.id, arms=folders, how=recipe.evaluate.model_dump())
    file = plan.train_dirs["student"] / "evaluation.json"
    if all(s.state == "done" for s in trained) and file.is_file():
        if json.loads(file.read_text()).get("id") == plan.evaluation_id:
            plan.stages.append(StagePlan(name="evaluate", state="done", planned=test.rows, committed=test.rows))
            return
    why = "" if all(s.state == "done" for s in trained) else "the student is trained first"
    plan.stages.append(StagePlan(name="evaluate", state="to do", planned=test.rows, pending=test.rows, why=why))
