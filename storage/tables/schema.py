"""The tables of a store, one pyarrow schema each, and how their columns are encoded in Parquet.

Lists are flat: a soft-target row of N scored tokens holds the E entries of all of them one after
another, N * K or, where positions differ, the sum of `entries`. Field metadata states what a column
is, with shape and unit.
`storage/tables/README.md` is the format for people, `columns.md` beside it lists these.
"""

from typing import Any, Literal

import pyarrow as pa

RECORD_VERSION = 1
"""Of commit records, snapshots, inputs and manifests."""
STORE_VERSION = 2
"""Of a store's marker; tables have versions of their own (`VERSIONS`)."""

TableName = Literal["prompts", "generations", "soft_targets", "features", "rejects"]
TABLES: tuple[TableName, ...] = ("prompts", "generations", "soft_targets", "features", "rejects")
VERSIONS: dict[str, int] = {
    "prompts": 3,
    "generations": 2,
    "soft_targets": 3,
    "features": 2,
    "rejects": 1,
    "inputs": 1,
}
"""What is read. A version only adds columns, null in older shards; one of 3 is written for images
alone."""

KEY = pa.binary(16)
TOKENS = pa.list_(pa.int32())
FLOAT_LIST = pa.list_(pa.float32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _field(name: str, kind: pa.DataType, about: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


def _maybe(name: str, kind: pa.DataType, about: str) -> pa.Field:
    """A column that is null in rows that it says nothing of."""
    return _field(name, kind, about, nullable=True)


def _since_2(name: str, kind: pa.DataType, about: str, *, version: int = 2) -> pa.Field:
    """A column that version 2, or a later one, of its table added: null in every row of before."""
    return pa.field(name, kind, metadata={"about": about, "since": str(version)})


_IMAGE = _since_2("image", pa.binary(), "the image as the teacher reads it: a PNG file", version=3)


SCHEMAS: dict[TableName, pa.Schema] = {
    "prompts": pa.schema(
        [
            _field("key", KEY, "hash of the whole row's content"),
            _field("prompt_key", KEY, "hash of the prompt part alone; chooses the split"),
            _field("format", pa.string(), "of the record: text, prompt, completion, messages, ..."),
            _field(
                "text",
                pa.string(),
                "the prompt or the document; tagged: its words, a JSON list; null for messages",
                nullable=True,
            ),
            _maybe("text_pair", pa.string(), "second text of a labelled pair"),
            _maybe("messages", MESSAGES, "the conversation before the answer; null for text"),
            _field("completion", pa.string(), "given continuation, to be scored", nullable=True),
            _field("reference", pa.string(), "gold answer, for evaluation only", nullable=True),
            _field("label", pa.int32(), "gold class index", nullable=True),
            _field("source", pa.string(), "where the row was read from"),
            _since_2(
                "message_fields",
                pa.list_(pa.string()),
                "of each message, what it has beside a role and a text: a JSON object, or null",
            ),
            _since_2("tools", pa.string(), "tools that the conversation offers: a JSON list"),
            _since_2(
                "completion_fields",
                pa.string(),
                "what the given answer has beside its text: a JSON object",
            ),
            _since_2("labels", TOKENS, "gold classes of the parts of a text"),
            _IMAGE,
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
                "hash of the token ids, where scoring starts, and the labels that go with them",
            ),
            _field("token_ids", TOKENS, "prompt then completion, special tokens included"),
            _field(
                "prompt_tokens",
                pa.int32(),
                (
                    "tokens of the prompt: the completion starts at this index; of a given "
                    "conversation, before its first scored turn"
                ),
            ),
            _field(
                "completion_tokens",
                pa.int32(),
                "tokens of the completion, end of sequence included",
            ),
            _field(
                "text",
                pa.string(),
                "the completion as text; of a given conversation, all from prompt_tokens on",
            ),
            _field("finish_reason", pa.string(), "stop, length or given"),
            _maybe("max_tokens", pa.int32(), "limit it was generated under; null if given"),
            _maybe("row_seed", pa.int64(), "sampling seed of this row; null if given"),
            _since_2(
                "spans",
                TOKENS,
                "[2 S] start and tokens of each scored span; null: all from prompt_tokens on",
            ),
            _since_2("text_key", KEY, "hash of the token ids alone"),
        ]
    ),
    "soft_targets": pa.schema(
        [
            _field("key", KEY, "hash of everything that determines the row"),
            _field("reuse_key", KEY, "hash of teacher, token ids and scored span"),
            _field(
                "tokens_key",
                KEY,
                "hash of the token ids, where scoring starts, and the labels that go with them",
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
                "[N] entries of each position; null where each has k (full; topk but for an "
                "endpoint's)",
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
                FLOAT_LIST,
                "[E] natural-log probabilities of the full softmax; full: in id order",
                nullable=True,
            ),
            _maybe("counts", TOKENS, "[E] sampled, proposal 1: how often it was drawn; sums to k"),
            _field(
                "weights",
                FLOAT_LIST,
                "[E] sampled, other proposals: estimate of the probability",
                nullable=True,
            ),
            _field(
                "tail_logprob",
                FLOAT_LIST,
                "[N] log probability outside the entries; -inf if none",
                nullable=True,
            ),
            _field(
                "token_logprob",
                FLOAT_LIST,
                "[N] log probability of the token that is there, at temperature 1",
            ),
            _field(
                "entropy",
                FLOAT_LIST,
                "[N] nats, of the full distribution; sampled: of the one that was drawn from",
            ),
            _field(
                "temperatures",
                FLOAT_LIST,
                (
                    "[m] other temperatures than 1 that are stored, ascending; sampled: the one "
                    "drawn at"
                ),
                nullable=True,
            ),
            _field(
                "tempered_tails",
                FLOAT_LIST,
                (
                    "[N * m] log sum of p^(1/T) over the ids outside the entries; sampled: over "
                    "all ids"
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
            _since_2(
                "spans",
                TOKENS,
                "[2 S] start and tokens of each scored span, N in all; null: span_start and N",
            ),
            _since_2("text_key", KEY, "hash of the token ids alone"),
            _since_2("tail_bound", FLOAT_LIST, "[N] how far off tail_logprob may be; null: exact"),
            _since_2(
                "entropy_is_bound", pa.bool_(), "whether entropy is a lower bound; null: exact"
            ),
            _since_2("engine", pa.string(), "what ran the teacher; null: hf"),
            _since_2("labels", TOKENS, "[N] gold class at each scored position"),
            _IMAGE,
        ]
    ),
    "features": pa.schema(
        [
            _field("key", KEY, "hash of everything that determines the row"),
            _field("reuse_key", KEY, "hash of teacher, token ids, kind and layer"),
            _field("text_key", KEY, "hash of the token ids alone"),
            _field("teacher_id", pa.string(), "identity of the teacher"),
            _field(
                "kind", pa.string(), "hidden, queries, keys, values, values_256, pooled_mean, ..."
            ),
            _maybe("layer", pa.int32(), "index of the layer; null where there is none"),
            _field("positions", TOKENS, "[P] indices of the tokens; null: of all", nullable=True),
            _field("vectors", pa.int32(), "P, positions that have one; of a pooled kind 1"),
            _field("width", pa.int32(), "D, numbers at each position; d of a projected kind"),
            _field("dtype", pa.string(), "int8, float16 or float32"),
            _field("values", pa.binary(), "[P * D] numbers of that type, little endian"),
            _maybe(
                "scale",
                FLOAT_LIST,
                "[P] what the numbers of a position are multiplied by; null: 1",
            ),
            _field(
                "rounding_error",
                pa.float32(),
                "sqrt(sum (x' - x)^2 / sum x^2) of all numbers, x' as read back",
            ),
            _maybe("heads", pa.int32(), "H of queries, keys and values, D / H numbers each"),
            _maybe("score_scale", pa.float32(), "of queries: what q . k is multiplied by"),
            _maybe("causal", pa.bool_(), "of queries: whether a token sees none behind itself"),
            _maybe("window", pa.int32(), "of queries: a token sees those less than this far away"),
            _maybe("projected_from", pa.int32(), "of a projected kind: D, numbers before"),
            _maybe("projection", pa.string(), "of a projected kind: id of the matrix [D, d]"),
            _maybe(
                "projection_error",
                pa.float32(),
                "sqrt(mean over i < j of (cos(x_i P, x_j P) - cos(x_i, x_j))^2), before rounding",
            ),
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


def columns_of(table: TableName, version: int) -> pa.Schema:
    """The columns of a table as a version had them, the first of today's."""
    return pa.schema([field for field in SCHEMAS[table] if since(field) <= version])


def since(field: pa.Field) -> int:
    """The version of its table that a column came with."""
    return int(field.metadata.get(b"since", b"1"))


def version_for(table: TableName, rows: pa.Table) -> int:
    """What rows are written as: where they have no image, as before there were any."""
    has_images = "image" in rows.column_names and rows["image"].null_count < rows.num_rows
    return VERSIONS[table] if has_images else min(VERSIONS[table], 2)


# Every reader knows these. Entries repeat the same ids, so a dictionary is smaller than deltas (1.0
# to 2.0 bytes against 2.0 to 2.2); a text alone repeats too few to pay for one in a small shard.
# Floats keep their bytes apart, so that the rounded low bytes compress to nothing. Never float16
# here: DuckDB 1.5 reads float16 + BYTE_STREAM_SPLIT as NaN without an error.
_DELTA = ("token_ids.list.element",)
# The columns of `soft_targets` that hold the teacher's numbers.
FLOATS = tuple(
    "logprobs weights tail_logprob token_logprob entropy tempered_tails tail_bound".split()
)
_SPLIT = tuple(f"{name}.list.element" for name in FLOATS)
# Each is there once. Nor are they compressed: zstd takes a tenth of them off. By how much depends
# on the teacher, while what they take is to be known before it runs. A PNG file is compressed.
_PLAIN = ("values", "image")
# Names beside them, which may be of one vector alone: a dictionary of what is random takes more.
_BESIDE_PLAIN = ("key", "reuse_key", "text_key", "rounding_error", "projection_error")


def encodings(schema: pa.Schema) -> dict[str, Any]:
    """Keyword arguments for `pyarrow.parquet.ParquetWriter`.

    The schema has some of a table's columns, and may have others.
    """
    leaves = set(_leaf_paths(schema))
    encoding = {c: "DELTA_BINARY_PACKED" for c in _DELTA if c in leaves}
    encoding |= {c: "BYTE_STREAM_SPLIT" for c in _SPLIT if c in leaves}
    plain = leaves & set(_PLAIN)
    beside = set(_BESIDE_PLAIN) if plain else set()
    # The least and the greatest vector or hash say nothing, and stand in a file three times.
    told = {"write_statistics": sorted(leaves - plain - beside)} if plain else {}
    return told | {
        "compression": {leaf: "none" if leaf in plain else "zstd" for leaf in sorted(leaves)},
        "compression_level": dict.fromkeys(sorted(leaves - plain), 1),
        "use_dictionary": sorted(leaves - set(encoding) - set(_PLAIN) - beside),
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
