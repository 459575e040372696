"""The card of a published dataset.

Front matter comes first, by the Hub's own classes, then what a reader must know.

It is made from a version's MANIFEST and PROVENANCE and one of its rows alone, so the same version
has the same card.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from ...stages.recipe.tasks import TASKS
from ...storage.published.manifest import Manifest
from ..printing.text import escaped, one_line, prose
from .dataset_card_code import code
from .dataset_card_origin import origin
from .dataset_card_text import columns, limits, numbers, sample, sizes, summary, warnings
from .features import matrices_about

_SIZES = tuple(
    (
        "n<1K 1K<n<10K 10K<n<100K 100K<n<1M 1M<n<10M 10M<n<100M 100M<n<1B "
        "1B<n<10B 10B<n<100B 100B<n<1T n>1T"
    ).split()
)
"""By powers of ten, from a thousand rows."""
TAGS = ("knowledge-distillation", "soft-targets", "stillroom")
CONFIGS = ("generations", "soft_targets", "features")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A version on disk, and what its card says beside it."""

    folder: Path
    """The published folder."""
    manifest: Manifest
    provenance: Mapping[str, Any]
    languages: tuple[str, ...] = ()
    """ISO codes."""
    repo: str | None = None
    """USER/NAME on the Hub; None: a folder."""


def dataset_card(published: Published) -> str:
    """The card, front matter and text."""
    from huggingface_hub import DatasetCard

    template = (
        package_files("stillroom.pipeline.templates")
        .joinpath("dataset_card.md.jinja")
        .read_text("utf-8")
    )
    manifest = published.manifest
    configs = [config for config in CONFIGS if config in manifest.tables]
    card = DatasetCard.from_template(
        _card_data(published, configs),
        template_str=template,
        title=escaped(manifest.name),
        version=manifest.version,
        summary=prose(summary(manifest, published.provenance)),
        warnings=[one_line(text) for text in warnings(manifest, published.provenance)],
        sizes=sizes(manifest, configs),
        code=code(manifest, published.provenance, repo=published.repo),
        configs={config: columns(manifest, published.provenance, config) for config in configs},
        sample=sample(published.folder, manifest),
        numbers=numbers(manifest),
        origin=origin(manifest, published.provenance),
        limits=limits(manifest),
        matrices=matrices_about(manifest),
    )
    return f"{str(card).rstrip()}\n"


def data_files(manifest: Manifest, config: str) -> list[dict[str, str]]:
    """Split -> where its files lie, as `configs` in a card have it."""
    there = [split for split in manifest.splits if manifest.tables_of(config, split)]
    return [
        {"split": split, "path": f"{manifest.version}/{config}/{split}-*.parquet"}
        for split in there
    ]


def _card_data(published: Published, configs: list[str]) -> Any:
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    manifest, provenance = published.manifest, published.provenance
    rows = max(
        sum(file.rows for file in manifest.files if file.table == config) for config in configs
    )
    data = DatasetCardData(
        pretty_name=one_line(manifest.name),
        license=provenance["license"],
        language=list(published.languages) or None,
        task_categories=_task_categories(manifest),
        size_categories=[_SIZES[min(max(len(str(rows)) - 3, 0), len(_SIZES) - 1)]],
        tags=[
            *TAGS,
            *(
                ["synthetic"]
                if any(model["wrote"] for model in provenance["models"].values())
                else []
            ),
        ],
        configs=[
            {
                "config_name": config,
                **({"default": True} if first else {}),
                "data_files": data_files(manifest, config),
            }
            for config, first in zip(configs, [True, False, False], strict=False)
        ],
    )
    DatasetInfosDict({config: _info(published, config) for config in configs}).to_dataset_card_data(
        data
    )
    return data


def _task_categories(manifest: Manifest) -> list[str]:
    """What the rows can teach.

    A shard says its head (what a teacher's distribution is over) and no task: the same rows serve
    every task with that head, so all of them are named.
    """
    heads = sorted({about.get("head", "lm") for about in manifest.about.values()})
    head = next((head for head in heads if head != "lm"), "lm")
    return sorted({task.hub_name for task in TASKS.values() if task.head == head})


def _of_any_length(schema: Any) -> Any:
    """Keys as bytes of any length: `datasets` 4.4 reads those of 16 so, and knows no others."""
    import pyarrow as pa

    keys = [pa.types.is_fixed_size_binary(field.type) for field in schema]
    fields = zip(schema, keys, strict=True)
    return pa.schema([field.with_type(pa.binary()) if key else field for field, key in fields])


def _info(published: Published, config: str) -> Any:
    """Features, rows and bytes, by `datasets` itself."""
    import pyarrow.parquet as pq
    from datasets import DatasetInfo, Features, Image, SplitDict, SplitInfo

    manifest = published.manifest
    files = [file for file in manifest.files if file.table == config]
    schema = pq.read_schema(published.folder / manifest.version / files[0].name).remove_metadata()
    splits = SplitDict()
    for split, found in manifest.statistics.items():
        if config in found:
            splits.add(
                SplitInfo(
                    name=split, num_bytes=found[config]["bytes"], num_examples=found[config]["rows"]
                )
            )
    features = Features.from_arrow_schema(_of_any_length(schema))
    if "image" in features:
        features["image"] = Image()  # so that it is shown, and decoded
    return DatasetInfo(
        features=features,
        splits=splits,
        download_size=sum(file.bytes for file in files),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
