"""A composite model's config and its parts: the one about text, and all of them."""

from collections.abc import Mapping
from typing import Any


def text_config(config: Any) -> Any:
    """The part of a config that is about text."""
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config


def parts_of(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs inside a config.json, by name."""
    return {
        name: part
        for name, part in config.items()
        if isinstance(part, dict) and "model_type" in part
    }
