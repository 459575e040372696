"""Labels that are ids of a source's own classes.

They are refused where these are the teacher's in another order.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pytest

from stillroom.stages.data.stage import survey
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError

FORMATS = {
    "labelled": ({"text": ["a b", "c d"], "label": [0, 1]}, "label", False),
    "tagged": ({"tokens": [["a", "b"], ["c", "d"]], "labels": [[0, 1], [1, 1]]}, "labels", True),
}
TASKS = {"labelled": "classification", "tagged": "token_classification"}


def source_of(folder: Path, how: str, format: str, names: list[str] | None) -> str:
    rows, column, lists = FORMATS[format]
    table = datasets.Dataset.from_dict(rows)
    if names is not None:
        kind: Any = datasets.ClassLabel(names=names)
        table = table.cast_column(column, datasets.List(kind) if lists else kind)
    if how == "saved":
        table.save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    table.to_parquet(str(folder / "rows.parquet"))
    return str(folder / "rows.parquet")


def surveyed(folder: Path, source: str, format: str) -> Any:
    """By a teacher of the classes cat and dog."""
    recipe = Recipe.model_validate(
        {
            "run": {"task": TASKS[format], "dir": str(folder / "run")},
            "storage": {"dir": str(folder / "store")},
            "teacher": {"model": str(folder)},
            "data": {"source": source, "format": format, "holdout": 0},
            "score": {"targets": "full"},
        }
    )
    return survey(recipe, SimpleNamespace(folder=folder, class_names=("cat", "dog")))


@pytest.mark.parametrize("how", ["parquet", "saved"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_teachers_classes_in_another_order_are_refused(
    tmp_path: Path, how: str, format: str
) -> None:
    source = source_of(tmp_path, how, format, ["Dog", "cat"])
    with pytest.raises(UsageError, match=r"numbers its classes Dog, cat, the teacher cat, dog"):
        surveyed(tmp_path, source, format)


@pytest.mark.parametrize("how", ["parquet", "saved"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("names", [["cat", "dog"], ["CAT", "DOG"], ["LABEL_0", "LABEL_1"], None])
def test_other_ids_are_the_teachers(
    tmp_path: Path, how: str, format: str, names: list[str] | None
) -> None:
    source = source_of(tmp_path, how, format, names)
    assert surveyed(tmp_path, source, format).inputs.num_rows == 2


def test_a_file_whose_schema_says_something_else_is_read_as_ever(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for number, kept in enumerate((b"[]", b'{"info": {"features": []}}', b"\xff")):
        table = pa.table(FORMATS["labelled"][0]).replace_schema_metadata({b"huggingface": kept})
        pq.write_table(table, tmp_path / f"{number}.parquet")
        found = surveyed(tmp_path, str(tmp_path / f"{number}.parquet"), "labelled")
        assert found.inputs.num_rows == 2
