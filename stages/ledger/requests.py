"""What a recipe asks of its store, one request at a time: names made from content, and sizes.

A size is how much a request will take. A request is named by a reuse key (what must agree for a row
to serve it). Coverage columns (K, max_tokens and finish reason) say how far a row serves. Nothing
here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.errors import IntegrityError, UsageError
from ...storage.keys import content_id, content_key
from ...storage.tables.heads import Head
from ...storage.tables.spans import positions, span_after, spans_of
from ..recipe.engines import ONLY_SPEED, Generate
from ..recipe.features import Feature
from ..recipe.kinds import HF
from ..recipe.sections import Data
from ..targets.alignment import class_span, spans_at
from ..targets.masks import Masks
from ..targets.spec import Kept
from .books import Place

GENERATION_BYTES = (
    6  # a token's id and its share of text and keys: 5 to 6 bytes in the stores measured so far
)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion that is wanted."""

    reuse_key: bytes
    prompt_key: bytes
    sample_index: int
    prompt: Place
    """The row of `prompts`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRequest:
    """Soft targets that are wanted for one generation, and features of its text."""

    reuse_key: bytes
    """Name of the request: that of the targets, and where features are made with them another."""
    tokens_key: bytes
    generation_key: bytes
    prompt_key: bytes
    token_ids: np.ndarray
    spans: np.ndarray
    """[S, 2] start and tokens of each scored span."""
    kept: Kept
    label: int | None = None
    """Gold class of a labelled text."""
    labels: np.ndarray | None = None
    """[N] gold class of each target, -1 where there is none; None: nowhere."""
    image: bytes | None = None
    """As the teacher reads it; None: it is a text."""
    text_key: bytes = b""
    """Of the token ids alone; where features are asked for."""
    features: tuple[Feature, ...] = ()
    """Features of the text that are to be made."""
    targets: bool = True
    """Whether its targets are to be made; else they are there, and some features are not."""

    @property
    def span_tokens(self) -> int:
        """N, scored tokens of all spans."""
        return int(self.spans[:, 1].sum())


_UNNAMED = ONLY_SPEED | {"max_model_len"}  # which has rules of its own: see `author_context`


def sampling_settings(generate: Generate, data: Data) -> dict[str, Any]:
    """What decides a completion's text beside author and prompt; greedy ignores top_p and seed."""
    greedy = generate.temperature == 0
    engine = {name: value for name, value in generate.engine_args.items() if name not in _UNNAMED}
    # An endpoint says what it drew from with the text, or never.
    kept = {"keep": generate.keep.k} if generate.remote and generate.keep is not None else {}
    # Ids once ran on to the end of the token that completed the stop string.
    stopped = {"end_of_stopped_ids": "before the stop string"} if generate.stop else {}
    return {
        "temperature": generate.temperature,
        "top_p": 1.0 if greedy else generate.top_p,
        "seed": 0 if greedy else generate.seed,
        "stop": sorted(generate.stop),
        "chat_template_kwargs": data.chat_template_kwargs,
        **stopped,
        # Of the prompt's turns too, which is other rows than of the completion alone.
        **({"turns": "all"} if data.turns == "all" else {}),
        **kept,
    } | ({"engine": engine} if engine else {})


def sampling_id(author_id: str, settings: dict[str, Any]) -> str:
    """Name of an author with sampling settings.

    With a prompt and a sample index it names a completion.
    """
    return content_id("sampling", author=author_id, settings=settings)


def tokens_key(
    token_ids: np.ndarray | list[int], prompt_tokens: int, spans: np.ndarray | None = None
) -> bytes:
    """Name of what a teacher is asked to score: the tokens, and which of them.

    Args:
        token_ids: [T] of the row.
        prompt_tokens: Where scoring starts, if it runs to the end; at the second token at the
            earliest.
        spans: [S, 2] start and tokens of each scored span, where that is not so.
    """
    ids = np.asarray(token_ids, dtype="<i4").tobytes()
    whole = span_after(prompt_tokens, len(token_ids))
    if spans is None or np.array_equal(spans, whole):
        return content_key("tokens", token_ids=ids, span_start=int(whole[0, 0]))
    return content_key("tokens", token_ids=ids, spans=spans.reshape(-1).tolist())


def labelled_key(token_ids: np.ndarray | list[int], label: int | None) -> bytes:
    """`tokens_key` of a labelled text: the tokens, and the gold label that goes with them."""
    start = int(class_span(len(token_ids))[0, 0])
    ids = np.asarray(token_ids, dtype="<i4").tobytes()
    return content_key("tokens", token_ids=ids, span_start=start, label=label)


def tagged_key(
    token_ids: np.ndarray | list[int], indices: np.ndarray, labels: Sequence[int] | None
) -> bytes:
    """`tokens_key` of a text with targets at tokens' own positions.

    It is of the tokens, of which have a target, and of what is there.
    """
    ids = np.asarray(token_ids, dtype="<i4").tobytes()
    spans = spans_at(indices).reshape(-1).tolist()
    own = {} if labels is None else {"labels": list(labels)}
    return content_key("tokens", token_ids=ids, spans=spans, **own)


def read_of(
    row: Mapping[str, Any], text: Mapping[str, Any], head: Head, masks: Masks | None
) -> dict[str, Any]:
    """What the teacher reads of a text, which tokens have a target, and what is there.

    Raises:
        IntegrityError: hidden tokens are not those that the text's row names.
    """
    if masks is None:
        spans = class_span(len(text["token_ids"])) if head.whole_text else spans_of(text)
        labels = _labels(row["labels"], text)
        return {"token_ids": text["token_ids"], "spans": spans, "labels": labels}
    found = masks.hide(text["token_ids"])
    if (
        tagged_key(found.token_ids, positions(found.spans), found.labels.tolist())
        != row["tokens_key"]
    ):
        raise IntegrityError(
            f"generations {row['key'].hex()}: its tokens are hidden otherwise than when it was "
            "written. Name another storage.dir: the texts are then read again."
        )
    return {"token_ids": found.token_ids, "spans": found.spans, "labels": found.labels}


def _labels(labels: Sequence[int] | None, text: Mapping[str, Any]) -> np.ndarray | None:
    """[N] of the words that a text still has: a cut takes whole words from its end."""
    return None if labels is None else np.array(labels[: int(spans_of(text)[:, 1].sum())], np.int32)


def author_context(generate: Generate | None, model_tokens: int) -> int:
    """What the author reads at once: the model's context, or less where the engine is told so."""
    limit = generate.engine_args.get("max_model_len") if generate else None
    if limit is not None and not (isinstance(limit, int) and limit > 1):
        raise UsageError(
            f"generate.engine_args: max_model_len must be a number of tokens (got {limit!r})."
        )
    return min(model_tokens, limit or model_tokens)


def generation_key(sampling: str, prompt_key: bytes, sample_index: int) -> bytes:
    """Reuse key of a completion.

    It is made of author and sampling settings (`sampling_id`), of the prompt, and of which sample
    it is.
    """
    return content_key("generation", sampling=sampling, prompt=prompt_key, sample=sample_index)


def target_key(teacher_id: str, tokens: bytes) -> bytes:
    """Reuse key of a soft-target row: the teacher and what it scored (`tokens_key`)."""
    return content_key("soft_targets", teacher=teacher_id, tokens=tokens)


def target_row_key(
    teacher_id: str, tokens: bytes, kept: Kept, *, bits: int, engine: str = HF
) -> bytes:
    """Key of a row of soft targets.

    It is made of what the row is of, what was kept, in how many bits, and what ran the teacher.
    """
    ran = {} if engine == HF else {"engine": engine}  # there was no other at first
    return content_key(
        "soft_targets_row",
        reuse_key=target_key(teacher_id, tokens),
        mantissa_bits=bits,
        **kept.named(),
        **ran,
    )


def captured_key(target: bytes, capture: str) -> bytes:
    """Name of a request for targets and features.

    It is made of the targets' reuse key and of the `capture_id` of all features that are asked for.
    """
    return content_key("capture", target=target, capture=capture)


def reject_key(reuse_key: bytes, limit: int) -> bytes:
    """Name of a rejected request; another context length is another request."""
    return content_key("reject", request=reuse_key, limit=limit)
