"""Conversations in lockstep on a GPU, where a decoding step is recorded once and replayed.

A small network's step is hundreds of kernels of a few microseconds each, and what launches them takes far longer than
what they do: on an H200, 70 ms a step of 48 rows in a network of SmolLM2's sizes. A CUDA graph launches them all at
once. It wants every tensor in its place: keys and values lie in slabs with room to write, the mask covers a slab's
whole width, and where a row stands is a tensor too. When rows leave, or a slab is full, the next step is recorded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from benchmarks.lockstep import Lockstep

SLAB_TOKENS = 256
"""A slab's width is a multiple of it."""


class SlabCache(Cache):
    """Keys and values of all layers, (rows, heads, width, channels) each; `length` columns are in use."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.length, self.width = 0, 0
        self.slabs: list[list[Tensor]] = [[] for _ in range(num_layers)]
        """Keys and values, by layer."""
        self.column: Tensor | None = None
        """int64 [1]: where the next token goes, while a step is recorded or replayed."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Called by the network: keep (rows, heads, new tokens, channels), give what attention reads."""
        slabs, new = self.slabs[layer_idx], (key_states, value_states)
        if not slabs:
            slabs += [each.new_zeros(*each.shape[:2], self.width, each.shape[3]) for each in new]
        if self.column is not None:
            for slab, states in zip(slabs, new, strict=True):
                slab.index_copy_(2, self.column, states)
            return slabs[0], slabs[1]
        stop = self.length + key_states.shape[2]
        for slab, states in zip(slabs, new, strict=True):
            slab[:, :, self.length : stop] = states
        return slabs[0][:, :, :stop], slabs[1][:, :, :stop]

    def widen(self, num_tokens: int) -> None:
        """Make room for so many in all."""
        self.width = -(-num_tokens // SLAB_TOKENS) * SLAB_TOKENS
        for slabs in self.slabs:
            slabs[:] = [torch.nn.functional.pad(slab, (0, 0, 0, self.width - slab.shape[2])) for slab in slabs]

    def keep(self, rows: Tensor) -> None:
        for slabs in self.slabs:
            slabs[:] = [slab[rows] for slab in slabs]

    def move_together(self, order: Tensor) -> None:
        """Let the columns `order` (rows, length) come first, and forget the others."""
        self.length = order.shape[1]
        for slabs in self.slabs:
            for slab in slabs:
                places = order[:, None, :, None].expand(-1, slab.shape[1], -1, slab.shape[3])
                slab[:, :, : self.length] = slab.gather(2, places)


class GraphedLockstep(Lockstep):
    """As `Lockstep`; on a CPU the same steps are run and not recorded."""

    def __init__(self, network: Any, *others: Any) -> None:
        super().__init__(network, *others)
        self._slabs = SlabCache(network.config.num_hidden_layers)
        self._bias = torch.empty(0)
        """(rows, 1, 1, width): 0 where a row has read a token, else -inf."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._output = torch.empty(0)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        if list(rows) == list(range(len(self._mask))):
            return
        index = torch.tensor(rows, device=self._device)
        self._slabs.keep(index)
        self._mask, self._logits, self._bias = self._mask[index], self._logits[index], self._bias[index]
        self._forget_step()

    @torch.inference_mode()
    def go_back(self, place: tuple[Tensor, Tensor]) -> None:
        self._mask, self._logits = place
        self._slabs.length = self._mask.shape[1]
        self._bias[..., self._slabs.length :] = -torch.inf

    def _move_together(self, order: Tensor) -> None:
        self._slabs.move_together(order)
        self._write_bias()

    def _last_logits(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        length, stop = self._slabs.length, self._mask.shape[1]
        if stop > self._slabs.width:
            self._slabs.widen(stop + self._max_action_tokens)
            self._write_bias()
        if tokens.shape[1] == 1:
            last = self._step(tokens, positions, mask)
        else:
            last = self._read(tokens, positions)
            self._bias[..., length:stop].masked_fill_(mask.bool()[:, None, None], 0.0)
        self._slabs.length = stop
        return last

    def _write_bias(self) -> None:
        read = self._mask[:, None, None, : self._slabs.length].bool()
        shape = (len(self._mask), 1, 1, self._slabs.width)
        self._bias = torch.full(shape, -torch.inf, dtype=self._network.dtype, device=self._device)
        self._bias[..., : self._slabs.length].masked_fill_(read, 0.0)
        self._forget_step()

    def _read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Read several tokens. One that is a hole sees itself, so that its numbers stay finite."""
        stop, width = self._mask.shape[1], tokens.shape[1]
        columns = torch.arange(stop, device=self._device)
        own = columns[-width:, None]
        sees = (columns <= own) & self._mask.bool()[:, None, None] | (columns == own)
        padded = -(-stop // 16) * 16  # CUDA's kernels read masks in words
        bias = torch.full((len(tokens), 1, width, padded), -torch.inf, dtype=self._network.dtype, device=self._device)
        bias = bias[..., :stop].masked_fill_(sees, 0.0)
        return self._network(
            input_ids=tokens, attention_mask=bias, position_ids=positions, past_key_values=self._slabs,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip

    # ------------------------------------------------------------------------------------------ one token

    def _step(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Read one token in every row; what a row that reads nothing says of it does not count."""
        column = self._slabs.length
        self._bias[..., column] = torch.where(mask.bool(), 0.0, -torch.inf).to(self._bias.dtype)[:, None]
        new = {"input_ids": tokens, "position_ids": positions, "column": torch.full((1,), column, device=self._device)}
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in new.items()}
            self._record()
        else:
            for name, value in new.items():
                self._inputs[name].copy_(value)
        if self._graph is None:
            self._output = self._computed()
        else:
            self._graph.replay()
        return self._output.clone()

    def _record(self) -> None:
        if self._device.type != "cuda":
            return
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            self._computed()  # kernels choose their algorithms in the first
        torch.cuda.current_stream().wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._computed()

    def _computed(self) -> Tensor:
        self._slabs.column = self._inputs["column"]
        try:
            return self._network(
                input_ids=self._inputs["input_ids"], attention_mask=self._bias,
                position_ids=self._inputs["position_ids"], past_key_values=self._slabs, logits_to_keep=1,
            ).logits[:, -1]  # fmt: skip
        finally:
            self._slabs.column = None

    def _forget_step(self) -> None:
        self._graph, self._inputs = None, {}
