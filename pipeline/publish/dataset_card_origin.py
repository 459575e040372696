"""Where a dataset comes from, as its card says it.

These are models, sources, licences, settings, and what was chosen.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...stages.recipe.kinds import HF
from ...storage.published.manifest import Manifest
from ..plan.lineage import came_from
from ..printing.numbers import count
from ..printing.text import inline, table
from .provenance import UNKNOWN


def model_name(model_id: str, model: Mapping[str, Any]) -> str:
    """What a model is called.

    Where nobody said it, the name is its architecture and the beginning of its id.
    """
    if model["name"]:
        return inline(model["name"])
    kind = (model.get("architectures") or ["a model"])[0]
    return f"{kind} ({inline(model_id[:8])})"


def origin(manifest: Manifest, provenance: Mapping[str, Any]) -> str:
    """Models, sources, licences, settings and versions."""
    models = [
        [
            model_name(id_, model),
            " and ".join(
                what
                for what, made in (("text", model["wrote"]), ("targets", model["scored"]))
                if made
            ),
            _license(model["license"]),
            _precision(model),
            inline(id_),
        ]
        for id_, model in provenance["models"].items()
    ]
    sources = [
        [inline(s["name"]), _license(s["license"]), count(s["prompts"])]
        for s in provenance["sources"]
    ]
    made = [
        [
            inline(name),
            _settings(entry.get("settings")),
            _settings(entry.get("versions")),
            count(entry["rows"]),
        ]
        for name, entries in provenance["made_with"].items()
        for entry in entries
    ]
    parts = [
        f"This dataset: licence {_license(provenance['license'])}.",
        table(
            ["model", "made", "licence", "dtype", "id (hash of its content)"],
            models,
            text_columns=5,
        )
        if models
        else "",
        *(_lineage(id_, model) for id_, model in provenance["models"].items()),
        table(["source of prompts", "licence", "prompts"], sources, text_columns=2)
        if sources
        else "",
        table(["rows of", "settings", "versions", "rows"], made, text_columns=3),
        _chosen(manifest.chosen),
        "The recipe is in `PROVENANCE.json`." if provenance["recipe"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _precision(model: Mapping[str, Any]) -> str:
    """Its dtype, how it is quantised, and whether an adapter is on it."""
    said = [inline(model.get("dtype"))]
    said += [inline(model["quantized"])] if model.get("quantized") else []
    return ", ".join([*said, *(["with an adapter"] if model["adapter"] else [])])


def engines(provenance: Mapping[str, Any]) -> list[str]:
    """Which engines scored the targets, where transformers alone did not, and what is bounded."""
    rows: Counter[str] = Counter()
    for entry in provenance["made_with"].get("soft_targets", []):
        rows[(entry.get("settings") or {}).get("engine", HF)] += entry["rows"]
    if set(rows) <= {HF}:
        return []
    by = " and ".join(f"{count(number)} rows by {inline(name)}" for name, number in rows.items())
    return [
        f"Targets were scored by different ways of running the teacher: {by} (`engine`; null is "
        f"{HF}). Where `entropy_is_bound` is true, `entropy` is the least that it can be, and "
        "`tail_logprob` may be off by `tail_bound` nats."
    ]


def _lineage(model_id: str, model: Mapping[str, Any]) -> str:
    """Of a model that is a student itself: what it comes from."""
    found = model.get("lineage") or []
    return f"{model_name(model_id, model)} is {came_from(found)}." if found else ""


def _license(name: str) -> str:
    return "**not stated**" if name == UNKNOWN else inline(name)


def _settings(found: Mapping[str, Any] | None) -> str:
    shown = {k: v for k, v in (found or {}).items() if v not in (None, [], {}, "")}
    return ", ".join(
        f"{name} {v if isinstance(v, str) else json.dumps(v)}" for name, v in sorted(shown.items())
    )


def _chosen(chosen: Mapping[str, Any]) -> str:
    said = []
    if chosen.get("where"):
        said.append(f"only rows whose generation has {inline(chosen['where'])}")
    if chosen.get("min_k"):
        said.append(
            f"targets cut to {chosen['min_k']} entries, the others in the tail; rows with fewer "
            "left out"
        )
    if chosen.get("columns"):
        said.append(f"only the columns {', '.join(map(inline, chosen['columns']))}")
    return f"Chosen for publication: {'; '.join(said)}." if said else ""
