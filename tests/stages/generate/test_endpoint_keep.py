"""An endpoint's log-probabilities as soft targets.

They are of its own ids or by names of tokens, or are rejected with the place. What the made-up
teacher says is in `endpoint_tokens.py`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from endpoint_server import KEY, Endpoint, answer_to, endpoint
from endpoint_tokens import (
    END,
    VOCABULARY,
    said_of,
    save_byte_tokenizer,
    teacher_says,
)
from kit import last_json, prompts, recipe_tree, stillroom, told, write_jsonl
from running import alive, ours, start, until

from stillroom.storage.store.store import Store
from stillroom.storage.tables.schema import SCHEMAS
from stillroom.storage.tables.soft_targets import SoftTargets

K = 12
MORE = " \N{VOLCANO}é"
"""Characters of several tokens."""


def answer(prompt: str) -> str:
    return answer_to(prompt) + MORE


@pytest.fixture
def teacher(tiny_llama: Callable[..., Path]) -> Path:
    return save_byte_tokenizer(tiny_llama("teacher", vocab_size=VOCABULARY))


def recipe_for(
    folder: Path, teacher: Path, served: Endpoint, /, *, rows: int = 12, **more: Any
) -> Path:
    folder.mkdir(exist_ok=True)
    source = write_jsonl(folder / "prompts.jsonl", prompts(rows))
    generate = {
        "engine": "openai",
        "base_url": served.url,
        "model": "tiny/one",
        "max_tokens": 40,
        "keep": {"k": K},
    } | more.pop("generate", {})
    tree = recipe_tree(folder, teacher, source, **{"generate": generate, "score": {"k": 8}} | more)
    tree["storage"]["mantissa_bits"] = 23
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(folder: Path, table: str) -> list[dict[str, Any]]:
    return Store.open(folder / "store").index(table, SCHEMAS[table].names).to_pylist()


def targets_of(row: dict[str, Any]) -> SoftTargets:
    return SoftTargets.from_row(
        {name: np.array(v) if isinstance(v, list) else v for name, v in row.items()}
    )


@pytest.mark.parametrize("form", ["ids", "bytes", "strings"])
def test_entries_tail_and_entropy_are_the_teachers(
    teacher: Path, tmp_path: Path, form: Any
) -> None:
    """Each entry has the id that it is of; all that has no id of its own is in the tail."""
    with endpoint(answer=answer, tokens=partial(said, form=form)) as served:
        recipe = recipe_for(tmp_path, teacher, served)
        if form == "bytes":  # which a completion of a text does not have
            as_a_conversation(recipe, teacher, [row["prompt"] for row in prompts(12)])
        stillroom("run", recipe, "--until", "score")
    texts = {row["key"]: row for row in rows(tmp_path, "generations")}
    kept = rows(tmp_path, "soft_targets")
    assert len(kept) == len(texts) == 12
    nameless = 0
    for row in kept:
        ids, start = row["token_ids"], texts[row["generation_key"]]["prompt_tokens"]
        assert row["teacher_id"] == texts[row["generation_key"]]["author_id"]
        assert ids[-1] == END
        assert (row["engine"], row["kind"], row["k"]) == ("openai", "topk", K)
        says = np.stack([teacher_says(ids[:n]) for n in range(start, len(ids))])
        targets, following = targets_of(row), np.array(ids[start:])
        assert targets.ids is not None
        assert targets.tail_logprob is not None
        there = targets.ids >= 0
        at = np.take_along_axis(says, np.maximum(targets.ids, 0), axis=1)
        np.testing.assert_allclose(targets.logprobs[there], at[there], atol=1e-6)
        np.testing.assert_allclose(
            targets.token_logprob, says[np.arange(len(says)), following], atol=1e-6
        )
        tail = np.log1p(-np.where(there, np.exp(at), 0).sum(1))
        assert (np.abs(targets.tail_logprob - tail) <= np.array(row["tail_bound"])).all()
        entropy = -(np.exp(says) * says).sum(1)
        assert (targets.entropy <= entropy + 1e-6).all()
        best = np.sort(-says, axis=1)[:, K - 1]
        assert (at[there] >= np.repeat(-best, there.sum(1)) - 1e-6).all() or form != "ids"
        nameless += int((~there).sum())
    assert (nameless > 0) == (form == "strings")
    line = told("plan", recipe)["stages"]["score"]
    assert (line["state"], line["committed"], line["pending"]) == ("done", 12, 0)
    assert told("verify", tmp_path / "store")["ok"]


def said(body: dict[str, Any], prompt: str, text: str, *, form: Any) -> dict[str, Any]:
    if "messages" not in body:
        return said_of(body, prompt, text, form=form)
    text = text.strip()
    return said_of(body, f"u:{prompt}a:", text, form=form)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ 'u:' if m.role == 'user' else 'a:' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


Changed = Callable[[dict[str, Any]], Any]


def content(choice: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = choice["logprobs"]["content"]
    return found


def each_likely(choice: dict[str, Any], change: Callable[[int, dict[str, Any]], None]) -> None:
    for n, other in enumerate(content(choice)[3]["top_logprobs"]):
        change(n, other)


def shifted(choice: dict[str, Any]) -> None:
    content(choice).insert(0, content(choice)[0])


def unlisted(choice: dict[str, Any]) -> dict[str, Any]:
    """A position whose token is none of the likely ones."""
    return next(
        one
        for one in content(choice)
        if all(other["token"] != one["token"] for other in one["top_logprobs"])
    )


def listed_with_another_number(choice: dict[str, Any]) -> None:
    one = unlisted(choice)
    one["top_logprobs"][-1] |= {"token": one["token"], "bytes": one["bytes"]}


def other_tokenizer(choice: dict[str, Any]) -> None:
    """Of single characters."""
    at = next(n for n, one in enumerate(content(choice)) if len(one["token"]) > 1)
    first = content(choice)[at]
    parts = [{"token": one, "bytes": list(one.encode())} for one in first["token"]]
    content(choice)[at : at + 1] = [first | part for part in parts]


def half_a_character(choice: dict[str, Any]) -> None:
    content(choice)[0] |= {"token": "\N{REPLACEMENT CHARACTER}", "bytes": None}


def of_names(choice: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = choice["logprobs"]
    return found


def changed_id(choice: dict[str, Any]) -> None:
    of_names(choice)["tokens"][2] = "token_id:9"


def changed_ids(choice: dict[str, Any]) -> None:
    choice["token_ids"][2] = 9
    of_names(choice)["tokens"][2] = "token_id:9"


def beyond(choice: dict[str, Any]) -> None:
    of_names(choice)["top_logprobs"][1]["token_id:300"] = -9.0


def without_the_end(choice: dict[str, Any]) -> None:
    choice["token_ids"].pop()
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        of_names(choice)[name].pop()


BY_NAMES: list[tuple[Changed, str]] = [
    (shifted, "position 1: the token b'"),
    (lambda c: unlisted(c).update(logprob=-0.01), "is no entry, and an entry has"),
    (listed_with_another_number, " beside it"),
    (other_tokenizer, ": the token b'"),
    (half_a_character, "position 0: the token b'\\xef\\xbf\\xbd', expected id "),
    (lambda c: content(c)[2]["top_logprobs"].pop(), "position 2: 11 entries, expected"),
    (lambda c: content(c)[2].update(top_logprobs=None), "position 2 has no top_logprobs"),
    (lambda c: content(c).pop(), "no entry, expected id 2 (b'</s>'), which ends the answer"),
    (lambda c: content(c)[1].update(logprob=None), "has the log-probability None, expected"),
    (lambda c: content(c)[1].update(logprob=float("nan")), "has the log-probability nan"),
    (lambda c: content(c)[1].update(logprob=-9999.0), "has the log-probability -9999.0"),
    (lambda c: content(c)[1].update(logprob=0.5), "has the log-probability 0.5"),
    (lambda c: each_likely(c, lambda n, o: o.update(logprob=float("-inf"))), "position 3: b'"),
    (lambda c: each_likely(c, lambda n, o: o.update(logprob=-1.0)), "the entries sum to 4.4"),
    (lambda c: c.update(logprobs=None), "the answer has no logprobs"),
    (lambda c: c.update(logprobs={"content": [3]}), "logprobs: "),
    (lambda c: c["usage"].update(prompt_tokens=99), "read 99 tokens of the prompt, expected"),
]
BY_IDS: list[tuple[Changed, str]] = [
    (changed_id, "position 2: the token id "),
    (changed_ids, "the ids that it gives decode to "),
    (beyond, "position 1: id 300 is none of the 300"),
    (without_the_end, "expected a token that ends one ([2])"),
    (lambda c: c["prompt_token_ids"].__setitem__(1, 9), "index 1 is id 9, expected"),
    (lambda c: c["prompt_token_ids"].pop(), "tokens of the prompt, expected the "),
    (lambda c: c["token_ids"].__setitem__(0, None), "position 0: id None, expected one of"),
    (lambda c: of_names(c)["tokens"].pop(), "times others"),
]


@pytest.mark.parametrize("form", ["bytes", "ids"])
def test_what_does_not_align_is_rejected_with_the_place(
    teacher: Path, tmp_path: Path, form: Any
) -> None:
    planted = BY_NAMES if form == "bytes" else BY_IDS
    # Others lie between, for the stage ends where none of the first answers can be kept.
    asked = [row["prompt"] for row in prompts(3 * len(planted))]
    faults = dict(zip(asked[::3], planted, strict=True))

    def tokens(body: dict[str, Any], prompt: str, text: str) -> dict[str, Any]:
        choice = said(body, prompt, text, form=form)
        if prompt in faults:
            faults[prompt][0](choice)
        return choice

    data: dict[str, Any] = {"source": str(tmp_path / "prompts.jsonl"), "format": "prompt"}
    with endpoint(answer=answer, tokens=tokens) as served:
        recipe = recipe_for(tmp_path, teacher, served, rows=len(asked), data=data | {"holdout": 0})
        if form == "bytes":
            as_a_conversation(recipe, teacher, asked)
        stillroom("run", recipe, "--until", "score")
    assert set(served.calls.values()) == {1}
    rejects = {row["prompt_key"]: row for row in rows(tmp_path, "rejects")}
    assert {row["reason"] for row in rejects.values()} == {"logprobs"}
    said_of_prompt = {}
    for row in rows(tmp_path, "prompts"):
        text = row["text"] or row["messages"][-1]["content"]
        said_of_prompt[text] = rejects.get(row["prompt_key"], {}).get("message", "")
    wrong = [
        (expected, said_of_prompt[prompt])
        for prompt, (_, expected) in faults.items()
        if expected not in said_of_prompt[prompt]
    ]
    assert not wrong
    assert (
        len(rows(tmp_path, "soft_targets"))
        == len(rows(tmp_path, "generations"))
        == 2 * len(planted)
    )
    assert told("verify", tmp_path / "store")["ok"]


def as_a_conversation(recipe: Path, teacher: Path, asked: list[str]) -> None:
    (teacher / "chat_template.jinja").write_text(TEMPLATE)
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["format"] = "messages"
    recipe.write_text(yaml.safe_dump(tree))
    lines = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    write_jsonl(Path(tree["data"]["source"]), lines)


def test_a_student_learns_from_it_and_everybody_says_whose_it_is(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: nobody loads a teacher, and neither key nor price is anywhere."""
    monkeypatch.setenv("TINY_SECRET_OF_MINE", KEY)
    generate = {
        "license": "tiny-terms-1.0",
        "api_key_env": "TINY_SECRET_OF_MINE",
        "usd_per_million_prompt_tokens": 1234.5671,
        "usd_per_million_completion_tokens": 2345.6782,
    }
    data = {"source": str(tmp_path / "prompts.jsonl"), "format": "prompt", "holdout": 4}
    with endpoint(answer=answer, tokens=partial(said, form="strings")) as served:
        recipe = recipe_for(
            tmp_path,
            teacher,
            served,
            generate=generate,
            data=data,
            train={"epochs": 6, "tokens_per_step": 128, "learning_rate": 3.0e-2},
            loss={"divergence": "jsd", "hard_weight": 0.1},
        )
        outcome = last_json(stillroom("run", recipe, "--json"))
    assert set(served.calls.values()) == {1}
    results = outcome["results"]
    assert results["student"]["kl_teacher"] < results["student_before"]["kl_teacher"]
    assert {line["state"] for line in told("plan", recipe)["stages"].values()} == {"done"}
    assert told("verify", tmp_path / "store")["ok"]
    said_so = stillroom("verify", tmp_path / "store", "--deep", "--teacher", teacher, expect=2)
    assert "of an endpoint, which reads no text again" in said_so.stderr
    page = tmp_path / "teachers.html"
    shown = stillroom("report", "--teachers", tmp_path / "store", "--out", page).stdout
    assert "tiny/one" in shown
    stillroom("inspect", tmp_path / "store")
    stillroom("export", tmp_path / "store", tmp_path / "out", "--license", "mit")
    cards = [tmp_path / "out" / "README.md", *tmp_path.glob("run/train-*/student/README.md")]
    assert len(cards) == 2
    for card in cards:
        assert "tiny-terms-1.0" in card.read_text()
        assert "tiny/one" in card.read_text()
    assert "distilled from one" in cards[1].read_text()
    assert "behind an endpoint, in the tokens of" in (tmp_path / "run/report.md").read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file != recipe]
    told_of = [
        file
        for file in files
        for secret in (KEY, "1234.56", "2345.67")
        if secret.encode() in file.read_bytes()
    ]
    assert not told_of
    # Rounded more coarsely than is asked for now: nobody can be asked, but the answers are there.
    again = ("--set", "storage.mantissa_bits=10", "--set", f"storage.dir={tmp_path / 'store2'}")
    stillroom("run", recipe, *again, "--until", "score")
    finer = stillroom("run", recipe, again[2], again[3], "--until", "score", expect=2).stderr
    assert "an endpoint reads no text again" in finer.replace("\n", " ")
    assert set(served.calls.values()) == {1}


def test_a_kill_loses_no_answer_and_makes_no_row_twice(teacher: Path, tmp_path: Path) -> None:
    with endpoint(answer=answer, tokens=partial(said, form="ids"), hold_from=20) as served:
        data = {"source": str(tmp_path / "prompts.jsonl"), "format": "prompt", "holdout": 4}
        recipe = recipe_for(tmp_path, teacher, served, rows=40, data=data)
        run = start(recipe, "--until", "generate")
        until(lambda: served.at_once == 8, "calls in flight")
        stages = ours(run)
        run.kill()
        for stage in stages:
            stage.kill()
        run.wait(60)
        until(lambda: not any(map(alive, stages)), "their end")
        served.hold_from = float("inf")
        stillroom("run", recipe, "--until", "score")
    texts, kept = rows(tmp_path, "generations"), rows(tmp_path, "soft_targets")
    assert len({row["prompt_key"] for row in texts}) == len(texts) == 40
    assert {row["generation_key"] for row in kept} == {row["key"] for row in texts}
    assert len(kept) == 40
    assert served.calls.total() == 40 + 8
    assert told("verify", tmp_path / "store")["ok"]


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"generate": {"temperature": 0.0}}, "generate.temperature: is 0, and whether"),
        ({"generate": {"top_p": 0.9}}, "generate.top_p: is 0.9, and whether"),
        ({"generate": {"stop": ["tree"]}}, "generate.stop: with generate.keep"),
        ({"generate": {"engine_args": {"top_k": 5}}}, "'top_k' may change what"),
        (
            {"generate": {"engine_args": {"chat_template_kwargs": {"a": 1}}}},
            "Give the same to both",
        ),
        ({"score": None}, "there is no section `score`"),
        ({"score": {"k": 13}}, "k 12 is less than score.k 13"),
        ({"score": {"targets": "full"}}, "score.targets is 'full'"),
        ({"score": {"k": 8, "temperatures": [1.0, 2.0]}}, "keeps temperature 1 alone"),
        ({"score": {"k": 8, "engine": "hf"}}, "'hf' reads texts, and the teacher is behind"),
        ({"student": {"from_teacher_layers": [0]}}, "its layers are not here"),
    ],
)
def test_what_nobody_could_tell_is_refused(
    teacher: Path, tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    served = Endpoint(url="http://127.0.0.1:9/v1")
    recipe = recipe_for(tmp_path, teacher, served, **sections)
    assert says in stillroom("plan", recipe, expect=2).stderr.replace("\n", " ")


def test_no_more_is_asked_of_an_endpoint_that_says_nothing(teacher: Path, tmp_path: Path) -> None:
    with endpoint(answer=answer) as served:
        recipe = recipe_for(tmp_path, teacher, served, rows=60, generate={"concurrency": 2})
        said_so = stillroom("run", recipe, "--until", "score", expect=2).stderr
    assert "none of the first 16 answers can be kept" in said_so.replace("\n", " ")
    assert served.calls.total() < 24
    assert rows(tmp_path, "rejects") == []
