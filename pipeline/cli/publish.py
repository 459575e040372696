"""The commands `export` and `publish`, and the options that both have."""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.errors import UsageError
from ..printing.text import show_line
from .app import AsJson, Overrides, print_json, words

if TYPE_CHECKING:
    from ...stages.recipe.sections import Recipe
    from ..publish.export import PublishRequest


_Place = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|STORE",
        help="A recipe, whose rows are meant; or the folder or URL of a store, all of it.",
    ),
]
_License = Annotated[
    str | None,
    typer.Option(metavar="ID", help="Licence of this dataset: apache-2.0, cc-by-4.0 ..."),
]
_TeacherLicense = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID",
        help="Licence or terms of the model that wrote and scored the text, or `unknown`. Of "
        "several models: MODELID=ID each, its first digits suffice.",
    ),
]
_SourceLicense = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID",
        help="Licence of the data that the prompts come from, or `unknown`. Of several "
        "sources: NAME=ID each.",
    ),
]
_Snapshot = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="Rows chosen before, by the first digits of their id; their validation and test "
        "splits come along [of a recipe what it selects; of a store the only rows that a student "
        "was trained on or a recipe exported, else all that it holds].",
    ),
]
_Where = Annotated[
    str | None,
    typer.Option(
        metavar="SQL", help="Only rows whose generation fits: SQL over its columns [all]."
    ),
]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Only these columns, plain or as table.name; `key` always, a table without any "
        "not at all [all].",
    ),
]
_MinK = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Only targets with K entries or more, cut to K: what is cut joins the tail, "
        "exactly [as stored].",
    ),
]
_Features = Annotated[
    bool | None,
    typer.Option(
        "--features/--no-features",
        help="Also what is stored of the teacher's layers for these texts, and its embeddings "
        "[what a recipe's student learns from; of a store nothing].",
    ),
]
_Name = Annotated[
    str | None,
    typer.Option(help="What the dataset is called [after the last part of where it goes]."),
]
_Teacher = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the teacher is called; the store cannot know."),
]
_Language = Annotated[
    list[str] | None,
    typer.Option(metavar="CODE", help="ISO code of the text's language, repeatable."),
]
_Run = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN_DIR",
        help="Of which the recipe goes along, without its paths; one that is named does.",
    ),
]


def publish_request(
    place: _Place,
    license: _License = None,
    teacher_license: _TeacherLicense = None,
    source_license: _SourceLicense = None,
    snapshot: _Snapshot = None,
    where: _Where = None,
    columns: _Columns = None,
    min_k: _MinK = None,
    features: _Features = None,
    name: _Name = None,
    teacher: _Teacher = None,
    language: _Language = None,
    run: _Run = None,
    overrides: Overrides = None,
) -> "PublishRequest":
    """What to publish, as the options of both commands say it."""
    from ...storage.published.choice import Choice
    from ..publish.export import PublishRequest

    recipe = _named_recipe(place, run, overrides)
    names = tuple(words(columns or ()))
    if columns is not None and not names:
        raise UsageError("--columns: names no column. Name some, or leave it out for all.")
    return PublishRequest(
        store=place if recipe is None else recipe.storage.dir,
        rows_of=recipe,
        license=license,
        model_licenses=tuple(teacher_license or ()),
        source_licenses=tuple(source_license or ()),
        snapshot=snapshot,
        choice=Choice(where=where, columns=names, min_k=min_k),
        features=features,
        name=name,
        teacher=teacher,
        languages=tuple(language or ()),
        run=run,
    )


def _named_recipe(place: str, run: Path | None, overrides: list[str] | None) -> "Recipe | None":
    """The recipe that was named in place of a store; None of a store."""
    from ...stages.recipe.load import load_recipe

    path = Path(place)
    if not path.is_file() and (path.suffix not in (".yaml", ".yml") or path.exists()):
        if overrides:
            raise UsageError(f"--set: {place} is no recipe. Name one, or leave it out.")
        return None
    if run is not None:
        raise UsageError(f"--run: the recipe {place} goes along already. Leave it out.")
    return load_recipe(path, overrides)


def _of_a_request(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first parameter is a request: on the command line, the options of one."""
    shared = signature(publish_request).parameters
    own = list(signature(command).parameters.values())[1:]

    @wraps(command)
    def called(**given: Any) -> None:
        request = publish_request(**{name: given.pop(name) for name in shared})
        command(request, **given)

    # Typer reads these two. What has no default is an argument, and those come first.
    parameters = sorted([*shared.values(), *own], key=lambda p: p.default is not Parameter.empty)
    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


@_of_a_request
def export(
    request: "PublishRequest",
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder of the dataset; may hold older versions.")
    ],
    as_json: AsJson = False,
) -> None:
    """Write rows of a store as a dataset folder, with its card.

    `datasets`, DuckDB, polars and pyarrow load it.

    Nobody need have been trained on them. Configs `generations`, `soft_targets` and `features`,
    splits as recorded or trained; Parquet in a folder named by its content, a MANIFEST with the
    sha256 of every file, and last the card that points at it. Stop it anywhere and run it again.
    """
    from ..publish.export import export as run_export

    if "://" in directory:
        raise UsageError(
            f"{directory}: export writes into a folder of this machine. To the Hub: `stillroom "
            "publish`."
        )
    exported = run_export(request, Path(directory), say=_say)
    _tell(exported.to_json(), as_json)


@_of_a_request
def publish(
    request: "PublishRequest",
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help="hf://datasets/USER/NAME, or a folder.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Do as `export` does, then send the dataset to the Hub and tag it.

    The data go first and the card goes last, so that no reader sees half a version. Then the
    version gets its tag.

    It refuses until the licence of the dataset, of the teacher and of the prompts is given. Stop it
    anywhere and run it again: what is there is not sent twice. The token is that of `hf auth login`
    or HF_TOKEN.
    """
    from ..publish.publish import publish as run_publish

    _tell(run_publish(request, destination, say=_say, private=private), as_json)


def _say(text: str) -> None:
    show_line(text, sys.stderr)


def _tell(done: dict[str, Any], as_json: bool) -> None:
    tables = []
    for table, splits in done["rows"].items():
        rows = ", ".join(f"{split} {count}" for split, count in splits.items())
        tables.append(f"{table}: {rows}")
    made = "" if done["built"] else " (it was there)"
    place = done.get("url", done["dir"])
    show_line(f"{done['version']}{made} in {place}")
    show_line(f"rows of {'; '.join(tables)}")
    print_json(done, as_json)
