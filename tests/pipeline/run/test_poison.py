"""One row that makes the engine raise, or kills it.

It is found and rejected, and all the others are done.

Where the engine's process dies, stages are processes; where it raises they are in this one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from running import PATIENCE, at_worker_start, start
from torch import Tensor
from torch.nn import functional

from stillroom.storage.errors import EngineDied
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow
KILL = "os.kill(os.getpid(), 9)"
POISON = "under the tree"
POISON_ID = 11  # "under", at the beginning of no other prompt


def fatal(folder: Path) -> str:
    """PYTHONPATH of workers that are killed by a pass over a text that starts with the poison."""
    return at_worker_start(
        folder,
        f"""
        import torch
        plain = torch.nn.functional.embedding
        def embedding(input, *arguments, **more):
            ids = input.flatten()
            if ((ids[:-1] == 1) & (ids[1:] == {POISON_ID})).any():
                {KILL}
            return plain(input, *arguments, **more)
        torch.nn.functional.embedding = embedding
        """,
    )


def faulty(error: Exception, poison: int | None) -> Any:
    """Let models in this process raise, while it lasts, on a text that starts with the poison.

    None: they raise on every text.
    """
    plain = functional.embedding

    def embedding(ids: Tensor, *arguments: Any, **more: Any) -> Tensor:
        flat = ids.flatten()
        if poison is None or ((flat[:-1] == 1) & (flat[1:] == poison)).any():
            raise error
        return plain(ids, *arguments, **more)

    return patch.object(functional, "embedding", embedding)


def run(recipe: Path, site: str, *words: str) -> str:
    """What a run says whose stages are processes."""
    process = start(recipe, *words, PYTHONPATH=site)
    _, said = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, said
    return said


def rejects(store: Path) -> list[dict[str, Any]]:
    table = Store.open(store).index(
        "rejects", ["stage", "reason", "message", "attempts", "prompt_key"]
    )
    return table.to_pylist()


def written_by_hf(tmp_path: Path, tiny_llama: Callable[..., Path], **sections: Any) -> Path:
    records = prompts(60)
    records.insert(23, {"prompt": POISON})
    engine = {"engine": "hf", "temperature": 0.0, "max_tokens": 6, "engine_args": {"batch_size": 8}}
    source = write_jsonl(tmp_path / "prompts.jsonl", records)
    return write_recipe(tmp_path, tiny_llama("teacher"), source, **{"generate": engine} | sections)


def given(tmp_path: Path, tiny_llama: Callable[..., Path], **sections: Any) -> Path:
    records = [
        r | {"completion": "the dog sat on the mat and ran"[: 7 + 4 * (i % 6)]}
        for i, r in enumerate(prompts(60))
    ]
    records.insert(23, {"prompt": POISON, "completion": "and then"})
    source = write_jsonl(tmp_path / "pairs.jsonl", records)
    data = {"source": str(source), "format": "completion", "holdout": 4}
    return write_recipe(
        tmp_path, tiny_llama("teacher"), source, **{"generate": None, "data": data} | sections
    )


def test_a_prompt_that_kills_the_engine_is_rejected_and_the_others_are_written(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    recipe = written_by_hf(tmp_path, tiny_llama)
    said = run(recipe, fatal(tmp_path / "site"), "--until", "generate")
    assert said.count("generate: starts again") == 2
    assert_only_the_poison_is_rejected(recipe, "engine_died", attempts=2)


def test_a_prompt_that_the_engine_refuses_is_rejected_and_the_others_are_written(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    recipe = written_by_hf(tmp_path, tiny_llama)
    with faulty(RuntimeError("no kernel for this"), POISON_ID):
        done = stillroom("run", recipe, "--until", "generate")
    assert "starts again" not in done.stderr
    assert_only_the_poison_is_rejected(recipe, "engine", attempts=4)


def assert_only_the_poison_is_rejected(recipe: Path, reason: str, *, attempts: int) -> None:
    folder = recipe.parent
    (rejected,) = rejects(folder / "store")
    found = (rejected["stage"], rejected["reason"], rejected["attempts"])
    assert found == ("generate", reason, attempts)
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["generate"]
    assert (line["planned"], line["committed"], line["rejected"], line["pending"]) == (61, 60, 1, 0)
    assert last_json(stillroom("verify", folder / "store", "--json"))["ok"]
    assert not list((folder / "run" / "logs").glob("*.inflight"))


def test_a_text_that_kills_the_teacher_is_rejected_and_the_others_are_scored(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    recipe = given(tmp_path, tiny_llama)
    said = run(recipe, fatal(tmp_path / "site"), "--until", "score")
    assert said.count("score: starts again") == 2
    (rejected,) = rejects(tmp_path / "store")
    assert (rejected["stage"], rejected["reason"]) == ("score", "engine_died")
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["score"]
    assert (line["planned"], line["committed"], line["rejected"], line["pending"]) == (61, 60, 1, 0)


def test_where_every_row_kills_the_engine_the_stage_fails_and_rejects_none(
    tmp_path: Path, tiny_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written_by_hf(tmp_path, tiny_llama)
    # The device is lost with the rows in hand, not before: while the engine opens, all is well.
    monkeypatch.setattr("stillroom.stages.engines.hf.check_causal", lambda model: None)
    with faulty(EngineDied("the device is lost"), None):
        failed = stillroom("run", recipe, "--until", "generate", expect=1)
    assert "the engine died: the device is lost" in failed.stderr
    assert failed.stderr.count("generate: starts again") == 2
    assert rejects(tmp_path / "store") == []
    done = last_json(
        stillroom("run", recipe, "--json", "--until", "generate")
    )  # on a machine that is well
    assert done["stages"]["generate"]["rows"] == 61


@pytest.mark.vllm
@pytest.mark.assets
def test_a_prompt_that_kills_vllm_is_rejected_and_the_others_are_written(
    tmp_path: Path, assets: Path
) -> None:
    from transformers import AutoTokenizer

    pytest.importorskip("vllm")
    folder = assets / "models" / "stories260k-llama-hd32"
    texts = [
        f"{name} had a {thing}"
        for name in ("Lily", "Tom", "Ben", "Mia")
        for thing in ("dog", "cat", "ball")
    ]
    texts.append("zoo")
    second = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"][1] for text in texts]
    assert second.count(second[-1]) == 1
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    recipe = write_recipe(
        tmp_path,
        folder,
        source,
        generate={"engine": "vllm", "max_tokens": 8, "engine_args": {"max_num_seqs": 4}},
    )
    with faulty(RuntimeError("no kernel for this"), second[-1]):
        done = stillroom("run", recipe, "--until", "generate")
    assert done.stderr.count("generate: starts again") == 2
    (rejected,) = rejects(tmp_path / "store")
    assert (rejected["reason"], rejected["attempts"]) == ("engine_died", 2)
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["generate"]
    assert line["committed"] == len(texts) - 1
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
