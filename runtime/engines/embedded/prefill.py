"""Which tokens of which prompts are computed in the next step.

A prompt is computed in chunks, so that running completions wait for a part of it only: as many tokens as the network
was seen to compute in a quarter of a second. Prompts that begin alike are computed one after the other: the second one
waits until it can copy what they share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from runtime.engines.embedded.kv_memory import MIN_KEPT_TOKENS, CachedSequence
from runtime.engines.embedded.rows import BatchRow, common_prefix

MAX_WAIT_S = 0.25
"""So long may prompts hold up the completions that run, in each step."""
MAX_WAIT_IDLE_S = 1.0
"""The same where none runs: so long may a request that comes wait for its first look."""
MIN_CHUNK, MAX_CHUNK = 64, 2048
"""Tokens. Fewer cost nearly as much; more need much memory."""
FIRST_CHUNK = 256
"""Before the network's speed is known."""
MAX_PADDED_LENGTH = 1.33
"""Chunks are computed together where the longest has at most this many times the tokens of the shortest."""

RowT = TypeVar("RowT", bound=BatchRow)


class ChunkSize:
    """How many tokens a step may compute, by how long they took so far."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        if num_tokens >= MIN_CHUNK:  # what is smaller is mostly overhead, and says nothing of larger ones
            now, before = seconds / num_tokens, self._seconds_per_token
            self._seconds_per_token = now if before is None else (now + before) / 2

    def tokens(self, is_waited_for: bool) -> int:
        """`is_waited_for`: completions run."""
        if self._seconds_per_token is None:
            return FIRST_CHUNK
        wanted = (MAX_WAIT_S if is_waited_for else MAX_WAIT_IDLE_S) / self._seconds_per_token
        return max(MIN_CHUNK, min(int(wanted), MAX_CHUNK))


def next_chunks(rows: Iterable[RowT], num_tokens: int) -> list[list[tuple[RowT, int]]]:
    """Rows and how many of their tokens to compute, in groups of about equal chunks: padding costs as much as tokens.

    Those who came first are served first; `rows` are those which read their prompt, in the order they came.
    """
    chunks: list[tuple[RowT, int]] = []
    for row in rows:
        if num_tokens < 1:
            break
        chunks.append((row, min(row.num_left, num_tokens)))
        num_tokens -= chunks[-1][1]
    groups: list[list[tuple[RowT, int]]] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk[1]):
        if groups and chunk[1] <= MAX_PADDED_LENGTH * groups[-1][0][1]:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def longest_known_prefix(row: BatchRow, known: Iterable[CachedSequence]) -> tuple[int, CachedSequence | None]:
    """How many of a row's tokens lie computed under the same adapter, and where. The last token never counts, nor one
    that is scored: their logits are wanted."""
    best, source = MIN_KEPT_TOKENS - 1, None
    for cached in known:
        if cached.adapter_name == row.adapter_name and min(cached.num_computed, row.num_reusable) > best:
            length = min(common_prefix(row.token_ids, cached.token_ids), cached.num_computed, row.num_reusable)
            if length > best:
                best, source = length, cached
    return (best, source) if source else (0, None)


def is_worth_waiting(row: BatchRow, reading: Sequence[BatchRow], known: Iterable[CachedSequence]) -> bool:
    """Whether another row is about to compute more of this row's beginning than is known now."""
    promised = [
        min(common_prefix(row.token_ids, other.token_ids), row.num_reusable)
        for other in reading
        if other.adapter_name == row.adapter_name
    ]
    most = max(promised, default=0)
    return most >= MIN_KEPT_TOKENS and most >= longest_known_prefix(row, known)[0] + MIN_KEPT_TOKENS
