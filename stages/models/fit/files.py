"""The JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError


def read_json(path: Path, field: str, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Args:
        path: The file.
        field: The recipe's field, for messages.
        missing: What stands for it where there is no file; None: there must be one.

    Raises:
        UsageError: it is not there, or holds something else.
    """
    if not path.is_file() and missing is not None:
        return missing.copy()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{field}: {path} is not readable JSON ({error}). Save the model again."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"{field}: {path} holds {type(content).__name__}, expected an object. Save the model "
            "again."
        )
    return content
