"""The sections of a report: Markdown, each made from one part of `report.json`; empty where nothing is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .markdown import count, decimals, duration, fenced, inline, percent, significant, size, table

Results = Mapping[str, Mapping[str, Any]]

ARMS = {
    "teacher": "teacher",
    "student_before": "student before training",
    "baseline": "baseline (cross-entropy alone)",
    "student": "student (distilled)",
}
CURVE_POINTS = 10


def has_answers(results: Results) -> bool:
    """Whether any arm's answers were scored."""
    return any(r.get("answers") is not None for r in results.values())


def result_headers(*, answers: bool, bound: bool) -> list[str]:
    """Headers of the results table; a KL that is only bounded from below is called so."""
    kl = "KL to teacher, lower bound (nats/token)" if bound else "KL to teacher (nats/token)"
    headers = ["arm", "cross-entropy (nats/token)", "perplexity", kl, "top-1 agreement", "ECE"]
    return headers + ["answers"] * answers


def result_rows(results: Results, *, answers: bool) -> list[list[str]]:
    """The results table: one line per arm of which anything is known."""
    return [[ARMS[arm], *result_cells(results[arm], answers=answers)] for arm in known_arms(results)]


def known_arms(results: Results) -> list[str]:
    """The arms, teacher first, without a teacher of whom nothing was stored."""
    return [arm for arm in ARMS if arm in results and any(v is not None for v in results[arm].values())]


def result_cells(result: Mapping[str, Any], *, answers: bool, errors: bool = True) -> list[str]:
    """An arm's numbers as text; `errors` adds standard errors."""

    def with_error(name: str) -> str:
        # The teacher's distance to itself is 0 by definition: its standard error of 0 says nothing.
        return decimals(result[name], error=result.get(f"{name}_se") or None if errors else None)

    row = [
        with_error("cross_entropy"),
        significant(result["perplexity"]),
        with_error("kl_teacher"),
        percent(result["top1_agreement"]),
        percent(result["ece"], 2),
    ]
    return row + [decimals(result.get("answers"), 3)] * answers


def results(evaluation: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The results table and how to read it."""
    answers, measured = has_answers(evaluation["results"]), evaluation["measured_on"]
    headers = result_headers(answers=answers, bound=measured["kl_is_lower_bound"])
    drawn = table(headers, result_rows(evaluation["results"], answers=answers))
    unshared = evaluation["results"]["student"].get("unshared_mass") or 0.0
    notes = [_measured_on(measured, unshared), *_paired(evaluation["differences"]), *_sampled_otherwise(recipe)]
    if answers:
        notes.append(_answers(evaluation["answers"]))
    return "\n\n".join(["## Results", drawn, "\n".join(f"- {note}" for note in notes)])


def _sampled_otherwise(recipe: Mapping[str, Any]) -> list[str]:
    """A caution where the text is no plain sample of its author."""
    generate = recipe.get("generate") or {}
    temperature, top_p = generate.get("temperature", 1.0), generate.get("top_p", 1.0)
    if temperature == 1.0 and top_p == 1.0:
        return []
    return [
        f"The text was sampled at temperature {temperature}, top-p {top_p}: not as its author's probabilities say, so "
        "even a perfect copy of the author is not calibrated on it (ECE above 0)."
    ]


def _measured_on(measured: Mapping[str, Any], unshared: float) -> str:
    bins = measured["ece_bins"]
    about = (
        f"Measured on {count(measured['tokens'])} held-out tokens ({count(measured['rows'])} rows of "
        f"{count(measured['prompts'])} prompts); ± is one standard error over prompts. Cross-entropy is on the text "
        f"that is there. ECE: expected calibration error of the most likely next token, {bins} equal-width bins."
    )
    if measured["reference"] is None:
        return f"{about} No teacher distribution was stored (no `score` section), so there is no KL."
    if measured["kl_is_lower_bound"]:
        about += (
            f" KL(teacher || student) is over the teacher's {count(measured['k'])} best tokens and one bucket for all "
            "others: a lower bound."
        )
    else:
        about += " KL(teacher || student) is exact, over the whole vocabulary."
    if unshared:
        how = "are in the bucket" if measured["kl_is_lower_bound"] else "are left out, the teacher renormalised"
        about += f" Tokens that the student lacks hold {unshared:.2g} of the teacher's probability and {how}."
    return about


def _paired(differences: Results) -> list[str]:
    """The student minus each other arm, token by token on the same rows."""
    lines = []
    for arm, difference in differences.items():
        parts = [
            f"{words} {decimals(difference[name], error=difference[f'{name}_se'])}"
            for name, words in (("kl_teacher", "KL"), ("cross_entropy", "cross-entropy"))
            if name in difference
        ]
        lines.append(f"Student minus {ARMS[arm]}, paired: {', '.join(parts)} nats/token.")
    return lines


def _answers(answers: Mapping[str, Any]) -> str:
    pattern = f" ({inline(answers['pattern'])})" if answers["pattern"] else ""
    return (
        f"Answers: {answers['metric']}{pattern}, 0 to 1, of greedy answers (at most {count(answers['max_tokens'])} "
        f"tokens) to {count(answers['prompts'])} held-out prompts, against {answers['against']}."
    )


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
        [
            "targets",
            f"{score['targets']}, {score['k']} entries per position" if score else "none: text only (black-box)",
        ],
        ["loss", _loss(loss) if score else "cross-entropy"],
        ["trained on", _trained_on(train)],
    ]
    return "## What was run\n\n" + table(["", ""], rows, text_columns=2)


def _author(generate: Mapping[str, Any] | None) -> str:
    if generate is None:
        return "as given in the data"
    who = inline(generate["model"]) if generate.get("model") else "the teacher"
    return f"written by {who}, {generate['samples']} per prompt, temperature {generate['temperature']}"


def _loss(loss: Mapping[str, Any]) -> str:
    divergence = (
        f"{loss['soft_weight']} x {loss['divergence']} (temperature {loss['temperature']}, tail {loss['tail']})"
    )
    return f"{divergence} + {loss['hard_weight']} x cross-entropy"


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
        rows = [[*_losses(point), f"{point['learning_rate']:.2e}"] for point in history]
        parts += [f"## Training: {ARMS[arm]}", table([*headers, "learning rate"], rows)]
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
