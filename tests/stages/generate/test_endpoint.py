"""An endpoint that writes.

Every prompt becomes one row, whatever it does, and no answer is paid for twice.
"""

from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from endpoint_server import KEY, Endpoint, answer_to, endpoint
from kit import last_json, prompts, stillroom, told, write_jsonl, write_recipe
from loaded import Loaded
from running import alive, ours, start, until

from stillroom.stages.engines.base import UNASKED, Request
from stillroom.stages.engines.openai import OpenAIEngine
from stillroom.stages.engines.throttle import Throttle
from stillroom.stages.recipe.engines import Generate
from stillroom.stages.workers.answers import Answers
from stillroom.stages.workers.clock import Clock
from stillroom.storage.errors import StillroomError, Stopped
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

TinyLlama = Callable[..., Path]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_SECRET_OF_MINE", KEY)


def recipe_for(
    folder: Path, teacher: Path, served: Endpoint, /, *, rows: int = 12, **more: Any
) -> Path:
    """Stage one alone, unless `more` names other sections: prompts that an endpoint answers."""
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder / "prompts.jsonl", prompts(rows))
    generate = {
        "engine": "openai",
        "base_url": served.url,
        "model": "tiny/one",
        "api_key_env": "TINY_SECRET_OF_MINE",
        "max_tokens": 12,
        "temperature": 0.0,
    } | more.pop("generate", {})
    alone: dict[str, Any] = dict.fromkeys(("student", "score", "loss", "train", "evaluate"))
    return write_recipe(folder, teacher, source, **alone | {"generate": generate} | more)


def rows_of(folder: Path, *columns: str, table: str = "generations") -> list[dict[str, Any]]:
    names = ", ".join(columns)
    return query(Store.open(folder / "store"), f"SELECT {names} FROM {table}").to_pylist()


FAULTS = ["429 now", "500", "half", "short", "closed", "hang"]


def test_every_prompt_is_one_row_whatever_the_endpoint_does(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    asked = [row["prompt"] for row in prompts(12)]
    faults = {prompt: deque([fault]) for prompt, fault in zip(asked, FAULTS, strict=False)}
    with endpoint(faults=faults) as served:
        teacher = tiny_llama("teacher")
        recipe = recipe_for(tmp_path, teacher, served, generate={"timeout_seconds": 4.0})
        outcome = last_json(stillroom("run", recipe, "--json"))
        assert outcome["stages"]["generate"]["rows"] == 12
        again = last_json(stillroom("run", recipe, "--json"))
    assert again["stages"]["generate"]["state"] == "cached"
    texts = Counter(row["text"] for row in rows_of(tmp_path, "text"))
    assert texts == Counter(answer_to(prompt).strip() for prompt in asked)
    assert served.answered == Counter(asked)
    assert served.calls == Counter(asked) + Counter(asked[: len(FAULTS)])


def test_answers_that_cannot_be_trained_on_are_rejected_by_name_and_paid_for_once(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    asked = [row["prompt"] for row in prompts(8)]
    kinds = {"filter": "content_filter", "empty": "empty", "tools": "tool_calls", "400": "engine"}
    faults = {prompt: deque([kind]) for prompt, kind in zip(asked, kinds, strict=False)}
    with endpoint(faults=faults) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served, rows=8)
        stillroom("run", recipe)
        stillroom("run", recipe)
    rejected = rows_of(tmp_path, "reason", "message", table="rejects")
    assert sorted(row["reason"] for row in rejected) == sorted(kinds.values())
    (refused,) = [row["message"] for row in rejected if row["reason"] == "engine"]
    assert (
        "Bearer ${TINY_SECRET_OF_MINE}" in refused
    )  # the endpoint says the key, the store does not
    assert served.calls == Counter(asked)
    assert len(rows_of(tmp_path, "key")) == 4


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("401", 2, "401 to every call"),
        ("404", 2, "only conversations can be asked"),
        ("429 insufficient_quota", 1, "the account is empty"),
    ],
)
def test_what_no_other_call_will_change_ends_the_run(
    fault: str, code: int, said: str, tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    with endpoint(every=lambda number: fault) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served, generate={"concurrency": 2})
        done = stillroom("run", recipe, expect=code)
        assert said in done.stderr
        assert KEY not in done.stderr + done.stdout
        assert served.calls.total() <= 2
        assert rows_of(tmp_path, "key", table="rejects") == []


def test_an_endpoint_that_is_down_is_not_the_rows_fault(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.stages.engines.openai.FIRST_WAIT_SECONDS", 0.001)
    with endpoint(every=lambda number: "500" if number > 4 else None) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served, generate={"concurrency": 1})
        done = stillroom("run", recipe, expect=1)
        assert "gave no answer in 8 attempts" in done.stderr
        assert rows_of(tmp_path, "key", table="rejects") == []
        served.every = lambda number: None
        stillroom("run", recipe)
    assert len(rows_of(tmp_path, "key")) == 12
    assert set(served.answered.values()) == {1}


def test_a_row_that_fails_while_others_are_answered_is_rejected(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.stages.engines.openai.ATTEMPTS", 2)
    monkeypatch.setattr("stillroom.stages.engines.openai.FIRST_WAIT_SECONDS", 2.0)
    asked = [row["prompt"] for row in prompts(12)]
    with endpoint(faults={asked[3]: deque(["500"] * 2)}) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served)
        monkeypatch.setattr("random.uniform", lambda low, high: high)  # the others come first
        stillroom("run", recipe)
    (rejected,) = rows_of(tmp_path, "reason", "attempts", table="rejects")
    assert rejected == {"reason": "engine", "attempts": 2}
    assert len(rows_of(tmp_path, "key")) == 11


def test_a_budget_stops_the_run_cleanly_and_more_money_buys_the_rest_only(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    prices = {"usd_per_million_prompt_tokens": 1000.0, "usd_per_million_completion_tokens": 2000.0}
    with endpoint() as served:
        teacher = tiny_llama("teacher")
        recipe = recipe_for(tmp_path, teacher, served, generate=prices | {"max_usd": 0.3})
        planned = told("plan", recipe, "--set", "compute.workers=2")["above"]
        assert "and their prompts beside" in planned
        assert "one process asks the endpoint, 8 calls at once" in planned
        done = stillroom("run", recipe, "--json")
        stage = last_json(done)["stages"]["generate"]
        assert stage["state"] == "partial"
        assert 0 < stage["rows"] < 12
        assert "rows are left" in done.stderr
        bought = served.answered.copy()
        paid = sum(len(p.split()) * 0.001 + 6 * 0.002 for p in bought.elements())
        assert paid <= 0.3
        stillroom("run", recipe)  # asks for nothing
        assert served.answered == bought

        plan = told("plan", recipe)
        left = plan["stages"]["generate"]
        assert left["pending"] == 12 - stage["rows"]
        assert left["usd_to_do"] == pytest.approx(paid / stage["rows"] * left["pending"], rel=0.1)
        assert "cost about $" in plan["above"]

        stillroom("run", recipe, "--set", "generate.max_usd=10.0")
    assert set(served.calls.values()) == {1}
    assert len(rows_of(tmp_path, "key")) == 12


def test_training_goes_on_with_a_part_only_where_the_recipe_says_so(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    with endpoint() as served:
        teacher = tiny_llama("teacher")
        recipe = recipe_for(
            tmp_path,
            teacher,
            served,
            rows=24,
            generate={"max_tokens_total": 400, "concurrency": 1},
            data={"source": str(tmp_path / "prompts.jsonl"), "format": "prompt", "holdout": 8},
            student={"config": {"hidden_size": 8, "num_hidden_layers": 1}},
            train={"epochs": 1, "tokens_per_step": 64},
            loss={"hard_weight": 1.0},
            evaluate={"tokens": 100},
        )
        stopped = last_json(stillroom("run", recipe, "--json"))
        assert set(stopped["stages"]) == {"data", "generate"}
        accepted = ("--set", "generate.accept_partial=true")
        outcome = last_json(stillroom("run", recipe, *accepted, "--json"))
        assert outcome["stages"]["train"]["state"] == "done"
        assert outcome["results"]["student"]["cross_entropy"] > 0
        plan = told("plan", recipe, *accepted)["stages"]
        assert (plan["generate"]["state"], plan["train"]["state"]) == ("done", "done")
        assert plan["generate"]["pending"] == 24 - stopped["stages"]["generate"]["rows"]
        with patch("shutil.disk_usage", return_value=SimpleNamespace(free=0)):
            said = told("plan", recipe, *accepted)["notes"]
        assert not any(note.startswith("disk:") for note in said), "nobody writes the rest"
        stillroom("run", recipe, "--set", "generate.max_tokens_total=100000")
    assert set(served.calls.values()) == {1}


def test_calls_in_flight_at_a_stop_are_answered_and_kept(tmp_path: Path) -> None:
    def stop() -> None:
        if served.at_once == 4:
            raise Stopped()

    with endpoint(delay=lambda number: 0.3) as served, Answers(tmp_path) as answers:
        engine = engine_at(served, answers, concurrency=4)
        with pytest.raises(Stopped):
            list(engine.generate(requests(8), stop))
        assert answers.count == served.calls.total() == 4
        assert {c.text for c in engine.generate(requests(8), lambda: None)} == {
            answer_to(row["prompt"]) for row in prompts(8)
        }
    assert set(served.calls.values()) == {1}


def engine_at(served: Endpoint, answers: Answers, **settings: Any) -> OpenAIEngine:
    asked = {"engine": "openai", "base_url": served.url, "model": "tiny", "max_tokens": 10}
    generate = Generate.model_validate(asked | {"temperature": 0.0} | settings)
    nobody: Any = None  # an endpoint has no weights to be loaded from
    return OpenAIEngine(nobody, generate, Clock(), answers)


def requests(count: int) -> list[Request]:
    rows = [{"text": row["prompt"], "messages": None} for row in prompts(count)]
    return [Request(n, [], 0, row) for n, row in enumerate(rows)]


def test_answers_that_are_not_counted_are_taken_at_the_most_that_they_can_cost(
    tmp_path: Path,
) -> None:
    with endpoint(usage=False) as served, Answers(tmp_path) as answers:
        most = max(sum(engine_at(served, answers)._call(one).most) for one in requests(6))
        engine = engine_at(served, answers, max_tokens_total=2 * most + most // 2)
        ends = Counter(one.finish_reason for one in engine.generate(requests(6), lambda: None))
    assert ends == {"stop": 2, UNASKED: 4}
    assert served.calls.total() == 2


def test_a_call_that_found_nobody_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.stages.engines.openai.FIRST_WAIT_SECONDS", 0.001)
    with endpoint() as served:
        pass  # nobody listens there any more
    with Answers(tmp_path) as answers:
        most = sum(engine_at(served, answers)._call(requests(1)[0]).most)
        engine = engine_at(served, answers, max_tokens_total=most + most // 2)
        with pytest.raises(StillroomError, match=r"no answer in 8 attempts.*the connection broke"):
            list(engine.generate(requests(1), lambda: None))
        assert sum(answers.in_doubt) == 0


def test_a_call_that_the_budget_does_not_let_be_tried_again_says_what_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillroom.stages.engines.openai.FIRST_WAIT_SECONDS", 0.001)
    with endpoint(every=lambda number: "closed") as served, Answers(tmp_path) as answers:
        most = max(sum(engine_at(served, answers)._call(one).most) for one in requests(2))
        engine = engine_at(served, answers, max_tokens_total=2 * most, concurrency=1)
        tried, unasked = engine.generate(requests(2), lambda: None)
    assert {tried.finish_reason, unasked.finish_reason} == {UNASKED}
    assert str(tried.error).startswith("the connection broke: ")
    assert unasked.error is None
    assert served.calls.total() == 2


def test_answers_outlive_the_store_and_serve_another_tokenizer(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    with endpoint(faults={prompts(1)[0]["prompt"]: deque(["length"])}) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served)
        stillroom("run", recipe)
        first = rows_of(tmp_path, "text", "author_id", "finish_reason")
        other = tiny_llama("other", seed=1, max_position_embeddings=64)
        config = other / "tokenizer_config.json"
        config.write_text(config.read_text().replace("</s>", "<pad>"))  # another end token
        again = ("--set", f"teacher.model={other}", "--set", f"storage.dir={tmp_path / 'store2'}")
        stillroom("run", recipe, *again)
        assert set(served.calls.values()) == {1}
        stillroom("run", recipe, "--set", "generate.max_tokens=20")  # the one that was cut
    assert sorted(served.calls.values()) == [1] * 11 + [2]
    second = query(Store.open(tmp_path / "store2"), "SELECT * FROM generations").to_pylist()
    assert sorted(row["text"] for row in first) == sorted(row["text"] for row in second)
    assert {row["author_id"] for row in first}.isdisjoint(row["author_id"] for row in second)
    ends = {row["finish_reason"]: row["token_ids"][-1] for row in second}
    assert ends["stop"] == 3  # closed as the tokenizer closes a text
    assert ends["length"] > 3  # cut short, and not closed


def test_another_fingerprint_is_said_and_kept(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    with endpoint(fingerprint=lambda number: "fp_one" if number <= 6 else "fp_two") as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served, generate={"concurrency": 1})
        stillroom("run", recipe)
        notes = told("status", recipe)["notes"]
    (note,) = [note for note in notes if "answered as 2 models" in note]
    assert "tiny/one fp_one (since 20" in note
    assert "tiny/one fp_two (since 20" in note
    stillroom("verify", tmp_path / "store")


def test_fewer_calls_at_once_while_the_endpoint_has_too_many() -> None:
    throttle = Throttle(8)
    began = [throttle.begins() for _ in range(8)]
    for turn in began:  # eight refusals of one moment are one
        throttle.refused(turn, 0.0)
    assert throttle.limit == 4
    throttle.refused(throttle.begins(), 30.0)
    assert throttle.limit == 2
    assert 29.0 < throttle.wait_seconds <= 30.0
    for _ in range(200):
        throttle.answered()
    assert throttle.limit == 8
    assert throttle.lowest == 2


def test_refused_calls_make_the_run_ask_for_less_at_once(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Throttle] = []
    monkeypatch.setattr(
        "stillroom.stages.engines.openai.Throttle",
        lambda most: seen.append(Throttle(most)) or seen[0],
    )
    with endpoint(every=lambda number: "429" if 3 <= number < 9 else None) as served:
        stillroom("run", recipe_for(tmp_path, tiny_llama("teacher"), served, rows=60))
    assert len(rows_of(tmp_path, "key")) == 60
    assert served.most_at_once <= 8
    assert seen[0].lowest <= 4
    assert seen[0].limit > seen[0].lowest
    assert served.calls.total() == 66


def refusal(recipe: Path, **changed: Any) -> str:
    words = [f"--set=generate.{name}={value}" for name, value in changed.items()]
    return stillroom("plan", recipe, *words, expect=2).stderr


def test_what_cannot_work_is_refused_by_name(
    tiny_llama: TinyLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with endpoint() as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served)
        told("plan", recipe)
        assert "NOT_SET_HERE is not set" in refusal(recipe, api_key_env="NOT_SET_HERE")
        written = refusal(recipe, api_key_env="sk-tiny-1234567890")
        assert "not the name of an environment variable" in written
        assert "sk-tiny" not in written
        assert "must begin with https://" in refusal(recipe, base_url="api.example.com/v1")
        assert "as plain text" in refusal(recipe, base_url="http://api.example.com/v1")
        assert "where keys stand" in refusal(recipe, base_url="https://a:b@api.example.com/v1")
        assert "missing: an endpoint serves models by name" in refusal(recipe, model="null")
        assert "missing: which endpoint" in refusal(recipe, base_url="null")
        assert "without both prices" in refusal(recipe, max_usd=1)
        assert "has no meaning without" in refusal(recipe, accept_partial="true")
        asks = {"max_tokens": 100, "usd_per_million_prompt_tokens": 0}
        paid = asks | {"usd_per_million_completion_tokens": 10}
        assert "100 tokens are not enough" in refusal(recipe, **paid, max_tokens_total=100)
        assert "for one call, about 0.001" in refusal(recipe, **paid, max_usd=0.0009)
        free = asks | {"usd_per_million_completion_tokens": 0}
        assert "nothing ever reaches it" in refusal(recipe, **free, max_usd=1)
        taken = ("generate.max_tokens_total=1", "generate.accept_partial=true")
        told("plan", recipe, *(f"--set={one}" for one in taken))  # what is there is gone on with
        assert "decided by the recipe's own fields" in refusal(recipe, engine_args="{seed: 1}")
        assert "generate.base_url: belongs to" in refusal(recipe, engine="hf", api_key_env="null")
        scored = stillroom("plan", recipe, "--set", "score={engine: openai}", expect=2).stderr
        assert "score.engine" in scored
    assert served.calls.total() == 0


def test_a_conversation_is_read_as_text_is_that_comes_with_the_data(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    """An answer's row has the tokens and spans of the same answer given as data.

    One that was cut has no end.
    """
    teacher = tiny_llama("teacher")
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    asked = [{"instruction": row["prompt"]} for row in prompts(6)]
    source = write_jsonl(tmp_path / "asked.jsonl", asked)
    data = {"source": str(source), "format": "instruction", "holdout": 2}
    cut = asked[0]["instruction"]
    with endpoint(faults={cut: deque(["length"])}, renamed=True) as served:
        stillroom("run", recipe_for(tmp_path / "api", teacher, served, data=data))
        assert all("messages" in body for body in served.bodies)
        last = {body["messages"][-1]["content"]: body for body in served.bodies}  # of each prompt
        assert {body.get("max_completion_tokens") for body in last.values()} == {12}
    given = [row | {"output": answer_to(row["instruction"]).strip()} for row in asked]
    data["source"] = str(write_jsonl(tmp_path / "given.jsonl", given))
    (tmp_path / "given").mkdir()
    alone = dict.fromkeys(("student", "generate", "score", "loss", "train", "evaluate"))
    stillroom("run", write_recipe(tmp_path / "given", teacher, source, data=data, **alone))
    columns = ("prompt_key", "token_ids", "prompt_tokens", "spans", "text", "finish_reason")
    found, expected = (
        {row["prompt_key"]: row for row in rows_of(tmp_path / name, *columns)}
        for name in ("api", "given")
    )
    assert found.keys() == expected.keys()
    for key, row in found.items():
        whole = expected[key]
        if row["finish_reason"] == "length":
            assert row["token_ids"] == whole["token_ids"][:-1]
            assert whole["token_ids"][-1] == 2
            assert row["text"] == whole["text"]
        else:
            assert row | {"finish_reason": "given"} == whole


def test_a_kill_asks_again_for_no_more_than_was_in_flight(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    with endpoint(hold_from=20) as served:
        recipe = recipe_for(tmp_path, tiny_llama("teacher"), served, rows=60)
        for answered in (19, 19 + 15):
            run = start(recipe, TINY_SECRET_OF_MINE=KEY)
            until(lambda: served.at_once == 8, "calls in flight")
            kill(run)
            assert len(journalled(tmp_path)) == answered
            served.hold_from += 8 + 15  # those that were in flight again, and so many others
        served.hold_from = float("inf")
        stillroom("run", recipe)
    texts = Counter(row["text"] for row in rows_of(tmp_path, "text"))
    assert texts == Counter(answer_to(row["prompt"]).strip() for row in prompts(60))
    again = served.calls - Counter({row["prompt"]: 1 for row in prompts(60)})
    assert again.total() == 2 * 8
    assert rows_of(tmp_path, "key", table="rejects") == []


def kill(run: Loaded) -> None:
    """Runner and stage, at once."""
    stages = ours(run)
    run.kill()
    for stage in stages:
        stage.kill()
    run.wait(60)
    until(lambda: not any(map(alive, stages)), "their end")


def journalled(folder: Path) -> list[str]:
    files = (folder / "run" / "answers").rglob("*.jsonl")
    return [
        line for file in files for line in file.read_text().splitlines() if '"answered"' in line
    ]


def test_the_key_and_the_prices_are_nowhere(tiny_llama: TinyLlama, tmp_path: Path) -> None:
    """They are not in the store, the logs, the report, the cards or an export.

    The licence is in both cards.
    """
    prices = {
        "usd_per_million_prompt_tokens": 1234.5671,
        "usd_per_million_completion_tokens": 2345.6782,
        "max_usd": 98765.4321,
    }
    faults = {
        row["prompt"]: deque([fault]) for row, fault in zip(prompts(2), ["400", "500"], strict=True)
    }
    with endpoint(faults=faults) as served:
        recipe = recipe_for(
            tmp_path,
            tiny_llama("teacher"),
            served,
            generate=prices | {"license": "tiny-terms-1.0"},
            data={"source": str(tmp_path / "prompts.jsonl"), "format": "prompt", "holdout": 4},
            student={"config": {"hidden_size": 8, "num_hidden_layers": 1}},
            score={"k": 4, "batch_tokens": 256},
            train={"epochs": 1, "tokens_per_step": 64},
            evaluate={"tokens": 100},
        )
        run = start(recipe, TINY_SECRET_OF_MINE=KEY)
        said = [*run.communicate(timeout=120)]
        assert run.returncode == 0, said
    export = ("export", tmp_path / "store", tmp_path / "out", "--license", "mit")
    said += [stillroom(*words, "--json").stdout for words in (export, ("status", recipe))]
    store = Store.open(tmp_path / "store")
    for table in ("prompts", "generations", "soft_targets", "rejects", "commits"):
        said.append(str(query(store, f"SELECT * FROM {table}").to_pylist()))
    files = [
        f
        for f in tmp_path.rglob("*")
        if f.is_file() and f != recipe and "said-" not in str(f.parent)
    ]
    said += [file.read_bytes().decode(errors="replace") for file in files]
    secrets = [KEY, *(str(price) for price in prices.values())]
    assert served.headers[0]["authorization"] == f"Bearer {KEY}"
    assert not [(secret, text[:200]) for secret in secrets for text in said if secret in text]
    cards = [(tmp_path / "out" / "README.md"), *tmp_path.glob("run/train-*/student/README.md")]
    assert len(cards) == 2
    assert all("tiny-terms-1.0" in card.read_text() for card in cards)
    assert all("tiny/one" in card.read_text() for card in cards)


TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }} "
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
