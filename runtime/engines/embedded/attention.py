"""Attention over KV slots: which tokens a query sees, grouped queries without copies of keys and values, and a common
prefix that is read once for all rows.

transformers' own `sdpa` repeats keys and values for every query head of a group when it is given a mask, at each
layer and token. Here the queries of a group are stacked along the token axis instead, and share their keys; so do the
queries of all rows that share a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PretrainedConfig

ATTENTION = "grouped_sdpa"
"""The name under which transformers finds `grouped_sdpa`."""
ALIGNED_TOKENS = 16
"""Of a mask's rows in memory: CUDA's kernels read them in words of so many, and die of others (misaligned address)."""


@dataclass(frozen=True, slots=True)
class KeySpan:
    """Keys and values of one layer, and who reads them."""

    rows: slice
    """Of the forward."""
    tokens: slice
    keys: torch.Tensor
    """(rows, or one that all share; key heads; tokens; channels)"""
    values: torch.Tensor
    is_shared: bool


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Sequence[KeySpan],
    value: Sequence[KeySpan],
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Called by the network. `query` is (rows, heads, queries, channels), the additive mask (rows, 1, queries, tokens);
    gives (rows, queries, heads, channels). `key` and `value` are the same spans, as `KvCache` gives them: each row's
    own, in the order of the rows, then those which several share."""
    own = [span for span in key if not span.is_shared]
    shared = [span for span in key if span.is_shared]
    masks = [attention_mask[span.rows, :, :, span.tokens] for span in own]
    if not shared:
        outputs = [attend(query[span.rows], span, mask, scaling) for span, mask in zip(own, masks, strict=True)]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.transpose(1, 2).contiguous(), None
    parts = [attend_weighed(query[span.rows], span, mask, scaling) for span, mask in zip(own, masks, strict=True)]
    output, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    for span in shared:
        other, other_weight = attend_shared(query[span.rows], span, scaling)
        share = torch.sigmoid(other_weight - weight[span.rows])[..., None]
        output[span.rows] = torch.lerp(output[span.rows].float(), other.float(), share).to(output.dtype)
    return output.transpose(1, 2).contiguous(), None


def attend(query: torch.Tensor, span: KeySpan, mask: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """(rows, heads, queries, channels), each row over its own keys."""
    num_rows, num_heads, num_queries, num_channels = query.shape
    num_key_heads = span.keys.shape[1]
    group = num_heads // num_key_heads
    stacked = query.reshape(num_rows, num_key_heads, group * num_queries, num_channels)
    mask = mask if num_queries == 1 else mask.repeat(1, 1, group, 1)
    output = functional.scaled_dot_product_attention(stacked, span.keys, span.values, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape)


# With the logarithm of what the softmax was divided by: two results over parts of the keys can be put together by it.
# Only the kernel for CPUs is called, and only for one query a row.


def attend_weighed(
    query: torch.Tensor, span: KeySpan, mask: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend`, and (rows, heads, 1)."""
    num_rows, num_heads, _, num_channels = query.shape
    num_key_heads = span.keys.shape[1]
    stacked = query.reshape(num_rows, num_key_heads, num_heads // num_key_heads, num_channels)
    output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked, span.keys, span.values, attn_mask=mask, scale=scaling
    )
    return output.reshape(query.shape), weight.reshape(num_rows, num_heads, 1)


def attend_shared(query: torch.Tensor, span: KeySpan, scaling: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend_weighed`, all rows over the same keys, all of which they see."""
    num_rows, num_heads, _, num_channels = query.shape
    num_key_heads = span.keys.shape[1]
    group = num_heads // num_key_heads
    by_key_head = query.reshape(num_rows, num_key_heads, group, num_channels).transpose(0, 1)
    stacked = by_key_head.reshape(1, num_key_heads, num_rows * group, num_channels)
    output, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        stacked, span.keys, span.values, scale=scaling
    )
    output = output.reshape(num_key_heads, num_rows, group, num_channels).transpose(0, 1).reshape(query.shape)
    return output, weight.reshape(num_key_heads, num_rows, group).transpose(0, 1).reshape(num_rows, num_heads, 1)


AttentionInterface.register(ATTENTION, grouped_sdpa)


class AttentionMasks:
    """Builds the additive masks that a decoder-only network takes, full or with a sliding window, from positions."""

    def __init__(self, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._window: int | None = getattr(config, "sliding_window", None)
        layer_types: Sequence[str] | None = getattr(config, "layer_types", None)
        # Families whose layers differ take a mask per layer type; the others one mask for all.
        self._layer_types = None if layer_types is None else sorted(set(layer_types))

    @property
    def has_window(self) -> bool:
        """Some layer sees its last tokens alone."""
        return self._window is not None and self._layer_types != ["full_attention"]

    def build(self, query_positions: torch.Tensor, num_tokens: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Masks (rows, 1, queries, at least num_tokens) for queries at `query_positions` (rows, queries)."""
        width = -(-num_tokens // ALIGNED_TOKENS) * ALIGNED_TOKENS
        distance = query_positions[:, :, None] - torch.arange(width, device=self._device)
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
