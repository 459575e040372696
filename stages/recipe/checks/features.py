"""Whether features can be captured and matched, as far as the recipe alone says it."""

from collections import Counter

from ..features import EMBEDDINGS, captured, layers_of
from ..fields import extremes
from ..sections import Loss, Score

CAPTURES = "hf"
"""The engine whose forward pass shows what a teacher's blocks hand on."""


def check_captured(score: Score) -> list[tuple[str, str]]:
    """What is wrong with `score.features`: (dotted path, message)."""
    path = "score.features"
    if not score.features:
        return []
    errors = []
    if score.engine != CAPTURES:
        message = f"engine {score.engine!r} shows no states of blocks. Use {CAPTURES!r}, or leave them out"
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
    errors = []
    stored = score.features if score is not None else []
    for number, asked in enumerate(loss.features):
        path = f"loss.features.{number}"
        layers = layers_of(stored, asked.kind)
        if asked.kind not in {request.what for request in stored}:
            where = "" if asked.kind == EMBEDDINGS else ", layers: [...]"
            message = (
                f"match {asked.match!r} needs {asked.kind} of the teacher, which score.features "
                f"does not store. Add score.features: [{{what: {asked.kind}{where}}}]"
            )
            errors.append((path, message))
        elif isinstance(asked.layers, dict):
            errors += _not_stored(f"{path}.layers", sorted(asked.layers), layers)
        if extremes(asked.weight)[1] == 0:
            errors.append(
                (f"{path}.weight", "is 0 throughout. Set it above 0, or remove the entry")
            )
    return errors


def _not_stored(path: str, asked: list[int], stored: list[int]) -> list[tuple[str, str]]:
    lacking = [layer for layer in asked if layer not in stored]
    if not lacking:
        return []
    message = (
        f"{_listed(lacking)} of the teacher {'is' if len(lacking) == 1 else 'are'} not stored; "
        f"score.features has {_listed(stored)}. Add what lacks there, or match those"
    )
    return [(path, message)]


def _listed(layers: list[int]) -> str:
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
