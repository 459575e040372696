"""The command `import`: other people's tables of entries become a store."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.errors import UsageError
from ...storage.words import counted
from ..printing.text import show_line
from .app import AsJson, Quiet, print_json, words

if TYPE_CHECKING:
    from ...stages.data.importing.table import Imported, ImportRequest

_USUAL = {"tokens": "token_ids", "ids": "teacher_topk_ids", "values": "teacher_topk_logprobs"}
"""Our name of a column -> what most tables call it."""
_NAMES = (*_USUAL, "lse", "token_logprobs", "prompt_tokens", "completion_tokens", "spans")
_SCORED = {"prompt_tokens", "completion_tokens", "spans"}
"""Each of these says which tokens are scored."""

_Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="File, glob or folder (Parquet, JSONL, Arrow), or Hub dataset id."
    ),
]
_Store = Annotated[
    str,
    typer.Argument(metavar="STORE", help="Folder or URL of the store, made if it is not there."),
]
_TargetsAt = Annotated[
    str,
    typer.Option(
        metavar="next|same",
        help="next: the list at a token predicts the token after it (a model's output there). "
        "same: it is the distribution of that very token (prompt log-probabilities of an engine).",
    ),
]
_Columns = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=COLUMN[,NAME=COLUMN]",
        help="Our name of a column and the table's. tokens: ids of prompt and completion [T]; "
        "ids: of the entries [positions][K]; values: their numbers [positions][K], see --values; "
        "lse: for logits, the log-sum-exp over the vocabulary; token_logprobs: of the tokens that "
        "are there [positions]; prompt_tokens: how many tokens are the prompt, or "
        "completion_tokens: how many at the end are the completion, or spans: start and tokens of "
        "each scored span, one after another (with none, all tokens but the first are scored) "
        "[tokens=token_ids,ids=teacher_topk_ids,values=teacher_topk_logprobs]. "
        "Example: --columns tokens=input_ids,ids=top_ids,values=top_logprobs.",
    ),
]
_Values = Annotated[
    str,
    typer.Option(
        metavar="logprobs|probs|logits",
        help="What the values are, of the whole vocabulary at temperature 1: natural logs of "
        "probabilities, probabilities, or logits (which need the column lse).",
    ),
]
_Forced = Annotated[
    bool,
    typer.Option("--forced", help="The last entry is the token that is there, besides the K best."),
]
_K = Annotated[
    int | None, typer.Option("--k", min=1, help="Store so many of the best entries [all].")
]
_Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Whose probabilities these are: folder or Hub id."),
]
_Revision = Annotated[str | None, typer.Option(help="Its Hub revision.")]
_Tokenizer = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Its tokenizer, where its weights are not here."),
]
_TeacherName = Annotated[str | None, typer.Option(metavar="NAME", help="What to call it then.")]
_VocabSize = Annotated[
    int | None, typer.Option(min=2, help="Ids of its vocabulary [as its config or tokenizer says].")
]
_Split = Annotated[str, typer.Option(help="Split of a dataset of the Hub or a saved one.")]
_Holdout = Annotated[
    int | None,
    typer.Option(min=0, help="Prompts for evaluation only, by hash [a tenth, 200 at most]."),
]
_MantissaBits = Annotated[
    int, typer.Option(min=1, max=23, help="Bits stored of each float's mantissa; 23 is exact.")
]
_SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave rows out that do not fit; they go to `rejects`, with the reason."
    ),
]


def import_(
    source: _Source,
    store: _Store,
    targets_at: _TargetsAt,
    columns: _Columns = None,
    values: _Values = "logprobs",
    forced: _Forced = False,
    k: _K = None,
    teacher: _Teacher = None,
    revision: _Revision = None,
    tokenizer: _Tokenizer = None,
    teacher_name: _TeacherName = None,
    vocab_size: _VocabSize = None,
    split: _Split = "train",
    holdout: _Holdout = None,
    mantissa_bits: _MantissaBits = 10,
    skip_bad: _SkipBad = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn a foreign table of token ids, entries and probabilities into a store to train from.

    Every row is checked before it is written: lengths, ids, order, sums, and whether the targets
    belong to the tokens that they stand beside. What does not fit is named by row and column and
    ends the import, or is left out (--skip-bad). Run it again to go on: rows that are there are not
    written twice. It prints a recipe to train with.
    """
    from ...stages.data.importing.columns import Columns
    from ...stages.data.importing.table import ImportRequest, import_table
    from ..run.progress import StageProgress

    how: dict[str, Any] = {
        "targets_at": _one_of(targets_at, "--targets-at", ("next", "same")),
        "kind": _one_of(values, "--values", ("logprobs", "probs", "logits")),
    }
    how |= column_names(columns or (), kind=values)
    request = ImportRequest(
        source=source,
        store=store,
        columns=Columns(**how, forced=forced, k=k),
        teacher=teacher,
        revision=revision,
        tokenizer=tokenizer,
        teacher_name=teacher_name,
        vocab_size=vocab_size,
        split=split,
        holdout=holdout,
        mantissa_bits=mantissa_bits,
        skip_bad=skip_bad,
    )
    progress = StageProgress("import", sys.stderr, quiet=quiet)
    done = import_table(request, progress)
    progress.finish()
    for line in lines(request, done):
        show_line(line)
    print_json(as_json_object(request, done), as_json)


def column_names(given: Sequence[str], *, kind: str) -> dict[str, str]:
    """Our name of a column -> the table's name.

    It comes from `--columns name=column,...`, and else from the names that most tables have.

    Raises:
        UsageError: no such name, or columns that do not go together.
    """
    names = dict(_USUAL)
    for word in words(given):
        name, _, column = word.partition("=")
        if name not in _NAMES or not column:
            raise UsageError(
                f"--columns: expected NAME=COLUMN, NAME one of {', '.join(_NAMES)} (got {word!r})."
            )
        names[name] = column
    if (kind == "logits") != ("lse" in names):
        raise UsageError(
            "--columns: lse goes with --values logits, and those with it. Name the column of "
            "their log-sum-exp: --columns lse=COLUMN."
        )
    if len(said := sorted(_SCORED & names.keys())) > 1:
        raise UsageError(f"--columns: {' and '.join(said)} say the same. Name one.")
    return names


def _one_of(value: str, option: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"{option}: expected {' or '.join(known)} (got {value!r}).")
    return value


def recipe_for(request: "ImportRequest", done: "Imported") -> dict[str, Any]:
    """A recipe that trains a student from what was imported; the student is the user's to name."""
    from ...stages.data.importing.table import given_format

    return {
        "run": {"dir": "runs/imported"},
        "storage": {"dir": request.store},
        "teacher": {"model": request.store},
        "student": {"model": "<folder or Hub id>"},
        "data": {
            "source": request.store,
            "format": given_format(done),
            "holdout": done.holdout,
        },
        "score": {"k": done.k},
        "train": {"epochs": 1},
    }


def lines(request: "ImportRequest", done: "Imported") -> Iterator[str]:
    """What to say of an import."""
    import yaml

    held = (
        counted(done.holdout, "prompt is held out", "prompts are held out")
        if done.holdout
        else "no prompt is held out"
    )
    again = f", {done.known} were there already" if done.known else ""
    made = f"{counted(done.rows, 'row')} of {counted(done.tokens, 'scored token')}"
    yield f"{made} imported into {request.store}{again}; {held}."
    if done.rejected:
        left_out = sum(done.rejected.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(done.rejected.items()))
        said = f"{counted(left_out, 'row')} left out: {reasons}"
        yield f"{said}. They are in `rejects`, each with its reason."
    yield from done.notes
    if "unseen" in done.teacher.parts:
        yield (
            f"The teacher is known by its name, {request.teacher_name}, and its tokenizer only: no "
            "weights were seen, so nothing here proves whose probabilities these are."
        )
    yield (
        "What the table does not hold is bounded: the tail is what the entries leave of 1, the "
        "entropy the least that it can be, and the log-probability of a token outside the "
        "entries the most."
    )
    recipe = yaml.safe_dump(recipe_for(request, done), sort_keys=False)
    yield f"A recipe that trains from it:\n\n{recipe}"


def as_json_object(request: "ImportRequest", done: "Imported") -> dict[str, Any]:
    """The same for programs."""
    return {
        "rows": done.rows,
        "known": done.known,
        "rejected": done.rejected,
        "tokens": done.tokens,
        "k": done.k,
        "teacher_id": done.teacher.id,
        "holdout": done.holdout,
        "notes": done.notes,
        "recipe": recipe_for(request, done),
    }
