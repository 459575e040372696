"""The key of an endpoint: out of the environment, and never shown."""

import os

from ...storage.credentials import hide
from ...storage.errors import UsageError
from ..recipe.engines import Generate


def api_key(generate: Generate) -> str | None:
    """The key that a recipe's endpoint asks for; None: it asks for none.

    Raises:
        UsageError: the environment variable is not set.
    """
    name = generate.api_key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UsageError(
            f"generate.api_key_env: the environment variable {name} is not set, or is empty. Put "
            "the endpoint's key into it."
        )
    hide({key: f"${{{name}}}"}, {})
    return key
