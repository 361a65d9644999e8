"""Rows that begin alike, so that attention reads their common beginning once for all of them.

The rows of an agent's server share a system prompt with tools; those of an inspection share nearly all they read.
Reading keys and values again for each row is what takes most of a decoding step with long prompts, more than the
network's products. The tokens of one row are as good as another's: same tokens, same adapter, same keys. (Known as
cascade attention, Hydragen or tree attention; two levels here: what all rows of a group share, and the rest of each.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runtime.engines.embedded.rows import BatchRow, common_prefix

MIN_TOKENS = 64
"""A shorter common beginning is not looked for."""
MIN_SPARED_BYTES = 2 << 20
"""Of keys and values, in each layer: fewer take less time to read than the two results to be put together."""

RowT = TypeVar("RowT", bound=BatchRow)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Neighbouring rows of a forward whose first tokens are the same."""

    rows: slice
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixGroup(Generic[RowT]):
    """Rows that read their first tokens together."""

    rows: list[RowT]
    num_tokens: int


def groups_by_prefix(rows: Sequence[RowT], bytes_per_token: int) -> list[PrefixGroup[RowT]]:
    """The rows whose common beginning is worth reading together; others are in no group.

    `bytes_per_token` are those of one layer. A token that is not computed yet is never shared.
    """
    alike: dict[tuple[str | None, tuple[int, ...]], list[RowT]] = {}
    for row in rows:
        alike.setdefault((row.adapter_name, tuple(row.token_ids[:MIN_TOKENS])), []).append(row)
    groups = [PrefixGroup(group, shared_tokens(group)) for group in alike.values() if len(group) > 1]
    return [group for group in groups if spared_bytes(group, bytes_per_token) >= MIN_SPARED_BYTES]


def shared_tokens(rows: Sequence[BatchRow]) -> int:
    """How many first tokens are the same in all, and computed."""
    first = rows[0].token_ids
    return min(min(common_prefix(first, row.token_ids), len(row.token_ids) - row.num_left) for row in rows)


def spared_bytes(group: PrefixGroup[Any], bytes_per_token: int) -> int:
    return (len(group.rows) - 1) * group.num_tokens * bytes_per_token
