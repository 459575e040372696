"""What a published dataset's card says, from its manifest, its provenance and one row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...stages.models.inputs.token_text import stored_tokenizer
from ...storage.published.export_rows import PUBLISHED
from ...storage.published.manifest import Manifest
from ...storage.tables.heads import head_of
from ...storage.tables.kinds import STRUCTURES
from ...storage.tables.rows import Rows
from ..printing.numbers import count, decimals, percent, size
from ..printing.text import cell, escaped, fenced, inline, prose, table
from ..report.stored.inspect import describe
from .dataset_card_origin import engines, model_name
from .features import features_about
from .provenance import UNKNOWN, unknown_licenses

_SHOWN_POSITIONS, _SHOWN_ENTRIES, _SHOWN_CHARACTERS = 8, 3, 1200
_ABOUT = {
    "generations": (
        "What the model wrote: one row is one prompt with one completion, as text and as token ids."
    ),
    "soft_targets": (
        "The teacher's distribution of N = `span_tokens` of T tokens. These are the tokens of "
        "`spans` (start, tokens, start, tokens ...); where that is null, or no column, the N from "
        "`span_start` on. The target of token t is given all tokens before it: the model's output "
        "at position t - 1. Lists are flat: entries of target 0, then those of target 1, E in "
        "all; each target has `k` of them, or as many as `entries` says. `generation_key` is the "
        "`key` of the row in `generations`."
    ),
    "masked_lm": (
        "The teacher's distribution at N = `span_tokens` of T tokens, which were hidden from it: "
        "`token_ids` are what it read, with the mask token or another one in their place. These "
        "are the tokens of `spans` (start, tokens, start, tokens ...); where that is null, the N "
        "from `span_start` on. The target of token t is the model's output at position t itself, "
        "and `labels` are the N tokens that were there. Lists are flat: entries of target 0, then "
        "those of target 1, E in all; each target has `k` of them, or as many as `entries` says. "
        "`generation_key` is the `key` of the row in `generations`, which has the text as it was."
    ),
    "classes": (
        "The teacher's distribution over the classes, one target a text, in the order of "
        "`class_names` in the files' metadata: {names}. `generation_key` is the `key` of the row "
        "in `generations`."
    ),
    "image_classes": (
        "The teacher's distribution over the classes, one target an image, in the order of "
        "`class_names` in the files' metadata: {names}. `image` is the image as the teacher read "
        "it, resized and cropped, a PNG file; it stands for a text of one token. `generation_key` "
        "is the `key` of the row in `generations`."
    ),
    "token_classes": (
        "The teacher's distribution over the classes of N = `span_tokens` words of a text, each "
        "said at the word's first token, in the order of `class_names` in the files' metadata: "
        "{names}. The first tokens are those of `spans` (start, tokens, start, tokens ...); where "
        "that is null, the N from `span_start` on. `labels` are the words' gold classes, -1 where "
        "there is none. `generation_key` is the `key` of the row in `generations`."
    ),
}


def summary(manifest: Manifest, provenance: Mapping[str, Any]) -> str:
    """What this is, in two sentences."""
    models = [model_name(id_, model) for id_, model in provenance["models"].items()]
    by = f" of {' and '.join(models)}" if models else ""
    splits = ", ".join(
        f"{count(found.rows)} rows in {name}" for name, found in manifest.splits.items()
    )
    if "soft_targets" not in manifest.tables:
        return f"Text{by} to train a smaller model on: {splits}."
    tokens = sum(found.scored_tokens for found in manifest.splits.values())
    kinds = {
        kind for found in manifest.statistics.values() for kind in found["soft_targets"]["kinds"]
    }
    hidden = head_of(manifest.about["soft_targets"]).masked
    which = (
        f"{count(tokens)} hidden tokens"
        if hidden
        else f"the next token at {count(tokens)} positions"
    )
    what = f"{which} ({', '.join(sorted(kinds))}), with the text it is about"
    if manifest.about["soft_targets"].get("class_names"):
        head = head_of(manifest.about["soft_targets"])
        each = "each image" if head.images else "each text"
        what = "the classes of " + (each if head.whole_text else f"{count(tokens)} words")
    return f"Soft targets{by} for knowledge distillation: the distribution over {what}; {splits}."


def warnings(manifest: Manifest, provenance: Mapping[str, Any]) -> list[str]:
    """What must not be overlooked."""
    found = []
    models, sources = unknown_licenses(provenance)
    unknown = [
        f"of the model {prose(model_name(id_, provenance['models'][id_]))}" for id_ in models
    ]
    unknown += [f"of the prompts' source {inline(name)}" for name in sources]
    unknown += ["of this dataset"] if provenance["license"] == UNKNOWN else []
    if unknown:
        found.append(
            f"Licences not stated: {'; '.join(unknown)}. Find them out before you use this."
        )
    found += engines(provenance)
    left_out = [name for name, facts in manifest.tables.items() if not facts["complete"]]
    if left_out:
        found.append(
            f"Columns were left out of {', '.join(sorted(left_out))}, so these rows cannot be "
            "checked whole."
        )
    return found


def sizes(manifest: Manifest, configs: list[str]) -> list[list[str]]:
    """A line per config and split: rows, positions, scored positions, bytes on disk."""
    rows = []
    for config in configs:
        for split in manifest.splits:
            files = manifest.tables_of(config, split)
            if not files:
                continue
            numbers = manifest.statistics[split][config]
            tokens = [count(numbers[name]["total"]) for name in ("tokens", "scored_tokens")]
            rows.append(
                [
                    inline(config),
                    cell(split),
                    count(sum(f.rows for f in files)),
                    *tokens,
                    _bytes(files),
                ]
            )
    return rows


def _bytes(files: list[Any]) -> str:
    return size(sum(file.bytes for file in files))


def columns(manifest: Manifest, provenance: Mapping[str, Any], config: str) -> dict[str, Any]:
    """What a row of a config is; each column's name, type and meaning."""
    schema, names = PUBLISHED[config], manifest.about.get(config, {}).get("class_names")
    if config == "generations":
        about = f"{_ABOUT[config]}\n\n{_reading(manifest, provenance)}"
    elif config == "features":
        about = features_about(manifest)
    elif names:
        about = _ABOUT[manifest.about[config]["head"]].format(names=", ".join(map(inline, names)))
    else:
        masked = config == "soft_targets" and head_of(manifest.about[config]).masked
        about = _ABOUT["masked_lm" if masked else config] + _whole(manifest)
    fields = [schema.field(name) for name in manifest.tables[config]["columns"]]
    return {
        "about": about,
        "columns": [
            [inline(f.name), inline(_type(f)), cell(f.metadata[b"about"].decode())] for f in fields
        ],
    }


def _whole(manifest: Manifest) -> str:
    """Which splits have whole distributions: there columns mean something else."""
    kinds = {name: found["soft_targets"]["kinds"] for name, found in manifest.statistics.items()}
    found = [
        f"{'all' if len(those) == 1 else 'some'} of {inline(name)}"
        for name, those in kinds.items()
        if any(STRUCTURES[kind].whole for kind in those)
    ]
    if not found:
        return ""
    size = manifest.about["soft_targets"]["vocab_size"]
    return (
        f"\n\nRows of kind `full` ({', '.join(found)}) are whole distributions: `ids` is null, "
        f"`logprobs` has `k` = {count(size)} numbers a target, in the order of the ids, and "
        "`tail_logprob` is -inf."
    )


def _reading(manifest: Manifest, provenance: Mapping[str, Any]) -> str:
    """How text and `token_ids` belong together."""
    model_id = manifest.about.get("soft_targets", {}).get("teacher_id") or next(
        iter(provenance["models"]), "<id>"
    )
    folder = inline(f"{manifest.version}/teachers/{model_id}/")
    folder += (
        ", and its chat template"
        if any(m["chat_template"] for m in provenance["models"].values())
        else ""
    )
    said = (
        f"The tokenizer is in {folder}; {{}} `text` is the completion decoded without special "
        "tokens, and encoding "
    )
    said += "it again may give other ids: take `token_ids`."
    if manifest.about.get("soft_targets", {}).get("class_names"):
        if head_of(manifest.about["soft_targets"]).images:
            return f"Images have no text; what scales and normalises them is in {folder}."
        if head_of(manifest.about["soft_targets"]).whole_text:
            return said.format(
                "`token_ids` are what it makes of `prompt` and `text_pair` together."
            )
        return said.format(
            "`prompt` is a JSON list of words, `token_ids` are what it makes of them "
            "(`is_split_into_words`), and `spans` are the words' first tokens."
        )
    if any(
        entry.get("stage") == "import" for entry in provenance["made_with"].get("generations", [])
    ):
        return said.format(
            "`token_ids` are those of the table that was imported, texts are decoded from them."
        )
    if manifest.tables.get("generations", {}).get("format_version", 1) > 1:
        return said.format(
            "`messages`, with their `message_fields` and `tools` (JSON) where there are any, "
            "became ids by the chat template, a `prompt` by the tokenizer with its special tokens. "
            "What the model wrote follows them, from `prompt_tokens` on. Text that was given "
            "(`finish_reason` given) is tokenized together with its prompt: of a conversation, "
            "`messages` and `answer` are one rendering, `spans` are the turns of the assistant, "
            "and `prompt_tokens` counts what stands before the first of them."
        )
    return said.format(
        "`messages` became the first `prompt_tokens` ids by the chat template, with "
        "`add_generation_prompt`; a `prompt` by the tokenizer, with its special tokens but no "
        "closing one. The other ids are the completion: as the model wrote them, or "
        "(`finish_reason` given) the text's ids with the end token after them."
    )


def _type(field: Any) -> str:
    kind = str(field.type).replace("fixed_size_binary[16]", "binary(16)").replace("item: ", "")
    return kind + ("?" if field.nullable else "")


def sample(folder: Path, manifest: Manifest) -> str:
    """One row for people: its text, and where it has targets the best entries at the first."""
    split = next(iter(manifest.splits))
    parts = []
    if "generations" in manifest.tables:
        row = _middle_row(folder, manifest, "generations", split)
        prompt = row.get("prompt") or _conversation(row.get("messages"))
        parts += [f"Prompt:\n\n{fenced(_short(prompt))}"] if prompt else []
        parts += [f"Completion:\n\n{fenced(_short(row['text']))}"] if row.get("text") else []
    if manifest.tables.get("soft_targets", {}).get("complete"):
        row = _middle_row(folder, manifest, "soft_targets", split)
        parts.append(_positions(row, _tokenizer(folder, manifest, row["teacher_id"]), manifest))
    return "\n\n".join(parts)


def _middle_row(folder: Path, manifest: Manifest, config: str, split: str) -> dict[str, Any]:
    """Row R // 2: rows often lie in the order of their length, so it is a common one."""
    import pyarrow.parquet as pq

    wanted = sum(file.rows for file in manifest.tables_of(config, split)) // 2
    for file in manifest.tables_of(config, split):
        for group, rows in enumerate(file.row_groups):
            if wanted < rows:
                read = pq.ParquetFile(folder / manifest.version / file.name).read_row_group(group)
                return Rows(read.slice(wanted, 1))[0]
            wanted -= rows
    raise AssertionError("a published table has rows")


def _tokenizer(folder: Path, manifest: Manifest, teacher_id: str) -> Any:
    return stored_tokenizer(folder / manifest.version / "teachers" / teacher_id / "tokenizer.json")


def _positions(row: dict[str, Any], tokenizer: Any, manifest: Manifest) -> str:
    classes = manifest.about["soft_targets"].get("class_names")
    head = manifest.about["soft_targets"].get("head", "lm")
    named = {"table": "soft_targets", "class_names": classes, "head": head}
    found = describe(row | named, tokenizer)
    lines = []
    for position in found["positions"][:_SHOWN_POSITIONS]:
        label = position.get("label", found.get("label")) or "none"
        token = label if classes else found["tokens"][position["index"]]
        best = ", ".join(
            f"{inline(entry[0])} {entry[1]:.3f}" for entry in position["entries"][:_SHOWN_ENTRIES]
        )
        tail = percent(position["tail"], 2) if position["tail"] is not None else "-"
        lines.append([inline(token), decimals(position["entropy"], 3), tail, best])
    headers = [
        "gold label" if classes else "token that is there",
        "entropy",
        "tail",
        "the teacher's best",
    ]
    return (
        "Its targets"
        + (", the first of them" if len(found["positions"]) > len(lines) else "")
        + ":\n\n"
        + table(headers, lines)
    )


def _conversation(messages: Any) -> str:
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages or [])


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def numbers(manifest: Manifest) -> str:
    """Lengths, kept mass and entropy: mean and quantiles by split."""
    rows = []
    shown = {
        "prompt tokens": ("generations", "prompt_tokens", 0),
        "completion tokens": ("generations", "completion_tokens", 0),
        "entries a position": ("soft_targets", "entries", 0),
        "kept mass": ("soft_targets", "kept_mass", 4),
        "entropy (nats)": ("soft_targets", "entropy", 3),
    }
    for split, found in manifest.statistics.items():
        for name, (config, number, places) in shown.items():
            values = found.get(config, {}).get(number)
            if values is not None:
                digits = [decimals(values[q], places) for q in ("p05", "p50", "p95", "max")]
                rows.append([split, name, decimals(values["mean"], max(places, 1)), *digits])
    kinds = {
        split: found["soft_targets"]["kinds"]
        for split, found in manifest.statistics.items()
        if "soft_targets" in found
    }
    finished = {
        split: found["generations"]["finish_reason"]
        for split, found in manifest.statistics.items()
        if "generations" in found
    }
    lines = [
        f"Kinds of targets in {prose(name)}: {_counts(found)}." for name, found in kinds.items()
    ]
    lines += [
        f"Temperatures at which a student can be trained on {prose(name)}: "
        f"{_temperatures(found['soft_targets'])}."
        for name, found in manifest.statistics.items()
        if "soft_targets" in found and not manifest.about["soft_targets"].get("class_names")
    ]
    lines += [
        f"How texts of {prose(name)} ended: {_counts(reasons)}."
        for name, reasons in finished.items()
    ]
    note = (
        "Kept mass is the teacher's probability inside the entries of a position; what is outside "
        "is in `tail_logprob`."
        if "soft_targets" in manifest.tables
        else ""
    )
    headers = [
        "split",
        "number of each row or position",
        "mean",
        "5 %",
        "median",
        "95 %",
        "largest",
    ]
    return "\n\n".join(
        part for part in (table(headers, rows, text_columns=2), note, "  \n".join(lines)) if part
    )


def _temperatures(found: Mapping[str, Any]) -> str:
    """Tails are stored at these; at another one the mass outside the entries is not known."""
    if found["temperatures"] is None:
        return "any"
    return ", ".join(f"{value:g}" for value in found["temperatures"]) or "none for all rows"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{escaped(name)} {count(number)}" for name, number in found.items())


def limits(manifest: Manifest) -> list[str]:
    """What this is not."""
    found = [
        (
            "Nobody read all of it: a language model's text may be wrong, offensive or repeat what "
            "it was trained on."
        ),
        "Splits differ in their prompts; nothing was searched for near copies of public test sets.",
    ]
    about = manifest.about.get("soft_targets")
    if about and "soft_targets" in manifest.tables:
        bits = about.get("mantissa_bits", 23)
        if bits < 23:
            found.append(
                f"Floats have {bits} bits of mantissa: a log probability l is off by at most |l| "
                f"/ {2 ** (bits + 1)}."
            )
        if not about.get("class_names"):
            found.append(
                "Ids are of the teacher's tokenizer (`teachers/` in the version's folder): a "
                "student with another one cannot use them as they are."
            )
            found.append(
                "Entries are what the teacher said of this text, one pass in its own precision; "
                "probabilities of ids outside the entries are known as a sum only."
            )
    return found
