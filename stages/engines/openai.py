"""The openai engine: an OpenAI-compatible endpoint answers; the one file that imports its client.

Conversations go to `/chat/completions`, plain prompts to `/completions`. A thread holds each call
to its end, and keeps the answer on disk before anybody hears of it (`workers/answers.py`). What may
pass (too many calls, a fault of the server, a connection that breaks, half an answer) is tried
again, after as long as the endpoint asks for, else after a random time that doubles. What will not
pass is a reject of the row (400, 413, 422), or ends the stage (401, 402, 403, 404, an empty
account).
"""

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ...storage.credentials import shown
from ...storage.errors import RowError, StillroomError, UsageError, in_short
from ...storage.keys import content_key, row_seed
from ...storage.tables.conversations import conversation
from ..models.identity import Identity
from ..recipe.engines import Generate
from ..workers.answers import Answer, Answers, Tokens
from ..workers.budget import Budget
from ..workers.clock import Clock
from .api_key import api_key
from .base import UNASKED, Completion, Request
from .said_tokens import said_tokens
from .throttle import Throttle

ATTEMPTS = 8
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.5, 30.0
MOST_ASKED_SECONDS = 300.0
"""Of what an endpoint asks for in Retry-After."""
LEAVE_SECONDS = 20.0
"""At the end calls in flight have this long to be answered, for they are paid for."""
_PASSES = frozenset({408, 409, 425, 429})
_TOO_MANY = frozenset({429, 503, 529})
_EMPTY = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
_ADVICE = {
    401: "See the key in the environment variable that generate.api_key_env names",
    403: "The key may not use generate.model, or not from here",
    404: "See generate.base_url and generate.model; where there is no /completions, only "
    "conversations can be asked: data.format messages or instruction",
}
_ENDS = {"stop": "stop", "eos": "stop", "length": "length"}
"""Finish reasons of answers that can be trained on, and what they are called here."""
_BESIDE = ("reasoning", "reasoning_content", "refusal", "tool_calls", "function_call", "audio")
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout"})
"""What the client's HTTP library (httpx or httpx2) calls a connection that was never there."""
_OF_THE_ROW = frozenset({400, 413, 422})
_BY_IDS = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What vLLM is told beside `logprobs`: to name tokens by ids, and to leave the model's own sampling
settings aside."""
_LOOK_SECONDS = 0.2
_PER_MESSAGE = 16
"""Tokens that a template puts around a message, at most."""


class _Passes(Exception):
    """What may be otherwise the next time."""

    def __init__(self, what: str, *, after_seconds: float | None = None) -> None:
        super().__init__(what)
        self.after_seconds = after_seconds


class _NoAnswer(RowError):
    """After all attempts, while others had one."""


class _Left(Exception):
    """The call was not sent again: the budget is spent. It says what the call came to before."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked, and the most that it may be charged."""

    key: str
    body: dict[str, Any]
    most: Tokens


class OpenAIEngine:
    """One model of an endpoint."""

    def __init__(
        self, author: Identity, settings: Generate, clock: Clock, answers: Answers
    ) -> None:
        from openai import OpenAI

        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every call
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._settings, self._clock, self._answers = settings, clock, answers
        self._client = OpenAI(
            base_url=settings.base_url,
            api_key=api_key(settings) or "none",
            timeout=settings.timeout_seconds,
            max_retries=0,  # tenacity's are used, which lets the throttle hear of each refusal
        )
        self.throttle = Throttle(settings.concurrency)
        self._budget = Budget(settings, answers)
        self._limit_field = "max_tokens"
        self._by_ids = settings.keep is not None
        """Whether what vLLM alone knows is asked for; not of a server that refuses it."""

    def generate(
        self, requests: Iterable[Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """Answers that are on disk are given at once, the others as the endpoint gives them."""
        leaving = threading.Event()
        pool = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="endpoint")
        flying: dict[Future[Answer], Request] = {}
        waiting = iter(requests)
        request = next(waiting, None)
        try:
            while request is not None or flying:
                if request is None or not self._has_room(flying):
                    yield from self._landed(flying, heartbeat)
                    continue
                call = self._call(request)
                known = self._answers.find(call.key)
                if known is not None:
                    heartbeat()
                    yield _completion(request, known)
                elif self._budget.admits(call.key, call.most):
                    flying[pool.submit(self._hold, call, leaving)] = request
                elif flying:  # what those cost is not known yet
                    yield from self._landed(flying, heartbeat)
                    continue
                else:
                    yield Completion(request.number, [], "", UNASKED)
                request = next(waiting, None)
        finally:
            leaving.set()
            wait(flying, LEAVE_SECONDS)
            pool.shutdown(wait=False, cancel_futures=True)

    def _has_room(self, flying: Sized) -> bool:
        return len(flying) < self.throttle.limit and not self.throttle.wait_seconds

    def _landed(
        self, flying: dict[Future[Answer], Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """What came back within a moment."""
        with self._clock.span("model"):
            done, _ = wait(flying, _LOOK_SECONDS, return_when=FIRST_COMPLETED)
            if not flying:  # the endpoint asked to be left alone
                time.sleep(min(_LOOK_SECONDS, self.throttle.wait_seconds))
        heartbeat()
        for future in done:
            yield self._heard(flying.pop(future), future)

    def _heard(self, request: Request, future: Future[Answer]) -> Completion:
        """What became of a call.

        Raises:
            StillroomError: the endpoint refuses all calls, or answers none.
        """
        try:
            return _completion(request, future.result())
        except _Left as left:
            return Completion(request.number, [], "", UNASKED, str(left))
        except RowError as error:
            attempts = ATTEMPTS if isinstance(error, _NoAnswer) else 1
            return _rejected(request, error.reason, str(error), attempts=attempts)

    def _call(self, request: Request) -> _Call:
        """What is asked; the key leaves the seed out, which is made of it."""
        settings, row = self._settings, request.row
        assert row is not None, "an endpoint is handed rows of prompts"
        body: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens}
        body |= {"temperature": settings.temperature}
        body |= {"top_p": settings.top_p} if settings.top_p < 1 or settings.keep else {}
        body |= {"stop": settings.stop} if settings.stop else {}
        if row["messages"] is None:
            body["prompt"] = row["text"]
        else:
            asked = conversation(row)
            body["messages"] = asked.messages
            body |= {"tools": asked.tools} if asked.tools else {}
        if settings.keep is not None:
            entries, chat = settings.keep.k, "messages" in body
            body |= {"logprobs": True, "top_logprobs": entries} if chat else {"logprobs": entries}
        body |= {"extra_body": settings.engine_args} if settings.engine_args else {}
        drawn = {} if settings.temperature == 0 else {"seed": settings.seed, "n": request.sample}
        key = content_key("call", url=settings.address, body=body, **drawn)
        if drawn:
            body["seed"] = row_seed(key) % 2**31
        said = len(json.dumps(body, ensure_ascii=False).encode())  # a token has a byte at least
        around = _PER_MESSAGE * (1 + len(body.get("messages", ())))
        return _Call(key.hex(), body, Tokens(said + around, settings.max_tokens))

    def _hold(self, call: _Call, leaving: threading.Event) -> Answer:
        """Ask until there is an answer.

        Raises:
            RowError: there is none for this row.
            StillroomError: there is none for anybody.
        """
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            stop_after_attempt,
            stop_when_event_set,
        )

        others: list[int] = []  # answered calls, at each attempt
        faults: list[str] = []  # what they came to
        retrying = Retrying(
            retry=retry_if_exception_type(_Passes),
            stop=stop_after_attempt(ATTEMPTS) | stop_when_event_set(leaving),
            wait=_pause,
            sleep=sleep_using_event(leaving),
            before_sleep=lambda state: faults.append(_fault(state)),
            reraise=True,
        )
        try:
            return retrying(self._try, call, others)
        except _Left as left:
            raise _Left(faults[-1]) from left
        except _Passes as error:
            if len(others) > 1 and others[-1] > others[-2]:
                what = f"no answer in {len(others)} attempts, while others had one: {error}"
                raise _NoAnswer("engine", what) from error
            raise StillroomError(
                f"generate: {self._settings.base_url} gave no answer in {len(others)} attempts "
                f"({error}). All answers so far are kept. Run the same command again when it is "
                "well."
            ) from error

    def _try(self, call: _Call, others: list[int]) -> Answer:
        """One call, and its answer on disk."""
        import openai

        if others and not self._budget.admits(call.key, call.most):
            raise _Left
        others.append(self.throttle.answers)
        began = self.throttle.begins()
        try:
            answer = self._send(call)
        except openai.APIStatusError as error:
            self._answers.refused(call.key)
            raise self._refusal(error, began) from error
        except openai.APIConnectionError as error:
            raise self._broken(call, error) from error
        except (openai.APIError, ValueError, LookupError, TypeError) as error:
            raise _Passes(f"half an answer: {in_short(error)}") from error
        self._answers.answered(call.key, answer)
        self.throttle.answered()
        return answer

    def _send(self, call: _Call) -> Answer:
        body = dict(call.body)
        body[self._limit_field] = body.pop("max_tokens")
        if self._by_ids:
            body["extra_body"] = _BY_IDS | body.get("extra_body", {})
        chat = "messages" in body
        client = self._client.chat.completions if chat else self._client.completions
        return _answer(client.create(**body), call.most, kept=self._settings.keep is not None)

    def _broken(self, call: _Call, error: Any) -> _Passes:
        """What a call without an answer is; nobody charges for one that found nobody to take it."""
        import openai

        cause = error.__cause__
        if type(cause).__name__ in _NOT_SENT:
            self._answers.refused(call.key)
        elif isinstance(error, openai.APITimeoutError):
            return _Passes(f"nothing within {self._settings.timeout_seconds:g} s")
        return _Passes(f"the connection broke: {cause or error}")

    def _refusal(self, error: Any, began: int) -> Exception:
        """What a status other than 200 means: raised by whoever asked."""
        status, said = error.status_code, shown(in_short(error))
        where = f"generate.base_url: {self._settings.base_url} answers"
        if error.param == "max_tokens" and "max_completion_tokens" in said:
            self._limit_field = "max_completion_tokens"
            return _Passes(said, after_seconds=0.0)
        if status in _OF_THE_ROW and self._by_ids and any(name in said for name in _BY_IDS):
            self._by_ids = False
            return _Passes(said, after_seconds=0.0)
        if error.code in _EMPTY or status == 402:
            return StillroomError(f"{where} that the account is empty ({said}). Fill it, or wait.")
        if status in _PASSES or status >= 500:
            after = _asked_seconds(error.response.headers)
            if status in _TOO_MANY:
                self.throttle.refused(began, after or 0.0)
            return _Passes(said, after_seconds=after)
        if status in _OF_THE_ROW:
            return RowError("engine", f"the endpoint refuses it: {said}")
        advice = _ADVICE.get(status, "See generate.base_url and generate.engine_args")
        return UsageError(f"{where} {status} to every call ({said}). {advice}.")


def _fault(state: Any) -> str:
    """What an attempt came to that is followed by another."""
    return str(state.outcome.exception())


def _pause(state: Any) -> float:
    """Seconds until the next attempt."""
    from tenacity import wait_random_exponential

    asked = state.outcome.exception().after_seconds
    if asked is not None:  # not all at the same moment
        return float(asked + random.uniform(0, min(1.0, asked / 4)))
    doubling = wait_random_exponential(multiplier=FIRST_WAIT_SECONDS, max=LONGEST_WAIT_SECONDS)
    return doubling(state)


def _asked_seconds(headers: Mapping[str, str]) -> float | None:
    """How long an endpoint asks to wait, in seconds or until a date; None: it does not say."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return min(max(seconds, 0.0), MOST_ASKED_SECONDS)


def _answer(response: Any, most: Tokens, *, kept: bool) -> Answer:
    """What is kept of a response, with what it says of its tokens.

    It raises a ValueError or its like where the response is not whole.
    """
    said = response.model_dump(warnings=False)  # what it says of its tokens is looked at later
    choice = said["choices"][0]
    message = choice.get("message")
    text = choice["text"] if message is None else message["content"]
    if not isinstance(text, str | None) or not isinstance(choice["finish_reason"], str):
        raise ValueError("no text or no finish reason")
    beside = {name for name in _BESIDE if (message or {}).get(name)}
    used = said.get("usage") or {}
    known = [used.get("prompt_tokens"), used.get("completion_tokens")]
    counted = [count for count in known if isinstance(count, int)]
    return Answer(
        text=text or "",
        finish_reason="refusal" if "refusal" in beside else choice["finish_reason"],
        tokens=Tokens(*counted) if len(counted) == len(known) else most,
        served=shown(" ".join(filter(None, [said.get("model"), said.get("system_fingerprint")]))),
        left_out=tuple(sorted(beside)),
        logprobs=said_tokens(said) if kept else None,
    )


def _completion(request: Request, answer: Answer) -> Completion:
    """An answer that can be trained on, or what it is rejected for."""
    reason = _ENDS.get(answer.finish_reason)
    if reason is None:
        said = f"the answer ended with {answer.finish_reason!r}, expected stop or length"
        return _rejected(request, answer.finish_reason, said)
    if not answer.text.strip():
        return _rejected(request, "empty", f"the answer has no words (it ended with {reason!r})")
    return Completion(
        request.number,
        [],
        answer.text,
        reason,
        served=answer.served,
        left_out=answer.left_out,
        logprobs=answer.logprobs,
    )


def _rejected(request: Request, reason: str, said: str, *, attempts: int = 1) -> Completion:
    return Completion(request.number, [], "", "error", said, attempts, reason)
