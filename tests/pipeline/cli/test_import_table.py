"""Foreign tables through the command line.

They get into a store and on to a student, or are refused with the row and the reason.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kit import last_json, stillroom, write_jsonl
from planting import copied, planted
from tiny_images import save_tiny_resnet
from tiny_llama import save_tiny_llama
from tiny_masks import save_tiny_masked
from tiny_models import save_tiny_bert
from tiny_store import SilentProgress, teacher_targets
from tiny_words import save_tiny_tagger
from transformers import AutoModelForCausalLM

from stillroom.pipeline.cli.deep_verify import deep_lines, deep_verify, deeply, find_teacher
from stillroom.pipeline.cli.import_table import column_names, recipe_for
from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.data.importing.columns import Columns
from stillroom.stages.data.importing.table import Imported, ImportRequest, import_table
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import positions, spans_of

COLUMNS = Columns(
    tokens="tokens", ids="ids", values="values", prompt_tokens="prompt", targets_at="next"
)
K, ROWS = 5, 40
Record = dict[str, Any]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(
        tmp_path_factory.mktemp("import") / "teacher", hidden_size=32, initializer_range=0.5
    )


@pytest.fixture(scope="module")
def records(teacher: Path) -> list[Record]:
    """Texts that the teacher drew; at each token the K best of what it says of the next one."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(0)
    found = []
    for number in range(ROWS):
        ids = [1, 4 + number % 15, 4 + number % 7]
        with torch.no_grad():
            for _ in range(6 + number % 9):
                last = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
                ids.append(int(torch.multinomial(last, 1, generator=draw)))
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values, entries = logprobs.topk(K)
        found.append(
            {"tokens": ids, "prompt": 3, "ids": entries.tolist(), "values": values.tolist()}
        )
    return found


@pytest.fixture
def asked(tmp_path: Path, teacher: Path, records: list[Record]) -> Callable[..., ImportRequest]:
    def make(
        *, change: Callable[[Record], None] | None = None, row: int = 1, **how: Any
    ) -> ImportRequest:
        rows = json.loads(json.dumps(records))
        if change is not None:
            change(rows[row])
        source = write_jsonl(tmp_path / "table.jsonl", rows)
        given = {"columns": COLUMNS, "teacher": str(teacher)} | how
        return ImportRequest(source=str(source), store=str(tmp_path / "store"), **given)

    return make


def imported(asked: ImportRequest) -> Imported:
    return import_table(asked, SilentProgress())


def targets(store: Store) -> list[dict[str, Any]]:
    places: dict[str, list[int]] = {}
    for row in store.index("soft_targets", ["key"]).to_pylist():
        places.setdefault(row["shard"], []).append(row["row"])
    return list(store.rows("soft_targets", places))


@pytest.mark.slow
def test_a_table_becomes_a_store_that_plan_and_train_know(
    tmp_path: Path, teacher: Path, records: list[Record]
) -> None:
    """The real command on Parquet, the recipe that it prints, and a student trained by it."""
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "table.parquet")
    words = (
        "--columns",
        "tokens=tokens,ids=ids,values=values",
        "--columns",
        "prompt_tokens=prompt",
    )
    store = tmp_path / "store"
    source = (
        "import",
        tmp_path / "table.parquet",
        store,
        "--targets-at",
        "next",
        "--teacher",
        teacher,
    )
    done = last_json(stillroom(*source, *words, "--holdout", "4", "--json"))
    assert {name: done[name] for name in ("rows", "known", "rejected", "k")} == {
        "rows": ROWS,
        "known": 0,
        "rejected": {},
        "k": K,
    }
    assert verify(Store.open(store)).ok
    # It can be given away before anybody is trained on it.
    given = last_json(stillroom("export", store, tmp_path / "out", "--license", "mit", "--json"))
    assert given["rows"]["soft_targets"] == {"train": ROWS - 4, "test": 4}
    tree = done["recipe"] | {
        "run": {"dir": str(tmp_path / "run")},
        "student": {"model": str(teacher)},
    }
    recipe = Recipe.model_validate(
        tree | {"train": {"epochs": 1, "tokens_per_step": 128}, "evaluate": {"tokens": 100}}
    )
    plan = make_plan(recipe, write=True)
    lines = {line.name: line for line in plan.stages}
    assert (lines["score"].state, lines["score"].committed) == ("done", ROWS - 0)
    assert lines["evaluate"].planned >= 1
    for snapshot in plan.snapshots.values():
        save_snapshot(Store.open(store), snapshot)
    b, snapshots = (
        plan.bound.binding,
        {split: snapshot.id for split, snapshot in plan.snapshots.items()},
    )
    ids: dict[str, Any] = {"teacher_id": b.teacher_id, "data_id": b.data_id, "snapshots": snapshots}
    folder = tmp_path / "train"
    train.run(
        Job(
            recipe=recipe,
            progress=SilentProgress(),
            stop=StopFlag(),
            train_dirs={"student": folder},
            **ids,
        )
    )
    # The student is the teacher: what it learns from agrees with what it says, but for the coarse
    # tail.
    first = json.loads((folder / "train.json").read_text())["history"][0]
    assert first["soft_loss" if "soft_loss" in first else "soft"] < 0.01


def test_deep_verification_compares_the_entries_of_an_imported_row(
    asked: Callable[..., ImportRequest], teacher: Path, tmp_path: Path
) -> None:
    """Bounds are not what the teacher says; the entries are, and one that is off is found."""
    imported(asked())
    store = Store.open(asked().store)
    how = deeply(str(teacher))
    found = deep_verify(store, find_teacher(store, how), how, progress=SilentProgress())
    assert (found.off, found.imported) == ([], 32)
    assert found.quantities.keys() == {"logprobs", "token_logprob"}
    assert any("only the entries are compared" in line for line in deep_lines(found))

    def change(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"logprobs": row["logprobs"] - np.float32(0.1)}

    off = copied(store, tmp_path / "off", change)
    found = deep_verify(off, find_teacher(store, how), how, progress=SilentProgress())
    assert {row.fault for row in found.off} == {"other numbers"}
    assert len(found.off) == 32
    back = planted(store, tmp_path / "back", "shifted", consistent=False)
    found = deep_verify(back, find_teacher(store, how), how, progress=SilentProgress())
    assert [row.fault for row in found.off].count("shifted by one position") >= 28


def test_probabilities_of_the_entries_alone_are_refused(
    asked: Callable[..., ImportRequest], records: list[Record]
) -> None:
    how = replace(COLUMNS, kind="probs")
    whole = [[np.exp(values).tolist() for values in record["values"]] for record in records]

    def give(rows: list[Record], *, over_entries: bool) -> ImportRequest:
        table = asked(columns=how)
        for row, values in zip(rows, whole, strict=True):
            row["values"] = [
                [p / (sum(some) if over_entries else 1) for p in some] for some in values
            ]
        write_jsonl(Path(table.source), rows)
        return table

    rows = json.loads(json.dumps(records))
    with pytest.raises(
        UsageError, match=r"look renormalised over their entries.*Give the values over the whole"
    ):
        imported(give(rows, over_entries=True))
    assert not Path(asked().store).exists()
    assert imported(give(rows, over_entries=False)).rows == ROWS


def test_what_is_stored_is_what_the_teacher_says(
    asked: Callable[..., ImportRequest], teacher: Path
) -> None:
    done = imported(asked(mantissa_bits=23))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    rows = targets(Store.open(asked().store))
    assert done.rows == len(rows) == ROWS
    for row in rows[::7]:
        ids = row["token_ids"].tolist()
        truth = teacher_targets(model, ids, range(3, len(ids)), K)
        found = SoftTargets.from_row(row)
        np.testing.assert_array_equal(found.ids, truth.ids)
        np.testing.assert_allclose(found.logprobs, truth.logprobs, atol=1e-5)
        np.testing.assert_allclose(
            np.exp(found.tail_logprob), np.exp(truth.tail_logprob), atol=1e-5
        )
        assert (found.token_logprob >= truth.token_logprob - 1e-5).all()
        assert (found.entropy <= truth.entropy + 1e-5).all()


def test_the_same_table_again_adds_nothing_and_a_longer_one_its_rows(
    asked: Callable[..., ImportRequest], records: list[Record]
) -> None:
    assert imported(asked()).rows == ROWS
    again = imported(asked())
    assert (again.rows, again.known) == (0, ROWS)
    one = asked()
    more = [*records, records[0] | {"tokens": [1, 9, 9, *records[0]["tokens"][3:]]}]
    write_jsonl(Path(one.source), more)
    longer = imported(one)
    assert (longer.rows, longer.known) == (1, ROWS)
    plan = make_plan(Recipe.model_validate(recipe_for(one, longer) | {"student": {"config": {}}}))
    assert plan.stages[0].committed == ROWS + 1


def test_shifted_targets_are_refused_before_anything_is_written(
    asked: Callable[..., ImportRequest],
) -> None:
    with pytest.raises(
        UsageError, match=r"the targets are shifted by one position.*--targets-at next\?"
    ):
        imported(asked(columns=replace(COLUMNS, targets_at="same")))
    assert not Path(asked().store).exists()


SPANS = replace(COLUMNS, prompt_tokens=None, spans="spans")


def spanned(records: list[Record], source: Path) -> Path:
    """Texts that are scored after the prompt, every second one in two spans."""
    rows = []
    for number, record in enumerate(records):
        total = len(record["tokens"])
        spans = [3, 2, 6, total - 6] if number % 2 else [3, total - 3]
        rows.append(record | {"spans": spans})
    return write_jsonl(source, rows)


def test_spans_are_rows_of_several_spans(
    asked: Callable[..., ImportRequest], teacher: Path, records: list[Record]
) -> None:
    one = asked(columns=SPANS)
    spanned(records, Path(one.source))
    done = imported(one)
    store = Store.open(one.store)
    assert verify(store).ok
    assert "no shift found" in done.notes[0]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    for row in targets(store)[:6]:
        ids = row["token_ids"].tolist()
        whole = teacher_targets(model, ids, range(3, len(ids)), K)
        scored = positions(spans_of(row))
        assert (row["spans"] is None) == (len(scored) == len(row["token_ids"]) - 3)
        np.testing.assert_array_equal(SoftTargets.from_row(row).ids, whole.ids[scored - 3])
    plan = make_plan(Recipe.model_validate(recipe_for(one, done) | {"student": {"config": {}}}))
    states = {stage.name: stage.state for stage in plan.stages}
    assert (states["data"], states["score"]) == ("done", "done"), states

    # A span to the end is the row that it is without the column.
    again = asked()
    assert imported(again).known == ROWS // 2


def test_shifted_targets_of_several_spans_are_refused(
    asked: Callable[..., ImportRequest], records: list[Record]
) -> None:
    one = asked(columns=replace(SPANS, targets_at="same"))
    spanned(records, Path(one.source))
    with pytest.raises(UsageError, match="shifted by one position"):
        imported(one)


def test_a_row_that_does_not_fit_ends_the_import_or_is_left_out(
    asked: Callable[..., ImportRequest],
) -> None:
    def twice(row: Record) -> None:
        row["ids"][4][1] = row["ids"][4][0]

    with pytest.raises(
        UsageError,
        match=r"table\.jsonl:2: column ids: id \d+ twice .* expected each id once.*--skip-bad",
    ):
        imported(asked(change=twice))
    assert not Path(asked().store).exists()
    done = imported(asked(change=twice, skip_bad=True))
    assert (done.rows, done.rejected) == (ROWS - 1, {"duplicate_id": 1})
    store = Store.open(asked().store)
    (commit,) = store.commits("rejects")
    (row,) = store.rows("rejects", {commit.shard.sha256: [0]})
    assert (row["stage"], row["reason"]) == ("import", "duplicate_id")
    assert "table.jsonl:2: column ids: id" in row["message"]
    assert verify(store).ok


def test_a_missing_column_and_a_missing_teacher_are_named(
    asked: Callable[..., ImportRequest],
) -> None:
    with pytest.raises(
        UsageError, match=r"table\.jsonl:1: no column 'logits' \(found 'tokens', 'prompt'"
    ):
        imported(asked(columns=replace(COLUMNS, values="logits")))
    with pytest.raises(UsageError, match="Whose probabilities are these"):
        imported(asked(teacher=None))
    with pytest.raises(
        UsageError,
        match="nothing to import: all 40 rows were rejected, the first for: column values",
    ):
        imported(asked(columns=replace(COLUMNS, kind="probs"), skip_bad=True))
    one = asked(columns=replace(COLUMNS, kind="probs"), skip_bad=True)
    source = Path(one.source)
    source.write_text(source.read_text().splitlines()[0])
    with pytest.raises(UsageError, match="the only row was rejected for: column values"):
        imported(one)
    with pytest.raises(UsageError, match=r"^SOURCE: nothing to read at .*/none\.jsonl"):
        imported(replace(asked(), source="/nowhere/none.jsonl"))
    assert not Path(asked().store).exists()
    with pytest.raises(UsageError, match=r"--holdout: 40 of \d+ prompts"):
        imported(asked(holdout=40))


@pytest.mark.parametrize(
    ("save", "what"),
    [
        (save_tiny_bert, "a text classifier"),
        (save_tiny_tagger, "a token classifier"),
        (save_tiny_masked, "a masked language model"),
        (save_tiny_resnet, "an image classifier"),
    ],
)
def test_a_teacher_of_anything_but_next_tokens_is_refused(
    tmp_path: Path,
    asked: Callable[..., ImportRequest],
    save: Callable[[Path], Path],
    what: str,
) -> None:
    request = asked(teacher=str(save(tmp_path / "other")))
    with pytest.raises(
        UsageError, match=rf"^--teacher: .* is {what} .* rows of a table are of the next"
    ):
        imported(request)
    assert not Path(request.store).exists()


def test_columns_are_named_as_in_a_recipe() -> None:
    assert column_names(["prompt_tokens=prompt, ids=best"], kind="logprobs") == {
        "tokens": "token_ids",
        "ids": "best",
        "values": "teacher_topk_logprobs",
        "prompt_tokens": "prompt",
    }
    for wrong, kind, message in (
        ("logprob=x", "logprobs", r"NAME=COLUMN, NAME one of tokens, ids, .* \(got 'logprob=x'\)"),
        ("ids", "logprobs", "got 'ids'"),
        ("ids=", "logprobs", "got 'ids='"),
        ("lse=z", "probs", "lse goes with --values logits"),
        ("ids=best", "logits", "--columns lse=COLUMN"),
        ("prompt_tokens=a,completion_tokens=b", "probs", "say the same. Name one"),
        ("spans=a,completion_tokens=b", "probs", "completion_tokens and spans say the same"),
    ):
        with pytest.raises(UsageError, match=message):
            column_names([wrong], kind=kind)


def test_a_teacher_without_weights_is_known_by_name_and_tokenizer(
    asked: Callable[..., ImportRequest], teacher: Path
) -> None:
    one = asked(teacher=None, tokenizer=teacher, teacher_name="org/teacher-405b")
    done = imported(one)
    store = Store.open(one.store)
    assert store.teacher_parts(done.teacher.id)["unseen"] == "org/teacher-405b"
    assert verify(store).ok
    assert {row["teacher_id"] for row in targets(store)} == {done.teacher.id}
    other = imported(asked(teacher=None, tokenizer=teacher, teacher_name="org/other"))
    assert other.teacher.id != done.teacher.id


def test_arrow_files_are_read_too(
    asked: Callable[..., ImportRequest], tmp_path: Path, records: list[Record]
) -> None:
    one = asked()
    table = pa.Table.from_pylist(records)
    for name, write in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with write(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        done = imported(replace(one, source=str(tmp_path / name)))
        assert done.rows + done.known == ROWS
