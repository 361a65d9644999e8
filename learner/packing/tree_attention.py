"""Attention in a pack: a token sees its ancestors and nothing else, and costs little more than that.

It is registered with transformers under the name TREE_ATTENTION. Load the network with that `attn_implementation`; the
tree comes with each call, and a call without one attends as `sdpa` does.

On CUDA a FlexAttention BlockMask skips what no token sees. On CPU there is no such kernel with a backward pass, so the
tokens are taken in blocks: those whose subtree has ended before a block begins are left out of its keys. Branches and
other trees thus cost nothing, and no mask of n x n is ever made. One dense mask was refused: at 40 steps three quarters
of the time went into attention, most of it to what no token sees.

The blocks' masks together are half of such a mask, and so are the keys and values that each block keeps for its
gradient. Packs of up to LONG_PACK tokens afford both, once for all layers. In longer ones a block has a mask only for
the keys that not all of its queries see, and its attention is computed again in the backward pass: then memory grows
with the tokens, and not with their square.

In 16 bits on a CPU a block's attention is written out as two products, and computed again in the backward pass, too.
torch's own kernel multiplies far below what the processor can there: with it a whole gradient of SmolLM2 takes 1.4
times as long, and is as far from one in 32 bits (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TREE_ATTENTION = "tree_attention"
BLOCK_TOKENS = 128
"""Queries of a block, on CPU."""
LONG_PACK = 4096
"""Tokens above which memory is spared, on CPU."""
TILE_TOKENS = 128
"""Queries and keys of a tile of FlexAttention, on CUDA."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """The queries `start` up to `stop` of a pack, and all that any of them sees."""

    start: int
    stop: int
    keys: Tensor | slice
    """int64 [k]: packed positions; or a slice of them, where they lie side by side."""
    num_seen_by_all: int
    """So many first keys are seen by every query, and have no mask."""
    mask: Tensor
    """[1, 1, stop - start, k - num_seen_by_all], of the other keys: added to the attention logits; 0 where the query
    sees the key, else -inf."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """The block's rows of [1, n, heads, d]."""
        if isinstance(self.keys, slice):
            keys, values = key[:, :, self.keys], value[:, :, self.keys]
        else:
            keys, values = key.index_select(2, self.keys), value.index_select(2, self.keys)
        mask = nn.functional.pad(self.mask, (self.num_seen_by_all, 0)) if self.num_seen_by_all else self.mask
        queries = query[:, :, self.start : self.stop]
        if _is_by_products(query):
            return attention_by_products(queries, keys, values, mask, **kwargs)
        return sdpa_attention_forward(module, queries, keys, values, mask, **kwargs)[0]


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """Who sees whom in a pack of n tokens: token i sees token j exactly if `j <= i < subtree_ends[j]`.

    With a sliding window, also only if fewer than `window` tokens of their sequence lie between: `depths[i] - depths[j]
    < window`. Masks are made once for all layers that attend alike."""

    subtree_ends: Tensor
    """int64 [n]"""
    depths: Tensor
    """int64 [n]"""
    is_long: bool = False
    """Memory is spared."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def sees(self, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """bool, of the positions' broadcast shape."""
        return _sees(self.subtree_ends, self.depths, window, queries, keys)

    def blocks(self, window: int | None, dtype: torch.dtype) -> list[Block]:
        """The whole pack in blocks of BLOCK_TOKENS queries, in order."""
        key = (window, dtype)
        if key not in self._made:
            starts = range(0, len(self.depths), BLOCK_TOKENS)
            self._made[key] = [self._block(start, window, dtype) for start in starts]
        return self._made[key]

    def _block(self, start: int, window: int | None, dtype: torch.dtype) -> Block:
        stop = min(start + BLOCK_TOKENS, len(self.depths))
        keys = self._open_keys(start, stop, window)
        num_seen_by_all = 0
        if self.is_long:
            is_seen_by_all = self._seen_by_all(keys, start, stop, window)
            num_seen_by_all = int(is_seen_by_all.sum())
            keys = torch.cat([keys[is_seen_by_all], keys[~is_seen_by_all]])
        queries = torch.arange(start, stop, device=keys.device)
        sees = self.sees(queries[:, None], keys[None, num_seen_by_all:], window)
        mask = torch.zeros(sees.shape, dtype=dtype, device=keys.device).masked_fill_(~sees, -torch.inf)
        return Block(start, stop, _as_slice(keys), num_seen_by_all, mask[None, None])

    def _open_keys(self, start: int, stop: int, window: int | None) -> Tensor:
        """int64 [k]: what any of these queries may see."""
        is_open = self.subtree_ends[:stop] > start
        if window is not None:
            is_open &= self.depths[:stop] > self.depths[start:stop].min() - window
        return is_open.nonzero()[:, 0]

    def _seen_by_all(self, keys: Tensor, start: int, stop: int, window: int | None) -> Tensor:
        """bool [k]"""
        is_seen = (keys < start) & (self.subtree_ends[keys] >= stop)
        if window is not None:
            is_seen &= self.depths[start:stop].max() - self.depths[keys] < window
        return is_seen

    def block_mask(self, window: int | None) -> BlockMask:
        """For FlexAttention. `create_block_mask` would make a mask of n x n, or compile itself anew for each pack."""
        if window not in self._made:
            from torch.nn.attention.flex_attention import BlockMask  # slow to import, of no use on CPU

            some, full = self._seen_tiles(window)
            self._made[window] = BlockMask.from_kv_blocks(
                *_listed(some & ~full),
                *_listed(full),
                BLOCK_SIZE=TILE_TOKENS,
                mask_mod=self._mask_mod(window),
                seq_lengths=(len(self.depths), len(self.depths)),
            )
        return self._made[window]

    def _mask_mod(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """`sees`, over plain tensors: what FlexAttention's compiler takes up as inputs of its kernel."""
        subtree_ends, depths = self.subtree_ends, self.depths

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _sees(subtree_ends, depths, window, query, key)

        return sees

    def _seen_tiles(self, window: int | None) -> tuple[Tensor, Tensor]:
        """bool [query tiles, key tiles], twice: does any query see any key, and do all see all?"""
        ends, depths = _tiled(self.subtree_ends, 0), _tiled(self.depths, -1)
        starts = torch.arange(0, ends.numel(), TILE_TOKENS, device=ends.device)
        is_earlier = starts[None, :] < starts[:, None]
        some = is_earlier & (ends.amax(1)[None, :] > starts[:, None]) | torch.eye(
            len(starts), dtype=torch.bool, device=ends.device
        )
        full = is_earlier & (ends.amin(1)[None, :] >= starts[:, None] + TILE_TOKENS)
        if window is not None:
            full &= depths.amax(1)[:, None] - depths.amin(1)[None, :] < window
        return some, full


def _sees(subtree_ends: Tensor, depths: Tensor, window: int | None, queries: Tensor, keys: Tensor) -> Tensor:
    is_ancestor = (keys <= queries) & (queries < subtree_ends[keys])
    return is_ancestor if window is None else is_ancestor & (depths[queries] - depths[keys] < window)


def _as_slice(keys: Tensor) -> Tensor | slice:
    first, number = int(keys[0]), len(keys)
    is_run = torch.equal(keys, torch.arange(first, first + number, device=keys.device))
    return slice(first, first + number) if is_run else keys


def _tiled(values: Tensor, padding: int) -> Tensor:
    """[n] -> [tiles, TILE_TOKENS]"""
    return nn.functional.pad(values, (0, -len(values) % TILE_TOKENS), value=padding).view(-1, TILE_TOKENS)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each sequence has, and which: int32 [1, 1, tiles] and [1, 1, tiles, tiles], as BlockMask wants
    them."""
    counts = tiles.sum(1, dtype=torch.int32)
    indices = tiles.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: Tree | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a layer of transformers calls. query, key, value [1, heads, n, d] -> [1, n, heads, d], and None."""
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.is_cuda:
        return flex_attention_forward(module, query, key, value, tree.block_mask(sliding_window), **kwargs)
    is_again = (tree.is_long or _is_by_products(query)) and torch.is_grad_enabled()
    attend = _attend_again_in_backward if is_again else Block.attend
    blocks = tree.blocks(sliding_window, query.dtype)
    return torch.cat([attend(block, module, query, key, value, **kwargs) for block in blocks], dim=1), None


def _attend_again_in_backward(
    block: Block, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any
) -> Tensor:
    attend = partial(block.attend, **kwargs)
    return checkpoint(attend, module, query, key, value, use_reentrant=False, preserve_rng_state=False)


def _is_by_products(query: Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float | None = None, **_: Any
) -> Tensor:
    """query [1, heads, n, d], key and value [1, key heads, k, d], mask [1, 1, n, k] -> [1, n, heads, d]: the queries of
    a group of heads lie side by side, so that keys and values are not repeated for them."""
    (_one, num_heads, num_queries, num_channels), num_key_heads = query.shape, key.shape[1]
    scaled = query * (num_channels**-0.5 if scaling is None else scaling)
    grouped = scaled.reshape(num_key_heads, -1, num_channels)
    logits = torch.bmm(grouped, key[0].transpose(1, 2)).view(num_key_heads, -1, num_queries, key.shape[2])
    shares = (logits + mask[0]).softmax(-1).view(num_key_heads, -1, key.shape[2])
    return torch.bmm(shares, value[0]).view(1, num_heads, num_queries, num_channels).transpose(1, 2)


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
