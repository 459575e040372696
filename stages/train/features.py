"""The teacher's features that a training needs, and what of the student is to match them."""

from typing import TYPE_CHECKING, Any

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ..ledger.features import find_embeddings
from ..loader.features import FeatureSource, open_features
from ..recipe.features import EMBEDDINGS, embedding_bits, learnt
from ..recipe.sections import Loss
from ..workers.job import Job

if TYPE_CHECKING:
    from ..losses.features.matching import Matching
    from ..losses.features.part import Part


def find_features(
    job: Job, loss: Loss, store: Store, samples: Snapshot, *, files: LocalFiles
) -> FeatureSource | None:
    """Where the teacher's features of these samples are; None where the loss needs none.

    Raises:
        UsageError: a sample has none.
    """
    if not loss.features or not (wanted := learnt(loss.features, job.score.features)):
        return None
    job.progress.say("finding the features of each sample")
    features = load_snapshot(store, job.features_id)
    return open_features(store, samples, features, wanted=wanted, files=files)


def make_matching(
    model: Any, job: Job, loss: Loss, source: FeatureSource | None, *, store: Store
) -> "Matching | None":
    """All that is matched, with its maps, where the model is; None: nothing is.

    Args:
        model: The student, on its device.
        job: Its recipe.
        loss: What the student minimises.
        source: The teacher's features of the samples; None: nothing of them is matched.
        store: Has the teacher's embeddings.

    Raises:
        UsageError: the student does not show what is compared, or the teacher's embeddings are not
            in the store.
    """
    if not loss.features:
        return None
    from ..losses.features.matching import Matching, pairs_of, parts_of
    from ..targets.features.blocks import blocks_of
    from ..targets.features.shown import check_shown

    parts = _embeddings(model, job, loss, store)
    if source is not None:
        pairs = pairs_of(loss.features, job.score.features, student_blocks=len(blocks_of(model)))
        known = {
            "layouts": source.layouts(),
            "student_width": model.config.get_text_config().hidden_size,
            "seed": job.recipe.run.seed,
        }
        parts += [part for pair in pairs for part in parts_of(pair, **known)]
    matching = Matching(parts)
    check_shown(model, matching.needs)
    return matching.to(next(model.parameters()).device)


def _embeddings(model: Any, job: Job, loss: Loss, store: Store) -> "list[Part]":
    """A part for each entry that matches the teacher's embeddings."""
    from ..losses.features.embeddings import EmbeddingsPart, check_embeddings
    from ..targets.features.shown import embeddings_of

    numbers = [number for number, asked in enumerate(loss.features) if asked.kind == EMBEDDINGS]
    bits = embedding_bits(job.score.features)
    if not numbers or bits is None:
        return []
    kept = find_embeddings(store, job.teacher_id, bits)
    if kept is None:
        raise UsageError(
            f"loss.features: the store has no embeddings of the teacher {job.teacher_id}. Run the "
            "recipe up to `score`."
        )
    mine = embeddings_of(model)
    check_embeddings(mine)
    teacher, seed = store.matrix(kept.id), job.recipe.run.seed
    return [EmbeddingsPart(teacher, mine.shape[1], asked=n, seed=seed) for n in numbers]
