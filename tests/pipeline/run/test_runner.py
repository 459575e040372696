"""The whole pipeline through the real command line, on a tiny teacher.

It is tested for results, reuse, resuming and refusals.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from running import start

from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture
def teacher(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama("teacher", hidden_size=32, intermediate_size=64)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", prompts(24))


def states(outcome: dict[str, Any]) -> dict[str, str]:
    return {name: stage["state"] for name, stage in outcome["stages"].items()}


def run(recipe: Path, *arguments: Any) -> dict[str, Any]:
    return last_json(stillroom("run", recipe, "--json", *arguments))


def in_processes(recipe: Path) -> tuple[str, dict[str, Any]]:
    """What a run says whose stages are processes, and the object of its last line."""
    process = start(recipe)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return said, json.loads(said.splitlines()[-1])


def plan(recipe: Path, *arguments: Any) -> dict[str, Any]:
    return last_json(stillroom("plan", recipe, "--json", *arguments))["stages"]


def test_one_command_from_prompts_to_a_judged_student(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = write_recipe(
        tmp_path,
        teacher,
        source,
        evaluate={"tokens": 200, "baseline": True, "generate": {"prompts": 3}},
    )
    said, outcome = in_processes(recipe)
    told = f"report: {tmp_path}/run/report.html\nstudent: {tmp_path}/run/latest/student\n"
    assert said.rpartition('{"run_dir')[0].endswith(told), "where both are, above the JSON line"
    assert list(outcome["results"]) == ["teacher", "student_before", "baseline", "student"]
    for arm in outcome["results"].values():
        assert {
            "cross_entropy",
            "perplexity",
            "kl_teacher",
            "tv_teacher",
            "acceptance",
        } <= arm.keys()
        assert {"top1_agreement", "ece"} <= arm.keys()
    assert outcome["results"]["teacher"]["kl_teacher"] == 0
    assert set(states(outcome).values()) == {"done"}
    student = Path(outcome["run_dir"]) / "latest" / "student"
    AutoModelForCausalLM.from_pretrained(student)
    AutoTokenizer.from_pretrained(student)
    verified = last_json(stillroom("verify", tmp_path / "store", "--json"))
    assert verified["ok"]
    assert verified["tables"]["generations"]["rows"] == 24
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["evaluation"]["results"] == outcome["results"]
    assert report["evaluation"]["gradient"]["student"]["angle_degrees"] > 0

    # The same command again does nothing: every stage is found done, and no stage's process starts.
    for log in (tmp_path / "run" / "logs").glob("*.log"):
        log.unlink()
    _, again = in_processes(recipe)
    assert set(states(again).values()) == {"cached"}
    assert again["results"] == outcome["results"]
    assert not list((tmp_path / "run" / "logs").glob("*.log"))

    # Another learning rate is another student in its own folder; everything before it is reused.
    lines = plan(recipe, "--set", "train.learning_rate=0.01")
    assert lines["train"]["why"] == "train.learning_rate: 0.005 -> 0.01"
    outcome = run(recipe, "--set", "train.learning_rate=0.01")
    assert states(outcome) == {
        "data": "cached",
        "generate": "cached",
        "score": "cached",
        "train": "done",
        "baseline": "done",
        "evaluate": "done",
    }
    assert len(list((tmp_path / "run").glob("train-*"))) == 4

    # Appended prompts: only they are generated and scored.
    write_jsonl(source, [*prompts(24), {"prompt": "the happy dog"}, {"prompt": "a happy cat"}])
    lines = plan(recipe)
    assert (lines["generate"]["committed"], lines["generate"]["pending"]) == (24, 2)
    outcome = run(recipe, "--until", "score")
    assert outcome["stages"]["generate"]["rows"] == outcome["stages"]["score"]["rows"] == 2
    assert Store.open(tmp_path / "store").index("generations", ["key"]).num_rows == 26

    status = last_json(stillroom("status", recipe, "--json"))["stages"]
    score = status["score"]
    assert sum(score["bytes_per_token_by_column"].values()) == pytest.approx(
        score["bytes_per_token"], abs=0.05
    )
    sample = last_json(stillroom("inspect", tmp_path / "store", "--json"))
    assert len(sample["positions"]) == len(sample["tokens"]) - sample["span_start"]
    counted = last_json(
        stillroom("query", tmp_path / "store", "SELECT count(*) AS n FROM generations", "--json")
    )
    assert counted == {"rows": [{"n": 26}], "complete": True}


def test_what_still_serves_is_reused_and_the_plan_says_why_the_rest_is_not(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    recipe = write_recipe(tmp_path, teacher, source)
    run(recipe, "--until", "score")

    def pending(*overrides: str) -> tuple[int, int]:
        lines = plan(recipe, *(word for o in overrides for word in ("--set", o)))
        return lines["generate"]["pending"], lines["score"]["pending"]

    assert pending() == (0, 0)
    assert pending("score.k=2") == (0, 0)
    assert pending("score.k=8") == (0, 20)  # held-out rows have the whole distribution already
    assert pending("storage.mantissa_bits=7") == (0, 0)
    assert pending("storage.mantissa_bits=23") == (
        0,
        24,
    )  # exact floats were asked for, and are not there
    assert pending("generate.samples=2", "generate.temperature=1.0")[0] == 48
    assert pending("generate.seed=5") == (0, 0)  # greedy text has no seed
    assert pending("generate.temperature=1.0")[0] == 24
    assert pending("storage.commit_rows=3", "run.seed=9", "data.holdout=4") == (0, 0)

    store = Store.open(tmp_path / "store")
    reasons = store.index("generations", ["finish_reason"])["finish_reason"].to_pylist()
    assert pending("generate.max_tokens=20")[0] == reasons.count("length")
    assert pending("generate.max_tokens=11")[0] >= reasons.count("length")

    weights = teacher / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(data)
    assert pending() == (
        24,
        0,
    )  # a changed weight is another teacher: nothing of the old one is its


def test_black_box_needs_no_distribution(tmp_path: Path, teacher: Path, source: Path) -> None:
    outcome = run(write_recipe(tmp_path, teacher, source, score=None, loss={"hard_weight": 1.0}))
    assert "score" not in outcome["stages"]
    student, before = outcome["results"]["student"], outcome["results"]["student_before"]
    assert student["cross_entropy"] < before["cross_entropy"]
    assert student["kl_teacher"] is None


def test_given_text_is_scored_and_learned_from(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    teacher = tiny_llama("teacher", initializer_range=0.5)
    texts = [{"text": " ".join(r["prompt"] for r in prompts(40)[i : i + 6])} for i in range(30)]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    data = {"source": str(source), "format": "text", "holdout": 4, "window_tokens": 16}
    outcome = run(
        write_recipe(tmp_path, teacher, source, data=data, generate=None, loss={"hard_weight": 0.0})
    )
    assert list(outcome["stages"]) == ["data", "score", "train", "evaluate"]
    rows = Store.open(tmp_path / "store").index(
        "generations", ["source_key", "completion_tokens", "token_ids"]
    )
    assert all(len(ids) <= 16 for ids in rows["token_ids"].to_pylist())
    assert (
        outcome["results"]["student"]["kl_teacher"]
        < outcome["results"]["student_before"]["kl_teacher"]
    )
    assert set(states(run(tmp_path / "recipe.yaml")).values()) == {"cached"}


def test_given_completions_are_scored_from_where_they_begin(tmp_path: Path, teacher: Path) -> None:
    records = [r | {"completion": "the dog sat on the mat"} for r in prompts(12)]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    data = {"source": str(source), "format": "completion", "holdout": 2}
    run(write_recipe(tmp_path, teacher, source, data=data, generate=None), "--until", "score")
    rows = (
        Store.open(tmp_path / "store")
        .index("soft_targets", ["token_ids", "span_start", "span_tokens"])
        .to_pylist()
    )
    assert {row["span_tokens"] for row in rows} == {7}  # six words and the end of the sequence
    assert all(row["token_ids"][-1] == 2 for row in rows)


def test_a_prompt_longer_than_the_context_is_rejected_and_the_others_are_done(
    tmp_path: Path, teacher: Path
) -> None:
    source = write_jsonl(
        tmp_path / "p.jsonl", [*prompts(12), {"prompt": "cat " * 200}, {"prompt": ""}]
    )
    recipe = write_recipe(
        tmp_path, teacher, source, data={"source": str(source), "format": "prompt", "holdout": 2}
    )
    outcome = run(recipe)
    assert outcome["stages"]["generate"]["rows"] == 12
    lines = plan(recipe)
    assert (lines["data"]["rejected"], lines["generate"]["rejected"]) == (1, 1)
    for line in lines.values():
        assert line["planned"] == line["committed"] + line["rejected"] + line["pending"]
    found = last_json(
        stillroom(
            "query",
            tmp_path / "store",
            "SELECT stage, reason, message FROM rejects ORDER BY 1",
            "--json",
        )
    )
    assert [(r["stage"], r["reason"]) for r in found["rows"]] == [
        ("data", "empty"),
        ("generate", "too_long"),
    ]
    assert "201 tokens; the author reads 128" in found["rows"][1]["message"]


def test_select_chooses_what_is_scored(tmp_path: Path, teacher: Path, source: Path) -> None:
    recipe = write_recipe(
        tmp_path, teacher, source, select={"where": "finish_reason = 'nothing like this'"}
    )
    done = stillroom("run", recipe, "--until", "train", expect=2)
    assert "waits for training rows" in done.stderr
    done = stillroom("plan", recipe, "--set", "select.where=no_such_column > 1", expect=2)
    assert "select.where" in done.stderr


def test_students_are_trained_where_teacher_and_data_are_not(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    recipe = write_recipe(tmp_path, teacher, source)
    run(recipe, "--until", "score")
    shutil.move(teacher, tmp_path / "gone")
    source.unlink()
    outcome = run(recipe, "--until", "train")
    assert states(outcome)["train"] == "done"
    done = stillroom("run", recipe, "--set", "score.k=9", expect=2)
    assert "teacher or data are not here" in done.stderr


def test_a_student_that_writes_while_the_teacher_scores(
    tmp_path: Path, teacher: Path, source: Path, tiny_llama: Callable[..., Path]
) -> None:
    author = tiny_llama("author", seed=7)
    generate = {"engine": "hf", "temperature": 0.0, "max_tokens": 8, "model": str(author)}
    run(write_recipe(tmp_path, teacher, source, generate=generate), "--until", "score")
    store = Store.open(tmp_path / "store")
    authors = set(store.index("generations", ["author_id"])["author_id"].to_pylist())
    teachers = set(store.index("soft_targets", ["teacher_id"])["teacher_id"].to_pylist())
    assert len(authors) == len(teachers) == 1
    assert authors != teachers


@pytest.mark.parametrize(
    ("overrides", "code", "expected"),
    [
        (["data.source=/none/at/all.jsonl"], 2, "data.source: nothing to read"),
        (["teacher.model=/none/at/all"], 2, "teacher.model: no folder"),
        (["data.holdout=24"], 2, "data.holdout: 24 of 24 prompts"),
        (["storage.dir=/dev/null/store"], 2, "/dev/null/store: it is below /dev/null"),
        (["generate.engine_args={batch_size: 2}", "train.row_tokens=8"], 2, "train.row_tokens: 8"),
    ],
)
def test_what_cannot_work_is_one_clear_message_without_a_traceback(
    tmp_path: Path, teacher: Path, source: Path, overrides: list[str], code: int, expected: str
) -> None:
    recipe = write_recipe(tmp_path, teacher, source)
    words = [word for o in overrides for word in ("--set", o)]
    done = stillroom("run", recipe, *words, expect=code)
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_model_is_named_before_anything_runs(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    (teacher / "model.safetensors").write_bytes(b"not a tensor file")
    done = stillroom("run", write_recipe(tmp_path, teacher, source), expect=2)
    assert "model.safetensors" in done.stderr
    assert "save the model again" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_read_only_store_keeps_everything_and_says_so(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    recipe = write_recipe(tmp_path, teacher, source)
    run(recipe, "--until", "generate")
    before = Store.open(tmp_path / "store").index("generations", ["key"])
    script = (
        f"mount --bind {tmp_path}/store {tmp_path}/store && "
        f"mount -o remount,ro,bind {tmp_path}/store && "
    )
    inner = f"{sys.executable} -m stillroom run {recipe} --json"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script + inner], capture_output=True, text=True, timeout=120
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine gives tests no mount namespace")
    assert done.returncode == 1
    assert "read-only" in done.stderr
    assert "Traceback" not in done.stderr
    assert Store.open(tmp_path / "store").index("generations", ["key"]).equals(before)


def test_an_author_with_another_tokenizer_is_refused_by_name(
    tmp_path: Path, teacher: Path, source: Path, tiny_llama: Callable[..., Path]
) -> None:
    author = tiny_llama("author")
    tokenizer = json.loads((author / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    (author / "tokenizer.json").write_text(json.dumps(tokenizer))
    generate = {"engine": "hf", "model": str(author)}
    done = stillroom("run", write_recipe(tmp_path, teacher, source, generate=generate), expect=2)
    assert "generate.model" in done.stderr
    assert "other tokens" in done.stderr


def test_a_pinned_snapshot_trains_on_nothing_it_is_judged_on(
    tmp_path: Path, teacher: Path, source: Path, tiny_llama: Callable[..., Path]
) -> None:
    from stillroom.storage.snapshots.snapshot import load_snapshot

    recipe = write_recipe(tmp_path, teacher, source)
    run(recipe, "--until", "train")
    record = json.loads((tmp_path / "run" / "latest" / "train.json").read_text())
    pin = ("--set", f"train.snapshot={record['snapshot']}", "--set", "data.holdout=12")
    outcome = run(recipe, *pin)
    store = Store.open(tmp_path / "store")
    evaluation = json.loads((Path(outcome["run_dir"]) / "latest" / "evaluation.json").read_text())

    def prompts_of(snapshot_id: str) -> set[bytes]:
        snapshot = load_snapshot(store, snapshot_id)
        rows = store.rows(
            "soft_targets", {s.sha256: s.rows for s in snapshot.shards}, ["prompt_key"]
        )
        return {row["prompt_key"] for row in rows}

    judged = prompts_of(evaluation["measured_on"]["snapshot"])
    assert judged
    assert not judged & prompts_of(record["snapshot"])
    other = tiny_llama("other", seed=5)
    run(recipe, "--set", f"teacher.model={other}", "--set", "data.holdout=12", "--until", "score")
    done = stillroom("plan", recipe, *pin, "--set", f"teacher.model={other}", expect=2)
    assert "train.snapshot" in done.stderr


def test_a_changed_reference_is_judged_again(tmp_path: Path, teacher: Path, source: Path) -> None:
    evaluate = {"tokens": 200, "generate": {"prompts": 3, "max_tokens": 4, "metric": "exact_match"}}
    recipe = write_recipe(tmp_path, teacher, source, evaluate=evaluate)
    for reference, state in (("cat", "done"), ("cat", "cached"), ("dog", "done")):
        write_jsonl(source, [r | {"reference": reference} for r in prompts(24)])
        outcome = run(recipe)
        assert states(outcome)["evaluate"] == state
    assert states(outcome)["train"] == "cached"


def test_given_text_that_was_lost_is_made_again(tmp_path: Path, teacher: Path) -> None:
    records = [r | {"completion": "the dog sat on the mat"} for r in prompts(24)]
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    data = {"source": str(source), "format": "completion", "holdout": 2}
    recipe = write_recipe(tmp_path, teacher, source, data=data, generate=None)
    run(recipe, "--until", "score")
    store = Store.open(tmp_path / "store")
    store.retire(store.commits("generations")[0], reason="the test lost it")
    assert plan(recipe)["data"]["pending"] == 24
    run(recipe, "--until", "score")
    assert Store.open(tmp_path / "store").index("generations", ["key"]).num_rows == 24


def test_only_and_until_do_not_go_together_and_name_stages_of_the_recipe(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    recipe = write_recipe(tmp_path, teacher, source, score=None, loss={"hard_weight": 1.0})
    assert (
        "one of them"
        in stillroom("run", recipe, "--only", "data", "--until", "data", expect=2).stderr
    )
    assert "no such stage" in stillroom("run", recipe, "--only", "score", expect=2).stderr


def test_latest_is_the_student_of_the_last_run_that_has_one(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    recipe = write_recipe(tmp_path, teacher, source)
    latest = tmp_path / "run" / "latest"
    run(recipe, "--until", "train")
    first = latest.resolve()
    run(recipe, "--until", "train", "--set", "train.learning_rate=0.01")
    assert latest.resolve() != first
    stillroom("run", recipe, "--set", "student.config={num_hiden_layers: 2}", expect=2)
    run(recipe)  # nothing to do, and yet it is this student that the report is about
    assert latest.resolve() == first
    assert (latest / "student" / "config.json").is_file()


def test_a_student_of_another_architecture_is_trained(
    tmp_path: Path, teacher: Path, source: Path
) -> None:
    config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}
    recipe = write_recipe(tmp_path, teacher, source, student={"config": config})
    stillroom("run", recipe, "--until", "train")
    saved = json.loads((tmp_path / "run" / "latest" / "student" / "config.json").read_text())
    assert (saved["model_type"], saved["n_embd"], saved["vocab_size"]) == ("gpt2", 8, 32)


def test_what_small_files_show_is_refused_before_the_teacher_works(
    tmp_path: Path, teacher: Path, source: Path, tiny_llama: Callable[..., Path]
) -> None:
    student = tiny_llama("student")
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {
        "cat": tokenizer["model"]["vocab"]["dog"],
        "dog": tokenizer["model"]["vocab"]["cat"],
    }
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe = write_recipe(tmp_path, teacher, source, student={"model": str(student)})
    assert "student.model: the tokenizer of" in stillroom("plan", recipe, expect=2).stderr
    lora = {"target_modules": ["q_proj", "embed_tokens"]}
    tied = {"model": str(tiny_llama("tied", tie_word_embeddings=True)), "lora": lora}
    recipe = write_recipe(tmp_path, teacher, source, student=tied)
    refused = stillroom("plan", recipe, expect=2).stderr
    assert "embed_tokens shares its weight with another layer" in " ".join(refused.split())
    data = {
        "source": str(source),
        "format": "instruction",
        "columns": {"instruction": "prompt"},
        "holdout": 4,
    }
    recipe = write_recipe(tmp_path, teacher, source, data=data)
    assert "chat template" in stillroom("plan", recipe, expect=2).stderr
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").touch()
    done = stillroom(
        "plan",
        write_recipe(tmp_path, teacher, source, storage={"dir": str(tmp_path / "occupied")}),
        expect=2,
    )
    assert "no store here" in done.stderr
