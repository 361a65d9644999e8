"""LoRA for a batch whose rows use different adapters, or none.

All adapters' A and B matrices lie side by side, one block of ranks each; a row's hidden values outside its own
adapter's block are set to zero. So a mixed batch costs two matrix products per layer however many adapters it mixes.
PEFT's own mixed batches (`adapter_names`) were refused: they gather and scatter rows per adapter in every layer and
install hooks at every forward. For 32 rows of a small network that adds six times as much to a forward as this does.
The network itself stays untouched: with only base rows nothing is added to its work but an idle hook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """One adapter's part in one linear layer."""

    a: torch.Tensor
    """(rank, in features)"""
    b: torch.Tensor
    """(rank, out features): transposed, and multiplied by the adapter's scaling."""


@dataclass(slots=True)
class _Stack:
    """All adapters' parts in one linear layer, and the hook that adds them."""

    hook: RemovableHandle
    a: torch.Tensor
    """(all ranks, in features)"""
    b: torch.Tensor
    """(all ranks, out features)"""


@dataclass(slots=True)
class LoraRows:
    """Adapters on a network's linear layers, chosen row by row."""

    network: nn.Module
    _adapters: dict[str, Mapping[str, LoraWeights]] = field(default_factory=dict)
    _blocks: dict[str, slice] = field(default_factory=dict)
    """Where each adapter's ranks lie among all ranks."""
    _stacks: dict[str, _Stack] = field(default_factory=dict)
    _ranks: slice | None = None
    """The ranks that the next forward uses; None: every row is base."""
    _foreign: torch.Tensor | None = None
    """(rows, 1, all ranks), True outside a row's own adapter; None: all rows share one adapter."""

    def add(self, name: str, weights: Mapping[str, LoraWeights]) -> None:
        """Put an adapter beside the others; `weights` by the path of the linear layer in the network."""
        self._adapters[name] = weights
        self._restack()

    def remove(self, name: str) -> None:
        del self._adapters[name]
        self._restack()

    def choose(self, names: Sequence[str | None]) -> None:
        """Set each row's adapter (None: base) for the forwards that follow."""
        used = set(names)
        self._foreign = None
        if used == {None}:
            self._ranks = None
        elif len(used) == 1:
            (name,) = used
            assert name is not None
            self._ranks = self._blocks[name]
        else:
            self._ranks = slice(None)
            self._foreign = self._outside(names)

    def _outside(self, names: Sequence[str | None]) -> torch.Tensor:
        num_ranks = max(block.stop for block in self._blocks.values())
        foreign = torch.ones(len(names), 1, num_ranks, dtype=torch.bool)
        for row, name in enumerate(names):
            if name is not None:
                foreign[row, 0, self._blocks[name]] = False
        return foreign.to(next(self.network.parameters()).device)

    def _restack(self) -> None:
        for stack in self._stacks.values():
            stack.hook.remove()
        ends = 0
        self._blocks = {}
        for name, weights in self._adapters.items():
            rank = max(part.a.shape[0] for part in weights.values())
            self._blocks[name] = slice(ends, ends + rank)
            ends += rank
        paths = sorted({path for weights in self._adapters.values() for path in weights})
        self._stacks = {path: self._stack(path, ends) for path in paths}

    def _stack(self, path: str, num_ranks: int) -> _Stack:
        """Lay the adapters' blocks side by side; an adapter that leaves this layer alone has a block of zeros."""
        linear = self.network.get_submodule(path)
        assert isinstance(linear, nn.Linear), path
        a = linear.weight.new_zeros(num_ranks, linear.in_features)
        b = linear.weight.new_zeros(num_ranks, linear.out_features)
        for name, weights in self._adapters.items():
            if path in weights:
                part = weights[path]
                block = slice(self._blocks[name].start, self._blocks[name].start + part.a.shape[0])
                a[block], b[block] = part.a, part.b
        return _Stack(linear.register_forward_hook(self._hook(path)), a, b)

    def _hook(self, path: str) -> Any:
        def add_lora(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor | None:
            if self._ranks is None:
                return None
            stack = self._stacks[path]
            hidden = functional.linear(args[0], stack.a[self._ranks])
            if self._foreign is not None:
                # Filled, not multiplied by 0: an overflow under one adapter must not reach another's rows.
                hidden.masked_fill_(self._foreign, 0.0)
            return output.add_(hidden @ stack.b[self._ranks])

        return add_lora
