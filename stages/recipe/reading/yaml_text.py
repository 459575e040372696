"""YAML that others wrote, read within bounds.

The bounds are on aliases that stand for one another without end, on depth and on size.

PyYAML shares what an alias names, so a file of few lines may hold billions of values, or itself.
The bounds are counted on its events, before anything is made of them, as if each alias were written
out.
"""

from typing import Any

import yaml

MOST_CHARACTERS = 2 << 20
MOST_VALUES = 20_000
"""Written out: keys, values, lists and mappings."""
MOST_DEPTH = 50
"""Lists and mappings inside one another."""


def read_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """What a document says, and its nodes, which know their lines.

    Raises:
        YAMLError: it is no YAML, or out of bounds.
    """
    if len(text) > MOST_CHARACTERS:
        raise yaml.YAMLError(f"more than {MOST_CHARACTERS} characters")
    try:
        _check_bounds(text)
        # Composed apart: making values of nodes writes merges into them.
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except ValueError as error:  # a date that no calendar has, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from error


def _check_bounds(text: str) -> None:
    sizes: dict[str | None, int] = {}  # of what each anchor names
    open_ones: list[tuple[str | None, int]] = []  # anchor, and how many values came before it
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_ones.pop()
            if anchor is not None:
                sizes[anchor] = values - before
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_ones):
                raise _too_much(event, f"*{event.anchor} stands inside of what it names")
            values += sizes.get(event.anchor, 0)
        else:
            values += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_ones.append((event.anchor, values))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if len(open_ones) > MOST_DEPTH:
            raise _too_much(event, f"lists and mappings are nested more than {MOST_DEPTH} deep")
        if values > MOST_VALUES:
            raise _too_much(event, f"more than {MOST_VALUES} values, each alias written out")


def _too_much(event: Any, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {event.start_mark.line + 1}: {what}")
