"""The commands `export` and `publish`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.errors import UsageError

if TYPE_CHECKING:
    from ..publish.export import Asked

License = Annotated[
    str | None,
    typer.Option(
        "--license", metavar="ID", help="Licence of this dataset: apache-2.0, cc-by-4.0 ..."
    ),
]
TeacherLicense = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-license",
        metavar="ID",
        help="Licence or terms of the model that wrote and scored the text, or `unknown`. Of several models: "
        "MODELID=ID each, its first digits suffice.",
    ),
]
SourceLicense = Annotated[
    list[str] | None,
    typer.Option(
        "--source-license",
        metavar="ID",
        help="Licence of the data that the prompts come from, or `unknown`. Of several sources: NAME=ID each.",
    ),
]
SnapshotId = Annotated[
    str | None,
    typer.Option(
        "--snapshot",
        metavar="ID",
        help="Of a training run, or its first digits; its validation and test splits come along [the only one].",
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        metavar="SQL", help="Only rows whose generation fits: SQL over its columns [all]."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Only these columns, plain or as table.name; `key` always, a table without any not at all [all].",
    ),
]
MinK = Annotated[
    int | None,
    typer.Option(
        "--min-k",
        min=1,
        metavar="K",
        help="Only targets with K entries or more, cut to K: what is cut joins the tail, exactly [as stored].",
    ),
]
Name = Annotated[
    str | None,
    typer.Option(help="What the dataset is called [after the last part of where it goes]."),
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the teacher is called; the store cannot know."),
]
Language = Annotated[
    list[str] | None,
    typer.Option(metavar="CODE", help="ISO code of the text's language, repeatable."),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run", metavar="RUN_DIR", help="Of which the recipe goes along, without its paths."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of standard output.")
]


def export(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of the store.")],
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of the dataset; may hold older versions.")
    ],
    license_id: License = None,
    teacher_license: TeacherLicense = None,
    source_license: SourceLicense = None,
    snapshot: SnapshotId = None,
    where: Where = None,
    columns: Columns = None,
    min_k: MinK = None,
    name: Name = None,
    teacher: Teacher = None,
    language: Language = None,
    run: RunDir = None,
    as_json: AsJson = False,
) -> None:
    """A snapshot as a dataset folder that `datasets`, DuckDB, polars and pyarrow load, with its card.

    Configs `generations` and `soft_targets`, splits as trained; Parquet in a folder named by its
    content, a MANIFEST with the sha256 of every file, and last the card that points at it. Stop it
    anywhere and run it again.
    """
    from ..publish.export import export as run_export

    if "://" in directory:
        raise UsageError(
            f"{directory}: export writes into a folder of this machine. To the Hub: `stillroom "
            "publish`."
        )
    asked = _asked(
        store,
        licenses=(license_id, teacher_license, source_license),
        chosen=(snapshot, where, columns, min_k),
        said={"name": name, "teacher": teacher, "languages": tuple(language or ()), "run": run},
    )
    _tell(run_export(asked, Path(directory), say=_say).to_json(), as_json)


def publish(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of the store.")],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="hf://datasets/USER/NAME, or a folder.")
    ],
    license_id: License = None,
    teacher_license: TeacherLicense = None,
    source_license: SourceLicense = None,
    snapshot: SnapshotId = None,
    where: Where = None,
    columns: Columns = None,
    min_k: MinK = None,
    name: Name = None,
    teacher: Teacher = None,
    language: Language = None,
    run: RunDir = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """`export`, and to the Hub: data first, the card last, so that no reader sees half a version; then a tag.

    Refuses until the licence of the dataset, of the teacher and of the prompts is given. Stop it
    anywhere and run it again: what is there is not sent twice. The token is that of `hf auth login`
    or HF_TOKEN.
    """
    from ..publish.publish import publish as run_publish

    asked = _asked(
        store,
        licenses=(license_id, teacher_license, source_license),
        chosen=(snapshot, where, columns, min_k),
        said={"name": name, "teacher": teacher, "languages": tuple(language or ()), "run": run},
    )
    _tell(run_publish(asked, destination, say=_say, private=private), as_json)


def _asked(
    store: str,
    *,
    licenses: tuple[str | None, list[str] | None, list[str] | None],
    chosen: tuple[str | None, str | None, list[str] | None, int | None],
    said: dict[str, Any],
) -> "Asked":
    from ...storage.published.export import Choice
    from ..publish.export import Asked

    own, models, sources = licenses
    snapshot, where, columns, min_k = chosen
    names = tuple(
        word.strip() for text in columns or () for word in text.split(",") if word.strip()
    )
    if columns is not None and not names:
        raise UsageError("--columns: names no column. Name some, or leave it out for all.")
    return Asked(
        store=store,
        license=own,
        model_licenses=tuple(models or ()),
        source_licenses=tuple(sources or ()),
        snapshot=snapshot,
        choice=Choice(where=where, columns=names, min_k=min_k),
        **said,
    )


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _tell(done: dict[str, Any], as_json: bool) -> None:
    rows = "; ".join(
        f"{table}: {', '.join(f'{split} {count}' for split, count in splits.items())}"
        for table, splits in done["rows"].items()
    )
    made = "" if done["built"] else " (it was there)"
    sys.stdout.write(f"{done['version']}{made} in {done.get('url', done['dir'])}\nrows of {rows}\n")
    if as_json:
        sys.stdout.write(json.dumps(done) + "\n")
