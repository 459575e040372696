"""`verify --deep` with the real command line.

It is tested which teacher it takes, what it does not look at, and what it says.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, stillroom
from planting import planted
from tiny_jobs import scored_store
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress

from stillroom.pipeline.cli.deep_verify import (
    deep_lines,
    deep_verify,
    deeply,
    find_teacher,
)
from stillroom.stages.audit import teacher_reader
from stillroom.stages.audit.rescore import Rescored
from stillroom.stages.audit.stored_rows import target_shards
from stillroom.storage.errors import UsageError
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store


def lora(folder: Path, teacher: Path) -> Path:
    """An adapter that changes what the teacher says."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(teacher), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Targets of a teacher in float32, and of the same with an adapter in bfloat16."""
    folder = tmp_path_factory.mktemp("two")
    teacher = save_tiny_llama(folder / "teacher", initializer_range=0.5)
    scored_store(folder, teacher, rows=8)
    adapted = {
        "model": str(teacher),
        "adapter": str(lora(folder / "adapter", teacher)),
        "dtype": "bfloat16",
    }
    _, store, _ = scored_store(folder, teacher, rows=8, teacher=adapted, score={"k": 8})
    return store


def folder_of(store: Store) -> Path:
    return Path(str(store.root)).parent


def deep(store: Store, **how: Any) -> Rescored:
    asked = deeply(str(folder_of(store) / "teacher"), **{"dtype": None, **how})
    return deep_verify(store, find_teacher(store, asked), asked, progress=SilentProgress())


def test_the_rows_of_the_teacher_that_is_named_are_read_and_the_others_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes, load = [], teacher_reader.load_causal_lm

    def noted(*about: Any, **how: Any) -> Any:
        model = load(*about, **how)
        dtypes.append(str(model.dtype))
        return model

    monkeypatch.setattr(teacher_reader, "load_causal_lm", noted)
    plain = deep(store)
    adapted = deep(store, adapter=str(folder_of(store) / "adapter"))
    assert plain.ok
    assert adapted.ok
    assert (plain.teacher.dtype, adapted.teacher.dtype) == ("float32", "bfloat16"), (
        "as the store's teacher had it"
    )
    assert plain.other_teachers == {adapted.teacher.id: adapted.rows}
    assert adapted.other_teachers == {plain.teacher.id: plain.rows}
    assert any(
        line == f"not read: 8 rows of the teacher {plain.teacher.id}"
        for line in deep_lines(adapted)
    )
    assert dtypes == ["torch.float32", "torch.bfloat16"]
    # In another batch float32 is off by some hundred roundings of eps = 1.2e-7. What bfloat16 is
    # off by depends on the processor, and may be nothing.
    assert plain.quantities["logprobs"].noise_worst < 1e-4


def test_a_teacher_that_the_store_does_not_hold_is_refused(store: Store, tmp_path: Path) -> None:
    other = save_tiny_llama(tmp_path / "other", initializer_range=0.5, seed=1)
    with pytest.raises(UsageError) as refused:
        find_teacher(store, deeply(str(other), dtype=None))
    assert str(refused.value).startswith(f"--teacher: {other} is ")
    for shard in target_shards(store):
        assert shard.teacher_id in str(refused.value)
    assert "8 rows, with other weights" in str(refused.value)
    with pytest.raises(UsageError, match="with other dtype"):
        deep(store, dtype="float16")
    with pytest.raises(UsageError, match=r"--adapter: .* holds no adapter_config\.json"):
        deep(store, adapter=str(tmp_path))


def test_options_that_do_not_go_together_are_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="--deep and --teacher MODEL go together"):
        deeply(None, dtype=None)
    with pytest.raises(UsageError, match=r"--dtype: int8 is no dtype of a teacher\. Use float32"):
        deeply("teacher", dtype="int8")
    done = stillroom("verify", store.root, "--teacher", folder_of(store) / "teacher", expect=2)
    assert "--deep and --teacher MODEL go together" in done.stderr


def test_rows_of_damaged_shards_are_left_out_and_counted(store: Store, tmp_path: Path) -> None:
    shutil.copytree(Path(str(store.root)), tmp_path / "store")
    copy = Store.open(tmp_path / "store")
    (tmp_path / "store" / copy.commits("soft_targets")[0].shard.name).write_bytes(b"damaged")
    damaged = {problem.file for problem in verify(copy).problems if problem.mend}
    asked = deeply(
        str(folder_of(store) / "teacher"), adapter=str(folder_of(store) / "adapter"), dtype=None
    )
    teacher = find_teacher(store, asked)
    report = deep_verify(copy, teacher, asked, progress=SilentProgress(), damaged=damaged)
    assert report.damaged
    assert report.ok
    everything = {commit.shard.name for commit in copy.commits("soft_targets")}
    with pytest.raises(
        UsageError, match=r"none of this teacher's rows can be read again.*16 of the store's are in"
    ):
        deep_verify(copy, teacher, asked, progress=SilentProgress(), damaged=everything)


def test_the_command_names_the_rows_and_ends_with_three(store: Store, tmp_path: Path) -> None:
    wrong = planted(store, tmp_path / "store", "shifted", consistent=True)
    words = [
        "verify",
        wrong.root,
        "--deep",
        "--teacher",
        folder_of(store) / "teacher",
        "--rows",
        6,
        "--json",
    ]
    done = stillroom(*words, expect=3)
    found = last_json(done)
    assert found["problems"] == [], "each row is valid by itself"
    assert not found["ok"]
    assert found["deep"]["rows"] == 6
    assert {row["fault"] for row in found["deep"]["off"]} == {"shifted by one position"}
    assert f"PROBLEM {found['deep']['off'][0]['shard']}, row " in done.stdout
    assert "6 of 6 rows are not what the teacher says (6 shifted by one position)" in done.stdout
