"""Forward passes over screened texts: each by itself, so that no row has padding."""

from dataclasses import replace
from typing import Any

from . import classification
from .classification import ClassPasses


def training_passes(model: Any, job: Any, **how: Any) -> ClassPasses:
    """Those of classification, as small as they get."""
    return replace(classification.training_passes(model, job, **how), tokens_per_pass=1)
