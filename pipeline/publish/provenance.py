"""Where a published dataset comes from, and the licence of each source.

Sources are models and prompts; settings and versions are named too.

The rule: a dataset has a licence of its own, and that of every model whose text or distribution is
in it and of every source of its prompts is named beside it. `export`, into a folder of yours,
writes `unknown` for those that were not given, and the card warns of it. `publish` refuses until
each is given; `unknown` may be given, in so many words.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...stages.models.fit.quantized import quantized_words
from ...stages.recipe.fields import ADDRESSES
from ...stages.recipe.run_folder import LATEST, SETTINGS, as_a_run_writes, begun_runs, read_record
from ...storage.bounds import mapping, parsed, understood
from ...storage.errors import UsageError
from ...storage.published.export import Made
from ...storage.published.export_rows import sources_of
from ...storage.store.store import Store
from ..plan.lineage import kept_lineage
from ..printing.text import public_name

UNKNOWN = "unknown"
PROVENANCE = "PROVENANCE.json"
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PATH_FIELDS = {"_name_or_path", "name_or_path", "base_model_name_or_path"} | {
    "tokenizer_file",
    "special_tokens_map_file",
}
"""Fields of a model's config that may name files of this machine: no part of an identity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Licenses:
    """What was said about licences; ids as the Hub spells them, or `name=id`."""

    dataset: str
    models: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    def of_model(self, model_id: str) -> str:
        """Licence of a model by its id, or the beginning of it."""
        named = [value for name, value in _named(self.models) if name and model_id.startswith(name)]
        return (named or [value for name, value in _named(self.models) if not name] or [UNKNOWN])[0]

    def of_source(self, source: str) -> str:
        """Licence of a source by its public name."""
        named = [value for name, value in _named(self.sources) if name == source]
        return (named or [value for name, value in _named(self.sources) if not name] or [UNKNOWN])[
            0
        ]


def check_licenses(
    license_id: str | None, models: Sequence[str], sources: Sequence[str], *, strict: bool
) -> Licenses:
    """What was given, if it suffices.

    Args:
        license_id: Of the dataset.
        models: Of the teacher and of who wrote the text.
        sources: Of the prompts' sources.
        strict: All must be given.

    Raises:
        UsageError: names what is missing, or what is no licence id.
    """
    missing = [] if license_id else ["--license ID: the licence of this dataset"]
    if strict and not models:
        missing.append(
            "--teacher-license ID: the licence or terms of the model that wrote and scored the text"
        )
    if strict and not sources:
        missing.append("--source-license ID: the licence of the data that the prompts come from")
    if missing:
        raise UsageError(
            "nothing leaves without its licences. Missing:\n  "
            + "\n  ".join(missing)
            + "\nIds as on the Hub: "
            "apache-2.0, mit, cc-by-4.0, llama3.1, other ...; `unknown` where you do not know, and "
            "readers are told."
        )
    for _, value in _named([license_id or "", *models, *sources]):
        if not _LICENSE.fullmatch(value):
            near = value.lower().replace(" ", "-")
            hint = (
                f"Did you mean {near}?"
                if _LICENSE.fullmatch(near)
                else "Such as apache-2.0 or cc-by-4.0."
            )
            raise UsageError(f"licence {value!r}: not an id as the Hub spells it. {hint}")
    return Licenses(dataset=str(license_id), models=tuple(models), sources=tuple(sources))


def check_stated(licenses: Licenses, provenance: Mapping[str, Any], *, strict: bool) -> None:
    """Each model that was named is one of these, and (strict) each model and source was spoken of.

    Raises:
        UsageError: names those that are not, or were not.
    """
    models, sources = (
        list(provenance["models"]),
        [source["name"] for source in provenance["sources"]],
    )
    named = {name for name, _ in _named(licenses.models)}
    for name in sorted(named - {""}):
        if not any(model_id.startswith(name) for model_id in models):
            known = ", ".join(models) or "none, no model made these rows"
            raise UsageError(f"--teacher-license {name}: no such model. These rows are of {known}.")
    silent = [
        f"--teacher-license {i}=ID" for i in models if not any(i.startswith(name) for name in named)
    ]
    spoken = {name for name, _ in _named(licenses.sources)}
    silent += [f"--source-license {name}=ID" for name in sources if not spoken & {name, ""}]
    if strict and silent:
        raise UsageError(
            "nothing leaves without its licences. Missing:\n  "
            + "\n  ".join(silent)
            + "\n`ID` alone is of all others."
        )


def _named(given: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, value) for name, _, value in (text.rpartition("=") for text in given)]


def read_recipe(run_dir: Path | None) -> dict[str, Any] | None:
    """The recipe of a run, its paths cut to names; None without a run.

    Raises:
        UsageError: no student was begun in this folder.
    """
    if run_dir is None:
        return None
    for file in (run_dir / LATEST / SETTINGS, *begun_runs(run_dir), run_dir / SETTINGS):
        if file.is_file():
            with as_a_run_writes(file):
                return public_recipe(mapping(read_record(file)["recipe"]))
    raise UsageError(
        f"--run {run_dir}: no {SETTINGS} in it or in its train-*. Name the run.dir of a recipe."
    )


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the paths of this machine, or the bucket in which its owner keeps things."""

    def public(section: str, name: str, value: Any) -> Any:
        if name == "engine_args":
            return _without_folders(value)
        if name == "factory" and value is not None:
            return value.rpartition("/")[2]  # the file stays, its folder is of this machine
        if name == "args":
            return _without_folders(value)
        if f"{section}.{name}" not in ADDRESSES:
            return value
        if isinstance(value, list):
            return [public_name(source) for source in value]
        if not isinstance(value, str):
            return value
        named = public_name(value)
        return named.rstrip("/").rpartition("/")[2] if name == "dir" else named

    def of_section(section: str, fields: Any) -> Any:
        if isinstance(fields, list):  # of several teachers
            return [of_section(section, one) for one in fields]
        if not isinstance(fields, Mapping):
            return fields
        return {name: public(section, name, value) for name, value in fields.items()}

    return {section: of_section(section, fields) for section, fields in recipe.items()}


def _without_folders(value: Any) -> Any:
    """Arguments of an engine without paths.

    Nobody knows which of them name files, so whatever looks like a path is cut.
    """
    if isinstance(value, Mapping):
        return {name: _without_folders(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return (
        public_name(value)
        if isinstance(value, str) and value.startswith(("/", "~", "."))
        else value
    )


def make_provenance(
    store: Store,
    made: Made,
    licenses: Licenses,
    *,
    teacher: str | None,
    recipe: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All of it as JSON; nothing in it depends on the clock or on this machine's folders.

    Args:
        store: Where the rows come from.
        made: What was taken of it.
        licenses: As given.
        teacher: What the teacher is called; a store knows its content, not its name.
        recipe: As `read_recipe` gives it.
    """
    named = teacher or (recipe or {}).get("teacher", {}).get("model")
    scored = {about.get("teacher_id") for about, _ in made.said.get("soft_targets", [])}
    wrote = {about.get("author_id") for about, _ in made.said.get("generations", [])}
    endpoints = {
        about["author_id"]: about
        for about, _ in made.said.get("generations", [])
        if "author_name" in about
    }
    models = {}
    for model_id in sorted(made.authors):
        parts = store.teacher_parts(model_id)
        if parts:  # text that was given has no model
            models[model_id] = _model(parts) | {
                "name": named if model_id in scored or not scored else None,
                "license": licenses.of_model(model_id),
                "wrote": model_id in wrote,
                "scored": model_id in scored,
            }
            if model_id in endpoints:
                models[model_id] |= _endpoint(endpoints[model_id], models[model_id]["license"])
            if before := kept_lineage(store.teacher_dir(model_id)):
                models[model_id]["lineage"] = before
    return {
        "license": licenses.dataset,
        "models": models,
        "sources": _sources(store, made, licenses),
        "made_with": {table: _grouped(said) for table, said in sorted(made.said.items())},
        "snapshots": {split: found.snapshot for split, found in made.splits.items()},
        "recipe": recipe,
    }


def _endpoint(about: Mapping[str, Any], license_id: str) -> dict[str, Any]:
    """Name and licence of a model behind an endpoint.

    What the command line says of the licence counts more.
    """
    stated = about.get("author_license") or UNKNOWN
    license_id = stated if license_id == UNKNOWN else license_id
    return {"name": public_name(str(about["author_name"])), "license": license_id}


def _model(parts: Mapping[str, Any]) -> dict[str, Any]:
    config = parts.get("config") or {}
    text = config.get("text_config") or config
    names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
    return {
        "architectures": config.get("architectures"),
        **{name: text[name] for name in names if name in text},
        "dtype": parts.get("dtype"),
        "adapter": parts.get("adapter") is not None,
        "chat_template": bool(parts.get("chat_template")),
        "weights_sha256": parts.get("weights"),
    } | ({"quantized": how} if (how := quantized_words(parts)) else {})


def _sources(store: Store, made: Made, licenses: Licenses) -> list[dict[str, Any]]:
    """Per recorded source how many prompts; splits have different prompts, so they add up."""
    counts: Counter[tuple[str, str]] = Counter()
    formats: dict[str, Any] = {}
    for keys in made.texts.values():
        for data_id, held_out, prompts in sources_of(store, keys):
            about = store.inputs_about(data_id) or {}
            source = str(about.get("source", UNKNOWN))
            if held_out:  # which may be rows of the user's own
                source = str(about.get("held_out_source", source))
            counts[data_id, source] += prompts
            formats.setdefault(source, about.get("format"))
    most: dict[str, int] = {}
    for (_, source), prompts in counts.items():
        # The same source, read with other settings, counts once.
        most[source] = max(most.get(source, 0), prompts)
    found: dict[str, dict[str, Any]] = {}
    for source in sorted(most):
        name = public_name(source)
        entry = {
            "name": name,
            "format": formats[source],
            "prompts": 0,
            "license": licenses.of_source(name),
        }
        found.setdefault(name, entry)["prompts"] += most[source]
    return [found[name] for name in sorted(found)]


def source_names(store: Store) -> set[str]:
    """Public names of all sources that the store has a record of."""
    ids = [name.removesuffix(".json") for name in store.files.names("inputs")]
    records = [store.inputs_about(data_id) or {} for data_id in ids]
    names = [record.get("source", UNKNOWN) for record in records]
    names += [record["held_out_source"] for record in records if "held_out_source" in record]
    return {public_name(str(name)) for name in names}


def _grouped(said: Sequence[tuple[Mapping[str, Any], int]]) -> list[dict[str, Any]]:
    """Shards that say the same are one entry, with how many rows were taken of them."""
    groups: dict[str, dict[str, Any]] = {}
    for about, rows in said:
        kept = public_about(about)
        entry = groups.setdefault(json.dumps(kept, sort_keys=True), {"rows": 0, **kept})
        entry["rows"] += rows
    return [groups[name] for name in sorted(groups)]


def public_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a shard says of how its rows were made, without its numbers and this machine's paths."""
    kept = {
        name: value for name, value in about.items() if name not in ("statistics", "again", "table")
    }
    settings = kept.get("settings")
    if isinstance(settings, Mapping) and isinstance(settings.get("source"), str):
        kept["settings"] = {**settings, "source": public_name(settings["source"])}
    return kept


def without_paths(content: bytes, name: str) -> bytes:
    """A kept file of a model without paths: some versions of transformers write them.

    They write them into the configs.
    """
    if name not in ("config.json", "tokenizer_config.json", "generation_config.json"):
        return content

    def public(value: Any, field: str = "") -> Any:
        if isinstance(value, dict):
            return {name: public(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [public(part) for part in value]
        return public_name(value) if field in _PATH_FIELDS and isinstance(value, str) else value

    with understood(name, "config"):
        fields = parsed(content)
    cut = public(fields)
    return (
        content if cut == fields else json.dumps(cut, indent=2, ensure_ascii=False).encode() + b"\n"
    )


def unknown_licenses(provenance: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Ids of the models, and names of the sources, whose licence nobody stated."""
    models = [id_ for id_, model in provenance["models"].items() if model["license"] == UNKNOWN]
    return models, [
        source["name"] for source in provenance["sources"] if source["license"] == UNKNOWN
    ]
