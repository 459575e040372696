"""Loading a recipe: YAML and `--set` in, a checked `Recipe` out.

Every mistake is told with its file, line and dotted path.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ...storage.credentials import all_shown, hide, hide_password
from ...storage.errors import UsageError
from .checks.together import check_together
from .engines import UNRECORDED
from .fields import ADDRESSES, NUMBER, SCHEDULE
from .reading.hints import hint_at
from .reading.outside import outside_value
from .reading.yaml_text import MOST_CHARACTERS, read_yaml
from .sections import Recipe

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: The YAML file.
        overrides: `section.key=value`, the value as YAML.

    Raises:
        UsageError: one line for every mistake found.
    """
    path = Path(path)
    text = _read(path)
    tree, lines = _parse(path, text)
    for override in overrides or []:
        _override(tree, override)
    problems: list[tuple[str, str]] = []
    tree = _expand(tree, "", problems)
    if not problems:
        try:
            recipe = Recipe.model_validate(tree)
        except ValidationError as error:
            problems = [
                _explain(tuple(p for p in e["loc"] if p not in (NUMBER, SCHEDULE)), e)
                for e in error.errors()
            ]
        else:
            problems = check_together(recipe)
    if problems:
        places = {name: f"{path}:{line}:" for name, line in lines.items()}
        places |= {override.partition("=")[0]: "--set" for override in overrides or []}
        raise UsageError("\n".join(_located(path, places, where, what) for where, what in problems))
    return recipe


def recorded(recipe: Recipe) -> dict[str, Any]:
    """A recipe as records keep it: no credential of an address, no machine, no prices.

    `${NAME}` stays as it was written.
    """
    tree = recipe.model_dump(mode="json", exclude={"compute"})
    if not tree["teachers"]:
        del tree["teachers"]
    for section, _, name in (path.partition(".") for path in ADDRESSES):
        found = tree.get(section) or []
        for fields in found if isinstance(found, list) else [found]:
            fields[name] = all_shown(fields[name])
    for name in UNRECORDED if tree["generate"] else ():
        del tree["generate"][name]
    return tree


def changed_fields(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`section.key: old -> new` for every field that differs."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_fields(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {json.dumps(before)} -> {json.dumps(after)}")
    return changes


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS + 1)  # what is longer is refused
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: not text in UTF-8 ({error.reason}). A recipe is YAML text; save it as UTF-8."
        ) from error
    except OSError as error:
        raise UsageError(
            f"{path}: no recipe to read there ({error.strerror}). `stillroom init {path.name}` "
            "writes one."
        ) from error


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree, and dotted path -> line."""
    try:
        tree, node = read_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML that can be read: {error}") from error
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else f"a {type(tree).__name__}"
        raise UsageError(
            f"{path}: holds {found}, expected sections. `stillroom init` writes an example."
        )
    lines: dict[str, int] = {}
    _walk(path, node, "", lines)
    return tree, lines


def _walk(path: Path, node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in lines:
            raise UsageError(f"{path}:{key.start_mark.line + 1}: {name}: given twice. Keep one.")
        lines[name] = key.start_mark.line + 1
        _walk(path, value, f"{name}.", lines)


def _override(tree: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    *sections, key = name.split(".")
    if not equals or not all((*sections, key)):
        raise UsageError(
            f"--set {override}: expected section.key=value, for example train.learning_rate=5.0e-4"
        )
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override}: {section} is not a section")
    try:
        given, _ = read_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {name}: the value is not YAML ({error})") from error
    if given is None and key in tree:
        del tree[key]  # back to the default
    else:
        tree[key] = given


def _expand(value: Any, where: str, problems: list[tuple[str, str]]) -> Any:
    """`${NAME}` in a field that names a place stands for an environment variable.

    Elsewhere it is text (`stop: ["${END}"]`), and a mistake where there is such a variable.
    """
    if isinstance(value, dict):
        dotted = f"{where}." if where else ""
        return {k: _expand(v, f"{dotted}{k}", problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, where, problems) for v in value]
    if not isinstance(value, str):
        return value
    names = _VARIABLE.findall(value)
    if where not in ADDRESSES:
        if not any(name in os.environ for name in names):
            return value
        what = f"{value!r} holds an environment variable, which only fields that name a place may "
        problems.append((where, f"{what}({', '.join(sorted(ADDRESSES))}). Write the value itself"))
        return value
    if missing := [name for name in names if name not in os.environ]:
        what = f"{value}: the environment variable {missing[0]} is not set"
        problems.append((where, f"{what}. Set it, or write the path"))
        return value
    found = _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    if names:
        hide({os.environ[name]: f"${{{name}}}" for name in names}, {found: value})
    hide_password(found)
    return found


_NO_SECTION = frozenset({"model_type", "model_attributes_type"})
"""What pydantic calls a value that stands where a section belongs."""


def _explain(loc: tuple[int | str, ...], error: Any) -> tuple[str, str]:
    """Dotted path and message of one pydantic error."""
    where = ".".join(str(part) for part in loc)
    if error["type"] == "extra_forbidden":
        name, colon, value = str(loc[-1]).partition(":")
        if colon and value and name in _keys_at(loc[:-1]):
            return where, f"unknown key. A space follows a colon in YAML: write {name}: {value}"
        if (known := hint_at(where)) is not None:
            return where, f"unknown key. {known}"
        near = difflib.get_close_matches(str(loc[-1]), _keys_at(loc[:-1]), n=1)
        hint = (
            f"Did you mean {near[0]!r}?"
            if near
            else f"Known here: {', '.join(_keys_at(loc[:-1]))}."
        )
        return where, f"unknown key. {hint}"
    if error["type"] in _NO_SECTION and (keys := _keys_at(loc)):
        found = error.get("input")
        return where, f"must be a section, with keys of {', '.join(keys)} (got {found!r})."
    wrong, outside = _wrong(error), outside_value(error.get("input"))
    return where, wrong if outside is None else f"{wrong} {outside}"


def _wrong(error: Any) -> str:
    """What is wrong with the value of a field that there is."""
    kind, found, limits = error["type"], error.get("input"), error.get("ctx", {})
    if kind == "missing":
        return "missing; it has no default. Add it (`stillroom init` writes an example)."
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        sign = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        limit = next(f"{sign[k]} {v:g}" for k, v in limits.items() if k in sign)
        return f"must be {limit} (got {found!r})."
    if kind == "literal_error":
        return f"must be one of {limits['expected']} (got {found!r})."
    if kind == "value_error":
        return f"{limits['error']}."
    return f"{error['msg'][0].lower()}{error['msg'][1:]} (got {found!r})."


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):  # an entry of a list: the model is that of the list
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options = [
            getattr(a, "__origin__", a) for a in (annotation, *getattr(annotation, "__args__", ()))
        ]
        model = next((a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _located(path: Path, places: dict[str, str], where: str, what: str) -> str:
    """Prefix a message with the nearest line of the file, or the `--set` that it comes from."""
    name = where
    while name and name not in places:
        name = name.rpartition(".")[0]
    place = places.get(name, f"{path}:")
    return f"{place} {where}: {what}" if where else f"{place} {what}"
