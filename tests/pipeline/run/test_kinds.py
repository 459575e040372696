"""Every kind of target from text to a judged student: one store for all, a scoring run for each.

The stages run in this process, in place of one of their own.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit import InThisProcess, last_json, prompts, stillroom, write_jsonl, write_recipe
from tiny_llama import save_tiny_llama

from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.report.stored.inspect import describe, find_row, render
from stillroom.pipeline.run import crew, runner
from stillroom.pipeline.run.status import stage_facts
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.targets.spec import Kept, wanted
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store
from stillroom.storage.tables.soft_targets import SoftTargets

T2 = ("score.temperatures=[1.0, 2.0]", "loss.temperature=2.0")
KINDS: dict[str, tuple[str, ...]] = {
    "topk": ("score.k=6", *T2),
    "topp": ("score.targets=topp", "score.p=0.7", "score.k=12", "score.k_min=2", *T2),
    "sampled": ("score.targets=sampled", "score.rounds=13"),
    "systematic": (
        *("score.targets=sampled", "score.rounds=9", "score.draw=systematic"),
        *("score.temperatures=[2.0]", "loss.temperature=2.0"),
    ),
    "weighted": ("score.targets=sampled", "score.rounds=9", "score.proposal=0.7"),
    "full": ("score.targets=full", *T2),
}


# What may be asked of a store that has the kind, and those before it: overrides, rows to score,
# why.
LATER: dict[str, list[tuple[tuple[str, ...], int, str]]] = {
    "topk": [
        (("score.k=4", "score.temperatures=[2.0]"), 0, ""),
        (("score.temperatures=[1.0]", "loss.temperature=1.0"), 0, ""),
        (("score.targets=topp", "score.p=0.9", "score.k=6"), 0, ""),
        (("score.k=7",), 20, "20 stored with fewer entries"),
        (("score.temperatures=[2.0, 3.0]",), 20, "20 stored without temperature 2 and 3"),
        (("storage.mantissa_bits=11",), 24, "24 stored with fewer bits"),
    ],
    "topp": [
        (("score.p=0.5",), 0, ""),
        (("score.k_min=3",), 20, "20 stored with fewer entries"),
    ],
    "sampled": [
        (("score.rounds=12",), 20, "20 stored with other draws"),
        (("score.draw=systematic",), 20, "20 stored with other draws"),
        (
            ("score.temperatures=[2.0]", "loss.temperature=2.0"),
            20,
            "20 stored as drawn at another temperature than 2",
        ),
    ],
    "systematic": [],
    "weighted": [(("score.proposal=0.8",), 20, "20 stored with other draws")],
    "full": [
        (
            (
                "score.targets=topk",
                "score.k=30",
                "score.temperatures=[5.0]",
                "loss.temperature=5.0",
            ),
            0,
            "",
        ),
        (("score.targets=topp", "score.p=0.99"), 0, ""),
    ],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    teacher = save_tiny_llama(
        folder / "teacher", hidden_size=32, intermediate_size=64, initializer_range=0.3
    )
    records = [
        r | {"completion": "the dog sat on the mat and ran"[: 7 + 4 * (i % 6)]}
        for i, r in enumerate(prompts(24))
    ]
    source = write_jsonl(folder / "pairs.jsonl", records)
    data = {"source": str(source), "format": "completion", "holdout": 4}
    train = {"epochs": 2, "tokens_per_step": 256, "learning_rate": 5.0e-3}
    storage = {"dir": str(folder / "store"), "mantissa_bits": 10}
    return write_recipe(
        folder,
        teacher,
        source,
        generate=None,
        data=data,
        train=train,
        score={"batch_tokens": 256},
        storage=storage,
    )


@pytest.mark.parametrize("name", KINDS)
def test_from_text_to_a_judged_student(
    recipe: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "StageProcess", InThisProcess)
    asked = load_recipe(recipe, KINDS[name])
    first = not (recipe.parent / "store").is_dir()
    outcome = runner.run(asked, quiet=True)
    assert outcome["stages"]["score"]["rows"] == (
        24 if first else 20
    )  # held-out rows are the same for all
    results = outcome["results"]
    assert results["teacher"]["kl_teacher"] == 0
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]

    store = Store.open(asked.storage.dir)
    rows = rows_of(store, name)
    assert len(rows) == (24 if name == "full" else 20)
    assert asked.score is not None
    assert {Kept.of_row(row) for row in rows} == {wanted(asked.score, 32)}
    check_against_the_teacher(rows, recipe.parent / "teacher")
    assert verify(store).problems == []
    facts = stage_facts(asked, make_plan(asked))["score"]
    assert facts["state"] == "done"
    assert facts["kept"][rows[0]["kind"]]["entries_per_token"] > 1
    assert (
        name not in ("topp", "systematic")
        or facts["bytes_per_token_by_column"]["tempered_tails"] > 0
    )
    sample = describe(find_row(store, rows[0]["key"].hex()), None)
    assert sample["kept"]["kind"] == rows[0]["kind"]
    assert len(sample["positions"]) == rows[0]["span_tokens"]
    assert render(sample, columns=80, colours=False)
    for overrides, rows_to_do, why in LATER[name]:
        line = make_plan(load_recipe(recipe, [*KINDS[name], *overrides])).stage("score")
        assert line is not None
        assert (line.pending, line.why) == (rows_to_do, why)


def test_rows_that_are_made_again_are_the_same(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws depend on the row.

    After a damaged shard was withdrawn, all ids and counts are as they were.

    The passes are of another size, so a number that lies between two of its ten bits may go to the
    other one.
    """
    monkeypatch.setattr(crew, "StageProcess", InThisProcess)
    words = [
        *KINDS["systematic"],
        "score.rounds=5",
    ]  # of no snapshot: one that names a damaged shard is lost
    asked = load_recipe(recipe, words)
    runner.run(asked, quiet=True, until="score")
    store = Store.open(asked.storage.dir)
    before = [row for row in rows_of(store, "systematic") if row["k"] == 5]
    commit = store.commits("soft_targets")[-1]
    shard = recipe.parent / "store" / commit.shard.name
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    assert {p.file for p in verify(store).problems} == {commit.shard.name}
    assert repair(store).ok
    again = runner.run(
        load_recipe(recipe, [*words, "score.batch_tokens=40"]), quiet=True, until="score"
    )
    assert again["stages"]["score"]["rows"] == commit.shard.rows
    after = {row["key"]: row for row in rows_of(Store.open(asked.storage.dir), "systematic")}
    assert len(before) == 20
    for row in before:
        for column, value in row.items():
            if getattr(value, "dtype", None) == np.float32:
                np.testing.assert_allclose(after[row["key"]][column], value, rtol=2.0**-10)
            else:
                np.testing.assert_array_equal(after[row["key"]][column], value)


@pytest.mark.slow
def test_the_whole_command_line(recipe: Path) -> None:
    """The recipe's words for everything that sampled targets may say."""
    words = [
        "score.targets=sampled",
        "score.rounds=11",
        "score.draw=systematic",
        "score.proposal=0.8",
    ]
    overrides = [w for o in [*words, *KINDS["systematic"][3:]] for w in ("--set", o)]
    outcome = last_json(stillroom("run", recipe, "--json", *overrides))
    results = outcome["results"]
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]


def rows_of(store: Store, name: str) -> list[dict[str, Any]]:
    """The rows that this kind's run wrote (`full` shares those of the held-out rows)."""
    places: dict[str, list[int]] = {}
    wanted = {
        "topk": "kind = 'topk'",
        "topp": "kind = 'topp'",
        "full": "kind = 'full'",
        "sampled": "draw = 'multinomial' AND proposal = 1",
        "systematic": "draw = 'systematic'",
        "weighted": "proposal <> 1",
    }[name]
    keys = set(query(store, f"SELECT key FROM soft_targets WHERE {wanted}")["key"].to_pylist())
    for row in store.index("soft_targets", ["key"]).to_pylist():
        if row["key"] in keys:
            places.setdefault(row["shard"], []).append(row["row"])
    return list(store.rows("soft_targets", places))


def check_against_the_teacher(rows: list[dict[str, Any]], folder: Path) -> None:
    """Compare every row's numbers with the teacher's own logits in float64.

    They agree to the rounding at 10 bits.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    drawn: list[np.ndarray] = []
    for row in rows:
        with torch.inference_mode():
            logits = model(torch.as_tensor(row["token_ids"])[None].long()).logits[0]
        span = slice(row["span_start"] - 1, row["span_start"] - 1 + row["span_tokens"])
        truth = logits.log_softmax(-1).numpy()[span]
        targets = SoftTargets.from_row(row)
        following = row["token_ids"][row["span_start"] :]
        np.testing.assert_allclose(
            targets.token_logprob, truth[np.arange(len(truth)), following], rtol=1e-3, atol=1e-4
        )
        temperature = (
            1.0
            if row["kind"] != "sampled" or row["temperatures"] is None
            else float(row["temperatures"][0])
        )
        teacher = truth / temperature - np.log(np.exp(truth / temperature).sum(-1, keepdims=True))
        np.testing.assert_allclose(
            targets.entropy, -(np.exp(teacher) * teacher).sum(-1), rtol=1e-3, atol=1e-4
        )
        if targets.logprobs is None:
            estimate = np.zeros((len(truth), truth.shape[1] + 1))
            np.put_along_axis(estimate, targets.ids, targets.probabilities, axis=1)
            drawn.append(estimate[:, :-1] - np.exp(teacher))
            continue
        dense = (
            truth
            if targets.ids is None
            else np.take_along_axis(truth, np.maximum(targets.ids, 0), 1)
        )
        np.testing.assert_allclose(
            np.where(np.isfinite(targets.logprobs), targets.logprobs - dense, 0), 0, atol=1e-2
        )
    if drawn:
        errors = np.concatenate(
            drawn
        )  # of all positions: their sum over ids is 0, their mean over positions near it
        standard = errors.std(0, ddof=1) / np.sqrt(len(errors))
        assert (np.abs(errors.mean(0)) <= 4 * standard + 1e-9).all()
