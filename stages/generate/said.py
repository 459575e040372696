"""What an endpoint said of the tokens of its answer, as soft targets of the ids that these are.

Or it is said why it is not. Where the endpoint gives ids, they are the row's. Else the ids are
those of the answer's text, prompt and answer tokenized as one: then each name must be one that the
id at its place can have. Of the other names at a place those are entries that only one id can have;
the others are in the tail.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...storage.errors import RowError
from ...storage.words import counted
from ..engines.base import Completion
from ..models.identity import Identity
from ..models.inputs.reads import too_long
from ..models.inputs.rendering import Renderer
from ..models.inputs.token_names import TokenNames, unfinished
from ..targets.bounded import Best, Bounded, bounded_targets
from ..targets.spec import Kept
from ..workers.job import Job
from .text import Text, answered

MOST_OVER = 1e-3
"""How far above 1 a sum of probabilities may be: as far as rounding to three decimals takes it."""
REASON = "logprobs"
"""What such a row is rejected for."""
_NONE = -9999.0
"""What servers say in place of -inf."""


@dataclass(frozen=True, slots=True)
class _Position:
    """What is known of one position."""

    entries: dict[int, float]
    own: float
    outside: float
    """The most that an id has which is no entry."""
    nameless: int
    """Names in the tail that more than one id may have, or none."""


class Alignment:
    """Of the answers of one stage."""

    def __init__(self, job: Job, author: Identity, renderer: Renderer, kept: Kept) -> None:
        self._job, self._renderer, self._kept = job, renderer, kept
        self._vocab_size = author.vocab_size
        ends: Any = author.parts.get("end_tokens")
        own = renderer.tokenizer.eos_token_id
        self._ends = {own, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._names = TokenNames(renderer.tokenizer)
        self._named = self._nameless = 0

    def written(self, prompt: Text, completion: Completion) -> Completion:
        """The same with the ids of its tokens, their text and what each was drawn from.

        Raises:
            RowError: it does not align with the text or the tokens, or its numbers are none.
        """
        said = completion.logprobs
        if said is None or "fault" in said:
            raise _fault(str(said["fault"]) if said else "the answer has no logprobs")
        tokens: Sequence[Any] = said["tokens"]
        ids = self._ids(said, prompt, completion)
        if len(prompt.token_ids) + len(ids) > self._job.context_tokens:
            total = len(prompt.token_ids) + len(ids)
            raise too_long(total, self._job.context_tokens, limit="the teacher reads")
        before = self._refuse_others(ids, tokens)
        exactly = self._gives_bytes(ids, tokens)
        found = [
            self._position(n, one, ids[n], before[n], exactly=exactly)
            for n, one in enumerate(tokens)
        ]
        targets = self._targets(ids, found, rounding=_rounding(tokens))
        self._nameless += sum(one.nameless for one in found)
        self._named += sum(len(one.entries) for one in found)
        text = str(self._renderer.tokenizer.decode(ids, skip_special_tokens=True))
        return replace(completion, token_ids=ids, text=text, targets=targets)

    def notes(self) -> list[str]:
        """What is to be said of all answers."""
        if not self._nameless:
            return []
        given = counted(self._nameless + self._named, "entry", "entries")
        return [
            f"{self._nameless} of {given} that the endpoint gave "
            "are in the tail: their names are not those of one id alone"
        ]

    def _ids(self, said: Mapping[str, Any], prompt: Text, completion: Completion) -> list[int]:
        """The ids of the answer's tokens: as given, or those of its text."""
        self._refuse_other_prompt(said, prompt)
        names = [one[0] for one in said["tokens"]]
        given: list[int] | None = said["ids"]
        if given is None and names and all(isinstance(name, int) for name in names):
            given = names
        if given is not None:
            return self._given(given, completion)
        text = answered(self._job, self._renderer, prompt, completion)
        start = text.prompt_tokens
        if start != len(prompt.token_ids) or text.token_ids[:start] != prompt.token_ids:
            shared = _same(prompt.token_ids, text.token_ids[:start])
            raise _fault(
                f"the answer's text and its prompt, as one, have other tokens from index {shared} "
                "on than the prompt that the endpoint was given"
            )
        end = start + int(text.spans[0, 1]) if len(text.spans) else len(text.token_ids)
        return text.token_ids[start:end]

    def _refuse_other_prompt(self, said: Mapping[str, Any], prompt: Text) -> None:
        """What an answer is drawn from depends on the prompt: it must be the row's."""
        ours, theirs = prompt.token_ids, said["prompt_ids"]
        counted = said["prompt_tokens"] if theirs is None else len(theirs)
        if counted is not None and counted != len(ours):
            raise _fault(
                f"the endpoint read {counted} tokens of the prompt, expected the {len(ours)} that "
                "teacher.model's tokenizer and template make"
            )
        if theirs is not None and theirs != ours:
            at = _same(ours, theirs)
            raise _fault(
                f"the endpoint read another prompt: index {at} is id {theirs[at]}, expected "
                f"{ours[at]}"
            )

    def _given(self, ids: list[int], completion: Completion) -> list[int]:
        tokenizer = self._renderer.tokenizer
        for n, one in enumerate(ids):
            if not (isinstance(one, int) and 0 <= one < self._vocab_size):
                raise _fault(
                    f"position {n}: id {one!r}, expected one of the vocabulary of "
                    f"{self._vocab_size}"
                )
        text, said = str(tokenizer.decode(ids, skip_special_tokens=True)), completion.text
        # A character that was cut in two is U+FFFD to some.
        if text.strip().rstrip("�").rstrip() != said.strip().rstrip("�").rstrip():
            raise _fault(
                f"the ids that it gives decode to {_short(text)}, and its text is {_short(said)}"
            )
        if completion.finish_reason == "stop" and (not ids or ids[-1] not in self._ends):
            last = ids[-1] if ids else None
            raise _fault(
                f"the answer came to its end, and its last id is {last}, expected a token that "
                f"ends one ({sorted(self._ends)}): a student would not learn to stop"
            )
        return ids

    def _refuse_others(self, ids: Sequence[int], tokens: Sequence[Any]) -> list[bytes]:
        """What each position begins inside of (`unfinished`).

        It is refused where a token has a name that its id cannot have.
        """
        before, text = [b""], b""
        for n, ((name, *_), token) in enumerate(zip(tokens, ids, strict=False)):
            fits = name == token
            if not isinstance(name, int):
                fits = self._names.fits(_bytes(name), token, before[-1])
            if not fits:
                raise _fault(f"position {n}: the token {_shown(name)}, expected {self._id(token)}")
            text = text[-3:] + (self._names.exact(token) or b"")
            before.append(unfinished(text))
        if len(tokens) < len(ids):
            n = len(tokens)
            last = ", which ends the answer" if ids[n] in self._ends else ""
            raise _fault(f"position {n}: no entry, expected {self._id(ids[n])}{last}")
        if len(tokens) > len(ids):
            n = len(ids)
            raise _fault(f"position {n}: the token {_shown(tokens[n][0])}, expected the end")
        return before

    def _id(self, token: int) -> str:
        name = self._names.exact(token)
        return f"id {token} ({self._names.alone(token) if name is None else name!r})"

    def _gives_bytes(self, ids: Sequence[int], tokens: Sequence[Any]) -> bool:
        """Whether the server gives the bytes of a token that alone decodes to something else."""
        told = {
            self._names.exact(token) == _bytes(name)
            for (name, *_), token in zip(tokens, ids, strict=True)
            if not isinstance(name, int)
            and self._names.exact(token) != self._names.alone(token)
            and b"" != _bytes(name)
            and "�".encode() not in self._names.alone(token)
        }
        return told == {True}

    def _position(
        self, n: int, one: Sequence[Any], token: int, before: bytes, *, exactly: bool
    ) -> _Position:
        """What is an entry: the token that is there, and each other one that only one id can be."""
        own = _number(n, one[1], self._id(token))
        listed = [
            (_hashable(name), _number(n, logprob, _shown(name)))
            for name, logprob in zip(one[2][::2], one[2][1::2], strict=True)
        ]
        mass = sum(np.exp(value) for _, value in listed)
        if mass > 1 + MOST_OVER:
            raise _fault(f"position {n}: the entries sum to {mass:.4g}, expected 1 at most")
        times = Counter(name for name, _ in listed)
        entries, nameless = {token: own}, 0
        for name, value in listed:
            found = self._one(n, name, exactly=exactly, before=before, times=times[name])
            if found is None:
                nameless += 1
            elif abs(value - entries.setdefault(found, value)) > MOST_OVER:
                raise _fault(
                    f"position {n}: {self._id(found)} has {entries[found]:.6g}, and {value:.6g} "
                    "beside it"
                )
        if not nameless and len(listed) < self._kept.k:
            raise _fault(
                f"position {n}: {len(listed)} entries, expected generate.keep.k, {self._kept.k}"
            )
        # The token that is there may be listed though it is none of the best. Of names that are
        # alike a server may leave out all but one, so that nothing is known of the others.
        # a server may leave out all but one, so that nothing is known of the others.
        own_names = (token, _hashable(one[0]))
        others = [value for name, value in listed if name not in own_names]
        least = min(others, default=0.0)
        if not nameless and len(others) == len(listed) and own > least + MOST_OVER:
            raise _fault(
                f"position {n}: {self._id(token)} is there with {own:.6g} and is no entry, and an "
                f"entry has {least:.6g}"
            )
        outside = 0.0 if nameless else least
        return _Position(entries, own, outside, nameless)

    def _one(self, n: int, name: Any, *, exactly: bool, before: bytes, times: int) -> int | None:
        """The id of a name; None: it may be that of several."""
        if not isinstance(name, int):
            if times > 1:
                return None
            return self._names.one(_bytes(name), exactly=exactly, inside=bool(before))
        if times > 1 or not 0 <= name < self._vocab_size:
            what = "stands twice" if times > 1 else f"is none of the {self._vocab_size}"
            raise _fault(f"position {n}: id {name} {what}")
        return name

    def _targets(
        self, ids: Sequence[int], found: Sequence[_Position], *, rounding: float
    ) -> Bounded:
        k = self._kept.k
        best = [
            sorted(one.entries.items(), key=lambda pair: (-pair[1], pair[0]))[:k] for one in found
        ]
        width = max(map(len, best))
        padded = np.array(
            [[*row, *[(-1, -np.inf)] * (width - len(row))] for row in best], np.float64
        )
        return bounded_targets(
            Best(
                ids=padded[:, :, 0].astype(np.int32),
                logprobs=padded[:, :, 1].astype(np.float32),
                token_ids=np.array(ids),
                token_logprob=np.array([one.own for one in found], np.float32),
                entries=np.array([len(row) for row in best]),
                most_outside=np.array([one.outside for one in found]),
                rounding=rounding,
            ),
            self._kept,
            self._vocab_size,
        )


def _rounding(tokens: Sequence[Any]) -> float:
    """Nats that the numbers were rounded by, where all have few decimals.

    It is 0 where they have as many as float32.
    """
    numbers = np.array([value for one in tokens for value in (one[1], *one[2][1::2])], np.float64)
    for decimals in range(1, 8):
        if np.allclose(np.round(numbers, decimals), numbers, rtol=0, atol=1e-12):
            return 0.5 * 10.0**-decimals
    return 0.0


def _number(n: int, value: Any, what: str) -> float:
    """A log-probability."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not _NONE < value <= MOST_OVER:  # NaN is neither
        raise _fault(
            f"position {n}: {what} has the log-probability {value}, expected one of the whole "
            "vocabulary"
        )
    return min(float(value), 0.0)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many are the same at the beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


def _bytes(name: Any) -> bytes:
    return name.encode(errors="replace") if isinstance(name, str) else bytes(name)


def _hashable(name: Any) -> Any:
    return name if isinstance(name, int) else _bytes(name)


def _shown(name: Any) -> str:
    return f"id {name}" if isinstance(name, int) else repr(_bytes(name))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _fault(what: str) -> RowError:
    return RowError(REASON, f"its log-probabilities do not go with it: {what}")
