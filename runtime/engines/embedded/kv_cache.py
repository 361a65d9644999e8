"""The KV cache that the network writes through: a face of transformers' `Cache` on the slots of `kv_memory`.

One forward's rows may lie in several slabs, and several may share a prefix. So keys and values go to attention as
spans: these tokens, for those rows (`KeySpan` in attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from runtime.engines.embedded.attention import KeySpan
from runtime.engines.embedded.kv_memory import CachedSequence, Slab
from runtime.engines.embedded.shared_prefix import SharedPrefix


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Neighbouring slots of a slab, which neighbouring rows of a forward write to and read."""

    slab: Slab
    rows: slice
    slots: slice
    tokens: slice
    """What attention reads of each slot."""
    is_shared: bool = False
    """All `rows` read the one slot; nothing is written."""
    is_real: torch.Tensor | None = None
    """(rows, new tokens): which of the new tokens are no padding; None: all, one each."""
    target: tuple[torch.Tensor, slice, torch.Tensor] | None = None
    """Where the real ones go: slots and positions, both (real tokens,), with all heads between."""

    def write(self, store: torch.Tensor, states: torch.Tensor) -> None:
        """Store a layer's new keys or values, (all rows, heads, new tokens, channels)."""
        if self.target is not None:
            own = states[self.rows]
            store[self.target] = own[:, :, 0] if self.is_real is None else own.transpose(1, 2)[self.is_real]

    def read(self, layer: int) -> KeySpan:
        keys, values = (store[self.slots, :, self.tokens] for store in (self.slab.keys[layer], self.slab.values[layer]))
        return KeySpan(self.rows, self.tokens, keys, values, self.is_shared)


class KvCache(Cache):
    """Call `aim` before each forward to say where its tokens go."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._runs: list[SlotRun] = []

    def aim(
        self,
        rows: Sequence[CachedSequence],
        positions: torch.Tensor,
        is_real: torch.Tensor | None,
        shared: Sequence[SharedPrefix] = (),
    ) -> None:
        """Set the rows of the next forward; neighbouring slots should be neighbouring rows (`slot_order`).

        `positions` and `is_real` are (rows, new tokens); is_real None: one new token each, and no padding.
        """
        begins = [0] * len(rows)
        for prefix in shared:
            begins[prefix.rows] = [prefix.num_tokens] * len(range(*prefix.rows.indices(len(rows))))
        ends = (positions[:, -1] + 1).tolist()
        self._runs = [
            own_run(rows, run, slice(begins[run.start], max(ends[run])), positions, is_real)
            for run in runs_of(rows, begins)
        ]
        self._runs += [shared_run(rows[prefix.rows.start], prefix) for prefix in shared]

    def update(  # type: ignore[override]
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[list[KeySpan], list[KeySpan]]:
        """Called by the network: store (rows, heads, new tokens, channels), give what attention reads."""
        for run in self._runs:
            run.write(run.slab.keys[layer_idx], key_states)
            run.write(run.slab.values[layer_idx], value_states)
        spans = [run.read(layer_idx) for run in self._runs]
        return spans, spans


def slot_order(sequence: CachedSequence) -> tuple[int, int]:
    """Neighbouring slots beside each other."""
    assert sequence.slab is not None
    return sequence.slab.number, sequence.slot


def runs_of(rows: Sequence[CachedSequence], begins: Sequence[int]) -> list[slice]:
    """Split rows into those whose slots lie side by side, and which read them from the same token on."""

    def goes_on(place: int) -> bool:
        row, before = rows[place], rows[place - 1]
        return row.slab is before.slab and row.slot == before.slot + 1 and begins[place] == begins[place - 1]

    starts = [place for place in range(len(rows)) if place == 0 or not goes_on(place)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def own_run(
    rows: Sequence[CachedSequence],
    run: slice,
    tokens: slice,
    positions: torch.Tensor,
    is_real: torch.Tensor | None,
) -> SlotRun:
    slab, first = rows[run.start].slab, rows[run.start].slot
    assert slab is not None
    slots = slice(first, first + run.stop - run.start)
    if is_real is None:
        places = torch.arange(slots.start, slots.stop, device=positions.device)
        return SlotRun(slab, run, slots, tokens, target=(places, slice(None), positions[run, 0]))
    real = is_real[run]
    row_of_token, _ = real.nonzero(as_tuple=True)
    target = (row_of_token + first, slice(None), positions[run][real])
    return SlotRun(slab, run, slots, tokens, is_real=real, target=target)


def shared_run(leader: CachedSequence, prefix: SharedPrefix) -> SlotRun:
    assert leader.slab is not None
    slots = slice(leader.slot, leader.slot + 1)
    return SlotRun(leader.slab, prefix.rows, slots, slice(0, prefix.num_tokens), is_shared=True)
