"""Text of others in what we write for others: cards, reports, pages. There it is words."""

import ast
import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import reports
import yaml
from hostile import FORGED, FORGED_NAME, Tags, active, assert_shown
from kit import recipe_tree, stillroom
from published import CLASSES_ABOUT, class_row, generation_row, keep_teacher, make_store, samples

from stillroom.pipeline.publish.model_card import student_card
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.store.store import Store

NAME = "<img src=x onerror=alert(1)> ![i](http://e.org/i.png) `|` **b** [l](http://e.org)"
"""Printable, in one line: what a name may be."""


def front_and_text(card: str) -> tuple[dict[str, Any], str]:
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_dataset_s_card_says_what_it_was_told_and_nothing_of_it_acts(tmp_path: Path) -> None:
    """Class names, settings, versions, a source, its format, texts and tokens of a stranger."""
    store, path = Store.open(tmp_path / "store", create=True), f"/x/{FORGED_NAME}"
    keep_teacher(store)
    told = {"settings": {FORGED: FORGED, "kind": FORGED}, "versions": {FORGED: FORGED}}
    classes = CLASSES_ABOUT | told | {"class_names": [FORGED, "fair", "good"]}
    rows = {
        "prompts": (samples.GENERATIONS_ABOUT, samples.prompt_row),
        "generations": (samples.GENERATIONS_ABOUT | told, generation_row),
        "soft_targets": (classes, class_row),
    }
    for name, (about, row) in rows.items():
        with store.writer(name, about=about) as writer:
            for index in range(4):
                text = {"text": FORGED, "finish_reason": FORGED} if name == "generations" else {}
                writer.add(row(index) | text)
    keys = store.index("prompts", ["key", "prompt_key"]).select(["key", "prompt_key"])
    for column, value in {"split": "train", "windows": 1, "first": True}.items():
        keys = keys.append_column(column, [[value] * len(keys)])
    store.put_inputs("d" * 32, keys, {"source": path, "format": FORGED})
    done = stillroom(
        *("export", store.root, tmp_path / "out", "--license", "mit"),
        *("--name", NAME, "--teacher", NAME, "--where", f"text <> '{NAME}'", "--json"),
    )
    assert_shown(done.stdout, done.stderr)
    card = (tmp_path / "out" / "README.md").read_text()
    assert_shown(card.replace("\nerror: forged", ""))  # inside a fence text is as it is
    front, text = front_and_text(card)
    assert active(text) == []
    assert front["pretty_name"] == NAME
    assert "forged" in text


def test_a_folder_s_name_is_the_title_and_points_the_card_nowhere_else(tmp_path: Path) -> None:
    """YAML breaks a long name into lines, of which one might look like the path of a version."""
    store = make_store(tmp_path / "store")
    folder = tmp_path / f"{'a' * 70} path: 'v-00000000\\x\x1b\n<b>"
    for _ in range(2):
        done = stillroom("export", store.root, folder, "--license", "mit")
        assert_shown(done.stdout, done.stderr)
    front, text = front_and_text((folder / "README.md").read_text())
    assert active(text) == []
    assert "\x1b" not in front["pretty_name"]


def hostile_evaluation() -> dict[str, Any]:
    found = reports.evaluation() | {"views": reports.views(), "reliability": reports.reliability()}
    found["views"]["pieces"] = dict.fromkeys(found["views"]["pieces"], FORGED)
    found["samples"] = [{"prompt": FORGED, "reference": FORGED, "teacher": "t", "student": FORGED}]
    found["answers"] = {
        "metric": "regex",
        "pattern": FORGED,
        "max_tokens": 4,
        "prompts": 1,
        "against": FORGED,
        "unanswered": {"student": [FORGED]},
    }
    found["measured_on"]["snapshot"] = FORGED
    return found


def hostile_recipe() -> dict[str, Any]:
    """Every text of it a stranger's, but for the words that we choose by."""
    ours = {"task", "targets", "divergence", "tail", "format"}

    def changed(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: changed(part, key) for key, part in value.items()}
        return FORGED if isinstance(value, str) and name not in ours else value

    found = changed(deepcopy(reports.RECIPE))
    return dict(found) | {"student": {"model": None, "config": {FORGED: FORGED}}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    facts = deepcopy(reports.facts()) | {"notes": [FORGED], "store": FORGED, "machine": FORGED}
    facts["versions"], facts["rejects"] = {FORGED: FORGED}, {"train": FORGED}
    facts["stages"]["$" + FORGED] = {"rows": 1, "clock": {"start": 1.0, "model": 2.0}}
    recipe = reports.with_features(hostile_recipe(), layer=FORGED)
    return reports.finished(tmp_path / "run", hostile_evaluation(), facts, recipe, matched=FORGED)


def test_a_report_is_words_as_markdown_and_as_a_page(run: Path) -> None:
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert active(text) == []
    assert_shown(text.replace("\nerror: forged", ""), page.replace("\nerror: forged", ""))
    tags = Tags(page).found
    assert [tag for tag, _ in tags].count("script") == 2  # the data and ours
    assert not {"img", "iframe", "object", "form", "base"} & {tag for tag, _ in tags}
    assert not [name for _, named in tags for name in named if name.startswith("on")]
    assert not [named["href"] for tag, named in tags if tag == "a" and named["href"][:1] != "#"]
    data = page.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    json.loads(data)


def test_reports_are_shown_and_compared(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / FORGED_NAME)
    shown = stillroom("report", run)
    assert_shown(shown.stdout.replace("\nerror: forged", ""), shown.stderr)
    both = stillroom("report", run, other, "--out", tmp_path / "page.html")
    assert active(both.stdout) == []
    assert_shown(both.stdout, both.stderr)
    assert [
        tag for tag, _ in Tags((tmp_path / "page.html").read_text()).found if tag == "img"
    ] == []
    inspected = stillroom("inspect", run)
    assert_shown(inspected.stdout.replace("\nerror: forged", ""), inspected.stderr)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_student_s_card_is_words(adapter: bool) -> None:
    tree = recipe_tree(Path("/x"), Path(f"/x/{FORGED_NAME}"), Path(f"/x/{FORGED_NAME}"))
    model = f'{FORGED}"); import os; os.system("'
    tree["student"] = {"model": model, "lora": {"rank": 4}}
    told = {
        "recipe": Recipe(**tree).model_dump(mode="json"),
        "arm": "student",
        "teacher_id": FORGED,
    }
    trained = dict.fromkeys(("steps", "tokens", "scored_tokens", "epochs", "parameters"), 1)
    trained |= {"trained_parameters": 1, "snapshot": FORGED, "notes": [FORGED]}
    evaluation = reports.evaluation()
    evaluation["measured_on"]["of"] = FORGED
    card = student_card(told, trained, evaluation, adapter=adapter)
    front, text = front_and_text(card)
    assert front["library_name"] == ("peft" if adapter else "transformers")
    assert active(text) == []
    assert_shown(card)
    for code in re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE):
        parsed = ast.walk(ast.parse(code))
        assert not [n for n in parsed if isinstance(n, ast.Attribute) and n.attr == "system"]
