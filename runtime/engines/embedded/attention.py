"""Attention over KV slots: which tokens a query sees, and grouped queries without copies of keys and values.

transformers' own `sdpa` repeats keys and values for every query head of a group when it is given a mask, at each
layer and token. Here the queries of a group are stacked along the token axis instead, and share their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig

ATTENTION = "grouped_sdpa"
"""The name under which transformers finds `grouped_sdpa`."""


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Sequence[torch.Tensor],
    value: Sequence[torch.Tensor],
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Called by the network. `query` is (rows, heads, queries, channels), the additive mask (rows, 1, queries, tokens);
    gives (rows, queries, heads, channels). `key` and `value` come from `KvCache`: for each run of rows whose keys lie
    side by side (rows, key heads, tokens, channels), one run after the other."""
    outputs, first = [], 0
    for keys, values in zip(key, value, strict=True):
        rows = slice(first, first + keys.shape[0])
        mask = attention_mask[rows, :, :, : keys.shape[2]]
        outputs.append(attend(query[rows], keys, values, mask, scaling))
        first = rows.stop
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)), None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    num_rows, num_heads, num_queries, num_channels = query.shape
    group = num_heads // key.shape[1]
    stacked = query.reshape(num_rows, key.shape[1], group * num_queries, num_channels)
    mask = mask if num_queries == 1 else mask.repeat(1, 1, group, 1)
    output = functional.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, grouped_sdpa)


class AttentionMasks:
    """Builds the additive masks that a decoder-only network takes, full or with a sliding window, from positions."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._window: int | None = getattr(config, "sliding_window", None)
        layer_types: Sequence[str] | None = getattr(config, "layer_types", None)
        # Families whose layers differ take a mask per layer type; the others one mask for all.
        self._layer_types = None if layer_types is None else sorted(set(layer_types))

    def build(self, query_positions: torch.Tensor, num_tokens: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks (rows, 1, queries, num_tokens) for queries at `query_positions` (rows, queries)."""
        distance = query_positions[:, :, None] - torch.arange(num_tokens, device=self._device)
        if self._layer_types is None:
            return self._mask(distance, self._window)
        windows = {"full_attention": None, "sliding_attention": self._window}
        return {name: self._mask(distance, windows[name]) for name in self._layer_types}

    def _mask(self, distance: torch.Tensor, window: int | None) -> torch.Tensor:
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        zeros = torch.zeros(distance.shape, dtype=self._dtype, device=self._device)
        return zeros.masked_fill_(hidden, float("-inf"))[:, None]
