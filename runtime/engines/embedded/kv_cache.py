"""The KV cache that the network writes through: a face of transformers' `Cache` on the slots of `kv_memory`.

One forward's rows may lie in several slabs. Attention is computed once for each run of neighbouring slots, so keys and
values go to it as lists of such runs (`grouped_sdpa` in attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from runtime.engines.embedded.kv_memory import CachedSequence, Slab


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Neighbouring slots of a slab, which neighbouring rows of a forward write to and read."""

    slab: Slab
    slots: slice
    num_tokens: int
    """Attention sees so many tokens of each slot."""
    rows: slice
    is_real: torch.Tensor | None
    """(rows, new tokens): which of the new tokens are no padding; None: all, one each."""
    target: tuple[torch.Tensor, slice, torch.Tensor]
    """Where the real ones go: slots and positions, both (real tokens,), with all heads between."""

    def write(self, store: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Store a layer's new keys or values (all rows, heads, new tokens, channels); gives what attention reads."""
        own = states[self.rows]
        store[self.target] = own[:, :, 0] if self.is_real is None else own.transpose(1, 2)[self.is_real]
        return store[self.slots, :, : self.num_tokens]


class KvCache(Cache):
    """Call `aim` before each forward to say where its tokens go."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._runs: list[SlotRun] = []

    def aim(self, rows: Sequence[CachedSequence], positions: torch.Tensor, is_real: torch.Tensor | None) -> None:
        """Set the rows of the next forward, in the order of `slot_order`.

        `positions` and `is_real` are (rows, new tokens); is_real None: one new token each, and no padding.
        """
        ends = (positions[:, -1] + 1).tolist()
        self._runs = [slot_run(rows, run, positions, is_real, max(ends[run])) for run in runs_of(rows)]

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Called by the network. For each run (rows, heads, tokens, channels)."""
        keys = [run.write(run.slab.keys[layer_idx], key_states) for run in self._runs]
        values = [run.write(run.slab.values[layer_idx], value_states) for run in self._runs]
        return keys, values


def slot_order(sequence: CachedSequence) -> tuple[int, int]:
    """Neighbouring slots beside each other."""
    assert sequence.slab is not None
    return sequence.slab.number, sequence.slot


def runs_of(rows: Sequence[CachedSequence]) -> list[slice]:
    """Split rows into those whose slots lie side by side."""
    begins = [
        place
        for place, row in enumerate(rows)
        if place == 0 or row.slab is not rows[place - 1].slab or row.slot != rows[place - 1].slot + 1
    ]
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True)]


def slot_run(
    rows: Sequence[CachedSequence],
    run: slice,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
    num_tokens: int,
) -> SlotRun:
    slab, first = rows[run.start].slab, rows[run.start].slot
    assert slab is not None
    slots = slice(first, first + run.stop - run.start)
    if is_real is None:
        places = torch.arange(slots.start, slots.stop, device=positions.device)
        return SlotRun(slab, slots, num_tokens, run, None, (places, slice(None), positions[run, 0]))
    real = is_real[run]
    row_of_token, _ = real.nonzero(as_tuple=True)
    return SlotRun(slab, slots, num_tokens, run, real, (row_of_token + first, slice(None), positions[run][real]))
