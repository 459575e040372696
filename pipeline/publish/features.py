"""Which of the teacher's features an export takes along, and what its card says of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ...stages.ledger.features import embeddings_name, find_embeddings
from ...stages.recipe.features import DTYPES, EMBEDDINGS, embedding_bits, learnt
from ...stages.recipe.sections import Recipe
from ...storage.errors import UsageError
from ...storage.published.choice import FeatureChoice, WantedFeature
from ...storage.published.manifest import Manifest
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.features import ERRORS, projected_to, what_and_how
from ..printing.numbers import count, size
from ..printing.text import cell, inline, table


def chosen_features(
    store: Store,
    snapshot: Snapshot,
    recipe: Recipe | None,
    *,
    asked: bool | None,
    columns: Sequence[str] = (),
) -> FeatureChoice | None:
    """What goes along; None: nothing, as of a store without features.

    Args:
        store: That is exported.
        snapshot: Of the rows; says whose they are.
        recipe: Whose rows they are, if one was named.
        asked: True: all that the store has of these texts; False: nothing; None: what the recipe's
            student learns from.
        columns: Of other tables that were chosen; features leave whole or not at all.

    Raises:
        UsageError: features are asked for and cannot go along.
    """
    scored, teacher_id = snapshot.table == "soft_targets", str(snapshot.about.get("teacher_id", ""))
    if asked and (columns or not scored):
        why = "features leave whole, not by --columns" if columns else "nothing was scored"
        raise UsageError(f"--features: {why}. Leave one of them out.")
    if asked is None and recipe is not None and not columns and scored:
        return _of_student(store, recipe, teacher_id)
    if not asked:
        return None
    names = [embeddings_name(teacher_id, dtype) for dtype in DTYPES.values()]
    matrices = tuple(name for name in names if store.matrix_named(name) is not None)
    if not store.commits("features") and not matrices:
        raise UsageError(
            f"--features: {store.root} holds none. Leave it out, or capture some first."
        )
    return FeatureChoice(rows=None, matrices=matrices)


def _of_student(store: Store, recipe: Recipe, teacher_id: str) -> FeatureChoice | None:
    """What the recipe's student learns from."""
    if recipe.score is None or recipe.train is None or not recipe.loss.features:
        return None
    rows = tuple(
        WantedFeature(kind=one.kind, layer=one.layer, dtypes=one.dtypes)
        for one in learnt(recipe.loss.features, recipe.score.features)
    )
    bits = embedding_bits(recipe.score.features)
    kept = None
    if bits is not None and any(loss.match == EMBEDDINGS for loss in recipe.loss.features):
        kept = find_embeddings(store, teacher_id, bits)
    names = [] if kept is None else [embeddings_name(teacher_id, str(kept.about["dtype"]))]
    return FeatureChoice(rows=rows, matrices=tuple(names))


ABOUT = (
    "What the teacher's layers say of a text, at each of its tokens (`vectors` of them) or once "
    "for all: one row is one text and one layer. `text_key` is that of the text's row in "
    "`soft_targets`. `values` are `vectors` times `width` numbers of the type `dtype`, one vector "
    "after another, little endian; where there is a `scale`, a vector's numbers are multiplied by "
    "its own. Layer i is what block i hands on, the first being 0, before any norm that follows "
    "the last. The error of rounding is sqrt(sum (x' - x)^2 / sum x^2), x' as read back."
)
PROJECTED = (
    " Where there is a `projection`, the teacher's vectors x of `projected_from` numbers were made "
    "narrower by the matrix P of that name: what is stored is x P, whose products are those of x "
    "in the mean, and x P P^T times `width` / `projected_from` is what it says of x. By how much P "
    "moves the cosines between the tokens of a text is its error: the root of the mean square over "
    "all pairs."
)
_HEADERS = (
    "what",
    "split",
    "rows",
    "vectors",
    "numbers each",
    "bytes",
    "error, mean",
    "error, most",
    "projection, mean",
    "projection, most",
)


def features_about(manifest: Manifest) -> str:
    """What a row of `features` is, and what there is of each kind and layer."""
    kinds = [
        (split, name, one)
        for split, found in manifest.statistics.items()
        for name, one in _kinds(found).items()
    ]
    projected = any("projection_error" in one for *_, one in kinds)
    errors = ERRORS if projected else ERRORS[:1]
    rows = [
        [
            inline(name),
            cell(split),
            count(one["rows"]),
            count(one["vectors"]),
            count(one["width"]),
            size(one["bytes"]),
            *(
                f"{one[of][which]:.2e}" if of in one else ""
                for of in errors
                for which in ("mean", "most")
            ),
        ]
        for split, name, one in kinds
    ]
    headers = _HEADERS if projected else _HEADERS[:-2]
    about = ABOUT + (PROJECTED if projected else "")
    return f"{about}\n\n{table(list(headers), rows, text_columns=2)}"


def matrices_about(manifest: Manifest) -> list[str]:
    """A line for each matrix: what it is, where, and how it is read."""
    found = []
    for name, about in manifest.about.get("matrices", {}).items():
        place = inline(f"{manifest.version}/{name}")
        said = "a matrix that rows name in `projection`"
        if about.get("what") == "projection":
            said = (
                f"the matrix by which vectors of {count(about['width'])} numbers became "
                f"{count(about['to'])}: rows name it in `projection`"
            )
        if about.get("what") == EMBEDDINGS:
            rows, columns = about["shape"]
            said = (
                f"the teacher's input embeddings, {count(rows)} ids of {count(columns)} numbers in "
                f"{inline(about['dtype'])}, off by {about['rounding_error']:.2e} in all. They are "
                "a part of the teacher's weights, and its licence is theirs"
            )
        found.append(f"{place}: {said}. `numpy.load` reads it.")
    return found


def asked_for(manifest: Manifest) -> list[dict[str, Any]]:
    """`score.features` of a recipe that trains from the folder."""
    bits = {name: number for number, name in DTYPES.items()}
    kinds = {name for found in manifest.statistics.values() for name in _kinds(found)}
    found: list[dict[str, Any]] = []
    for name in sorted(kinds):
        kind, *layer, dtype = name.split(" ")
        what, how = what_and_how(kind)
        one = {"what": what, "layers": [int(part) for part in layer], "bits": bits[dtype]}
        if to := projected_to(kind):
            one["project"] = to
        elif how:
            one["pooling"] = how
        found.append(one)
    for about in manifest.about.get("matrices", {}).values():
        if about.get("what") == EMBEDDINGS:
            found.append({"what": EMBEDDINGS, "bits": bits[about["dtype"]]})
    return found


def _kinds(found: Mapping[str, Any]) -> Mapping[str, Any]:
    kinds: Mapping[str, Any] = found.get("features", {}).get("kinds", {})
    return kinds
