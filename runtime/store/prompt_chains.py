"""Prompts as suffixes on the step before, and back to whole sequences.

A step's *sequence* is its prompt and completion. The next prompt nearly always begins with it, so a step stores only
how far its prompt follows the parent's sequence, and the rest: an episode's log grows linearly with its length.
Rebuilding walks up to the nearest cached ancestor. Refused: a full prompt every n steps, which grows quadratically.

Sequences are handled as blobs (int32 little endian): compact, and compared at the speed of memcmp.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterable

from runtime.store.step_rows import TOKEN_BYTES

CACHE_BYTES = 64 * 2**20
"""What the cache holds at most: sixteen million token ids."""


class SequenceCache:
    """The sequences of the steps used last, by step id. Thread-safe."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._sequences: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, step_id: str) -> bytes | None:
        with self._lock:
            if step_id in self._sequences:
                self._sequences.move_to_end(step_id)
            return self._sequences.get(step_id)

    def put(self, step_id: str, sequence: bytes) -> None:
        with self._lock:
            self._remove(step_id)
            self._sequences[step_id] = sequence
            self._num_bytes += len(sequence)
            while self._num_bytes > self._max_bytes:
                self._remove(next(iter(self._sequences)))

    def discard(self, step_ids: Iterable[str]) -> None:
        with self._lock:
            for step_id in step_ids:
                self._remove(step_id)

    def _remove(self, step_id: str) -> None:
        self._num_bytes -= len(self._sequences.pop(step_id, b""))


def sequence_of(connection: sqlite3.Connection, cache: SequenceCache, step_id: str) -> bytes | None:
    """Prompt and completion of a logged step; None for an unknown one. Linear in what its ancestors store.

    Raises ValueError or TypeError where what an ancestor stores is damaged.
    """
    links = []
    seen: set[str] = set()
    ancestor_id: str | None = step_id
    sequence = bytearray()
    while ancestor_id is not None:
        if ancestor_id in seen:
            raise ValueError(f"step {ancestor_id} is its own ancestor")
        seen.add(ancestor_id)
        cached = cache.get(ancestor_id)
        if cached is not None:
            sequence += cached
            break
        link = connection.execute(
            "SELECT parent_id, prefix_len, prompt_suffix, completion_token_ids FROM steps WHERE id = ?", (ancestor_id,)
        ).fetchone()
        if link is None:
            return None
        links.append(link)
        ancestor_id = link["parent_id"]
    for link in reversed(links):  # one buffer, cut and extended in place: copying it at each link would be quadratic
        del sequence[link["prefix_len"] * TOKEN_BYTES :]
        sequence += link["prompt_suffix"]
        sequence += link["completion_token_ids"]
    if links:
        cache.put(step_id, bytes(sequence))
    return bytes(sequence)


def common_prefix_len(left: bytes, right: bytes) -> int:
    """How many token ids two blobs share from their beginning."""
    shared, limit = 0, min(len(left), len(right)) // TOKEN_BYTES
    if left[: limit * TOKEN_BYTES] == right[: limit * TOKEN_BYTES]:  # the usual case: the prompt extends the parent's
        return limit
    while limit - shared > 1:  # shared ids are equal, limit ids are not
        middle = (shared + limit) // 2
        if left[shared * TOKEN_BYTES : middle * TOKEN_BYTES] == right[shared * TOKEN_BYTES : middle * TOKEN_BYTES]:
            shared = middle
        else:
            limit = middle
    return shared
