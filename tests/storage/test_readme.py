"""The pages of storage say what is.

Their columns are the schema's, their record is sealed, their code runs.
"""

import re
from pathlib import Path

import pytest

from stillroom.storage.keys import unseal
from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS

SPELLED = {
    "fixed_size_binary[16]": "binary(16)",
    "list<item: int32>": "list<int32>",
    "list<item: float>": "list<float>",
    "list<item: string>": "list<string>",
    "list<item: struct<role: string, content: string>>": "list<struct<role, content>>",
}
STORAGE = Path(__file__).parents[2] / "storage"


def page(room: str) -> str:
    return STORAGE.joinpath(room, "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page("store"), flags=re.DOTALL)


@pytest.mark.parametrize("table", SCHEMAS)
def test_columns_are_those_of_the_schema(table):
    columns = STORAGE.joinpath("tables", "columns.md").read_text()
    section = columns.split(f"## `{table}`\n")[1].split("\n\n`type?`")[0].split("\n##")[0]
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)(\??)` \| (.+) \|$", section, flags=re.MULTILINE)
    expected = [
        (
            f.name,
            SPELLED.get(str(f.type), str(f.type)),
            "?" if f.nullable else "",
            f.metadata[b"about"].decode(),
        )
        for f in SCHEMAS[table]
    ]
    assert listed == expected


def test_the_record_is_a_real_one():
    (record,) = blocks("json")
    assert unseal(record.encode(), "README")["table"] == "soft_targets"


def test_the_code_runs(tmp_path, samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    samples.add_targets(Store.open("stores/example", create=True), range(20))
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["rows"].num_rows == names["frame"].height == 20
    assert len(names["entries"]) == 6
    assert names["targets"].ids.shape == (6, 4)
