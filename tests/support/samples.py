"""Rows for tests, made from an index alone.

Run as a script, it is a process that writes them into a store.

`samples.py STORE FIRST STOP` says "ready", waits for a line, adds rows FIRST to STOP of
soft_targets and says a line after each.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import content_key
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
from stillroom.storage.tables.soft_targets import SoftTargets
from stillroom.storage.tables.spans import flat, positions

VOCABULARY = 50
BITS = 10
ABOUT = {
    "teacher_id": "t" * 32,
    "tokenizer_id": "k" * 32,
    "vocab_size": VOCABULARY,
    "mantissa_bits": BITS,
    "stage": "score",
    "versions": {"stillroom": "0"},
}
GENERATIONS_ABOUT = {
    "author_id": "t" * 32,
    "tokenizer_id": "k" * 32,
    "vocab_size": VOCABULARY,
    "stage": "generate",
}


def target_key(index: int) -> bytes:
    return content_key("test_target", index=index)


def spans_for(index: int, tokens: int) -> np.ndarray:
    """One span, or two where the index says so.

    Then a token between them and one after them are unscored.
    """
    if index % 3 != 1 or tokens < 2:
        return np.array([[2, tokens]])
    first = tokens // 2
    return np.array([[2, first], [3 + first, tokens - first]])


P, K_MIN = 0.8, 2
KINDS = ("topk", "topp", "sampled", "weighted", "full", "tempered", "hot")
"""`weighted` is `sampled` from another distribution than the teacher's, `tempered` is `topp` with
temperatures, `hot` is `sampled` at one."""
TEMPERATURES = {"tempered": (0.5, 2.0), "hot": (2.0,)}


def target_row(index: int, *, tokens: int = 6, k: int = 4, kind: str = "topk") -> dict[str, Any]:
    """A soft_targets row whose numbers hold together.

    It has two prompt tokens, then what `spans_for` says.
    """
    rng = np.random.default_rng(index)
    spans = spans_for(index, tokens)
    scored = positions(spans)
    unscored_end = len(spans) > 1
    token_ids = rng.integers(0, VOCABULARY, scored[-1] + 1 + unscored_end, dtype=np.int32)
    logits = rng.normal(0, 3, (tokens, VOCABULARY))
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    token_ids[scored] = [
        rng.choice(VOCABULARY, p=p / p.sum()) for p in np.exp(logprobs.astype(np.float64))
    ]
    settings: dict[str, Any] = dict.fromkeys(("p", "k_min", "draw", "proposal"))
    plain = {"tempered": "topp", "hot": "sampled"}.get(kind, kind)
    if plain == "topp":
        settings |= {"p": P, "k_min": K_MIN, "k": k}
    if plain in ("sampled", "weighted"):
        settings |= {"draw": "multinomial", "proposal": 0.5 if kind == "weighted" else 1.0, "k": k}
    teacher = logprobs
    if kind == "hot":
        teacher = logprobs / 2 - np.log(np.exp(logprobs / 2).sum(axis=1, keepdims=True))
    entries = _entries(teacher, plain, k, rng)
    targets = SoftTargets(
        **entries,
        **_tempered(logprobs, entries["ids"], kind),
        token_logprob=logprobs[np.arange(tokens), token_ids[scored]],
        entropy=-(np.exp(teacher) * teacher).sum(axis=1),
    )
    return {
        "key": target_key(index),
        "reuse_key": content_key("test_reuse", index=index),
        "tokens_key": content_key("test_tokens", index=index),
        "generation_key": content_key("test_generation", index=index),
        "prompt_key": content_key("test_prompt", index=index),
        "teacher_id": ABOUT["teacher_id"],
        "kind": "sampled" if kind == "weighted" else plain,
        "token_ids": token_ids,
        "span_start": 2,
        "spans": flat(spans) if len(spans) > 1 else None,
        **targets.columns(BITS),
        **settings,
    }


def _tempered(logprobs: np.ndarray, ids: np.ndarray | None, kind: str) -> dict[str, Any]:
    """Temperatures and the sums of what is outside the entries, or of all where they are drawn."""
    if kind not in TEMPERATURES:
        return {}
    outside = np.ones((len(logprobs), VOCABULARY + 1), bool)
    if kind == "tempered":
        np.put_along_axis(outside, ids, False, axis=1)  # padding, id -1, goes to the last place
    rest = np.where(outside[:, :VOCABULARY], np.exp(logprobs.astype(np.float64)), 0)
    with np.errstate(divide="ignore"):  # nothing is left when the entries are the vocabulary
        sums = [np.log((rest ** (1 / t)).sum(axis=1)) for t in TEMPERATURES[kind]]
    temperatures = np.array(TEMPERATURES[kind], np.float32)
    return {
        "temperatures": temperatures,
        "tempered_tails": np.stack(sums, axis=1).astype(np.float32),
    }


def _entries(logprobs: np.ndarray, kind: str, k: int, rng: np.random.Generator) -> dict[str, Any]:
    """What `SoftTargets` of a kind hold about the entries, from [N, V] log probabilities."""
    if kind == "full":
        return {
            "ids": None,
            "logprobs": logprobs,
            "tail_logprob": np.full(len(logprobs), -np.inf, np.float32),
        }
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ordered = np.take_along_axis(logprobs, order, axis=1)
    entries = np.full(len(logprobs), k, np.int32)
    values = ordered.copy()
    if kind == "topp":
        enough = (np.exp(ordered.astype(np.float64)).cumsum(axis=1) < P).sum(axis=1) + 1
        entries = np.minimum(np.maximum(enough, K_MIN), k).astype(np.int32)
    if kind in ("sampled", "weighted"):
        teacher = np.exp(logprobs.astype(np.float64))
        proposal = teacher ** (1.0 if kind == "sampled" else 0.5)
        proposal /= proposal.sum(axis=1, keepdims=True)
        counts = np.stack([rng.multinomial(k, q) for q in proposal])
        order = np.argsort(-counts, axis=1, kind="stable")
        entries = (counts > 0).sum(axis=1).astype(np.int32)
        values = np.take_along_axis(
            counts if kind == "sampled" else counts / k * teacher / proposal, order, axis=1
        )
    used = np.arange(entries.max()) < entries[:, None]
    ids, values = order[:, : entries.max()].astype(np.int32), values[:, : entries.max()]
    if kind in ("sampled", "weighted"):
        name = "counts" if kind == "sampled" else "weights"
        values = np.where(used, values, 0).astype(np.int32 if kind == "sampled" else np.float32)
        nothing = {"logprobs": None, "tail_logprob": None}
        return nothing | {
            "ids": np.where(used, ids, -1).astype(np.int32),
            name: values,
            "entries": entries,
        }
    rest = np.where(np.arange(VOCABULARY) < entries[:, None], 0, np.exp(ordered)).sum(
        axis=1, dtype=np.float64
    )
    with np.errstate(divide="ignore"):  # nothing is left when k is the vocabulary
        tail = np.log(rest).astype(np.float32)
    return {
        "ids": np.where(used, ids, -1),
        "logprobs": np.where(used, values, -np.inf).astype(np.float32),
        "tail_logprob": tail,
        "entries": entries if kind == "topp" else None,
    }


def generation_row(index: int) -> dict[str, Any]:
    return {
        "key": content_key("test_generation", index=index),
        "reuse_key": content_key("test_generation_reuse", index=index),
        "prompt_key": content_key("test_prompt", index=index),
        "author_id": GENERATIONS_ABOUT["author_id"],
        "sampling_id": GENERATIONS_ABOUT["author_id"],
        "tokens_key": content_key("test_tokens", index=index),
        "sample_index": 0,
        "token_ids": [1, 2, 3, index % VOCABULARY],
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "text": f"text {index}",
        "finish_reason": "stop",
        "max_tokens": 16,
        "row_seed": index,
    } | ({"spans": [1, 1, 3, 1]} if index % 3 == 1 else {})


def prompt_row(index: int) -> dict[str, Any]:
    return {
        "key": content_key("test_prompt", index=index),
        "prompt_key": content_key("test_prompt", index=index),
        "format": "messages",
        "messages": [{"role": "user", "content": f"prompt {index}"}],
        "source": "test",
    } | (FIELDS if index % 3 == 1 else {})


FIELDS = {"message_fields": ['{"name":"Ann"}'], "tools": '[{"name":"sum"}]'}
"""What a conversation may have beside roles and texts."""


def add_targets(store: Store, indices: range, *, commit_rows: int = 8) -> int:
    """Write rows of these indices; returns how many were committed now."""
    with store.writer("soft_targets", about=ABOUT, limits=CommitLimits(rows=commit_rows)) as writer:
        for index in indices:
            writer.add(target_row(index))
    return writer.rows


def assert_each_key_once(root: str, rows: int) -> None:
    """Soft targets 0 to `rows` are in the store, and it is whole."""
    store = Store.open(root)
    assert verify(store).problems == []
    keys = sorted(store.index("soft_targets", ["key"])["key"].to_pylist())
    assert keys == sorted(map(target_key, range(rows)))


def flip(path: Path, column: str) -> None:
    """Flip one bit in the last page of a column."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    start = (
        chunk.data_page_offset
        if chunk.dictionary_page_offset is None
        else chunk.dictionary_page_offset
    )
    data = bytearray(path.read_bytes())
    data[start + chunk.total_compressed_size - 2] ^= 0x10
    path.write_bytes(data)


def main(root: str, first: str, stop: str) -> None:
    store = Store.open(root, create=True)
    _say("ready")
    sys.stdin.readline()
    with store.writer("soft_targets", about=ABOUT, limits=CommitLimits(rows=8)) as writer:
        for index in range(int(first), int(stop)):
            writer.add(target_row(index))
            _say(str(index))
    _say(f"committed {writer.rows}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
