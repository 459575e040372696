"""The tables of a store, one pyarrow schema each, and how their columns are encoded in Parquet.

Lists are flat: a soft-target row of N scored tokens holds the E entries of all of them one after
another, N * K or, where positions differ, the sum of `entries`. Field metadata states what a column
is, with shape and unit.
`storage/tables/README.md` is the format for people.
"""

from typing import Any, Literal

import pyarrow as pa

FORMAT_VERSION = 1

TableName = Literal["prompts", "generations", "soft_targets", "rejects"]
TABLES: tuple[TableName, ...] = ("prompts", "generations", "soft_targets", "rejects")

KEY = pa.binary(16)
TOKENS = pa.list_(pa.int32())
FLOATS = pa.list_(pa.float32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _field(name: str, kind: pa.DataType, about: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


SCHEMAS: dict[TableName, pa.Schema] = {
    "prompts": pa.schema(
        [
            _field("key", KEY, "hash of the whole row's content"),
            _field("prompt_key", KEY, "hash of the prompt part alone; chooses the split"),
            _field(
                "format", pa.string(), "text, prompt, completion, messages, instruction or labelled"
            ),
            _field(
                "text", pa.string(), "the prompt or the document; null for messages", nullable=True
            ),
            _field("text_pair", pa.string(), "second text of a labelled pair", nullable=True),
            _field(
                "messages",
                MESSAGES,
                "the conversation before the answer; null for text",
                nullable=True,
            ),
            _field("completion", pa.string(), "given continuation, to be scored", nullable=True),
            _field("reference", pa.string(), "gold answer, for evaluation only", nullable=True),
            _field("label", pa.int32(), "gold class index", nullable=True),
            _field("source", pa.string(), "where the row was read from"),
        ]
    ),
    "generations": pa.schema(
        [
            _field("key", KEY, "hash of everything that determines the row"),
            _field("reuse_key", KEY, "hash of what must agree for the row to serve a request"),
            _field("prompt_key", KEY, "the prompt's hash"),
            _field(
                "source_key",
                KEY,
                "key of the prompts row whose text this is; null if generated",
                nullable=True,
            ),
            _field(
                "author_id",
                pa.string(),
                "identity of the model that wrote it, or of the tokenizer of given text",
            ),
            _field("sampling_id", pa.string(), "author and sampling settings; author_id if given"),
            _field(
                "sample_index",
                pa.int32(),
                "which sample of the prompt, or which window of the text",
            ),
            _field(
                "tokens_key",
                KEY,
                "hash of the token ids, where scoring starts, and the label of a labelled text",
            ),
            _field("token_ids", TOKENS, "prompt then completion, special tokens included"),
            _field(
                "prompt_tokens",
                pa.int32(),
                "tokens of the prompt: the completion starts at this index",
            ),
            _field(
                "completion_tokens",
                pa.int32(),
                "tokens of the completion, end of sequence included",
            ),
            _field("text", pa.string(), "the completion as text"),
            _field("finish_reason", pa.string(), "stop, length or given"),
            _field(
                "max_tokens",
                pa.int32(),
                "limit it was generated under; null if given",
                nullable=True,
            ),
            _field(
                "row_seed", pa.int64(), "sampling seed of this row; null if given", nullable=True
            ),
        ]
    ),
    "soft_targets": pa.schema(
        [
            _field("key", KEY, "hash of everything that determines the row"),
            _field("reuse_key", KEY, "hash of teacher, token ids and scored span"),
            _field(
                "tokens_key",
                KEY,
                "hash of the token ids, where scoring starts, and the label of a labelled text",
            ),
            _field("generation_key", KEY, "key of the generations row that asked for it first"),
            _field("prompt_key", KEY, "the prompt's hash"),
            _field("teacher_id", pa.string(), "identity of the teacher"),
            _field("kind", pa.string(), "topk, topp, sampled or full"),
            _field(
                "k",
                pa.int32(),
                "K, entries at most; sampled: draws per position; full: the vocabulary size",
            ),
            _field("p", pa.float32(), "topp: the mass to keep", nullable=True),
            _field("k_min", pa.int32(), "topp: entries at least", nullable=True),
            _field("draw", pa.string(), "sampled: multinomial or systematic", nullable=True),
            _field(
                "proposal",
                pa.float32(),
                "sampled: drawn from the teacher to this power; 1: itself",
                nullable=True,
            ),
            _field("token_ids", TOKENS, "[T] prompt then completion"),
            _field(
                "span_start",
                pa.int32(),
                "index of the first scored token; position span_start - 1 predicts it",
            ),
            _field("span_tokens", pa.int32(), "N, the number of scored tokens"),
            _field(
                "entries",
                TOKENS,
                "[N] entries of each position; null where each has k (topk, full)",
                nullable=True,
            ),
            _field(
                "ids",
                TOKENS,
                "[E] token ids, best (sampled: most drawn) first; null for full",
                nullable=True,
            ),
            _field(
                "logprobs",
                FLOATS,
                "[E] natural-log probabilities of the full softmax; full: in id order",
                nullable=True,
            ),
            _field(
                "counts",
                TOKENS,
                "[E] sampled, proposal 1: how often it was drawn; sums to k",
                nullable=True,
            ),
            _field(
                "weights",
                FLOATS,
                "[E] sampled, other proposals: estimate of the probability",
                nullable=True,
            ),
            _field(
                "tail_logprob",
                FLOATS,
                "[N] log probability outside the entries; -inf if none",
                nullable=True,
            ),
            _field(
                "token_logprob",
                FLOATS,
                "[N] log probability of the token that is there, at temperature 1",
            ),
            _field(
                "entropy",
                FLOATS,
                "[N] nats, of the full distribution; sampled: of the one that was drawn from",
            ),
            _field(
                "temperatures",
                FLOATS,
                (
                    "[m] other temperatures than 1 that are stored, ascending; sampled: the one "
                    "drawn at"
                ),
                nullable=True,
            ),
            _field(
                "tempered_tails",
                FLOATS,
                (
                    "[N * m] log sum of p^(1/T) over the ids outside the entries; sampled: over all "
                    "ids"
                ),
                nullable=True,
            ),
            _field(
                "mantissa_bits",
                pa.int32(),
                "bits of mantissa kept in the floats; 23 is exact float32",
            ),
            _field(
                "kept_mass",
                pa.float32(),
                "mean probability inside the entries; null for sampled",
                nullable=True,
            ),
            _field("label", pa.int32(), "gold class index (head: classes)", nullable=True),
        ]
    ),
    "rejects": pa.schema(
        [
            _field("key", KEY, "hash of the request that could not be done"),
            _field("stage", pa.string(), "data, generate or score"),
            _field("prompt_key", KEY, "the prompt's hash", nullable=True),
            _field(
                "context_id",
                pa.string(),
                "sampling_id or teacher_id that was asked; null for data",
                nullable=True,
            ),
            _field(
                "sample_index", pa.int32(), "which sample was asked for (generate)", nullable=True
            ),
            _field("tokens_key", KEY, "what was to be scored (score)", nullable=True),
            _field(
                "limit_tokens", pa.int32(), "tokens that the model reads at once", nullable=True
            ),
            _field("reason", pa.string(), "short code: too_long, empty, unreadable, engine"),
            _field("message", pa.string(), "what happened, for people"),
            _field("attempts", pa.int32(), "how often it was tried"),
        ]
    ),
}

# Every reader knows these. Entries repeat the same ids, so a dictionary is smaller than deltas (1.0
# to 2.0 bytes against 2.0 to 2.2); a text alone repeats too few to pay for one in a small shard.
# Floats keep their bytes apart, so that the rounded low bytes compress to nothing. Never float16
# here: DuckDB 1.5 reads float16 + BYTE_STREAM_SPLIT as NaN without an error.
_DELTA = ("token_ids.list.element",)
# The columns of `soft_targets` that hold the teacher's numbers.
FLOATS = ("logprobs", "weights", "tail_logprob", "token_logprob", "entropy", "tempered_tails")
_SPLIT = tuple(f"{name}.list.element" for name in FLOATS)


def parquet_options(table: TableName) -> dict[str, Any]:
    """Keyword arguments for `pyarrow.parquet.ParquetWriter` of one table."""
    return encodings(SCHEMAS[table])


def encodings(schema: pa.Schema) -> dict[str, Any]:
    """`parquet_options` of some of a table's columns, and of others, which get dictionaries."""
    leaves = set(_leaf_paths(schema))
    encoding = {c: "DELTA_BINARY_PACKED" for c in _DELTA if c in leaves}
    encoding |= {c: "BYTE_STREAM_SPLIT" for c in _SPLIT if c in leaves}
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": sorted(leaves - set(encoding)),
        "column_encoding": encoding,
        "write_page_checksum": True,
        "write_page_index": True,
    }


def _leaf_paths(schema: pa.Schema) -> list[str]:
    paths = []
    for field in schema:
        if field.type == MESSAGES:
            paths += [f"{field.name}.list.element.role", f"{field.name}.list.element.content"]
        elif pa.types.is_list(field.type):
            paths.append(f"{field.name}.list.element")
        else:
            paths.append(field.name)
    return paths
