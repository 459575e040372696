"""Whether features can be captured and matched, as far as the recipe alone says it."""

from collections import Counter
from collections.abc import Sequence

from ....storage.tables.features import projected_to, what_and_how
from ..features import EMBEDDINGS, FeatureRequest, captured, layers_for, layers_of
from ..fields import extremes
from ..kinds import HF, Score
from ..sections import Loss
from ..tasks import TASKS


def check_captured(score: Score, task: str) -> list[tuple[str, str]]:
    """What is wrong with `score.features`: (dotted path, message)."""
    path = "score.features"
    if not score.features:
        return []
    errors = []
    if score.named_engine not in (None, HF):
        message = (
            f"engine {score.engine!r} shows no states of blocks. Use {HF!r}, or leave them out"
        )
        errors.append((path, message))
    if not TASKS[task].labelled and any(asked.pooling == "cls" for asked in score.features):
        message = (
            "pooling 'cls' is the state of the first token, which in a causal model sees no other. "
            "Use 'last' or 'mean'"
        )
        errors.append((path, message))
    counts = Counter((f.kind, f.layer) for f in captured(score.features))
    errors += [
        (path, f"{kind} of layer {layer} is asked for {count} times. Ask once")
        for (kind, layer), count in counts.items()
        if count > 1
    ]
    if [request.what for request in score.features].count(EMBEDDINGS) > 1:
        errors.append((path, "embeddings are asked for more than once. Ask once"))
    return errors


def check_matched(loss: Loss, score: Score | None) -> list[tuple[str, str]]:
    """What is wrong with `loss.features`: (dotted path, message)."""
    errors = _groups(loss)
    stored = score.features if score is not None else []
    for number, asked in enumerate(loss.features):
        path = f"loss.features.{number}"
        lacking = [kind for kind in asked.needs if not _is_stored(stored, kind)]
        if lacking:
            added = ", ".join(f"{{{_as_asked(kind)}}}" for kind in lacking)
            message = (
                f"match {asked.match!r} needs {' and '.join(lacking)} of the teacher, which "
                f"score.features does not store. Add score.features: [{added}]"
            )
            errors.append((path, message))
        elif isinstance(asked.layers, dict):
            for kind in asked.needs:
                layers = layers_of(stored, kind)
                errors += _not_stored(f"{path}.layers", kind, sorted(asked.layers), layers)
        elif asked.match != EMBEDDINGS and not layers_for(asked, stored):
            message = (
                f"match {asked.match!r} needs {' and '.join(asked.needs)} of one layer, and "
                "score.features stores them of none together. Name a layer for each"
            )
            errors.append((path, message))
        if extremes(asked.weight)[1] == 0:
            errors.append(
                (f"{path}.weight", "is 0 throughout. Set it above 0, or remove the entry")
            )
    return errors


def _groups(loss: Loss) -> list[tuple[str, str]]:
    groups = sorted({f.group for f in loss.features if "group" in f.kind.settings})
    if len(groups) < 2:
        return []
    message = (
        f"groups of {' and '.join(map(str, groups))} samples: a pass holds whole groups, of one "
        "size. Give all entries the same `group`"
    )
    return [("loss.features", message)]


def _is_stored(stored: Sequence[FeatureRequest], kind: str) -> bool:
    """Whether there is some of a kind."""
    if kind == EMBEDDINGS:
        return any(request.what == kind for request in stored)
    return bool(layers_of(stored, kind))


def _as_asked(kind: str) -> str:
    """What `score.features` says of a kind."""
    what, how = what_and_how(kind)
    if what == EMBEDDINGS:
        return f"what: {what}"
    field = "project" if projected_to(kind) else "pooling"
    return f"what: {what}" + (f", {field}: {how}" if how else "") + ", layers: [...]"


def _not_stored(path: str, kind: str, asked: list[int], stored: list[int]) -> list[tuple[str, str]]:
    lacking = [layer for layer in asked if layer not in stored]
    if not lacking:
        return []
    message = (
        f"{kind} of {_listed(lacking)} of the teacher {'is' if len(lacking) == 1 else 'are'} not "
        f"stored; score.features has {_listed(stored)}. Add what lacks there, or match those"
    )
    return [(path, message)]


def _listed(layers: list[int]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
