"""The teacher's features that a training needs, and what of the student is to match them."""

from typing import TYPE_CHECKING, Any

from ...storage.errors import UsageError
from ...storage.files.local import LocalFiles
from ...storage.snapshots.snapshot import Snapshot, load_snapshot
from ...storage.store.store import Store
from ..ledger.features import find_embeddings
from ..loader.features import FeatureSource, open_features
from ..loader.samples import Lengths
from ..recipe.features import EMBEDDINGS, embedding_bits, learnt
from ..recipe.sections import Loss, Train
from ..workers.job import Job

if TYPE_CHECKING:
    from ..losses.features.matching import Matching
    from ..losses.features.part import Part


def feature_snapshots(job: Job, loss: Loss, store: Store) -> list[Snapshot]:
    """The snapshot of features that a training reads; none where its loss compares with no rows."""
    if not loss.features or not learnt(loss.features, job.score.features):
        return []
    return [load_snapshot(store, job.features_id)]


def find_features(
    job: Job, loss: Loss, store: Store, samples: Snapshot, *, files: LocalFiles
) -> FeatureSource | None:
    """Where the teacher's features of these samples are; None where the loss needs none.

    Raises:
        UsageError: a sample has none.
    """
    found = feature_snapshots(job, loss, store)
    if not found:
        return None
    job.progress.say("finding the features of each sample")
    wanted = learnt(loss.features, job.score.features)
    return open_features(store, samples, found[0], wanted=wanted, files=files)


def make_matching(
    model: Any,
    job: Job,
    loss: Loss,
    source: FeatureSource | None,
    *,
    store: Store,
    longest: int,
) -> "Matching | None":
    """All that is matched, with its maps, where the model is; None: nothing is.

    Args:
        model: The student, on its device.
        job: Its recipe.
        loss: What the student minimises.
        source: The teacher's features of the samples; None: nothing of them is matched.
        store: Has the teacher's embeddings.
        longest: Tokens of the longest sample that is read.

    Raises:
        UsageError: the student does not show what is compared, or the teacher's embeddings are not
            in the store.
    """
    if not loss.features:
        return None
    from ..losses.features.matching import Matching, pairs_of, parts_of
    from ..targets.features.blocks import blocks_of
    from ..targets.features.capture import check_first_token
    from ..targets.features.shown import check_shown, glimpse

    parts, pairs = _embeddings(model, job, loss, store), []
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
    firsts = [p.student for p in pairs if "pooled_cls" in p.loss.needs]
    check_first_token(model, sorted(set(firsts)))
    matching.check(glimpse(model, matching.needs), longest)
    return matching.to(next(model.parameters()).device)


def _embeddings(model: Any, job: Job, loss: Loss, store: Store) -> "list[Part]":
    """A part for each entry that matches the teacher's embeddings."""
    from ..losses.features.embeddings import EmbeddingsPart, check_embeddings
    from ..targets.features.shown import embeddings_of

    numbers = [number for number, asked in enumerate(loss.features) if asked.match == EMBEDDINGS]
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


def group_notes(group: int | None, lengths: Lengths, train: Train) -> list[str]:
    """What the user is told of losses between samples, for samples of these lengths."""
    if group is None:
        return []
    mean = lengths.tokens / lengths.samples
    if 2 * mean > train.tokens_per_step:
        return [
            f"loss.features: samples have {mean:,.0f} tokens in the mean and train.tokens_per_step "
            f"is {train.tokens_per_step:,}: a step that holds one sample has no terms between "
            "samples. Raise it"
        ]
    of_step = min(int(train.tokens_per_step / mean), lengths.samples)
    notes = []
    if of_step < group:
        notes.append(
            f"loss.features: a step has about {of_step} samples, fewer than a group of {group}, so "
            f"groups are no larger. Set group to {of_step}, or raise train.tokens_per_step if "
            "there are more texts"
        )
    held = min(group, of_step) * mean
    if held <= train.tokens_per_pass:
        return notes
    return [
        *notes,
        f"loss.features: a group of {group} samples has about {held:,.0f} tokens, which is more "
        f"than train.tokens_per_pass ({train.tokens_per_pass:,}), and is read in one pass all the "
        "same",
    ]
