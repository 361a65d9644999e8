"""Memory for keys and values: a fixed number of bytes, in slabs that are cut into slots of one length.

A slab allocator. All slabs have the same bytes; a slab is cut into slots of one length, one sequence each, and cut anew
once it is empty. A sequence that outgrows its slot moves to a longer one. Sequences that ended stay in their slots as
kept prefixes, until their memory is wanted: the least recently used goes first. Running sequences lie in the first
slots of their slab without gaps, so that attention reads them as a plain slice.

Refused: one tensor of equal slots for all (64 slots grow to the longest sequence), growing by concatenation
(transformers' DynamicCache copies all of it at each token), and pages (they must be gathered before each attention,
which on a CPU costs three times the reading).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

logger = logging.getLogger(__name__)

CUTS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""How often more slots a slab can be cut into than its longest: a slot is at most a half longer than it need be."""
MIN_CAPACITY = 32
"""Tokens of the shortest slot."""
MIN_SLAB_BYTES = 32 << 20
"""A slab may be as small as one longest sequence, but is not smaller than this where the budget holds many: short
sequences then lie in few slabs, and attention is called once for each."""
MIN_KEPT_TOKENS = 16
"""A prefix shorter than this is not kept: copying it costs as much as computing it."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What a token's keys and values take in one network."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, network: Any) -> KvShape:
        config = network.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(config.num_hidden_layers, num_heads, head_dim, network.dtype, network.device)

    @property
    def numbers_per_token(self) -> int:
        return self.num_layers * 2 * self.num_heads * self.head_dim

    @property
    def bytes_per_token(self) -> int:
        return self.numbers_per_token * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class CachedSequence:
    """Tokens whose keys and values lie in a slot."""

    token_ids: list[int]
    """While it runs: of its row, which appends to it."""
    adapter_name: str | None
    num_computed: int = 0
    """So many of the tokens have their keys and values here."""
    slab: Slab | None = field(default=None, repr=False)
    """None: it has no memory (any more)."""
    slot: int = -1
    last_used: int = 0
    """Counts up; read of kept sequences alone."""


class Slab:
    """A piece of memory, cut into slots of one length. The running sequences come first, without gaps."""

    def __init__(self, number: int, num_tokens: int, shape: KvShape) -> None:
        self.number = number
        """In the order of allocation."""
        self._num_tokens = num_tokens
        self._shape = shape
        # Zeros, not empty: attention multiplies what it masks by 0, and 0 times a stray NaN is NaN.
        self._numbers = torch.zeros(num_tokens * shape.numbers_per_token, dtype=shape.dtype, device=shape.device)
        self.cut(num_tokens)

    def cut(self, capacity: int) -> None:
        """Cut an empty slab into slots of so many tokens."""
        shape = self._shape
        num_slots = self._num_tokens // capacity
        self.capacity = capacity
        self.sequences: list[CachedSequence | None] = [None] * num_slots
        self.num_running = 0
        numbers = self._numbers[: num_slots * capacity * shape.numbers_per_token]
        self._storage = numbers.view(shape.num_layers, 2, num_slots, shape.num_heads, capacity, shape.head_dim)
        self.keys = list(self._storage[:, 0])
        """By layer: (slot, head, token, channel)."""
        self.values = list(self._storage[:, 1])

    @property
    def has_free_slot(self) -> bool:
        return None in self.sequences

    @property
    def is_empty(self) -> bool:
        return not any(self.sequences)

    @property
    def kept(self) -> list[CachedSequence]:
        return [sequence for sequence in self.sequences[self.num_running :] if sequence is not None]

    def take_in(self, sequence: CachedSequence) -> None:
        """Give a free slot to a sequence that runs."""
        slot = self.num_running
        if (kept := self.sequences[slot]) is not None:
            self._move(kept, self.sequences.index(None))
        self._put(sequence, slot)
        self.num_running += 1

    def set_at_rest(self, sequence: CachedSequence) -> None:
        """It runs no longer: its slot goes behind those of the running ones."""
        last = self.num_running - 1
        other = self.sequences[last]
        assert other is not None
        if other is not sequence:
            slot, num_tokens = sequence.slot, sequence.num_computed
            own = self._storage[:, :, slot, :, :num_tokens].clone()
            self._move(other, slot)
            self._storage[:, :, last, :, :num_tokens] = own
            self._put(sequence, last)
        self.num_running = last

    def drop(self, sequence: CachedSequence) -> None:
        """Free the slot of a sequence at rest."""
        self.sequences[sequence.slot] = None
        sequence.slab = None

    def wipe(self, slot: int) -> None:
        """Zero a slot that may hold values which are not finite."""
        self._storage[:, :, slot] = 0.0

    def _move(self, sequence: CachedSequence, slot: int) -> None:
        old = sequence.slot
        self.sequences[old] = None
        self._put(sequence, slot)
        self.copy(self, old, slot, sequence.num_computed)

    def _put(self, sequence: CachedSequence, slot: int) -> None:
        self.sequences[slot] = sequence
        sequence.slab, sequence.slot = self, slot

    def copy(self, source: Slab, source_slot: int, slot: int, num_tokens: int) -> None:
        """Copy the first tokens of a slot here from one that lies anywhere."""
        self._storage[:, :, slot, :, :num_tokens] = source._storage[:, :, source_slot, :, :num_tokens]


class KvMemory:
    """All slabs, within `num_bytes`."""

    def __init__(self, shape: KvShape, num_bytes: int, max_tokens: int, max_kept: int) -> None:
        """`max_tokens`: of the longest sequence, which must fit. `max_kept` sequences at rest: each is looked at
        whenever a prompt comes."""
        per_token = shape.bytes_per_token
        assert max_tokens * per_token <= num_bytes, (max_tokens, per_token, num_bytes)
        wanted = min(MIN_SLAB_BYTES, num_bytes // 8) // per_token
        self._shape = shape
        self._tokens_per_slab = max(max_tokens, wanted)
        self._max_slabs = num_bytes // (self._tokens_per_slab * per_token)
        fewest = self._tokens_per_slab // max_tokens
        capacities = {self._tokens_per_slab // int(fewest * cut) for cut in CUTS}
        longest = max(capacities)
        self._capacities = sorted(one for one in capacities if one >= MIN_CAPACITY or one == longest)
        self._slabs: list[Slab] = []
        self._max_kept = max_kept
        self._clock = itertools.count(1)

    @property
    def num_bytes(self) -> int:
        """Taken by now."""
        return len(self._slabs) * self._tokens_per_slab * self._shape.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return self._shape.bytes_per_token

    def sequences(self) -> Iterator[CachedSequence]:
        """All that have memory, running or kept."""
        return (sequence for slab in self._slabs for sequence in slab.sequences if sequence is not None)

    def place(self, sequence: CachedSequence, num_tokens: int) -> bool:
        """Give a sequence that begins to run a slot for so many tokens. False: there is no room now."""
        slab = self._slab_with_room(num_tokens)
        if slab is not None:
            slab.take_in(sequence)
        return slab is not None

    def grow(self, sequence: CachedSequence, num_tokens: int) -> bool:
        """See that a running sequence has room for so many tokens. False: there is no room now; it stays as it is."""
        old, old_slot = sequence.slab, sequence.slot
        assert old is not None
        if num_tokens <= old.capacity:
            return True
        slab = self._slab_with_room(num_tokens)
        if slab is None:
            return False
        copied = CachedSequence([], None, sequence.num_computed)
        old._put(copied, old_slot)  # stands in for it until its slot is free
        slab.take_in(sequence)
        slab.copy(old, old_slot, sequence.slot, sequence.num_computed)
        copied.num_computed = 0
        old.set_at_rest(copied)
        old.drop(copied)
        return True

    def keep(self, sequence: CachedSequence) -> None:
        """A sequence has ended: its memory may serve a prompt that begins alike, until it is wanted."""
        slab = sequence.slab
        assert slab is not None
        slab.set_at_rest(sequence)
        sequence.token_ids = sequence.token_ids[: sequence.num_computed]
        kept = [other for slab in self._slabs for other in slab.kept if other is not sequence]
        if sequence.num_computed < MIN_KEPT_TOKENS or any(is_prefix(sequence, other) for other in kept):
            slab.drop(sequence)
            return
        self.touch(sequence)
        superseded = [other for other in kept if is_prefix(other, sequence)]
        rest = sorted(set(kept) - set(superseded), key=lambda other: other.last_used)
        self._drop(superseded)
        self._drop(rest[: len(rest) + 1 - self._max_kept])

    def release(self, sequence: CachedSequence) -> None:
        """A sequence has failed: what it left may not be finite."""
        slab = sequence.slab
        assert slab is not None
        slab.wipe(sequence.slot)
        sequence.num_computed = 0
        slab.set_at_rest(sequence)
        slab.drop(sequence)

    def touch(self, sequence: CachedSequence) -> None:
        """It has been of use now."""
        sequence.last_used = next(self._clock)

    def forget(self, adapter_name: str) -> None:
        """Drop what was kept of an adapter that is unloaded."""
        self._drop([one for slab in self._slabs for one in slab.kept if one.adapter_name == adapter_name])

    def copy(self, source: CachedSequence, target: CachedSequence, num_tokens: int) -> None:
        """Let a sequence begin with the keys and values of another one's first tokens."""
        assert source.slab is not None
        assert target.slab is not None
        target.slab.copy(source.slab, source.slot, target.slot, num_tokens)
        target.num_computed = num_tokens

    def _slab_with_room(self, num_tokens: int) -> Slab | None:
        capacity = next(one for one in self._capacities if one >= num_tokens)
        while True:
            for slab in self._slabs:
                if slab.capacity == capacity and slab.has_free_slot:
                    return slab
            for slab in self._slabs:
                if slab.is_empty:
                    slab.cut(capacity)
                    return slab
            if len(self._slabs) < self._max_slabs and (slab := self._new_slab()):
                slab.cut(capacity)
                return slab
            if not (unwanted := self._least_recently_used(capacity)):
                return None
            self._drop(unwanted)

    def _new_slab(self) -> Slab | None:
        """None where the machine has less memory than the budget: what there is must do from now on."""
        try:
            slab = Slab(len(self._slabs), self._tokens_per_slab, self._shape)
        except RuntimeError as error:  # torch's, on a GPU and on a CPU
            if not self._slabs:
                raise
            logger.warning("no memory for more keys and values; going on with %d bytes: %s", self.num_bytes, error)
            self._max_slabs = len(self._slabs)
            return None
        self._slabs.append(slab)
        return slab

    def _least_recently_used(self, capacity: int) -> list[CachedSequence]:
        """The kept sequences that make room for a slot: one of this length, or all of a slab where none runs."""
        slabs = [slab for slab in self._slabs if slab.kept]
        choices = [[one] for slab in slabs if slab.capacity == capacity for one in slab.kept]
        choices += [slab.kept for slab in slabs if not slab.num_running]
        return min(choices, key=lambda kept: max(one.last_used for one in kept), default=[])

    def _drop(self, kept: Iterable[CachedSequence]) -> None:
        for sequence in kept:
            assert sequence.slab is not None
            sequence.slab.drop(sequence)


def is_prefix(one: CachedSequence, other: CachedSequence) -> bool:
    """Whether `other`, which is kept, knows all that `one` knows."""
    num_tokens = one.num_computed
    return one.adapter_name == other.adapter_name and other.token_ids[:num_tokens] == one.token_ids[:num_tokens]
