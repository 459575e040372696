"""Who answered for an author that is an endpoint.

There is a record for each model and fingerprint, beside the author's identity.
"""

from ..files.base import Files
from ..keys import content_id, seal, unseal

SERVED = "served-"
"""Begins the names of these records, in the folder of the author."""


def note_served(files: Files, author_id: str, served: str, *, day: str) -> bool:
    """Write down who answered, and the day on which that was seen first; whether it is new.

    Args:
        files: Of the store.
        author_id: Identity of the endpoint.
        served: The model's own name, and its fingerprint where it has one.
        day: As 2026-11-30.
    """
    name = f"teachers/{author_id}/{SERVED}{content_id('served', served=served)}.json"
    return files.put_if_absent(name, seal({"served": served, "since": day}))


def served_by(files: Files, author_id: str) -> dict[str, str]:
    """Everybody who answered for an author, and since which day, the earliest first."""
    folder = f"teachers/{author_id}"
    records = [
        unseal(files.read(f"{folder}/{name}"), name)
        for name in files.names(folder)
        if name.startswith(SERVED)
    ]
    found = {str(record["served"]): str(record["since"]) for record in records}
    return dict(sorted(found.items(), key=lambda pair: (pair[1], pair[0])))
