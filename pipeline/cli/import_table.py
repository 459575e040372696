"""The command `import`."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...storage.errors import UsageError

if TYPE_CHECKING:
    from ...stages.data.importing.table import Imported, ImportRequest

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
        help="next: the list at a token predicts the token after it (a model's output there). same: it is the "
        "distribution of that very token (prompt log-probabilities of an engine).",
    ),
]
_Tokens = Annotated[str, typer.Option(help="Column of token ids, prompt and completion [T].")]
_Ids = Annotated[str, typer.Option(help="Column of the entries' ids [positions][K].")]
_Logprobs = Annotated[
    str, typer.Option(help="Column of their numbers [positions][K]; see --values.")
]
_Values = Annotated[
    str,
    typer.Option(
        metavar="logprobs|probs|logits",
        help="What the numbers are, of the whole vocabulary at temperature 1: natural logs of probabilities, "
        "probabilities, or logits (with --lse).",
    ),
]
_Lse = Annotated[
    str | None, typer.Option(help="logits: column of their log-sum-exp over the vocabulary.")
]
_TokenLogprobs = Annotated[
    str | None,
    typer.Option(help="Column with the log-probability of the token that is there [positions]."),
]
_PromptTokens = Annotated[
    str | None,
    typer.Option(
        help="Column: how many tokens are the prompt [none, all but the first are scored]."
    ),
]
_CompletionTokens = Annotated[
    str | None,
    typer.Option(
        help="Column: how many tokens at the end are the completion; in place of the above."
    ),
]
_Forced = Annotated[
    bool,
    typer.Option("--forced", help="The last entry is the token that is there, besides the K best."),
]
_K = Annotated[
    int | None, typer.Option("--k", min=1, help="Keep so many of the best entries [all].")
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
    typer.Option(min=0, help="Prompts kept for evaluation, by hash [a tenth, 200 at most]."),
]
_MantissaBits = Annotated[
    int, typer.Option(min=1, max=23, help="Bits kept of each float; 23 is exact.")
]
_SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad", help="Leave rows out that do not fit; they go to `rejects`, with the reason."
    ),
]
_AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object as the last line of standard output.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]


def import_(
    source: _Source,
    store: _Store,
    targets_at: _TargetsAt,
    tokens: _Tokens = "token_ids",
    ids: _Ids = "teacher_topk_ids",
    logprobs: _Logprobs = "teacher_topk_logprobs",
    values: _Values = "logprobs",
    lse: _Lse = None,
    token_logprobs: _TokenLogprobs = None,
    prompt_tokens: _PromptTokens = None,
    completion_tokens: _CompletionTokens = None,
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
    as_json: _AsJson = False,
    quiet: _Quiet = False,
) -> None:
    """A foreign table of token ids, entries and probabilities becomes a store that students are trained from.

    Every row is checked before it is written: lengths, ids, order, sums, and whether the targets
    belong to the tokens that they stand beside. What does not fit is named by row and column and
    ends the import, or is left out (--skip-bad). Run it again to go on: rows that are there are not
    written twice. Prints a recipe to train with.
    """
    from ...stages.data.importing.columns import Columns
    from ...stages.data.importing.table import ImportRequest, import_table
    from ..run.progress import StageProgress

    choices: dict[str, Any] = {
        "targets_at": _one_of(targets_at, "--targets-at", ("next", "same")),
        "kind": _one_of(values, "--values", ("logprobs", "probs", "logits")),
    }
    if (values == "logits") != (lse is not None):
        raise UsageError(
            "--lse: goes with --values logits, and those with it. Name the column of their "
            "log-sum-exp."
        )
    if prompt_tokens is not None and completion_tokens is not None:
        raise UsageError("--prompt-tokens and --completion-tokens: give one of them.")
    columns = Columns(
        tokens=tokens,
        ids=ids,
        values=logprobs,
        lse=lse,
        token_logprobs=token_logprobs,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        forced=forced,
        k=k,
        **choices,
    )
    asked = ImportRequest(
        source=source,
        store=store,
        columns=columns,
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
    done = import_table(asked, progress)
    progress.finish()
    for line in lines(asked, done):
        sys.stdout.write(f"{line}\n")
    if as_json:
        sys.stdout.write(json.dumps(as_json_object(asked, done)) + "\n")


def _one_of(value: str, option: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"{option}: expected {' or '.join(known)} (got {value!r}).")
    return value


def recipe_for(asked: "ImportRequest", done: "Imported") -> dict[str, Any]:
    """A recipe that trains a student from what was imported; the student is the user's to name."""
    from ...stages.data.importing.table import given_format

    data = {"source": asked.store, "format": given_format(done), "holdout": done.holdout}
    return {
        "run": {"dir": "runs/imported"},
        "storage": {"dir": asked.store},
        "teacher": {"model": asked.store},
        "student": {"model": "<folder or Hub id>"},
        "data": data,
        "score": {"k": done.k},
        "train": {"epochs": 1},
    }


def lines(asked: "ImportRequest", done: "Imported") -> Iterator[str]:
    """What to say of an import."""
    import yaml

    held = f"{done.holdout} prompts are held out" if done.holdout else "no prompt is held out"
    again = f", {done.known} were there already" if done.known else ""
    yield f"{done.rows} rows of {done.tokens} scored tokens imported into {asked.store}{again}; {held}."
    if done.rejected:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(done.rejected.items()))
        yield f"{sum(done.rejected.values())} rows left out: {reasons}. They are in `rejects`, each with its reason."
    yield from done.notes
    if "unseen" in done.teacher.parts:
        yield (
            f"The teacher is known by its name, {asked.teacher_name}, and its tokenizer only: no "
            "weights were seen, so nothing here proves whose probabilities these are."
        )
    yield (
        "What the table does not hold is bounded: the tail is what the entries leave of 1, the "
        "entropy the least that it can be, and the log-probability of a token outside the "
        "entries the most."
    )
    yield "A recipe that trains from it:\n\n" + yaml.safe_dump(
        recipe_for(asked, done), sort_keys=False
    )


def as_json_object(asked: "ImportRequest", done: "Imported") -> dict[str, Any]:
    """The same for programs."""
    found = {
        "rows": done.rows,
        "known": done.known,
        "rejected": done.rejected,
        "tokens": done.tokens,
        "k": done.k,
    }
    recipe = json.loads(json.dumps(recipe_for(asked, done)))
    return found | {
        "teacher_id": done.teacher.id,
        "holdout": done.holdout,
        "notes": done.notes,
        "recipe": recipe,
    }
