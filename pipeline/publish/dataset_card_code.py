"""The code in a published dataset's card: how to load it. Tests run it as it stands."""

import json
from collections.abc import Mapping
from typing import Any

from ...stages.recipe.formats import FORMATS
from ...stages.recipe.kinds import KINDS
from ...storage.published.manifest import Manifest
from ...storage.tables.heads import head_of
from ...storage.tables.kinds import STRUCTURES, Structure
from .features import asked_for

FOLDER = "path/to/this/folder"
"""What the code says where only the reader knows."""


def code(manifest: Manifest, provenance: Mapping[str, Any], *, repo: str | None) -> dict[str, str]:
    """Ready to paste, by tool.

    Args:
        manifest: What there is to load.
        provenance: How it was made, for the recipe of a student.
        repo: USER/NAME on the Hub; None: a folder, which is called `FOLDER`.
    """
    scored = manifest.tables.get("soft_targets")
    configs = [config for config in ("generations", "soft_targets") if config in manifest.tables]
    split = next(iter(manifest.splits))
    names = {"generations": "texts", "soft_targets": "targets"}
    lines = [
        f'{names[config]} = load_dataset("{repo or FOLDER}", "{config}", split="{split}")'
        for config in configs
    ]
    base = f"hf://datasets/{repo}" if repo else FOLDER
    found = {
        "datasets": "\n".join(
            ["from datasets import load_dataset", "", *lines, _KEY.format(names[configs[0]])]
        ),
        "duckdb": _duckdb(manifest, configs, split, base),
    }
    if scored and scored["complete"] and not manifest.about["soft_targets"].get("class_names"):
        found["torch"] = _torch(manifest, split)
    if "features" in manifest.tables:
        there = next(name for name in manifest.splits if manifest.tables_of("features", name))
        found["features"] = _FEATURES.format(repo or FOLDER, there)
    if (
        all(facts["complete"] for facts in manifest.tables.values())
        and len(provenance["sources"]) == 1
    ):
        found["stillroom"] = _recipe(manifest, provenance, base)
    return found


def _recipe(manifest: Manifest, provenance: Mapping[str, Any], base: str) -> str:
    """The sections that say where teacher, data and targets come from: from here."""
    (source,) = provenance["sources"]
    held_out = manifest.splits.get("test")
    lines = [
        f'storage: {{dir: stores/mine, sources: ["{base}"]}}',
        f'teacher: {{model: "{base}"}}',
        f'data: {{source: "{base}", format: {_value(source["format"])}, '
        f"holdout: {held_out.rows if held_out else 0}}}",
    ]
    kinds = [
        entry.get("settings") or {} for entry in provenance["made_with"].get("soft_targets", [])
    ]
    if "soft_targets" in manifest.tables and kinds and kinds[0].get("kind") in KINDS:
        stored = kinds[0] | {"rounds": kinds[0].get("k")}  # how draws name it in a recipe
        settings = {"targets": stored["kind"]}
        for name in KINDS[stored["kind"]].settings:
            if name in stored:
                settings[name] = stored[name]
        if manifest.chosen.get("min_k") and "k" in settings:
            settings["k"] = min(settings["k"], manifest.chosen["min_k"])
        lines.append(
            "score: "
            f"{{{', '.join(f'{name}: {_value(value)}' for name, value in settings.items())}}}"
        )
        if asked := asked_for(manifest):
            lines[-1] = f"{lines[-1].removesuffix('}')}, features: {json.dumps(asked)}}}"
    return "\n".join([*lines, "# and run, student, loss, train and evaluate, as you like"])


def _value(value: Any) -> str:
    """A setting in YAML: a word of ours as it is, all else as JSON, which stays one value."""
    known = value in FORMATS or value in KINDS if isinstance(value, str) else False
    return str(value) if known else json.dumps(value)


def _duckdb(manifest: Manifest, configs: list[str], split: str, base: str) -> str:
    paths = {config: f"{base}/{manifest.version}/{config}/{split}-*.parquet" for config in configs}
    if len(configs) == 2 and {"generation_key", "entropy", "span_tokens"} <= set(
        manifest.tables["soft_targets"]["columns"]
    ):
        text = (
            "text" if "text" in manifest.tables["generations"]["columns"] else "hex(g.key) AS key"
        )
        query = f"""\
    SELECT {text}, span_tokens, round(list_avg(entropy), 3) AS nats
    FROM '{paths["soft_targets"]}' t
    JOIN '{paths["generations"]}' g ON t.generation_key = g.key
    ORDER BY nats DESC LIMIT 5"""
    else:
        query = f"    SELECT * FROM '{paths[configs[0]]}' LIMIT 5"
    return f'import duckdb\n\nduckdb.sql("""\n{query}\n""").show()'


_KEY = 'print({}[0]["key"].hex())  # keys are 16 bytes'
_FEATURES = """\
import numpy as np
from datasets import load_dataset

row = load_dataset("{}", "features", split="{}")[0]
kind = {{"int8": "i1", "float16": "<f2", "float32": "<f4"}}[row["dtype"]]
vectors = np.frombuffer(row["values"], kind).reshape(row["vectors"], row["width"]).astype("float32")
if row["scale"]:
    vectors *= np.float32(row["scale"])[:, None]
print(row["kind"], row["layer"], vectors.shape)"""
_HEAD = """\
import torch

row = targets[0]
n, k = row["span_tokens"], row["k"]
spans = row.get("spans") or [row["span_start"], n]  # start, tokens, start, tokens ...
scored = torch.cat([torch.arange(s, s + t) for s, t in zip(spans[::2], spans[1::2])])  # [N]
tokens = torch.tensor(row["token_ids"])  # [T]; target i is about token scored[i]
"""
_ENTRIES = {
    "fixed": """\
ids = torch.tensor(row["ids"]) if row["ids"] else torch.arange(k).repeat(n)\
  # null: kind full, every id
ids = ids.reshape(n, k)  # [N, K] best first
logprobs = torch.tensor(row["logprobs"]).reshape(n, k)  # [N, K] of the full softmax
tail = torch.tensor(row["tail_logprob"])  # [N] all other ids together
""",
    "ragged": """\
ids = torch.tensor(row["ids"]) if row["ids"] else torch.arange(k).repeat(n)\
  # null: kind full, every id
ids = ids.split(row["entries"] or k)  # N tensors, as many entries as the position has
logprobs = torch.tensor(row["logprobs"]).split(row["entries"] or k)
tail = torch.tensor(row["tail_logprob"])  # [N] all other ids together
""",
    "drawn": """\
# of rows of kind full take logprobs, [N * V] in id order: they were not drawn
ids = torch.tensor(row["ids"]).split(row["entries"])  # N tensors: the ids that were drawn
shares = torch.tensor(row["counts"] or row["weights"]).split(row["entries"])\
  # how often of k, or weights
""",
    "whole": """\
logprobs = torch.tensor(row["logprobs"]).reshape(n, k)  # [N, V] in id order
""",
}
_LOSS = """
# logits [T, V] of a student that reads `tokens`: position t - 1 predicts token t
logits = torch.zeros(len(tokens), {vocabulary})
student = logits[scored - 1].log_softmax(-1)
"""
_KL = """\
kept = student.gather(-1, ids)  # [N, K]
rest = torch.log1p(-kept.exp().sum(-1).clamp(max=1 - 1e-6))\
  # the student's mass outside the entries
kl = (logprobs.exp() * (logprobs - kept)).sum(-1) + tail.exp() * (tail.clamp(min=-1e4) - rest)\
  # [N] nats
"""


_LOSS_OF_HIDDEN = """
# logits [T, V] of a student that reads `tokens`: position t says what is hidden there
logits = torch.zeros(len(tokens), {vocabulary})
student = logits[scored].log_softmax(-1)
hidden = torch.tensor(row["labels"])  # [N] the tokens that were there
"""


def _torch(manifest: Manifest, split: str) -> str:
    numbers = manifest.statistics[split]["soft_targets"]
    kinds, entries = numbers["kinds"], numbers["entries"]
    kind = max(kinds, key=lambda name: kinds[name])
    about = manifest.about["soft_targets"]
    loss = _LOSS_OF_HIDDEN if head_of(about).masked else _LOSS
    loss = loss.format(vocabulary=int(about["vocab_size"]))
    structure = STRUCTURES[kind]
    # Of an endpoint positions may lack entries.
    lacks = structure.may_lack and len(kinds) == 1 and entries["mean"] != entries["max"]
    shape = _shape(structure, ragged=structure.ragged or lacks)
    return (_HEAD + _ENTRIES[shape] + loss + (_KL if shape == "fixed" else "")).rstrip()


def _shape(structure: Structure, *, ragged: bool) -> str:
    """What a row's entries are, of the four that the example knows."""
    if structure.whole:
        return "whole"
    if structure.drawn:
        return "drawn"
    return "ragged" if ragged else "fixed"
