"""The results of a report, as a table and in words, bounds and errors named.

It also says which measures there are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ...stages.recipe.tasks import TASKS
from ...storage.words import counted
from ..printing.numbers import count, decimals, percent, significant
from ..printing.text import inline
from .blocks import Bullets, Section, Table

Results = Mapping[str, Mapping[str, Any]]

ARMS = {
    "teacher": "teacher",
    "student_before": "student before training",
    "baseline": "baseline (cross-entropy alone)",
    "student": "student (distilled)",
}
LINES = ARMS | {"difference": "student - baseline, seed by seed"}
"""Lines of a results table; the last one only over seeds."""


class Measure(NamedTuple):
    """A column of the results table; `{unit}` in a header is what a number is a mean over."""

    name: str
    header: str
    bound: str
    """What it is where targets are not full: exact there, a bound else."""
    short: str
    """Header on a terminal."""
    show: Callable[..., str]
    """A value and maybe its `error` as text."""


MEASURES = (
    Measure("accuracy", "top-1 accuracy", "", "accuracy", percent),
    Measure("cross_entropy", "cross-entropy (nats/{unit})", "", "cross-\nentropy", decimals),
    Measure("perplexity", "perplexity", "", "perplexity", significant),
    Measure(
        "kl_teacher",
        "KL to teacher (nats/{unit})",
        "KL to teacher, lower bound (nats/{unit})",
        "KL to\nteacher",
        decimals,
    ),
    Measure("acceptance", "acceptance", "acceptance, upper bound", "accept\nrate", percent),
    Measure("top1_agreement", "top-1 agreement", "", "top-1\nagree", percent),
    Measure("ece", "ECE", "", "ECE", partial(percent, places=2)),
    Measure("answers", "answers", "", "answers", partial(decimals, places=3)),
)


CLASS_MEASURES = (
    Measure("accuracy", "accuracy", "", "accuracy", percent),
    Measure("f1_macro", "macro F1", "", "macro F1", percent),
    Measure("entity_f1", "entity F1", "", "entity\nF1", percent),
    Measure("cross_entropy", "cross-entropy (nats/{unit})", "", "cross-\nentropy", decimals),
    Measure("kl_teacher", "KL to teacher (nats/{unit})", "", "KL to\nteacher", decimals),
    Measure("top1_agreement", "agreement with teacher", "", "agreement", percent),
    Measure("ece", "ECE", "", "ECE", partial(percent, places=2)),
)
"""The columns where classes are learnt."""

PAIRED = (
    ("accuracy", "accuracy", 100, 2, "points"),
    ("f1_macro", "macro F1", 100, 2, "points"),
    ("entity_f1", "entity F1", 100, 2, "points"),
    ("kl_teacher", "KL", 1, 4, "nats/{unit}"),
    ("cross_entropy", "cross-entropy", 1, 4, "nats/{unit}"),
    ("acceptance", "acceptance", 100, 2, "points"),
    ("top1_agreement", "agreement", 100, 2, "points"),
    ("ece", "ECE", 100, 2, "points"),
)
"""Differences that are printed: name, words, factor, decimals, unit."""


def measures(results: Iterable[Mapping[str, Any]]) -> list[Measure]:
    """The columns of a table of these results: what is known of any arm."""
    found = list(results)
    columns = CLASS_MEASURES if any("f1_macro" in r for r in found) else MEASURES
    return [m for m in columns if any(r.get(m.name) is not None for r in found)]


def unit_of(measured: Mapping[str, Any]) -> str:
    """What a number is a mean over, as a singular.

    `measured` is what an evaluation was measured on.
    """
    return str(measured.get("of", "tokens")).removesuffix("s")


def of_classes(measured: Mapping[str, Any]) -> bool:
    """Whether classes were answered, with a gold label or none."""
    return any(task.labelled and task.unit == unit_of(measured) for task in TASKS.values())


def result_headers(columns: Sequence[Measure], *, bound: bool, unit: str) -> list[str]:
    """Headers of the results table; what is only bounded is called so."""
    headers = [m.bound or m.header if bound else m.header for m in columns]
    return ["arm", *(header.format(unit=unit) for header in headers)]


def result_rows(results: Results, columns: Sequence[Measure]) -> list[list[str]]:
    """The results table: one line per arm of which anything is known."""
    return [[LINES[arm], *result_cells(results[arm], columns)] for arm in known_arms(results)]


def known_arms(results: Results) -> list[str]:
    """The arms, teacher first, without a teacher of whom nothing was stored."""
    return [
        arm for arm in LINES if arm in results and any(v is not None for v in results[arm].values())
    ]


def result_cells(
    result: Mapping[str, Any], columns: Sequence[Measure], *, errors: bool = True
) -> list[str]:
    """An arm's numbers as text; `errors` adds standard errors."""
    # The teacher's distance to itself is 0 by definition: its standard error of 0 says nothing.
    return [
        m.show(result.get(m.name), error=result.get(f"{m.name}_se") or None if errors else None)
        for m in columns
    ]


def results(evaluation: Mapping[str, Any], recipe: Mapping[str, Any]) -> Section:
    """The results table and how to read it."""
    columns, measured = measures(evaluation["results"].values()), evaluation["measured_on"]
    headers = result_headers(columns, bound=measured["kl_is_lower_bound"], unit=unit_of(measured))
    drawn = Table(headers, result_rows(evaluation["results"], columns), strong=ARMS["student"])
    unshared = evaluation["results"]["student"].get("unshared_mass") or 0.0
    notes = [
        *_measured_on(measured, unshared),
        *_paired(evaluation["differences"], measured),
        *_gradient(evaluation),
    ]
    notes += _sampled_otherwise(recipe)
    if evaluation["answers"]:
        notes.append(_answers(evaluation["answers"]))
    return Section("Results", [drawn, Bullets(notes)])


def _sampled_otherwise(recipe: Mapping[str, Any]) -> list[str]:
    """A caution where the text is no plain sample of the model that wrote it."""
    generate = recipe.get("generate") or {}
    temperature, top_p = generate.get("temperature", 1.0), generate.get("top_p", 1.0)
    if temperature == 1.0 and top_p == 1.0:
        return []
    return [
        f"The text was sampled at temperature {temperature}, top-p {top_p}: not as the "
        "probabilities of the model that wrote it say, so even a perfect copy of that model is not "
        "calibrated on it (ECE above 0)."
    ]


def _measured_on(measured: Mapping[str, Any], unshared: float) -> list[str]:
    bins = measured["ece_bins"]
    if of_classes(measured):
        whole = measured["rows"] == measured["tokens"]
        texts = "" if whole else f" of {counted(measured['rows'], 'text')}"
        over = "" if whole else " over texts"
        return [
            f"Measured on {count(measured['tokens'])} held-out {measured['of']}{texts}"
            f"{_with_label(measured)}; ± is one standard error{over}. Cross-entropy is with the "
            "gold labels, KL(teacher || student) exact. ECE: expected calibration error of the "
            f"most likely class, {bins} equal-width bins. All of it is at temperature 1."
        ]
    hidden = unit_of(measured) == TASKS["masked_lm"].unit
    guessed = "token where one is hidden" if hidden else "next token"
    notes = [
        f"Measured on {count(measured['tokens'])} held-out {measured.get('of', 'tokens')} "
        f"({counted(measured['rows'], 'row')} "
        f"of {counted(measured['prompts'], 'prompt')}); ± is one standard error over prompts. "
        f"Cross-entropy is on the text that is there{_HIDDEN if hidden else ''}. ECE: expected "
        f"calibration error of the most likely {guessed}, {bins} equal-width bins."
    ]
    if measured["reference"] is None:
        return [
            f"{notes[0]} No teacher distribution was stored (no `score` section), so there is no "
            "KL."
        ]
    about = (
        "Acceptance: how often the teacher accepts a token that the arm proposes in speculative "
        "decoding, which is 1 - total variation. "
    )
    if measured["kl_is_lower_bound"]:
        about += (
            f"KL(teacher || student) and acceptance are over the teacher's {count(measured['k'])} "
            "best tokens and one bucket for all others: a lower bound of the KL, an upper bound "
            "of the acceptance."
        )
    else:
        about += "KL(teacher || student) and acceptance are exact, over the whole vocabulary."
    if unshared:
        how = (
            "are in the bucket"
            if measured["kl_is_lower_bound"]
            else "are left out of the KL, the teacher renormalised"
        )
        about += (
            f" Tokens that the student lacks hold {unshared:.2g} of the teacher's probability and "
            f"{how}."
        )
    return [*notes, about]


_HIDDEN = (
    " where tokens are hidden, the same ones from every arm, and the perplexity is of these alone"
)


def _with_label(measured: Mapping[str, Any]) -> str:
    labelled = measured.get("labelled", measured["tokens"])  # before there was it, all had one
    if labelled == measured["tokens"]:
        return " with a gold label"
    if not labelled:
        return (
            ", of which none has a gold label: only how close to the teacher a student is is known"
        )
    return (
        f", of which {count(labelled)} have a gold label: accuracy, F1, cross-entropy and ECE are "
        "on those, the others on all"
    )


def _paired(differences: Results, measured: Mapping[str, Any]) -> list[str]:
    """The student minus each other arm, token by token on the same rows."""
    lines, labelled = [], of_classes(measured)
    for arm, difference in differences.items():
        parts = [
            f"{words} {decimals(scale * difference[name], places, error=error and scale * error)} "
            f"{unit}"
            for name, words, scale, places, unit in PAIRED
            for error in [difference.get(f"{name}_se")]
            if name in difference and not (labelled and name == "acceptance")
        ]
        parts = [part.format(unit=unit_of(measured)) for part in parts]
        lines.append(f"Student minus {ARMS[arm]}, paired: {', '.join(parts)}.")
    return lines


def _gradient(evaluation: Mapping[str, Any]) -> list[str]:
    """How far the recipe's targets turn the gradient of the soft loss."""
    found = {arm: turned for arm, turned in (evaluation.get("gradient") or {}).items() if turned}
    if not found:
        return []
    parts = [
        f"{ARMS[arm]} {decimals(turned['angle_degrees'], 2)} degrees, "
        f"{decimals(turned['norm_ratio'], 3)} of its length"
        for arm, turned in found.items()
    ]
    tokens = next(iter(found.values()))["tokens"]
    measured = evaluation["measured_on"]
    best = f"the teacher's {count(measured['k'])} best tokens, renormalised"
    whole = best if measured["kl_is_lower_bound"] else "the whole distribution"
    return [
        f"Gradient of the soft loss on {count(tokens)} held-out tokens, with the recipe's targets "
        f"against {whole}: {'; '.join(parts)}. (0 degrees and 1 is a student that is taught all "
        "that the teacher says.)"
    ]


def _answers(answers: Mapping[str, Any]) -> str:
    pattern = f" ({inline(answers['pattern'])})" if answers["pattern"] else ""
    form = answers.get("normalize", "none")
    return (
        f"Answers: {answers['metric']}{pattern}, 0 to 1, of greedy answers (at most "
        f"{count(answers['max_tokens'])} tokens) to {count(answers['prompts'])} held-out prompts, "
        f"against {answers['against']}.{_FORMS[form]}{_no_number(answers.get('no_number', {}))}"
        f"{_unanswered(answers.get('unanswered', {}))}"
    )


def _no_number(found: Mapping[str, int]) -> str:
    """Who gave texts that have no number, and how many."""
    named = [f"{LINES.get(who, who)} {count(texts)}" for who, texts in found.items() if texts]
    return f" Answers without a number count as wrong: {', '.join(named)}." if named else ""


def _unanswered(found: Mapping[str, Sequence[str]]) -> str:
    """With whose texts the pattern came to no end, and of which prompts."""
    named = [
        f"{LINES.get(who, who)} {count(len(keys))} ({', '.join(key[:8] for key in keys[:_NAMED])}"
        f"{', ...' if len(keys) > _NAMED else ''})"
        for who, keys in found.items()
    ]
    said = f" Texts that the pattern came to no end with count as unanswered: {', '.join(named)}."
    return said if named else ""


_NAMED = 5  # prompts, of each arm
_FORMS = {
    "none": "",
    "text": " Compared without case, punctuation and English articles.",
    "number": " Compared as numbers.",
}
"""How answers were made alike before they were compared."""


def by_teacher(report: Mapping[str, Any]) -> Section | None:
    """Of several teachers: who each is, its share, and every arm on the texts asked of it."""
    found = report["evaluation"].get("teachers")
    if not found:
        return None
    recipe, stages = report["settings"].get("recipe", {}), report["facts"].get("stages") or {}
    scored = {name: stages.get(f"score/{name}", {}) for name in found}
    whole = sum(stage.get("tokens") or 0 for stage in scored.values())
    said = {one["name"]: one for one in recipe.get("teachers") or ()}
    who = [_teacher(name, said.get(name, {}), scored[name], whole=whole) for name in found]
    headers = "teacher, model, licence, weight, asked for, texts, tokens, share, kept mass".split(
        ", "
    )
    arms = [result for one in found.values() for result in one["arms"].values()]
    columns = measures(arms)
    on = report["evaluation"]["measured_on"]
    of_route, *others = result_headers(columns, bound=on["kl_is_lower_bound"], unit=unit_of(on))
    rows = [
        [inline(name), LINES[arm], count(result["tokens"]), *result_cells(result, columns)]
        for name, one in found.items()
        for arm, result in one["arms"].items()
    ]
    about = (
        "Each teacher by itself, on the held-out texts that its `where` takes. The results above "
        "are over all held-out texts; KL and agreement there are means over the teachers of each "
        "text, by their weights at the end of the training. What is no mean, the teachers' ECE "
        "say, is that of each text's first teacher."
    )
    tables = [
        Table(headers, who, text_columns=5),
        Table(["teacher", of_route, "held-out", *others], rows, 2),
    ]
    return Section("By teacher", [*tables, Bullets([about])])


def _teacher(
    name: str, said: Mapping[str, Any], scored: Mapping[str, Any], *, whole: int
) -> list[str]:
    """Who a teacher is, what it was asked for, and its part of all scored tokens."""
    kept = [kind["kept_mass"] for kind in (scored.get("kept") or {}).values() if kind["kept_mass"]]
    weight = said.get("weight", 1.0)
    budget = said.get("budget_tokens")
    asked = [inline(said["where"])] if said.get("where") else []
    asked += [f"at most {count(budget)} tokens"] if budget else []
    tokens = scored.get("tokens") or 0
    return [
        inline(name),
        inline(said.get("model", "")),
        inline(said["license"]) if said.get("license") else "not stated",
        str(weight) if not isinstance(weight, Mapping) else f"{weight['start']} to {weight['end']}",
        ", ".join(asked) or "everything",
        count(scored.get("rows")),
        count(tokens),
        percent(tokens / whole if whole else None),
        decimals(min(kept, default=None), 4),
    ]
