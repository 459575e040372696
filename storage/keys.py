"""Names made from content: canonical JSON, hashes of it, sealed records, and sets of keys."""

import hashlib
import json
from typing import Any

import numpy as np

from .bounds import parsed
from .errors import IntegrityError, in_short

KEY_BYTES = 16
_MERGE = 1 << 16  # new keys held as Python objects before they join the arrays
_ADVICE = (
    "Restore the file from a backup, or run `stillroom repair` and then the recipe, which makes it "
    "again; what somebody published, fetch again."
)


def canonical_json(value: Any) -> bytes:
    """One spelling for equal values: keys sorted, no spaces, UTF-8, bytes as hex.

    NaN and infinity are refused.
    """
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=_bytes_as_hex,
    )
    return text.encode()


def _bytes_as_hex(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(
        f"{type(value).__name__} has no canonical form; use str, int, float, bool, None, bytes, "
        "list, dict"
    )


def content_key(kind: str, /, **parts: Any) -> bytes:
    """16 bytes that name a thing of this kind with these parts."""
    return hashlib.sha256(canonical_json([kind, parts])).digest()[:KEY_BYTES]


def content_id(kind: str, /, **parts: Any) -> str:
    """`content_key` as 32 hex digits."""
    return content_key(kind, **parts).hex()


def row_seed(key: bytes) -> int:
    """A seed in [0, 2**63) of the row's key alone, not of when or where the row is made."""
    return int.from_bytes(key[:8], "big") >> 1


def seal(record: dict[str, Any]) -> bytes:
    """A record as JSON with `self`, the sha256 of the record without it."""
    digest = hashlib.sha256(canonical_json(record)).hexdigest()
    text = json.dumps(
        {**record, "self": digest}, indent=1, ensure_ascii=False, default=_bytes_as_hex
    )
    return text.encode() + b"\n"


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """The record that `seal` wrote; `name` is the file, for the message."""
    try:
        record: dict[str, Any] = parsed(data)
        digest = record.pop("self")
        actual = hashlib.sha256(canonical_json(record)).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise IntegrityError(
            f"{name}: not a record that Stillroom wrote ({in_short(error)}). {_ADVICE}"
        ) from error
    if actual != digest:
        raise IntegrityError(
            f"{name}: the record was changed after it was written (its hash is {actual[:16]}, it "
            f"says {str(digest)[:16]!a}). {_ADVICE}"
        )
    return record


class KeySet:
    """Keys of 16 bytes. A set only grows.

    It holds two arrays, ordered by the first half: 16 bytes a key.
    """

    def __init__(self, joined: bytes = b"") -> None:
        """`joined`: keys one after the other."""
        self._high, self._low = _halves(joined)
        self._new: set[bytes] = set()

    def update(self, joined: bytes) -> None:
        """Add keys given one after the other."""
        self._new.update(joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES))
        if len(self._new) > max(_MERGE, len(self._high) // 8):
            old = np.stack([self._high, self._low], axis=1).tobytes()
            self._high, self._low = _halves(old + b"".join(self._new))
            self._new.clear()

    def __contains__(self, key: bytes) -> bool:
        if key in self._new or not len(self._high):
            return key in self._new
        high, low = np.frombuffer(key, np.uint64)
        first = self._high.searchsorted(high, side="left")
        last = self._high.searchsorted(high, side="right")
        return bool((self._low[first:last] == low).any())


def _halves(joined: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of each key as integers, ordered by the first."""
    halves = np.frombuffer(joined, np.uint64).reshape(-1, 2)
    order = np.argsort(halves[:, 0], kind="stable")
    return halves[order, 0], halves[order, 1]
