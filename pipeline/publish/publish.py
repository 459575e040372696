"""`publish`: export with every licence stated, and on to the Hub where that is the destination."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...storage.errors import UsageError
from ...storage.files.base import user_cache
from .export import PublishRequest, export

HUB = "hf://datasets/"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def publish(
    request: PublishRequest, destination: str, *, say: Callable[[str], None], private: bool = False
) -> dict[str, Any]:
    """Export with every licence given.

    It reaches the Hub by way of a folder in the user's cache, which a resumed upload uses.

    Args:
        request: What to publish.
        destination: A folder, or hf://datasets/USER/NAME.
        say: Told what is being done.
        private: Make the repository private where it is not there yet; refuse one that is public.

    Returns:
        For `--json`.

    Raises:
        UsageError, IntegrityError: as `export`.
        StillroomError: the Hub refused, or did not answer.
    """
    if "://" not in destination:
        return export(request, Path(destination), say=say, strict=True).to_json()
    repo = destination.removeprefix(HUB).strip("/")
    if not destination.startswith(HUB) or not _REPO.fullmatch(repo):
        raise UsageError(
            f"{destination}: name a folder, or a dataset of the Hub as {HUB}USER/NAME."
        )
    from .hub import upload

    folder = user_cache() / "publish" / repo.replace("/", "--")
    exported = export(request, folder, say=say, strict=True, repo=repo)
    url = upload(exported, repo, say=say, private=private)
    return exported.to_json() | {"url": url}
