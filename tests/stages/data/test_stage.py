"""Stage data: every format and source becomes prompts rows.

Bad records are rejected with a reason, never lost.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import prompts, recipe_tree, write_jsonl

from stillroom.pipeline.plan.resolve import bind
from stillroom.stages.data import stage
from stillroom.stages.data.formats import prompt_row
from stillroom.stages.data.sources.source import training_source
from stillroom.stages.data.stage import inputs_id, survey
from stillroom.stages.models.identity import FileHashes, identify
from stillroom.stages.models.inputs.rendering import Renderer, cut
from stillroom.stages.recipe.sections import Data, Recipe
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import RowError, StillroomError, UsageError
from stillroom.storage.store.store import Store


def section(source: Path | str, format: str = "prompt", **more: Any) -> Data:
    return Data(source=str(source), format=format, **{"holdout": 0} | more)


def recipe(data: Data, *, generate: bool = True) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"dir": "r"},
            "storage": {"dir": "s"},
            "teacher": {"model": "t"},
            "student": {"config": {}},
            "data": data.model_dump(exclude_unset=True),
            "generate": {} if generate else None,
            "train": {"epochs": 1},
        }
    )


def surveyed(data: Data, *, generate: bool = True) -> tuple[pa.Table, int]:
    return survey(recipe(data, generate=generate))[:2]


def row(record: dict[str, Any], format: str, *, given: bool = False, **more: Any) -> dict[str, Any]:
    return prompt_row(record, "x:1", section("x", format, **more), given=given)


def test_instruction_and_input_are_joined_by_a_newline() -> None:
    made = row({"instruction": "Add.", "input": "1 2", "output": "3"}, "instruction")
    assert made["messages"] == [{"role": "user", "content": "Add.\n1 2"}]
    assert (made["reference"], made["completion"]) == ("3", None)
    assert (
        row({"instruction": "Add.", "input": ""}, "instruction")["messages"][0]["content"] == "Add."
    )


def test_the_output_is_scored_where_nothing_is_generated() -> None:
    made = row({"instruction": "Add.", "output": "3"}, "instruction", given=True)
    assert (made["completion"], made["reference"]) == ("3", None)


def test_the_last_answer_of_a_conversation_is_not_part_of_the_prompt() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    made = row({"messages": messages}, "messages")
    assert made["messages"] == messages[:1]
    assert made["reference"] == "hello"
    assert row({"messages": messages}, "messages", given=True)["completion"] == "hello"


def test_one_prompt_with_two_references_is_one_prompt_key_and_two_rows() -> None:
    first, second = (row({"prompt": "p", "reference": r}, "prompt") for r in "ab")
    assert first["prompt_key"] == second["prompt_key"]
    assert first["key"] != second["key"]


def test_metadata_and_order_do_not_change_a_key() -> None:
    plain = row({"prompt": "p"}, "prompt")
    renamed = row({"id": 7, "question": "p"}, "prompt", columns={"prompt": "question"})
    assert plain["key"] == renamed["key"]


@pytest.mark.parametrize(
    ("record", "format", "reason"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": None}, "prompt", "empty"),
        ({"prompt": float("nan")}, "prompt", "empty"),
        ({"prompt": float("inf")}, "prompt", "unreadable"),
        ({"prompt": True}, "prompt", "unreadable"),
        ({"prompt": "\ud800"}, "prompt", "unreadable"),
        ({"text": "p"}, "prompt", "missing_column"),
        ({"messages": "hi"}, "messages", "unreadable"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": [{"role": "user"}]}, "messages", "unreadable"),
        ({"messages": [{"role": "\ud800", "content": "p"}]}, "messages", "unreadable"),
        ({"messages": [{"role": 3, "content": "p"}]}, "messages", "unreadable"),
        ({"instruction": "p", "input": ["x"]}, "instruction", "unreadable"),
        ({"prompt": "p", "reference": {"a": 5}}, "prompt", "unreadable"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(
    record: dict[str, Any], format: str, reason: str
) -> None:
    with pytest.raises(RowError) as caught:
        row(record, format)
    assert caught.value.reason == reason


def test_an_empty_reference_is_no_reference() -> None:
    assert row({"prompt": "p", "reference": ""}, "prompt") == row({"prompt": "p"}, "prompt")
    assert row({"instruction": "p", "output": ""}, "instruction")["reference"] is None


def test_a_conversation_without_an_answer_has_nothing_to_score() -> None:
    with pytest.raises(RowError, match="no answer to score"):
        row(
            {"messages": [{"role": "user", "content": "hi"}], "reference": "r"},
            "messages",
            given=True,
        )


def test_sources_of_every_kind_give_the_same_prompts(tmp_path: Path) -> None:
    records = prompts(12)
    write_jsonl(tmp_path / "a.jsonl", records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("prompt\n" + "\n".join(r["prompt"] for r in records))
    import datasets

    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    tables = [
        surveyed(section(tmp_path / n))[0]
        for n in ("a.jsonl", "b.json", "c.parquet", "d.csv", "saved")
    ]
    assert all(table.equals(tables[0]) for table in tables)
    assert len(tables[0]) == 12


def test_a_table_gives_no_call_the_arguments_of_others(tmp_path: Path) -> None:
    calls = [{"function": {"name": "add", "arguments": a}} for a in ({"a": 1}, {"text": "x"})]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": calls}]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "b.parquet")
    lines, table = (
        surveyed(section(tmp_path / n, "messages"), generate=False)[0]
        for n in ("a.jsonl", "b.parquet")
    )
    assert table.equals(lines)
    # JSON says what it means: a null of its own stays.
    calls[0]["function"]["arguments"]["text"] = None
    write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    assert surveyed(section(tmp_path / "a.jsonl", "messages"), generate=False)[0] != table


def unrolled() -> list[dict[str, Any]]:
    """A conversation after its first answer and whole, and another one.

    The first of them is held out by its hash.
    """
    for name in "abcdefghijklmnopq":
        turns = [
            {"role": ("user", "assistant")[n % 2], "content": text}
            for n, text in enumerate((name, "yes", "so?", "no"))
        ]
        other = [{"role": "user", "content": "the cat"}, turns[1]]
        records = [{"messages": turns[:2]}, {"messages": turns}, {"messages": other}]
        keys = [row(record, "messages", given=True)["prompt_key"] for record in records]
        if keys[0] == min(keys):
            return records
    raise AssertionError("no conversation has the smallest hash")


@pytest.mark.parametrize(
    ("more", "generate", "split"),
    [
        ({}, False, ["test", "train"]),
        ({"turns": "last"}, False, ["test", "train", "train"]),
        ({}, True, ["test", "train", "train"]),
        ({"holdout": 0}, False, ["train"] * 3),
    ],
)
def test_what_is_held_out_is_no_turn_of_what_is_trained_on(
    tmp_path: Path, more: dict[str, Any], generate: bool, split: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", unrolled())
    data = section(source, "messages", **{"holdout": 1} | more)
    table, _, notes, _ = survey(recipe(data, generate=generate))
    assert table["split"].to_pylist() == split
    assert len(notes) == 3 - len(split)


def test_that_nothing_is_left_to_train_on_is_said(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", unrolled()[:2])
    with pytest.raises(UsageError, match="every other conversation has the answer of a held-out"):
        surveyed(section(source, "messages", holdout=1), generate=False)


def test_columns_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": r["prompt"]}], "functions": [{"name": "add"}]}
        for r in prompts(3)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", [*records, {"messages": [], "functions": []}])
    (note,) = survey(recipe(section(source, "messages"))).notes
    assert note.startswith("3 records have a column 'functions', which nothing reads. ")
    named = survey(recipe(section(source, "messages", columns={"tools": "functions"})))
    assert not named.notes
    assert named.why_rejected.startswith("1 rejected: empty, the first at a.jsonl:4: ")


@pytest.mark.parametrize(
    ("format", "ours"),
    [("labelled", "label"), ("labelled", "text_pair"), ("messages", "tools"), ("prompt", "prompt")],
)
def test_a_column_that_is_named_and_in_no_record_is_refused(
    tmp_path: Path, format: str, ours: str
) -> None:
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    records = [{"prompt": "a", "text": "a"} | said, {"prompt": "b", "text": "b"} | said]
    data = section(write_jsonl(tmp_path / "a.jsonl", records), format, columns={ours: "mine"})
    with pytest.raises(UsageError, match=r"column 'mine'"):
        surveyed(data, generate=format == "prompt")
    # One record that has it is enough: nobody asks that all have it.
    brings: dict[str, Any] = {"label": 1, "text_pair": "c", "tools": [], "prompt": "c"}
    write_jsonl(tmp_path / "a.jsonl", [*records, records[0] | {"mine": brings[ours]}])
    alone = recipe(data, generate=format == "prompt").model_copy(update={"train": None})
    assert survey(
        alone, SimpleNamespace(folder=tmp_path, class_names=("no", "yes"))
    ).inputs.num_rows


def test_globs_and_folders_read_every_file_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "1.jsonl", prompts(12)[:5])
    write_jsonl(tmp_path / "2.jsonl", prompts(12)[5:])
    everything = surveyed(section(write_jsonl(tmp_path.parent / "all.jsonl", prompts(12))))[0]
    assert surveyed(section(tmp_path / "*.jsonl"))[0].equals(everything)
    assert surveyed(section(tmp_path))[0].equals(everything)


def test_brackets_in_a_file_name_are_no_glob(tmp_path: Path) -> None:
    assert len(surveyed(section(write_jsonl(tmp_path / "x[1].jsonl", prompts(5))))[0]) == 5


def test_a_folder_is_read_without_its_readme_and_by_its_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    (tmp_path / "README.md").write_text("About these texts.")
    (tmp_path / "part.parquet").mkdir()

    def texts(source: Path) -> int:
        return len(surveyed(section(source, "text"), generate=False)[0])

    assert [texts(tmp_path), texts(tmp_path / "README.md"), texts(tmp_path / "*.*")] == [1, 1, 1]


def test_what_a_file_is_belongs_to_its_fingerprint(tmp_path: Path) -> None:
    hashes = FileHashes(tmp_path / "store", remember=False)
    found = [write_jsonl(tmp_path / name, prompts(2)) for name in ("a.jsonl", "b.jsonl", "a.txt")]
    lines, same, text = (
        training_source(recipe(section(path))).fingerprint(hashes) for path in found
    )
    assert lines == same
    assert lines != text


def test_rows_of_a_table_are_read_one_by_one(tmp_path: Path) -> None:
    long = "word " * 40_000
    (tmp_path / "a.csv").write_bytes(f"prompt\ncaf\u00e9\n{long}\nfine\n".encode("latin-1"))
    table, rejected = surveyed(section(tmp_path / "a.csv"))
    assert (len(table), rejected) == (2, 1)


def test_a_document_that_is_not_utf_8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("the cat")
    table, rejected = surveyed(section(tmp_path, "text"), generate=False)
    assert (len(table), rejected) == (1, 1)


def test_broken_lines_are_counted_and_the_others_are_read(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "a"}, "{broken", "[1]", {"prompt": "b"}, {"prompt": ""}]
    )
    table, rejected = surveyed(section(source))
    assert (len(table), rejected) == (2, 3)


def test_limit_and_duplicates(tmp_path: Path) -> None:
    source = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    )
    assert len(surveyed(section(source, limit=3))[0]) == 2


def test_holdout_is_chosen_by_hash_and_survives_reordering(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", prompts(40))
    turned = write_jsonl(tmp_path / "b.jsonl", prompts(40)[::-1])

    def held_out(path: Path) -> set[bytes]:
        table = surveyed(section(path, holdout=7))[0]
        return {
            k
            for k, s in zip(
                table["prompt_key"].to_pylist(), table["split"].to_pylist(), strict=True
            )
            if s == "test"
        }

    assert held_out(source) == held_out(turned)
    assert len(held_out(source)) == 7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "none.jsonl", "nothing to read"),
        (lambda p: write_jsonl(p / "a.jsonl", []), "holds no records"),
        (lambda p: write_jsonl(p / "a.jsonl", [{"text": "x"}]), "the only record was rejected"),
        (lambda p: (p / "a.json", (p / "a.json").write_text("[1,"))[0], "is not JSON"),
        (lambda p: (p / "a.parquet", (p / "a.parquet").write_text("x"))[0], "not readable Parquet"),
        (lambda p: (p, (p / "a.jsonl").symlink_to(p / "gone"))[0], "a.jsonl is a broken link"),
        (
            lambda p: (p / "a.xlsx", (p / "a.xlsx").write_text("x"))[0],
            "an ending that nothing here reads",
        ),
        (lambda p: write_jsonl(p / "a.jsonl", ["[" * 100_000]), "the only record was rejected"),
    ],
)
def test_a_source_without_prompts_is_a_clear_error(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        surveyed(section(make(tmp_path)))


def test_a_holdout_that_takes_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.holdout: 9 of 9 prompts"):
        surveyed(section(write_jsonl(tmp_path / "a.jsonl", prompts(9)), holdout=9))


class Silent:
    """A progress line that nobody sees; `meanwhile` happens while the source is read."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.meanwhile = meanwhile

    def start(self, **_: Any) -> None: ...

    def advance(self, units: int = 1, *, tokens: int = 0, note: str = "") -> None:
        self.meanwhile()

    def wrote(self, *, rejects: int, size: int) -> None: ...

    def say(self, text: str) -> None: ...


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("when", ["never", "before", "while"])
def test_a_source_that_changes_after_the_plan_gets_no_inputs_record(
    tmp_path: Path, tiny_llama: Callable[..., Path], when: str, given: bool
) -> None:
    records = [r | {"completion": "the cat"} for r in prompts(6)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    tree = recipe_tree(tmp_path, tiny_llama(), source)
    tree["data"] = {
        "source": str(source),
        "format": "completion" if given else "prompt",
        "holdout": 1,
    }
    recipe = Recipe.model_validate(tree | ({"generate": None} if given else {}))
    store = Store.open(recipe.storage.dir, create=True)
    bound = bind(recipe, write=True)
    assert bound.teacher is not None
    store.put_teacher(bound.teacher.id, bound.teacher.files_to_keep())
    b = bound.binding
    ids = {"data_id": b.data_id, "teacher_id": b.teacher_id, "author_id": b.author_id}

    def change() -> None:
        write_jsonl(source, records[1:])

    progress = Silent(change) if when == "while" else Silent()
    if when == "before":
        change()
    job = Job(
        recipe=recipe, progress=progress, stop=StopFlag(), context_tokens=b.context_tokens, **ids
    )
    if when == "never":
        stage.run(job)
    else:
        with pytest.raises(StillroomError, match="changed while it was read"):
            stage.run(job)
    assert (store.inputs(b.data_id) is not None) == (when == "never")


@pytest.mark.parametrize(("generate", "same"), [(False, False), (True, True)])
def test_the_context_names_the_inputs_of_given_text(
    tmp_path: Path, tiny_llama: Callable[..., Path], generate: bool, same: bool
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", prompts(2))
    made = recipe(section(source, "completion"), generate=generate)
    hashes = FileHashes(tmp_path / "store", remember=False)
    teachers = [
        identify(tiny_llama(f"t{n}", max_position_embeddings=n), dtype="auto", hashes=hashes)
        for n in (64, 128)
    ]
    assert (inputs_id(made, teachers[0], hashes) == inputs_id(made, teachers[1], hashes)) == same


@pytest.mark.parametrize("window", [2, 3, 5, 8, 100])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 9, 17])
def test_windows_predict_every_token_but_the_first_exactly_once(window: int, length: int) -> None:
    pieces = cut(np.arange(length), window)
    assert [token for piece in pieces for token in piece[1:]] == list(range(1, length))
    assert all(2 <= len(piece) <= window for piece in pieces)


def test_a_completion_ends_with_the_end_token_once(tiny_llama: Callable[..., Path]) -> None:
    renderer = Renderer(tiny_llama(), {})
    for text in ("the cat", "the cat</s>"):
        row = {"messages": None, "text": "a dog ", "completion": text}
        ids, spans = renderer.given(row, last=True)
        assert renderer.tokenizer.convert_ids_to_tokens(ids) == "<s> a dog the cat </s>".split()
        assert spans.tolist() == [[3, 3]]
        assert renderer.prompt_ids(row) == ids[:3]


def test_messages_without_a_template_say_what_to_do(tiny_llama: Callable[..., Path]) -> None:
    renderer = Renderer(tiny_llama(), {})
    with pytest.raises(UsageError, match="chat template"):
        renderer.prompt_ids({"messages": [{"role": "user", "content": "the cat"}], "text": None})


def test_the_chat_template_gets_its_arguments(tiny_llama: Callable[..., Path]) -> None:
    folder = tiny_llama()
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if happy %} happy{% endif %}"
    )
    conversation = {"messages": [{"role": "user", "content": "the cat"}], "text": None}
    plain = Renderer(folder, {}).prompt_ids(conversation)
    happy = Renderer(folder, {"happy": True}).prompt_ids(conversation)
    assert happy[: len(plain)] == plain
    assert len(happy) == len(plain) + 1
