"""Answers on disk, and the budget that they are paid from.

What a process leaves counts for the next one.
"""

from pathlib import Path

from stillroom.stages.recipe.engines import Generate
from stillroom.stages.workers.answers import Answer, Answers, Tokens, answers_dir
from stillroom.stages.workers.budget import Budget, is_reached, note_reached
from stillroom.storage.credentials import hide

CALL = Tokens(10, 5)


def said(text: str, *tokens: int) -> Answer:
    return Answer(text=text, finish_reason="stop", tokens=Tokens(*tokens), served="tiny")


def asked(**settings: object) -> Generate:
    named = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "tiny"}
    return Generate.model_validate(named | settings)


def test_what_others_heard_is_known_and_a_torn_line_is_no_answer(tmp_path: Path) -> None:
    with Answers(tmp_path) as first, Answers(tmp_path) as second:
        first.answered("one", said("text \n of one", 4, 2))
        second.look()
        assert second.find("one") == first.find("one") == said("text \n of one", 4, 2)
        first.answered("two", said("text of two", 4, 2))
    (file,) = tmp_path.glob("*.jsonl")  # nothing is left of one that heard nothing
    file.write_bytes(file.read_bytes()[:-9])
    with Answers(tmp_path) as third:
        assert third.count == 1
        assert third.find("two") is None


def test_calls_that_came_to_nothing_count_in_full_and_those_refused_do_not(tmp_path: Path) -> None:
    with Answers(tmp_path) as dead:
        dead.asked("one", CALL)
    with Answers(tmp_path) as answers:
        budget = Budget(asked(max_tokens_total=40), answers)
        assert answers.in_doubt == CALL
        assert budget.admits("two", CALL)
        assert not budget.admits("three", CALL)  # 45 of 40
        answers.answered("two", said("", 4, 2))
        assert answers.charged == (4, 2)
        assert budget.admits("three", CALL)  # 36 of 40
        assert not budget.admits("four", CALL)
        answers.refused("three")
        assert budget.admits("four", CALL)


def test_dollars_are_limited_by_both_prices(tmp_path: Path) -> None:
    prices = {"usd_per_million_prompt_tokens": 1e5, "usd_per_million_completion_tokens": 2e5}
    with Answers(tmp_path) as answers:
        budget = Budget(asked(max_usd=4.0, **prices), answers)
        assert budget.admits("one", CALL)  # 10 * 0.1 + 5 * 0.2 = 2
        assert budget.admits("two", CALL)
        assert not budget.admits("three", Tokens(1, 0))


def test_a_budget_that_is_reached_is_another_one_with_other_limits(tmp_path: Path) -> None:
    generate = asked(max_tokens_total=40)
    folder = answers_dir(tmp_path, generate)
    with Answers(folder):
        note_reached(folder, generate)
    assert is_reached(folder, generate)
    assert not is_reached(folder, asked(max_tokens_total=41))
    assert answers_dir(tmp_path, asked(model="other")) != folder


def test_an_answer_stays_as_it_was_given_whatever_a_recipe_hides(tmp_path: Path) -> None:
    """A path that `${NAME}` stands for may stand in a text, which is learnt from."""
    hide({"/data/texts": "${TEXTS}"}, {})
    with Answers(tmp_path) as first:
        first.answered("one", said("look into /data/texts", 4, 2))
    with Answers(tmp_path) as second:
        assert second.find("one") == said("look into /data/texts", 4, 2)


def test_an_endpoint_is_one_with_a_slash_at_its_end_and_without(tmp_path: Path) -> None:
    """Else its budget would begin anew, and answers would be paid for again."""
    slash = asked(base_url="http://127.0.0.1:1/v1/")
    assert answers_dir(tmp_path, slash) == answers_dir(tmp_path, asked())
