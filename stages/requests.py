"""What a recipe asks of its store, and what the store can already serve: the ledger behind plan, generate and score.

planned = committed + rejected + pending. A request is named by a reuse key (what must agree for a row to serve it);
coverage columns (K, max_tokens and finish reason) say how far a row serves. Nothing here imports torch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..storage.errors import UsageError
from ..storage.keys import content_id, content_key
from ..storage.store import Store
from .alignment import scored_span
from .sections import Data, Generate, Recipe, Score

FULL_VOCABULARY = 65_536  # reference targets are the whole distribution up to this vocabulary ...
REFERENCE_K = 4_096  # ... and this many entries plus the tail beyond it

Place = tuple[str, int]  # shard sha256, row within the shard


@dataclass(kw_only=True, slots=True)
class Ledger:
    """One stage's books."""

    committed: dict[bytes, Place] = field(default_factory=dict)
    """Request -> the row that serves it."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> requests that cannot be done."""
    pending: list[Any] = field(default_factory=list)
    """Requests still to do."""
    why: Counter[str] = field(default_factory=Counter)
    """Why a pending request is not served by what is there."""
    tokens: int = 0
    """Completion or scored tokens of the committed rows."""

    @property
    def planned(self) -> int:
        """All requests."""
        return len(self.committed) + self.rejected.total() + len(self.pending)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One completion that is wanted."""

    reuse_key: bytes
    prompt_key: bytes
    sample_index: int
    split: str


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """Soft targets that are wanted for one generation."""

    reuse_key: bytes
    tokens_key: bytes
    generation_key: bytes
    prompt_key: bytes
    token_ids: np.ndarray
    span_start: int
    kind: str
    k: int
    split: str

    @property
    def span_tokens(self) -> int:
        """Scored tokens: the span runs to the end."""
        return len(self.token_ids) - self.span_start


# Engine arguments that change how fast a model writes or how much it holds; any other may change what it writes.
_ONLY_SPEED = {
    "batch_size",
    "block_size",
    "data_parallel_size",
    "disable_log_stats",
    "distributed_executor_backend",
    "download_dir",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "max_model_len",  # has rules of its own: see `serves`
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "swap_space",
    "tensor_parallel_size",
}


def sampling_settings(generate: Generate, data: Data) -> dict[str, Any]:
    """What decides a completion's text beside author and prompt; greedy ignores top_p and seed."""
    greedy = generate.temperature == 0
    engine = {name: value for name, value in generate.engine_args.items() if name not in _ONLY_SPEED}
    return {
        "temperature": generate.temperature,
        "top_p": 1.0 if greedy else generate.top_p,
        "seed": 0 if greedy else generate.seed,
        "stop": sorted(generate.stop),
        "chat_template_kwargs": data.chat_template_kwargs,
    } | ({"engine": engine} if engine else {})


def sampling_id(author_id: str, settings: dict[str, Any]) -> str:
    """Name of an author with sampling settings; with a prompt and a sample index it names a completion."""
    return content_id("sampling", author=author_id, settings=settings)


def tokens_key(token_ids: np.ndarray | list[int], prompt_tokens: int) -> bytes:
    """Name of what a teacher is asked to score: the tokens, and where the scored span starts (it runs to the end)."""
    start, _ = scored_span(prompt_tokens, len(token_ids))
    return content_key("tokens", token_ids=np.asarray(token_ids, dtype="<i4").tobytes(), span_start=start)


def author_context(generate: Generate | None, model_tokens: int) -> int:
    """What the author reads at once: the model's context, or less where the engine is told so."""
    limit = generate.engine_args.get("max_model_len") if generate else None
    if limit is not None and not (isinstance(limit, int) and limit > 1):
        raise UsageError(f"generate.engine_args: max_model_len must be a number of tokens (got {limit!r}).")
    return min(model_tokens, limit or model_tokens)


def serves(row: dict[str, Any], max_tokens: int, context: int) -> bool:
    """Whether a generation is what a run with this `max_tokens` and this context would have made."""
    total = row["prompt_tokens"] + row["completion_tokens"]
    if row["finish_reason"] != "length":
        return bool(row["completion_tokens"] <= max_tokens and total <= context)
    return bool(row["completion_tokens"] == max_tokens or (total == context and row["completion_tokens"] < max_tokens))


def reject_key(reuse_key: bytes, limit: int) -> bytes:
    """Name of a rejected request; another context length is another request."""
    return content_key("reject", request=reuse_key, limit=limit)


def generation_ledger(
    store: Store, recipe: Recipe, *, author_id: str, prompts: Mapping[bytes, str], context_tokens: int
) -> Ledger:
    """The books of `generate`: which completions are there, which are to be made."""
    assert recipe.generate is not None
    rows = _author_rows(store, author_id)
    rejects = _rejects(store)
    ledger = Ledger()
    for request in _wanted_generations(recipe, author_id, prompts):
        found = rows.get(request.reuse_key, [])
        best = next((r for r in found if serves(r, recipe.generate.max_tokens, context_tokens)), None)
        reason = rejects.get(reject_key(request.reuse_key, context_tokens))
        if best is not None:
            ledger.committed[request.reuse_key] = (best["shard"], best["row"])
            ledger.tokens += best["completion_tokens"]
        elif reason is not None:
            ledger.rejected[reason] += 1
        else:
            ledger.pending.append(request)
            ledger.why["stored under another max_tokens" if found else "new"] += 1
    return ledger


def _wanted_generations(recipe: Recipe, author_id: str, prompts: Mapping[bytes, str]) -> Iterator[GenerationRequest]:
    assert recipe.generate is not None
    sampling = sampling_id(author_id, sampling_settings(recipe.generate, recipe.data))
    for prompt_key, split in prompts.items():
        for index in range(recipe.generate.samples):
            key = content_key("generation", sampling=sampling, prompt=prompt_key, sample=index)
            yield GenerationRequest(key, prompt_key, index, split)


def prompt_splits(inputs: pa.Table) -> dict[bytes, str]:
    """Prompt key -> split, in the source's order, each prompt once; from an inputs table."""
    return dict(zip(inputs["prompt_key"].to_pylist(), inputs["split"].to_pylist(), strict=True))


def selected_generations(
    store: Store, recipe: Recipe, *, author_id: str, data_id: str, context_tokens: int
) -> list[dict[str, Any]]:
    """The generations a recipe goes on with: one per request, after `select.where`, each with its split.

    Returns rows with key, reuse_key, prompt_key, token_ids, prompt_tokens, completion_tokens, shard, row, split.
    """
    inputs = store.inputs(data_id)
    assert inputs is not None
    splits = prompt_splits(inputs)
    by_key = _author_rows(store, author_id, with_tokens=True)
    if recipe.generate is None:
        sources = set(inputs["key"].to_pylist())
        rows = [r for found in by_key.values() for r in found[:1] if r["source_key"] in sources]
    else:
        wanted = {r.reuse_key for r in _wanted_generations(recipe, author_id, splits)}
        limit = recipe.generate.max_tokens
        fitting = ([r for r in by_key[key] if serves(r, limit, context_tokens)] for key in wanted & by_key.keys())
        rows = [found[0] for found in fitting if found]
    allowed = _where(store, recipe.select.where)
    rows = [r for r in rows if allowed is None or r["key"] in allowed]
    for row in rows:
        row["split"] = splits[row["prompt_key"]]
    return sorted(rows, key=lambda r: r["key"])


def target_key(teacher_id: str, tokens: bytes) -> bytes:
    """Reuse key of a soft-target row: the teacher and what it scored (`tokens_key`)."""
    return content_key("soft_targets", teacher=teacher_id, tokens=tokens)


def reference_kind(vocab_size: int) -> tuple[str, int]:
    """Kind and entries of the targets that held-out rows are judged on."""
    return ("full", vocab_size) if vocab_size <= FULL_VOCABULARY else ("topk", REFERENCE_K)


def target_ledger(
    store: Store, recipe: Recipe, *, teacher_id: str, vocab_size: int, generations: list[dict[str, Any]], limit: int
) -> tuple[Ledger, list[TargetRequest]]:
    """The books of `score`, and every request: held-out rows first.

    Args:
        store: Holds the generations and the soft targets.
        recipe: Its `score` section asks for the targets of training rows.
        teacher_id: Whose distribution.
        vocab_size: Of the teacher; decides what reference targets are.
        generations: From `selected_generations`.
        limit: Tokens the teacher can read at once.
    """
    assert recipe.score is not None
    requests = list(_wanted_targets(recipe, recipe.score, teacher_id, vocab_size, generations))
    index = store.index("soft_targets", ["reuse_key", "kind", "k", "mantissa_bits", "teacher_id"])
    have: dict[bytes, list[dict[str, Any]]] = {}
    for row in index.filter(pc.equal(index["teacher_id"], teacher_id)).to_pylist():
        have.setdefault(row["reuse_key"], []).append(row)
    rejects = _rejects(store)
    ledger = Ledger()
    for request in requests:
        found = have.get(request.reuse_key, [])
        fit = [r for r in found if _covers(r, request, recipe.storage.mantissa_bits)]
        reason = rejects.get(reject_key(request.reuse_key, limit))
        if fit:
            best = min(fit, key=lambda r: (r["kind"] != request.kind, r["k"], r["mantissa_bits"]))
            ledger.committed[request.reuse_key] = (best["shard"], best["row"])
            ledger.tokens += request.span_tokens
        elif reason is not None:
            ledger.rejected[reason] += 1
        else:
            ledger.pending.append(request)
            ledger.why["stored with fewer entries or bits" if found else "new"] += 1
    return ledger, requests


def _covers(row: dict[str, Any], request: TargetRequest, mantissa_bits: int) -> bool:
    if row["mantissa_bits"] < mantissa_bits:
        return False
    return row["kind"] == "full" or (request.kind == "topk" and row["kind"] == "topk" and row["k"] >= request.k)


def _wanted_targets(
    recipe: Recipe, score: Score, teacher_id: str, vocab_size: int, generations: list[dict[str, Any]]
) -> Iterator[TargetRequest]:
    """Equal tokens are scored once; a training row with the tokens of a held-out one is left out of training."""
    seen: set[bytes] = set()
    for row in held_out_first(generations, recipe.evaluate.tokens):
        start, span = scored_span(row["prompt_tokens"], len(row["token_ids"]))
        tokens = tokens_key(row["token_ids"], row["prompt_tokens"])
        reuse_key = target_key(teacher_id, tokens)
        if span < 1 or reuse_key in seen:
            continue
        seen.add(reuse_key)
        wanted = str(score.targets), min(score.k, vocab_size)
        kind, k = reference_kind(vocab_size) if row["split"] == "test" else wanted
        keys = (reuse_key, tokens, row["key"], row["prompt_key"])
        yield TargetRequest(*keys, row["token_ids"], start, kind, k, row["split"])


def given_rows(store: Store, author_id: str) -> Counter[bytes]:
    """How many rows of given text the store has, by the key of the prompts row they came from."""
    index = store.index("generations", ["source_key", "author_id"])
    return Counter(index.filter(pc.equal(index["author_id"], author_id))["source_key"].to_pylist())


def target_bytes(request: TargetRequest) -> float:
    """About what one scored token takes on disk, ids and log-probabilities at 10 mantissa bits compressed."""
    return 1.5 * request.k if request.kind == "full" else 3.75 * request.k + 12


def held_out_first(generations: list[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """Held-out rows, in hash order and up to `budget` scored tokens (one row at least), then all training rows."""
    rows = sorted(generations, key=lambda r: (r["prompt_key"], r["key"]))
    chosen: list[dict[str, Any]] = []
    for row in (r for r in rows if r["split"] == "test"):
        _, span = scored_span(row["prompt_tokens"], len(row["token_ids"]))
        if not chosen or span <= budget:
            chosen.append(row)
            budget -= span
    return chosen + [r for r in rows if r["split"] != "test"]


def _author_rows(store: Store, author_id: str, *, with_tokens: bool = False) -> dict[bytes, list[dict[str, Any]]]:
    """Reuse key -> an author's rows in commit order; `with_tokens` adds token_ids as numpy arrays."""
    columns = ["key", "reuse_key", "prompt_key", "source_key", "author_id", "finish_reason"]
    columns += ["prompt_tokens", "completion_tokens", "max_tokens"] + ["token_ids"] * with_tokens
    index = store.index("generations", columns)
    index = index.filter(pc.equal(index["author_id"], author_id)).drop_columns(["author_id"])
    rows: dict[bytes, list[dict[str, Any]]] = {}
    for batch in index.to_batches():
        tokens = _token_arrays(batch["token_ids"]) if with_tokens else repeat(None)
        plain = batch.drop_columns(["token_ids"]) if with_tokens else batch
        for row, token_ids in zip(plain.to_pylist(), tokens, strict=False):
            rows.setdefault(row["reuse_key"], []).append(row | ({"token_ids": token_ids} if with_tokens else {}))
    return rows


def _token_arrays(lists: pa.ListArray) -> Iterator[np.ndarray]:
    values, ends = lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().to_numpy())
    return iter(np.split(values, ends[:-1])) if len(lists) else iter(())


def _rejects(store: Store) -> dict[bytes, str]:
    index = store.index("rejects", ["key", "reason"])
    return dict(zip(index["key"].to_pylist(), index["reason"].to_pylist(), strict=True))


def _where(store: Store, condition: str | None) -> set[bytes] | None:
    if condition is None:
        return None
    from ..storage.catalog import query

    try:
        return set(query(store, f"SELECT key FROM generations WHERE {condition}")["key"].to_pylist())
    except UsageError as error:
        raise UsageError(f"select.where: {error}") from error
