"""The matrix as tables, and in one line."""

from collections.abc import Iterable
from typing import Any

Cells = dict[str, dict[str, dict[str, Any]]]
"""By column and fault."""
HEAD = ("lost", "exit code", "then", "processes left", "files left", "after vacuum")


def report(cells: Cells, faults: Iterable[str]) -> str:
    """One table of all verdicts, then one table for each command."""
    lines = [_row("", *cells), _row("---", *["---"] * len(cells))]
    lines += [_row(fault, *(_short(of.get(fault)) for of in cells.values())) for fault in faults]
    for column, of in cells.items():
        unit = next((cell["unit"] for cell in of.values() if "unit" in cell), "")
        lines += ["", f"## {column}", "", _row("", *HEAD, f"{unit} made again", "says")]
        lines.append(_row("---", *["---:"] * len(HEAD), "---:", "---"))
        lines += [_row(fault, *_numbers(cell)) for fault, cell in of.items()]
    return "\n".join(lines)


def _row(*entries: object) -> str:
    return f"| {' | '.join(str(entry) for entry in entries)} |"


def _short(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    verdict = str(cell["verdict"]).partition(":")[0]
    return f"right, {cell['code']}" if verdict == "right" else verdict


def _numbers(cell: dict[str, Any]) -> list[object]:
    if "lost" not in cell:
        return [*[""] * (len(HEAD) + 1), cell["verdict"]]
    said = cell["said"] if cell["verdict"] == "right" else f"{cell['said']} **{cell['verdict']}**"
    left = len(cell["processes_left"]), cell["files_left"], len(cell["files_left_after_vacuum"])
    codes = [cell["code"], *cell["others"]]
    told = " ".join(said.replace("|", "\\|").split())
    return [
        cell["lost"], ", ".join(map(str, codes)), cell["again_code"], *left, cell["again"], told
    ]  # fmt: skip


def totals(cells: Cells) -> dict[str, Any]:
    """What the last line says."""
    every = [cell for of in cells.values() for cell in of.values()]
    verdicts = [cell["verdict"].partition(":")[0] for cell in every]
    return {
        "cells": len(every),
        "right": verdicts.count("right"),
        "does_not_apply": verdicts.count("does not apply"),
        "lost": sum(cell.get("lost", 0) for cell in every),
        "wrong": {
            f"{cell['column']}/{cell['fault']}": cell["verdict"]
            for cell in every
            if cell["verdict"].partition(":")[0] not in ("right", "does not apply")
        },
        "by_column": cells,
    }
