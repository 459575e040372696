"""What an endpoint says of the tokens of its answer, in the one form that is kept on disk.

    prompt_ids      ids of the prompt that it read; null: it does not say (`return_token_ids` of
                    vLLM)
    prompt_tokens   how many it counted there; null: it does not say
    ids             ids of the answer; null
    tokens          for each token of the answer
                    [name, log-probability, [name, log-probability, ...]]: the token that is
                    there, then the likely ones at this place
    fault           in place of tokens: why there are none

A name is an id where the server gives one (vLLM's `token_id:286`), else a string. It is a list of
bytes where the server gives some that are not the string's own. Numbers are as they came: null,
NaN, whatever.
"""

import re
from collections.abc import Mapping
from typing import Any

_ID = re.compile(r"token_id:([0-9]+)")


def said_tokens(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole response, as JSON."""
    choice, usage = said["choices"][0], said.get("usage") or {}
    found = {
        "prompt_ids": choice.get("prompt_token_ids") or said.get("prompt_token_ids"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "ids": choice.get("token_ids"),
    }
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return found | {"fault": "the answer has no logprobs, though they were asked for"}
    of = _of_conversation if logprobs.get("content") is not None else _of_text
    try:
        return found | {"tokens": of(logprobs)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return found | {"fault": f"logprobs: {type(error).__name__}: {error}"}


def _of_conversation(logprobs: Mapping[str, Any]) -> list[Any]:
    found = []
    for number, one in enumerate(logprobs["content"]):
        likely: list[Any] = []
        for other in _there(one.get("top_logprobs"), number):
            likely += [_name(other), other.get("logprob")]
        found.append([_name(one), one.get("logprob"), likely])
    return found


def _of_text(logprobs: Mapping[str, Any]) -> list[Any]:
    names, own = logprobs["tokens"], logprobs["token_logprobs"]
    likely = _there(logprobs.get("top_logprobs"), 0)
    if not len(names) == len(own) == len(likely):
        raise ValueError(f"{len(names)} tokens, {len(own)} numbers, {len(likely)} times others")
    found = []
    for number, name in enumerate(names):
        others: list[Any] = []
        for other, logprob in _there(likely[number], number).items():
            others += [_id_or(other), logprob]
        found.append([_id_or(name), own[number], others])
    return found


def _there(likely: Any, number: int) -> Any:
    if likely is None:
        raise ValueError(f"position {number} has no top_logprobs")
    return likely


def _name(one: Mapping[str, Any]) -> Any:
    name, given = _id_or(one["token"]), one.get("bytes")
    if isinstance(name, int) or given is None or bytes(given) == name.encode(errors="replace"):
        return name
    return list(given)


def _id_or(name: str) -> Any:
    found = _ID.fullmatch(name)
    return int(found[1]) if found else name
