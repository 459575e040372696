"""Rows for tests, made from an index alone; run as a script, a process that writes them into a store.

`samples.py STORE FIRST STOP` says "ready", waits for a line, adds rows FIRST to STOP of soft_targets and says a line
after each.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stillroom.storage.codec import SoftTargets
from stillroom.storage.keys import content_key
from stillroom.storage.store import Store
from stillroom.storage.writer import CommitLimits

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
GENERATIONS_ABOUT = {"author_id": "t" * 32, "tokenizer_id": "k" * 32, "vocab_size": VOCABULARY, "stage": "generate"}


def target_key(index: int) -> bytes:
    return content_key("test_target", index=index)


def target_row(index: int, *, tokens: int = 6, k: int = 4, full: bool = False) -> dict[str, Any]:
    """A soft_targets row whose numbers hold together: two prompt tokens, the rest scored."""
    rng = np.random.default_rng(index)
    token_ids = rng.integers(0, VOCABULARY, tokens + 2, dtype=np.int32)
    logits = rng.normal(0, 3, (tokens, VOCABULARY))
    logprobs = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    token_ids[2:] = [rng.choice(VOCABULARY, p=p / p.sum()) for p in np.exp(logprobs.astype(np.float64))]
    order = np.argsort(-logprobs, axis=1, kind="stable")
    rest = np.exp(np.take_along_axis(logprobs, order[:, k:], axis=1)).sum(axis=1, dtype=np.float64)
    with np.errstate(divide="ignore"):  # nothing is left when k is the vocabulary
        tail = np.log(rest).astype(np.float32)
    targets = SoftTargets(
        ids=None if full else order[:, :k].astype(np.int32),
        logprobs=logprobs if full else np.take_along_axis(logprobs, order[:, :k], axis=1),
        tail_logprob=np.full(tokens, -np.inf, np.float32) if full else tail,
        token_logprob=logprobs[np.arange(tokens), token_ids[2:]],
        entropy=-(np.exp(logprobs) * logprobs).sum(axis=1),
    )
    return {
        "key": target_key(index),
        "reuse_key": content_key("test_reuse", index=index),
        "tokens_key": content_key("test_tokens", index=index),
        "generation_key": content_key("test_generation", index=index),
        "prompt_key": content_key("test_prompt", index=index),
        "teacher_id": ABOUT["teacher_id"],
        "kind": "full" if full else "topk",
        "token_ids": token_ids,
        "span_start": 2,
        **targets.columns(BITS),
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
    }


def prompt_row(index: int) -> dict[str, Any]:
    return {
        "key": content_key("test_prompt", index=index),
        "prompt_key": content_key("test_prompt", index=index),
        "format": "messages",
        "messages": [{"role": "user", "content": f"prompt {index}"}],
        "source": "test",
    }


def add_targets(store: Store, indices: range, *, commit_rows: int = 8) -> int:
    """Write rows of these indices; returns how many were committed now."""
    with store.writer("soft_targets", about=ABOUT, limits=CommitLimits(rows=commit_rows)) as writer:
        for index in indices:
            writer.add(target_row(index))
    return writer.rows


def flip(path: Path, column: str) -> None:
    """Flip one bit in the last page of a column."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunk = next(chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)
    start = chunk.data_page_offset if chunk.dictionary_page_offset is None else chunk.dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start + chunk.total_compressed_size - 2] ^= 0x10
    path.write_bytes(data)


def main(root: str, first: str, stop: str) -> None:
    store = Store.open(Path(root), create=True)
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
