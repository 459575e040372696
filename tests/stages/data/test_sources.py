"""Sources as people have them: which files are read, of which split, packed or not.

It is also about who judges, and what is rejected.
"""

import bz2
import gzip
import json
import lzma
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from kit import prompts, write_jsonl

from stillroom.stages.data.formats import prompt_row
from stillroom.stages.data.sources.files import find_files
from stillroom.stages.data.sources.source import Source, all_records
from stillroom.stages.data.stage import Survey, inputs_id, survey
from stillroom.stages.models.identity import FileHashes
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Data, Recipe
from stillroom.storage.bounds import MOST_DEPTH
from stillroom.storage.errors import UsageError


def recipe(
    source: Path | str,
    format: str = "prompt",
    *,
    evaluate: dict[str, Any] | None = None,
    **more: Any,
) -> Recipe:
    given = format in ("prompt", "instruction")
    return Recipe.model_validate(
        {
            "run": {"dir": "r"},
            "storage": {"dir": "s"},
            "teacher": {"model": "t"},
            "student": {"config": {}},
            "data": {"source": str(source), "format": format, **more}
            | ({} if evaluate else {"holdout": 0}),
            "generate": {} if given else None,
            "train": {"epochs": 1},
            "evaluate": evaluate or {},
        }
    )


def read(*of: Any, **more: Any) -> list[Any]:
    """The prompts of a source, or why one is unreadable, in order."""
    records = [record for _, record, _ in all_records(recipe(*of, **more))]
    return [r if isinstance(r, str) else next(iter(r.values())) for r in records]


def lines(*names: str) -> bytes:
    return "".join(json.dumps({"prompt": name}) + "\n" for name in names).encode()


def packed(text: bytes, ending: str) -> bytes:
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(text)
        return bytes(sink.getvalue())
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    return pack[ending](text)


def as_people_have_it(folder: Path) -> Path:
    (folder / "train-1.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("a", "b"))
    (folder / "train-2.jsonl.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines("c")))
    (folder / "TEST.JSONL").write_bytes(b"\xef\xbb\xbf" + lines("d", "e", "f"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.jsonl").write_bytes(lines("g"))
    (folder / "dataset_info.json").write_text('{"prompt": "about"}')
    return folder


def test_a_folder_is_read_by_its_split_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    folder = as_people_have_it(tmp_path)
    found = survey(recipe(folder))
    assert (len(found.inputs), found.rejected) == (3, 0)
    assert found.notes == [
        f"left out of {folder}: TEST.JSONL (split test), .cache/x.jsonl (hidden), "
        "dataset_info.json (about the data)"
    ]
    assert read(folder) == ["a", "b", "c"]
    test = survey(recipe(folder, split="test"))
    assert (len(test.inputs), test.rejected) == (3, 0)
    assert read(folder, split="test") == ["d", "e", "f"]
    assert test.notes[0].count("(split train)") == 2


@pytest.mark.parametrize(
    ("names", "split", "read_of", "refused"),
    [
        (
            ["data/train-00000-of-00001.jsonl", "data/dev-0.jsonl"],
            "validation",
            "data/dev-0.jsonl",
            "",
        ),
        (["train/x.jsonl", "test/x.jsonl"], "test", "test/x.jsonl", ""),
        (["x.jsonl", "train.jsonl"], "train", "train.jsonl", ""),
        (["latest.jsonl"], "train", "latest.jsonl", ""),
        (["latest.jsonl"], "test", "", "names a split"),
        (["train.jsonl", "x.jsonl"], "test", "", "found train"),
        (["train/test.jsonl"], "all", "train/test.jsonl", ""),
        (["train/test.jsonl"], "train", "", "names the splits test and train"),
        (["train.jsonl"], "train[:10%]", "", r"data\.limit"),
        (["train.jsonl"], "gold", "", "no split that local files can name"),
    ],
)
def test_paths_name_splits(
    tmp_path: Path, names: list[str], split: str, read_of: str, refused: str
) -> None:
    folder = tmp_path / "given"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(name))
    for source in (folder, folder / "**" / "*.jsonl"):
        if refused:
            with pytest.raises(UsageError, match=refused):
                read(source, split=split)
        else:
            assert read(source, split=split) == [read_of]


def test_a_file_that_is_named_is_read_unless_it_says_another_split(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "test.jsonl", [{"prompt": "a"}])
    assert read(source) == ["a"]
    assert read(source, split="test") == ["a"]
    with pytest.raises(UsageError, match=r"data\.split: train, but .* names the split test"):
        read(source, split="train")
    both = write_jsonl(tmp_path / "train_eval.jsonl", [{"prompt": "c"}])
    assert read(both) == ["c"]
    hidden = write_jsonl(tmp_path / ".labels.json", [{"prompt": "b"}])
    assert read(hidden) == ["b"]


def test_a_folder_of_one_split_is_named_by_itself(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "x.jsonl").write_bytes(lines("a"))
    for source in (tmp_path / "dev", tmp_path / "dev" / "*.jsonl"):
        assert read(source) == read(source, split="validation") == ["a"]
        with pytest.raises(UsageError, match="none is of train"):
            read(source, split="train")


def test_a_saved_folder_has_the_splits_it_was_saved_with(tmp_path: Path) -> None:
    import datasets

    parts = {n: datasets.Dataset.from_dict({"prompt": [n]}) for n in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    datasets.Dataset.from_dict({"prompt": ["one"]}, split="test").save_to_disk(
        str(tmp_path / "one")
    )
    assert read(tmp_path / "both", split="test") == ["test"]
    assert read(tmp_path / "one") == ["one"]
    for source, split in (("both", "dev"), ("one", "train")):
        with pytest.raises(UsageError, match="it was saved"):
            read(tmp_path / source, split=split)
    # What `datasets` wrote is all of it named: the name is that of before.
    found = Source.files(named(tmp_path / "both"))
    files = sorted(p.name for p in found.files)  # type: ignore[union-attr]
    assert files == sorted(
        ["dataset_dict.json", *["data-00000-of-00001.arrow", "dataset_info.json", "state.json"] * 2]
    )


def named(path: Path) -> Source:
    return Source(
        name=str(path), field="data.source", split="train", split_field="data.split", asked=False
    )


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_packed_texts_of_every_format(tmp_path: Path, ending: str) -> None:
    mark = b"\xef\xbb\xbf"
    contents = {
        "a.jsonl": mark + lines("a", "b"),
        "a.ndjson": lines("a", "b"),
        "a.JSON": mark + json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=1).encode(),
        "a.csv": mark + b'prompt,x\r\na,1\r\n"b",2\r\n',
    }
    for name, content in contents.items():
        file = tmp_path / f"{name}{ending.upper()}"
        file.write_bytes(packed(content, ending))
        assert read(file) == ["a", "b"], name
    for name in ("a.txt", "a.md"):
        (tmp_path / f"{name}{ending}").write_bytes(packed(mark + b"the cat\n", ending))
        assert read(tmp_path / f"{name}{ending}", "text") == ["the cat\n"]
    broken = tmp_path / f"a.jsonl{ending}"
    broken.write_bytes(packed(lines("a", "b"), ending)[:-6])
    with pytest.raises(UsageError, match="cannot be read"):
        read(broken)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".txt.bz2", ".json.xz", ".md.zst"])
def test_a_file_that_is_nothing_but_large_unpacked_is_refused(tmp_path: Path, ending: str) -> None:
    source = tmp_path / f"bomb{ending}"
    source.write_bytes(packed(b" " * (65 << 20), Path(ending).suffix))
    with pytest.raises(UsageError, match="more than 100 times as large as the file"):
        read(source)


def test_lines_that_repeat_themselves_are_read_though_they_pack_well(tmp_path: Path) -> None:
    """A long system prompt in every record: what is held at once is a line."""
    source = tmp_path / "rows.jsonl.gz"
    content = lines("a" * 4000, "b") * 18_000
    source.write_bytes(packed(content, ".gz"))
    assert len(content) > max(64 << 20, 100 * source.stat().st_size)
    assert len(read(source)) == 36_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{\n "prompt": "a"\n}\n', ["a.json:1"]),
        (
            '{\n "prompt": "a"\n}\n{\n "prompt": "b"}{"prompt": "c"}',
            ["a.json:1", "a.json:4", "a.json:5"],
        ),
        ('{"prompt": "a"}\n\n{"prompt": "b"}\n', ["a.json:1", "a.json:3"]),
        ('[{"prompt": "a"},\n{"prompt": "b"}]', ["a.json:1", "a.json:2"]),
    ],
)
def test_objects_stand_on_lines_of_their_own_or_on_many(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    (tmp_path / "a.json").write_text(text)
    found = list(all_records(recipe(tmp_path / "a.json")))
    assert [where for where, _, _ in found] == expected
    assert [record["prompt"] for _, record, _ in found if isinstance(record, dict)] == list(
        "abc"[: len(expected)]
    )


def test_broken_objects_are_rejected_where_they_stand_on_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"prompt": "a"}\n{"prompt": }\n{"prompt": "b"}\n')
    first, broken, last = read(tmp_path / "a.json")
    assert (first, last) == ("a", "b")
    assert broken.startswith("not JSON")
    (tmp_path / "a.json").write_text('{\n "prompt": "a",\n "messages": [\n  {"prompt": "b"}\n }')
    with pytest.raises(UsageError, match="it is not JSON"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("depth", [MOST_DEPTH + 1, 100_000])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_record_that_is_nested_deeper_than_anybody_writes_is_rejected(
    tmp_path: Path, ending: str, depth: int
) -> None:
    deep = f'{{"prompt": {"[" * depth}{"]" * depth}}}'
    (tmp_path / f"a.{ending}").write_text(f'{{"prompt": "a"}}\n{deep}\n{{"prompt": "b"}}\n')
    first, rejected, last = read(tmp_path / f"a.{ending}")
    assert (first, last) == ("a", "b")
    assert rejected.endswith(f"nested more than {MOST_DEPTH} deep")


def test_in_a_list_a_deep_record_is_rejected_and_one_that_no_parser_reads_refuses_the_file(
    tmp_path: Path,
) -> None:
    def listed(depth: int) -> Path:
        deep = f'{{"prompt": {"[" * depth}{"]" * depth}}}'
        (tmp_path / "a.json").write_text(f'[{{"prompt": "a"}},\n{deep}]')
        return tmp_path / "a.json"

    first, rejected = read(listed(MOST_DEPTH + 1))
    assert first == "a"
    assert rejected.endswith(f"nested more than {MOST_DEPTH} deep")
    with pytest.raises(UsageError, match="it is not JSON"):
        read(listed(100_000))


def test_a_list_inside_an_object_is_no_odd_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": prompts(3)}, indent=1))
    with pytest.raises(UsageError, match="if the 3 objects in 'data' are the records, write that"):
        survey(recipe(tmp_path / "a.json"))


def test_rows_with_more_cells_than_the_header_are_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,x\nyes, he said,1\nb,2,,\n")
    found = survey(recipe(tmp_path / "a.csv"))
    assert (len(found.inputs), found.rejected) == (1, 1)
    assert "a comma stands in a cell without quotes" in found.why_rejected


TWICE = '{"prompt": "a", "prompt": "b"}'


def test_a_record_that_names_a_field_twice_is_rejected(tmp_path: Path) -> None:
    """A parser takes the last one without a word."""
    for ending in ("jsonl", "json"):
        file = tmp_path / f"a.{ending}"
        file.write_text(f'{{"prompt": "x"}}\n{TWICE}\n{{"prompt": "y", "more": {{"z": 1}}}}\n')
        first, rejected, last = read(file)
        assert (first, last) == ("x", "y")
        assert rejected.endswith("an object names 'prompt' twice")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", f"[{TWICE}]"),
        ("a.json", f'[{{"prompt": "a", "more": {TWICE}}}]'),
        ("a.csv", "prompt,x,prompt\na,1,b\n"),
    ],
)
def test_a_file_whose_records_would_lose_a_cell_is_refused(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=r"'prompt' twice|two columns are named 'prompt'"):
        read(tmp_path / name)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path, ending: str) -> None:
    table = pa.table([["a"], ["b"]], names=["prompt", "prompt"])
    file = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UsageError, match="two columns are named 'prompt'"):
        read(file)


def test_rejects_name_the_path_and_are_counted_by_reason(tmp_path: Path) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_bytes(lines(folder, "") + b"{\n")
    for source in (tmp_path, tmp_path / "*" / "x.jsonl"):
        found = survey(recipe(source))
        assert found.rejected == 4
        assert found.why_rejected.startswith(
            "2 rejected: empty, the first at a/x.jsonl:2: prompt is empty; 2 rejected: unreadable, "
            "the first at a/x.jsonl:3: not JSON"
        )
    assert [w for w, _, _ in all_records(recipe(tmp_path))][3:] == [
        f"b/x.jsonl:{number}" for number in (1, 2, 3)
    ]


def test_numbers_are_text_and_nan_is_nothing(tmp_path: Path) -> None:
    def row(**record: Any) -> dict[str, Any]:
        data = Data(source="x", format="completion")
        return prompt_row(record, "x:1", data, given=True)

    answers = (42, 42.0, 0.5, 1e300, -3)
    made = [row(prompt="p", completion=answer)["completion"] for answer in answers]
    assert made == ["42", "42", "0.5", "1e+300", "-3"]
    assert row(prompt="p", completion="a", reference=float("nan"))["reference"] is None
    table = pa.table({"prompt": ["a", "b"], "reference": pa.array([7.0, float("nan")])})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = [
        prompt_row(record, where, Data(source="x", format="prompt"), given=False)
        for where, record, _ in all_records(recipe(tmp_path / "a.parquet"))
    ]
    assert [row["reference"] for row in rows] == ["7", None]
    content = {"messages": [{"role": "user", "content": 42, "name": float("nan")}]}
    made = prompt_row(content, "x:1", Data(source="x", format="messages"), given=False)["messages"]
    assert made == [{"role": "user", "content": "42"}]


def judged(tmp_path: Path, evaluate: dict[str, Any], **more: Any) -> Survey:
    write_jsonl(tmp_path / "train.jsonl", prompts(12))
    write_jsonl(tmp_path / "test.jsonl", [*prompts(3), {"prompt": "new"}, {"prompt": ""}])
    return survey(recipe(tmp_path, evaluate=evaluate, **more))


def test_rows_of_the_users_own_judge_and_are_not_trained_on(tmp_path: Path) -> None:
    found = judged(tmp_path, {"split": "test"})
    assert found.inputs["split"].to_pylist() == ["test"] * 4 + ["train"] * 9
    assert found.notes == [
        "records left out of training: 3. Their prompts are held out too",
        f"held out: 4 rows of {tmp_path}, split test",
    ]
    assert (
        found.why_rejected
        == "1 rejected: empty, the first at held out: test.jsonl:5: prompt is empty"
    )
    # The same, named by itself; the file is no part of the data's split.
    own = judged(tmp_path, {"source": str(tmp_path / "test.jsonl"), "limit": 2})
    assert own.inputs["split"].to_pylist() == ["test"] * 2 + ["train"] * 10
    assert own.notes[-1] == f"held out: 2 rows of {tmp_path / 'test.jsonl'}"


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"split": "validation"}, r"evaluate\.split: no file .* found test and train"),
        ({"source": "all.jsonl"}, "nothing to train on .* 12. Their prompts are held out too"),
        ({"source": "empty.jsonl"}, r"evaluate\.source: no row to judge by"),
    ],
)
def test_rows_that_cannot_judge_are_refused(
    tmp_path: Path, evaluate: dict[str, Any], message: str
) -> None:
    (tmp_path / "others").mkdir()
    write_jsonl(tmp_path / "others" / "all.jsonl", prompts(12))
    write_jsonl(tmp_path / "others" / "empty.jsonl", [])
    if "source" in evaluate:
        evaluate = {"source": str(tmp_path / "others" / evaluate["source"])}
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=message):
        judged(tmp_path / "data", evaluate)


def test_one_file_has_no_other_split(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", prompts(2))
    with pytest.raises(UsageError, match=r"evaluate\.split: .* is one file"):
        survey(recipe(source, evaluate={"split": "test"}))


@pytest.mark.parametrize(
    ("evaluate", "data", "path"),
    [
        ({"limit": 3}, {}, "evaluate.limit"),
        ({"split": "test"}, {"holdout": 5}, "data.holdout"),
        ({"split": "train"}, {}, "evaluate.split"),
        ({"source": "s"}, {}, "evaluate.source"),
        ({"split": "test"}, {"split": "train", "holdout": 0}, None),
        ({"split": "test"}, {"holdout": 200}, None),  # as a recipe that is written out has it
    ],
)
def test_it_is_clear_which_rows_judge(
    evaluate: dict[str, Any], data: dict[str, Any], path: str | None
) -> None:
    found = check_together(recipe("x.jsonl", evaluate=evaluate, **data))
    assert [where for where, _ in found] == ([path] if path else [])


def test_held_out_rows_belong_to_the_name_of_the_inputs(tmp_path: Path) -> None:
    class Teacher:
        context_tokens, class_names = 64, ()

    def name(evaluate: dict[str, Any] | None) -> str:
        hashes = FileHashes(tmp_path / "store", remember=False)
        judged_so = recipe(tmp_path, evaluate=evaluate)
        return inputs_id(judged_so, Teacher(), hashes)  # type: ignore[arg-type]

    judged(tmp_path, {"split": "test"})
    sources = [None, {"split": "test"}, {"source": str(tmp_path / "test.jsonl")}]
    names = [name(evaluate) for evaluate in [*sources, {"split": "test", "limit": 2}]]
    assert names[1] == names[2] == name({"split": "test", "tokens": 9})  # the same rows
    assert len(set(names)) == 3


def test_an_address_on_the_web_is_named_as_one() -> None:
    with pytest.raises(UsageError, match=r"https://host/a\.jsonl is an address") as refused:
        find_files("https://me:word@host/a.jsonl?token=x", field="data.source")
    assert "word" not in str(refused.value)


def test_a_class_of_images_that_is_called_as_a_split_is(tmp_path: Path) -> None:
    below = tmp_path / "below"
    for folder in ("bus", "train", "below/train/bus", "below/train/train", "below/test"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(b"")
    found = find_files(str(below), field="data.source", images=True)
    assert len(found.files) == 3  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"folder train may be a split, or a class .* bus beside"):
        find_files(f"{tmp_path}/*/*.png", field="data.source", images=True)


def test_a_glob_over_the_images_of_one_folder_names_no_class(tmp_path: Path) -> None:
    for file in ("birds/cat/1.png", "birds/dog/2.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    for pattern in ("*.png", "*", "**/*.png"):
        with pytest.raises(UsageError, match=r"of a class 'cat' or of none\. Expected a glob over"):
            find_files(f"{tmp_path}/birds/cat/{pattern}", field="data.source", images=True)
    for source in ("birds/*/*.png", "birds/**", "birds/**/*.png", "birds/cat"):
        assert find_files(f"{tmp_path}/{source}", field="data.source", images=True)


@pytest.mark.parametrize("table", ["rows.parquet", "data-0.arrow"])
def test_images_beside_tables_are_refused_unless_one_kind_is_named(
    tmp_path: Path, table: str
) -> None:
    """Either may hold the records: neither is left out because the other is there."""
    (tmp_path / "cat").mkdir()
    for name in ("cat/1.png", table, "metadata.csv"):
        (tmp_path / name).write_bytes(b"")
    for source in (str(tmp_path), f"{tmp_path}/**"):
        with pytest.raises(UsageError, match=rf"has tables \({table}\) and images \(cat/1.png\)"):
            find_files(source, field="data.source", images=True)
    for source in (f"{tmp_path}/{table}", f"{tmp_path}/*/*.png"):
        assert find_files(source, field="data.source", images=True)
    (tmp_path / table).unlink()
    found = find_files(str(tmp_path), field="data.source", images=True)
    assert found is not None
    assert [file.name for file in found.left_out] == ["metadata.csv"]


@pytest.mark.parametrize("name", ["texts.parquet", "texts.arrow"])
def test_a_table_of_long_texts_is_read_a_few_rows_at_a_time(tmp_path: Path, name: str) -> None:
    text, rows = "the cat sat " * 20_000, 100  # 24 MB, and one batch where it is Arrow
    table = pa.table({"prompt": pa.array([text] * rows)})
    if name.endswith("parquet"):
        pq.write_table(table, tmp_path / name)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as file:
            file.write_table(table)
    tracemalloc.start()
    found = sum(len(record["prompt"]) for _, record, _ in all_records(recipe(tmp_path / name)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == rows * len(text)
    assert most < 10e6


@pytest.mark.parametrize("length", [-5, 1 << 30])
def test_an_arrow_file_of_impossible_lengths_is_named(tmp_path: Path, length: int) -> None:
    """No checksum covers it: pyarrow reads such a text from wherever that leads."""
    table = pa.table({"prompt": ["the cat sat", "a dog ran on", "x"]})
    with pa.ipc.new_file(tmp_path / "texts.arrow", table.schema) as file:
        file.write_table(table)
    written = (tmp_path / "texts.arrow").read_bytes()
    ends = struct.pack("<4i", 0, 11, 23, 24)
    assert written.count(ends) == 1
    damaged = written.replace(ends, struct.pack("<4i", 0, length, 23, 24))
    (tmp_path / "texts.arrow").write_bytes(damaged)
    with pytest.raises(UsageError, match=r"texts\.arrow.*it is not readable Arrow"):
        list(all_records(recipe(tmp_path / "texts.arrow")))
