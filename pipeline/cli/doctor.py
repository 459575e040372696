"""The command `doctor`: what this machine and a store can do."""

from typing import Annotated

import typer

from .app import AsJson, print_for_people, print_json


def doctor(
    store: Annotated[
        str | None,
        typer.Argument(metavar="[STORE]", help="Folder or URL of a store, there or to be made."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is installed, GPUs, engines; of a store its put-if-absent, speed and free space.

    A line each: ok, a warning (runs work, more slowly or without a part) or a fault (a run is
    impossible), what it means and what to do. Exit code 1 where there is a fault. What is tried in
    the store is in a folder that is removed again.
    """
    from ..doctor.examine import examine

    found = []
    for finding in examine(store):
        print_for_people(finding.line())
        found.append(finding)
    faults = sum(finding.state == "fault" for finding in found)
    print_json({"ok": not faults, "findings": [finding.json() for finding in found]}, as_json)
    if faults:
        raise typer.Exit(1)
