"""The section of several teachers: who each is, its share, and every arm on its own texts."""

from copy import deepcopy
from typing import Any

from reports import RECIPE, arm, evaluation, facts

from stillroom.pipeline.report.blocks import Table
from stillroom.pipeline.report.results import by_teacher
from stillroom.pipeline.report.sections import title, what_was_run


def report() -> dict[str, Any]:
    judged = evaluation()
    arms = {"teacher": arm(1.5, 0.0, 1.0, 0.01), "student": arm(1.9, 0.25, 0.8, 0.02)}
    few = {name: one | {"tokens": 50} for name, one in arms.items()}
    judged["teachers"] = {"stories": {"id": "1", "arms": arms}, "code": {"id": "2", "arms": few}}
    recipe: dict[str, Any] = deepcopy(RECIPE) | {
        "teachers": [
            {"name": "stories", "model": "m/tales", "weight": 1.0, "license": "mit"},
            {
                "name": "code",
                "model": "m/snakes",
                "weight": {"shape": "linear", "start": 1.0, "end": 0.5},
                "where": "text LIKE '%def%'",
                "budget_tokens": 3000,
            },
        ]
    }
    known = facts()
    kept = {"topk": {"tokens": 9, "entries_per_token": 4.0, "kept_mass": 0.9512}}
    known["stages"] |= {
        "score/stories": {"rows": 30, "tokens": 9000, "kept": kept},
        "score/code": {"rows": 10, "tokens": 3000},
    }
    train = {"student": {"tokens": 5}}
    return {"evaluation": judged, "settings": {"recipe": recipe}, "facts": known, "train": train}


def test_each_teacher_is_named_with_share_licence_and_kept_mass() -> None:
    section = by_teacher(report())
    assert section is not None
    who, arms, _ = section.blocks
    assert isinstance(who, Table)
    assert isinstance(arms, Table)
    stories, code = who.rows
    assert stories[2:] == ["`mit`", "1.0", "everything", "30", "9,000", "75.0 %", "0.9512"]
    assert code[2:4] == ["not stated", "1.0 to 0.5"]
    assert code[4].endswith("at most 3,000 tokens")
    assert code[5:] == ["10", "3,000", "25.0 %", "-"]
    assert [row[:3] for row in arms.rows] == [
        ["`stories`", "teacher", "100,123"],
        ["`stories`", "student (distilled)", "100,123"],
        ["`code`", "teacher", "50"],
        ["`code`", "student (distilled)", "50"],
    ]
    assert all(len(row) == len(arms.headers) for row in arms.rows)


def test_the_title_and_the_settings_name_them_all() -> None:
    found = report()
    assert title(found["settings"]).startswith("tales and snakes distilled into")
    run = what_was_run(found)
    assert run is not None
    (table,) = run.blocks
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows[:2]] == ["teacher `stories`", "teacher `code`"]


def test_one_teacher_has_no_such_section() -> None:
    found = report()
    del found["evaluation"]["teachers"]
    assert by_teacher(found) is None
