"""The whole run on real models and real vLLM.

Stories go in, a student comes out, and others can read the store.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from kit import last_json, stillroom, write_jsonl, write_recipe
from running import start

from stillroom.storage.store.store import Store

pytestmark = [pytest.mark.assets, pytest.mark.slow]


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_stories_by_vllm_teach_a_student(assets: Path, tmp_path: Path) -> None:
    import duckdb
    import pyarrow.parquet as pq

    stories = pq.read_table(assets / "text" / "tinystories-8k" / "validation.parquet")[
        "text"
    ].to_pylist()
    openings = list(dict.fromkeys(" ".join(s.split()[:8]) for s in stories))[:60]
    source = write_jsonl(tmp_path / "stories.jsonl", [{"prompt": o} for o in openings])
    recipe = write_recipe(
        tmp_path,
        assets / "models" / "stories260k-llama-hd32",
        source,
        storage={"dir": str(tmp_path / "store")},
        student={
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "head_dim": 8,
                "intermediate_size": 64,
            }
        },
        data={"source": str(source), "format": "prompt", "holdout": 10},
        generate={"engine": "vllm", "max_tokens": 24},
        score={"k": 16},
        train={"epochs": 4, "tokens_per_step": 512, "learning_rate": 1.0e-2},
        evaluate={"tokens": 300},
    )
    # vLLM in a stage's process, all else in this one.
    writing = start(recipe, "--until", "generate")
    said = writing.communicate(timeout=300)
    assert writing.returncode == 0, said
    results = last_json(stillroom("run", recipe, "--json"))["results"]
    assert results["student"]["kl_teacher"] < 0.8 * results["student_before"]["kl_teacher"]
    assert results["student"]["cross_entropy"] < results["student_before"]["cross_entropy"]

    store = Store.open(tmp_path / "store")
    assert store.commits("generations")[0].versions["vllm"]
    shards = [str(store.root / c.shard.name) for c in store.commits("soft_targets")]
    with duckdb.connect() as connection:
        by_duckdb = connection.execute(
            "SELECT sum(span_tokens) FROM read_parquet($1)", [shards]
        ).fetchall()
    assert by_duckdb == [(sum(pq.read_table(s)["span_tokens"].to_numpy().sum() for s in shards),)]
    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "cache")
    )
    row = loaded.filter(lambda r: r["kind"] == "topk")[0]
    mass = np.exp(row["logprobs"]).reshape(-1, 16).sum(1) + np.exp(row["tail_logprob"])
    np.testing.assert_allclose(mass, 1.0, atol=2e-3)


def test_plain_text_is_scored_and_taught(assets: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        assets / "models" / "stories260k-llama-hd32",
        assets / "text" / "tinystories-8k" / "validation.parquet",
        student={
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "head_dim": 8,
                "intermediate_size": 64,
            }
        },
        data={
            "source": str(assets / "text" / "tinystories-8k" / "validation.parquet"),
            "format": "text",
            "limit": 60,
            "holdout": 8,
            "window_tokens": 128,
        },
        generate=None,
        storage={"dir": str(tmp_path / "store")},
        score={"k": 16, "batch_tokens": 4096},
        train={"epochs": 2, "tokens_per_step": 512, "learning_rate": 1.0e-2},
        evaluate={"tokens": 600},
    )
    results = last_json(stillroom("run", recipe, "--json"))["results"]
    assert (
        results["teacher"]["perplexity"] < 6
    )  # the teacher knows these stories: perplexity 3.7 on the test split
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]
