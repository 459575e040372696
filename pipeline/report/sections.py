"""The sections of a report, each made from a part of `report.json`. None: nothing is known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...stages.recipe.divergences import DIVERGENCES
from ...stages.recipe.features import (
    DTYPES,
    EMBEDDINGS,
    FEATURES,
    MATCHES,
    FeatureRequest,
    captured,
    embedding_bits,
)
from ...stages.recipe.kinds import KINDS
from ...storage.tables.kinds import STRUCTURES
from ..plan.lineage import endpoint_teacher
from ..printing.numbers import count, decimals, duration, percent, teacher_layers
from ..printing.text import inline
from . import figures
from .blocks import Block, Figures, Sample, Samples, Section, Table, Text, Tokens
from .results import ARMS
from .token_view import rows_of

CURVE_POINTS = 10


def what_was_run(report: Mapping[str, Any]) -> Section | None:
    """Models, data, targets, loss and tokens, one line each."""
    recipe = report["settings"].get("recipe", {})
    train = report["train"]["student"]
    if not recipe:
        return None
    student, data, loss = recipe["student"], recipe["data"], recipe["loss"]
    score, generate = recipe.get("score"), recipe.get("generate")
    rows = [
        *_teachers(recipe),
        ["student", begins_as(student)],
        ["student's parameters", count(train.get("parameters"))],
        ["data", f"{inline(data['source'])}, format {data['format']}"],
        ["text", _written_by(generate)],
        ["targets", _stored(score) if score else "none: text only (black-box)"],
        ["loss", _loss(loss, score) if score else "cross-entropy"],
        *([["divergence", _equation(loss)]] if score else []),
        *(_features(loss, score) if score else []),
        ["trained on", _trained_on(train)],
        *(["note", inline(note)] for note in report["facts"].get("notes", ())),
        *(["note", inline(note)] for note in train.get("notes", ())),
    ]
    return Section("What was run", [Table(["", ""], rows, text_columns=2)])


def _teachers(recipe: Mapping[str, Any]) -> list[list[str]]:
    several = recipe.get("teachers") or ()
    if (author := endpoint_teacher(recipe)) is not None:
        lends = teacher_words(recipe["teacher"])
        return [["teacher", f"{inline(author)}, behind an endpoint, in the tokens of {lends}"]]
    if not several:
        return [["teacher", teacher_words(recipe["teacher"])]]
    return [[f"teacher {inline(one['name'])}", teacher_words(one)] for one in several]


def teacher_words(teacher: Mapping[str, Any]) -> str:
    """A teacher as the recipe names it, and how it is quantised while it is loaded."""
    how = teacher.get("quantize")
    return inline(teacher["model"]) + (f" (quantised to {how})" if how else "")


def student_of(recipe: Mapping[str, Any]) -> str:
    """Whom a student has learnt from, as the recipe names them."""
    if (author := _whose_text(recipe)) is not None:
        return inline(author)
    return " and ".join(map(teacher_words, recipe.get("teachers") or [recipe["teacher"]]))


def _whose_text(recipe: Mapping[str, Any]) -> str | None:
    """The model whose text or endpoint taught, where the recipe's teacher only reads; else None."""
    if recipe.get("score") is not None:
        return endpoint_teacher(recipe)
    return (recipe.get("generate") or {}).get("model")


def taught_by(recipe: Mapping[str, Any]) -> str:
    """Short names of the teachers, or of the other model whose text or endpoint taught alone."""
    models = [one["model"] for one in recipe.get("teachers") or [recipe["teacher"]]]
    if (author := _whose_text(recipe)) is not None:
        models = [author]
    return " and ".join(Path(model).name for model in models)


def begins_as(student: Mapping[str, Any]) -> str:
    """What a student starts from: a model, layers of the teacher, or fresh weights of what."""
    if student.get("model"):
        return inline(student["model"])
    if student.get("factory"):
        said = ", ".join(f"{inline(n)} {inline(v)}" for n, v in (student.get("args") or {}).items())
        return f"fresh weights of {inline(student['factory'])}" + (f", with {said}" if said else "")
    config, layers = student.get("config") or {}, student.get("from_teacher_layers")
    said = ", ".join(f"{inline(n)} {value}" for n, value in config.items() if n != "model_type")
    if layers:
        start = f"starts from {teacher_layers(layers)}"
        return f"{start}, with {said}" if said else start
    if "model_type" not in config:
        return f"fresh weights, the teacher's config with {said}"
    return f"fresh weights of a {config['model_type']}" + (f", with {said}" if said else "")


def _written_by(generate: Mapping[str, Any] | None) -> str:
    if generate is None:
        return "as given in the data"
    who = inline(generate["model"]) if generate.get("model") else "the teacher"
    return (
        f"written by {who}, {generate['samples']} per prompt, temperature {generate['temperature']}"
    )


def _stored(score: Mapping[str, Any]) -> str:
    return KINDS[score["targets"]].words.format(**score)


def _loss(loss: Mapping[str, Any], score: Mapping[str, Any]) -> str:
    how = [f"temperature {scheduled(loss['temperature'])}"]
    if STRUCTURES[score["targets"]].has_tail:
        how.append(f"tail {loss['tail']}")
    how += [f"{name} {loss[name]}" for name in DIVERGENCES[loss["divergence"]].parameters]
    soft, hard = (scheduled(loss[name]) for name in ("soft_weight", "hard_weight"))
    features = "".join(f" + {_matched(asked)}" for asked in loss.get("features") or ())
    if loss.get("teachers", "sum") != "sum":
        how.append(f"from the teachers' {loss['teachers']}")
    if loss.get("teacher_weights", "fixed") != "fixed":
        how.append(f"teachers weighed at each token by {loss['teacher_weights']}")
    return f"{soft} x {loss['divergence']} ({', '.join(how)}) + {hard} x cross-entropy{features}"


def _matched(asked: Mapping[str, Any]) -> str:
    """An entry of `loss.features`."""
    layers = asked["layers"]
    if isinstance(layers, Mapping):
        layers = ", ".join(f"{teacher} to {student}" for teacher, student in layers.items())
    settings = MATCHES[asked["match"]].settings
    how = ", ".join(_setting(asked, name) for name in settings if name in asked)
    where = [] if asked["match"] == EMBEDDINGS else [f"layers {layers}"]
    how = ", ".join(filter(None, [how, *where]))
    return f"{scheduled(asked['weight'])} x {asked['match']}" + (f" ({how})" if how else "")


def _setting(asked: Mapping[str, Any], name: str) -> str:
    """A setting of a match for people: a word as it is, of others the name too."""
    value = asked[name]
    if name == "distance":
        return str(value)
    words = (
        ", ".join(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    )
    return f"{name.replace('_', ' ')} {words}"


def _features(loss: Mapping[str, Any], score: Mapping[str, Any]) -> list[list[str]]:
    """What is stored besides targets, and the equations of what is matched of it."""
    asked = [FeatureRequest.model_validate(one) for one in score.get("features") or ()]
    said = [f"{one.words} ({one.dtype})" for one in captured(asked)]
    if bits := embedding_bits(asked):
        said.append(f"{FEATURES[EMBEDDINGS].words} ({DTYPES[bits]}, once)")
    rows = [["features", ", ".join(said)]] if said else []
    matched = {(f["match"], f.get("distance", "")) for f in loss.get("features") or ()}
    for name, distance in sorted(matched):
        kind = MATCHES[name]
        equation = kind.distances.get(distance, kind.equation)
        what = f"{equation}, t the teacher's, s the student's"
        what += " after its map" if distance else ""
        rows.append([", ".join(filter(None, (name, distance))), inline(f"{what} ({kind.source})")])
    return rows


def _equation(loss: Mapping[str, Any]) -> str:
    kind = DIVERGENCES[loss["divergence"]]
    return f"{inline(kind.equation)}, t the teacher, p the student ({kind.source})"


def scheduled(setting: float | Mapping[str, Any]) -> str:
    """A number, or where a schedule starts and ends."""
    if not isinstance(setting, Mapping):
        return str(setting)
    if setting["shape"] != "wsd":
        return f"({setting['shape']}: {setting['start']} to {setting['end']})"
    return (
        f"(wsd: {setting['start']} to {setting['peak']} in {setting['warmup_fraction']} of the "
        f"tokens, to {setting['end']} in the last {setting['decay_fraction']})"
    )


def _trained_on(train: Mapping[str, Any]) -> str:
    return (
        f"{count(train.get('tokens'))} tokens ({count(train.get('scored_tokens'))} scored), "
        f"{count(train.get('steps'))} steps, {decimals(train.get('epochs'), 2)} epochs, "
        f"{duration(train.get('seconds'), places=1)}, {count(train.get('tokens_per_second'))} "
        f"tokens/s{_rate_of(train)}"
    )


def _rate_of(train: Mapping[str, Any]) -> str:
    """MFU with what it is measured against; nothing where a run does not know."""
    if not (peak := train.get("peak")):
        return ""
    mfu, padding, waited = (
        decimals(100 * train[name], 1) for name in ("mfu", "padding_share", "waited_share")
    )
    return f" ({mfu} % of {peak['of']}; padding {padding} %, waiting for data {waited} %)"


def training(trained: Mapping[str, Mapping[str, Any]], *, of: str) -> Section | None:
    """Loss parts and learning rate over tokens, of all arms. `of`: losses are per token or text."""
    numbers = [found for arm, train in trained.items() if (found := curve(arm, train))]
    if not numbers:
        return None
    named = [(figures.LEGEND[arm], arm, trained[arm]) for arm in ARMS if arm in trained]
    return Section("Training", [Figures(figures.losses(named, of=of), numbers)])


def curve(arm: str, train: Mapping[str, Any]) -> Section | None:
    """The training of one arm in ten lines, and its validation if there was any."""
    points = [*(train.get("history") or []), *(train.get("validation") or [])]
    features = [*points[0].get("features", {})] if points else []
    headers = ["tokens", "loss", "divergence", "cross-entropy", *map(spelled, features)]
    blocks: list[Block] = []
    if history := thinned(train.get("history") or []):
        moving = [
            name for name in ("soft_weight", "hard_weight", "temperature") if name in history[0]
        ]
        rows = [
            [
                *_losses(point, features),
                f"{point['learning_rate']:.2e}",
                *(decimals(point[name], 3) for name in moving),
            ]
            for point in history
        ]
        blocks.append(
            Table([*headers, "learning rate", *(name.replace("_", " ") for name in moving)], rows)
        )
        if "temperature" in moving:
            blocks.append(
                Text(
                    "The divergence is that at the temperature of its line, times the "
                    "temperature squared."
                )
            )
    if validation := thinned(train.get("validation") or []):
        blocks.append(
            Section(
                f"Validation: {ARMS[arm]}",
                [Table(headers, [_losses(point, features) for point in validation])],
            )
        )
    return Section(f"Training: {ARMS[arm]}", blocks) if blocks else None


def spelled(pair: str) -> str:
    """The name of a pair of layers that is matched, for people."""
    return pair.replace("_", " ")


def _losses(point: Mapping[str, Any], features: Sequence[str]) -> list[str]:
    matched = point.get("features", {})
    return [
        count(point["tokens"]),
        *(decimals(point.get(name)) for name in ("loss", "soft", "hard")),
        *(decimals(matched.get(name)) for name in features),
    ]


def thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ten points, evenly spaced, first and last among them."""
    last = len(history) - 1
    if last < CURVE_POINTS:
        return history
    return [history[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]


def distance(evaluation: Mapping[str, Any]) -> Section | None:
    """Where the students are off: by position, and by how well their confidence is calibrated."""
    panels: list[Any] = []
    numbers: list[Block] = []
    about = (evaluation.get("views") or {}).get("by_position")
    if about and (
        panel := figures.by_position(
            [(figures.LEGEND[arm], arm, arm, about) for arm in about["arms"]]
        )
    ):
        panels.append(panel)
        numbers.append(Section(panel.title, [_by_position(about)]))
    if reliability := {arm: bins for arm, bins in evaluation["reliability"].items() if bins}:
        panels.append(figures.reliability(reliability))
        numbers.append(Section("Reliability", [_reliability(reliability)]))
    if not panels:
        return None
    notes = []
    by_position = len(panels) > bool(reliability)
    if by_position:
        notes.append("Bands by position are two standard errors over prompts.")
    if reliability:
        notes.append(
            f"Bins with less than {percent(figures.RARE)} of the tokens are left out of the "
            "diagram."
        )
    title = (
        ("By position, and calibration" if reliability else "By position")
        if by_position
        else "Calibration"
    )
    return Section(title, [Figures(panels, numbers), Text(" ".join(notes))])


def _by_position(about: Mapping[str, Any]) -> Table:
    arms = about["arms"]
    first = next(iter(arms.values()))
    rows = [
        [name, count(first[n]["tokens"])]
        + [decimals(bins[n]["mean"], error=bins[n]["se"]) for bins in arms.values()]
        for n, name in enumerate(figures.position_names(about["edges"], len(first)))
        if first[n]["tokens"]
    ]
    return Table(["position", "tokens", *(ARMS[arm] for arm in arms)], rows)


def _reliability(reliability: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    edges = sorted({b["up_to"] for bins in reliability.values() for b in bins})
    cells = {
        (
            arm,
            b["up_to"],
        ): f"{percent(b['confidence'])} / {percent(b['accuracy'])} ({count(b['tokens'])})"
        for arm, bins in reliability.items()
        for b in bins
    }
    rows = [
        [decimals(edge, 3), *(cells.get((arm, edge), "-") for arm in reliability)] for edge in edges
    ]
    return Table(
        [
            "confidence up to",
            *(f"{ARMS[arm]}: confidence / accuracy (number)" for arm in reliability),
        ],
        rows,
    )


def held_out(evaluation: Mapping[str, Any]) -> Section | None:
    """What the held-out text is like: kept mass, entropy, lengths."""
    views = evaluation.get("views") or {}
    panels, numbers = [], []
    for panel, table in figures.distributions(views, evaluation["measured_on"]):
        panels.append(panel)
        numbers.append(Section(panel.title, [table]))
    return Section("The held-out text", [Figures(panels, numbers)]) if panels else None


def tokens(evaluation: Mapping[str, Any]) -> Section | None:
    """A few held-out rows token by token."""
    rows = [row for row in rows_of(evaluation) if row.arms]
    if not rows:
        return None
    bound = ", a lower bound" if evaluation["measured_on"]["kl_is_lower_bound"] else ""
    about = (
        f"Held-out text, each token coloured by KL(teacher || student) at its position{bound}: "
        "what the model says before it sees the token."
    )
    return Section(
        "Token by token", [Text(about), Tokens(rows, {arm: ARMS[arm] for arm in rows[0].arms})]
    )


def samples(evaluation: Mapping[str, Any]) -> Section | None:
    """Answers of all arms to a few held-out prompts."""
    found = []
    for sample in evaluation["samples"]:
        # Where there is no gold answer the reference is the teacher's text, shown once.
        same = sample.get("reference") == sample.get("teacher")
        named = {"reference": "reference", **ARMS}
        texts = [
            (words, sample[name])
            for name, words in named.items()
            if sample.get(name) is not None and not (name == "reference" and same)
        ]
        found.append(Sample(sample["prompt"], texts))
    return Section("Samples", [Samples(found)]) if found else None


def title(report_settings: Mapping[str, Any]) -> str:
    """Who was distilled into whom."""
    recipe = report_settings.get("recipe")
    if not recipe:
        return "Distillation report"
    student, layers = (recipe["student"].get(name) for name in ("model", "from_teacher_layers"))
    fresh = f"{len(layers)} of its layers" if layers else "a fresh student"
    name = Path(student).name if student else fresh
    return f"{taught_by(recipe)} distilled into {name}"
