"""A composite model's config and its parts: the one about text, and all of them."""

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a config that is about text."""
    try:
        return config.get_text_config()
    except ValueError:  # it has several
        return config
