"""The sections of a report: Markdown, each made from one part of `report.json`; empty where nothing is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .markdown import count, decimals, duration, fenced, inline, size, table
from .report_results import ARMS

CURVE_POINTS = 10


def what_was_run(report: Mapping[str, Any]) -> str:
    """Models, data, targets, loss and tokens, one line each."""
    recipe = report["settings"].get("recipe", {})
    train = report["train"]["student"]
    if not recipe:
        return ""
    teacher, student, data, loss = recipe["teacher"], recipe["student"], recipe["data"], recipe["loss"]
    score, generate = recipe.get("score"), recipe.get("generate")
    fresh = f"fresh weights, the teacher's config with {inline(student['config'])}"
    rows = [
        ["teacher", inline(teacher["model"])],
        ["student", inline(student["model"]) if student.get("model") else fresh],
        ["student's parameters", count(train.get("parameters"))],
        ["data", f"{inline(data['source'])}, format {data['format']}"],
        ["text", _author(generate)],
        ["targets", _kept(score) if score else "none: text only (black-box)"],
        ["loss", _loss(loss, score) if score else "cross-entropy"],
        ["trained on", _trained_on(train)],
    ]
    return "## What was run\n\n" + table(["", ""], rows, text_columns=2)


def _author(generate: Mapping[str, Any] | None) -> str:
    if generate is None:
        return "as given in the data"
    who = inline(generate["model"]) if generate.get("model") else "the teacher"
    return f"written by {who}, {generate['samples']} per prompt, temperature {generate['temperature']}"


def _kept(score: Mapping[str, Any]) -> str:
    entries = f"{score['k']} entries per position"
    return {
        "topk": f"topk, {entries}",
        "topp": f"topp, mass {score.get('p')} in at most {entries}",
        "sampled": f"sampled, {score.get('rounds')} draws per position ({score.get('draw')})",
        "full": "full, the whole distribution",
    }[score["targets"]]


_PARAMETERS = {
    "skew_forward_kl": "skew",
    "skew_reverse_kl": "skew",
    "jsd": "jsd_weight",
    "alpha_beta": "alpha_beta",
    "adaptive_kl": "head_mass",
}
"""Divergence -> the field of the recipe that it has for itself."""


def _loss(loss: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    how = [f"temperature {scheduled(loss['temperature'])}"]
    if score["targets"] in ("topk", "topp"):
        how.append(f"tail {loss['tail']}")
    if own := _PARAMETERS.get(loss["divergence"]):
        how.append(f"{own} {loss[own]}")
    soft, hard = (scheduled(loss[name]) for name in ("soft_weight", "hard_weight"))
    return f"{soft} x {loss['divergence']} ({', '.join(how)}) + {hard} x cross-entropy"


def scheduled(setting: float | Mapping[str, Any]) -> str:
    """A number, or where a schedule starts and ends."""
    if not isinstance(setting, Mapping):
        return str(setting)
    if setting["shape"] != "wsd":
        return f"({setting['shape']}: {setting['start']} to {setting['end']})"
    return (
        f"(wsd: {setting['start']} to {setting['peak']} in {setting['warmup_fraction']} of the tokens, to "
        f"{setting['end']} in the last {setting['decay_fraction']})"
    )


def _trained_on(train: Mapping[str, Any]) -> str:
    return (
        f"{count(train.get('tokens'))} tokens ({count(train.get('scored_tokens'))} scored), "
        f"{count(train.get('steps'))} steps, {decimals(train.get('epochs'), 2)} epochs, "
        f"{duration(train.get('seconds'))}, {count(train.get('tokens_per_second'))} tokens/s"
    )


def curve(arm: str, train: Mapping[str, Any]) -> str:
    """The training of one arm in ten lines, and its validation if there was any."""
    headers = ["tokens", "loss", "divergence", "cross-entropy"]
    parts = []
    if history := thinned(train.get("history") or []):
        moving = [name for name in ("soft_weight", "hard_weight", "temperature") if name in history[0]]
        rows = [
            [*_losses(point), f"{point['learning_rate']:.2e}", *(decimals(point[name], 3) for name in moving)]
            for point in history
        ]
        named = [*headers, "learning rate", *(name.replace("_", " ") for name in moving)]
        parts += [f"## Training: {ARMS[arm]}", table(named, rows)]
        if "temperature" in moving:
            parts.append("The divergence is that at the temperature of its line, times the temperature squared.")
    if validation := thinned(train.get("validation") or []):
        parts += [f"### Validation: {ARMS[arm]}", table(headers, [_losses(point) for point in validation])]
    return "\n\n".join(parts)


def _losses(point: Mapping[str, Any]) -> list[str]:
    return [count(point["tokens"]), *(decimals(point.get(name)) for name in ("loss", "soft", "hard"))]


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ten points, evenly spaced, first and last among them."""
    last = len(history) - 1
    if last < CURVE_POINTS:
        return history
    return [history[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]


def stages(facts: Mapping[str, Any]) -> str:
    """Time and bytes of each stage."""
    reasons = facts.get("rejects") or {}
    if not facts.get("stages"):
        return ""
    rows = [
        [
            name,
            count(stage.get("rows")),
            count(stage.get("tokens")),
            count(stage.get("rejected")) + (f" ({reasons[name]})" if name in reasons else ""),
            size(stage.get("bytes")),
            decimals(stage.get("bytes_per_token"), 1),
            duration(stage.get("seconds")),
            count(stage.get("tokens_per_second")),
        ]
        for name, stage in facts["stages"].items()
    ]
    headers = ["stage", "rows", "tokens", "rejected", "bytes", "bytes/token", "time", "tokens/s"]
    note = "Rows and tokens are this run's; bytes and time are those of the whole store, which runs share."
    return f"## Time and bytes\n\n{table(headers, rows)}\n\n{note}"


def samples(evaluation: Mapping[str, Any]) -> str:
    """Answers of all arms to a few held-out prompts."""
    parts = []
    for number, sample in enumerate(evaluation["samples"], 1):
        parts.append(f"### Prompt {number}\n\n{fenced(sample['prompt'])}")
        # Where there is no gold answer the reference is the teacher's text, shown once.
        same = sample.get("reference") == sample.get("teacher")
        named = {"reference": "reference", **ARMS}
        for name, words in named.items():
            if sample.get(name) is not None and not (name == "reference" and same):
                parts.append(f"{words}:\n\n{fenced(sample[name])}")
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def provenance(report: Mapping[str, Any]) -> str:
    """Where every number can be traced to."""
    facts, measured = report["facts"], report["evaluation"]["measured_on"]
    machine, versions = facts.get("machine"), facts.get("versions") or {}
    lines = {
        "teacher id": report["settings"].get("teacher_id"),
        "training snapshot": report["train"]["student"].get("snapshot"),
        "held-out snapshot": measured["snapshot"],
        "store": facts.get("store"),
        "training run": report["train_dir"],
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "machine": ", ".join(f"{k}: {v}" for k, v in machine.items()) if isinstance(machine, Mapping) else machine,
    }
    listed = "\n".join(f"- {name}: {inline(value)}" for name, value in lines.items() if value)
    recipe = report["settings"].get("recipe")
    as_yaml = fenced(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(), "yaml") if recipe else ""
    return "\n\n".join(part for part in ("## Provenance", listed, as_yaml) if part)


def title(report_settings: Mapping[str, Any]) -> str:
    """Who was distilled into whom."""
    recipe = report_settings.get("recipe")
    if not recipe:
        return "Distillation report"
    student = recipe["student"].get("model")
    return (
        f"{Path(recipe['teacher']['model']).name} distilled into {Path(student).name if student else 'a fresh student'}"
    )
