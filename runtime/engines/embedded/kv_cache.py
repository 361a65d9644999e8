"""Keys and values of every sequence the embedded engine knows, in slots of one preallocated tensor per layer.

Running sequences fill the first slots without gaps, so that attention reads them as a plain slice; finished ones are
copied to the slots behind, where a prompt that begins alike finds them. Refused: growing the cache by concatenation
(transformers' DynamicCache), which copies all of it at each token, and scattered slots or pages, which must be gathered
before each attention.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache

FIRST_CAPACITY = 256
"""Tokens per slot to begin with; it doubles when a longer sequence comes, up to the context limit."""


class KvSlots(Cache):
    """The KV cache that the network writes through. Call `aim` before each forward to say where its tokens go."""

    def __init__(
        self, config: PretrainedConfig, num_slots: int, max_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._max_tokens = max_tokens
        # (layer, keys or values, slot, head, token, channel). Zeros, not empty: attention multiplies what it masks
        # by 0, and 0 times a stray NaN is NaN.
        shape = (config.num_hidden_layers, 2, num_slots, num_heads, min(FIRST_CAPACITY, max_tokens), head_dim)
        self._hold(torch.zeros(shape, dtype=dtype, device=device))

    def _hold(self, storage: torch.Tensor) -> None:
        self._storage = storage
        self._keys = list(storage[:, 0])
        self._values = list(storage[:, 1])

    def reserve(self, num_tokens: int) -> None:
        """Make every slot at least `num_tokens` long, keeping what it holds."""
        capacity = self._storage.shape[4]
        if num_tokens <= capacity:
            return
        while capacity < num_tokens:
            capacity *= 2
        old = self._storage
        grown = old.new_zeros((*old.shape[:4], min(capacity, self._max_tokens), old.shape[5]))
        grown[:, :, :, :, : old.shape[4]] = old
        self._hold(grown)

    def aim(
        self,
        rows: slice,
        num_tokens: int,
        slots: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor | None = None,
    ) -> None:
        """Set where the next forward writes, and what it reads.

        The forward's new tokens, flattened to (rows * new tokens), of which `chosen` (None: all) are real, go to
        `slots` and `positions`, shape (real tokens,). Attention sees the first `num_tokens` of the slots `rows`.
        """
        self._rows, self._num_tokens = rows, num_tokens
        self._target = (slots, slice(None), positions)
        self._chosen = chosen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the network: store (rows, heads, new tokens, channels), give (rows, heads, tokens, channels)."""
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys[self._target] = self._real_tokens(key_states)
        values[self._target] = self._real_tokens(value_states)
        return keys[self._rows, :, : self._num_tokens], values[self._rows, :, : self._num_tokens]

    def _real_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """(rows, heads, new tokens, channels) to (real tokens, heads, channels)."""
        if self._chosen is None:
            return states[:, :, 0]
        return states.transpose(1, 2).flatten(0, 1)[self._chosen]

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` of one slot to another."""
        self._storage[:, :, target, :, :num_tokens] = self._storage[:, :, source, :, :num_tokens]

    def wipe(self, slot: int) -> None:
        """Zero a slot that may hold values which are not finite."""
        self._storage[:, :, slot] = 0.0
