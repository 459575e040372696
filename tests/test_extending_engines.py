"""Adding an engine takes two files: the engine's own, and a row in `stages/recipe/engines.py`."""

from pathlib import Path

import pytest
from extending import changed_files, extended, last_line, stillroom_in
from kit import prompts, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

FILES = ["stages/engines/sentence.py", "stages/recipe/engines.py"]
STAGES = ["data", "generate", "score", "train", "evaluate"]
SENTENCE = "the dog sat on the mat"


@pytest.mark.slow
def test_a_recipe_with_a_new_engine_runs_from_plan_to_card(tmp_path: Path) -> None:
    code = extended(tmp_path / "code", "engine")
    assert changed_files(code) == FILES

    teacher = save_tiny_llama(tmp_path / "teacher")
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    recipe = write_recipe(
        tmp_path, teacher, source, generate={"engine": "sentence", "max_tokens": 12}
    )
    lines = (["plan", recipe, "--json"], ["run", recipe, "--quiet", "--json"])
    plan, outcome = map(last_line, stillroom_in(code, *lines))
    planned = plan["stages"]["generate"]
    assert (planned["state"], planned["pending"]) == ("to do", 12)
    assert {name: outcome["stages"][name]["state"] for name in STAGES} == dict.fromkeys(
        STAGES, "done"
    )
    assert outcome["stages"]["generate"]["rows"] == outcome["stages"]["score"]["rows"] == 12
    assert outcome["results"]["student"]["kl_teacher"] > 0
    texts = "SELECT DISTINCT text, finish_reason FROM generations"
    rows = query(Store.open(tmp_path / "store"), texts).to_pylist()
    assert rows == [{"text": SENTENCE, "finish_reason": "stop"}]

    run_dir = Path(outcome["run_dir"])
    assert (run_dir / "report.html").is_file()
    (card,) = run_dir.glob("train-*/student/README.md")
    assert "stillroom" in card.read_text()
    assert changed_files(code) == FILES
