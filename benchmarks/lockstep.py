"""Many conversations that one network reads and continues together, on one KV cache, without a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from policies.types import Completion, FinishReason, TokenIds

MAX_ACTION_TOKENS = 96
ROOM_TOKENS = 256
"""That keys and values get at a time, to be written into."""
ATTENTION = "grouped_rows"
"""The name under which transformers finds `_grouped_attention`."""


def load_policy(base: Path, adapter: Path | None, device: str = "cpu") -> Any:
    """The base with the adapter merged into it: it samples faster, and the logprobs differ by rounding alone."""
    attention = ATTENTION if device == "cpu" else None
    network: Any = AutoModelForCausalLM.from_pretrained(base, attn_implementation=attention)
    network.to(device)
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()
    return network.eval()


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """One that draws where the network is, seeded by the other's next number; the same on a CPU."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (1,), generator=generator))
    return torch.Generator(device).manual_seed(seed)


class Lockstep:
    """Conversations that one network reads and continues together. What a row does not read is a hole in its cache."""

    def __init__(
        self,
        network: Any,
        num_rows: int,
        stop_token_id: int,
        generator: torch.Generator,
        max_action_tokens: int = MAX_ACTION_TOKENS,
    ) -> None:
        self._network = network
        self._stop = stop_token_id
        self._device = network.device
        self._generator = generator_on(self._device, generator)
        self._max_action_tokens = max_action_tokens
        self._cache = Cache(layer_class_to_replicate=RoomyLayer)
        self._mask = torch.zeros(num_rows, 0, dtype=torch.long, device=self._device)
        self._logits = torch.empty(0)

    @torch.inference_mode()
    def read(self, texts: Sequence[TokenIds]) -> None:
        """Append tokens to every row, of different lengths."""
        self._close_holes()
        width = max(map(len, texts))
        self._forward(
            torch.tensor([(0,) * (width - len(text)) + text for text in texts], device=self._device),
            torch.tensor([(0,) * (width - len(text)) + (1,) * len(text) for text in texts], device=self._device),
        )

    @torch.inference_mode()
    def complete(self, temperatures: Tensor) -> list[Completion]:
        """Let every row write until its stop token, which it then has read."""
        num_rows, temperatures = len(temperatures), temperatures.to(self._device)
        written = [([], []) for _ in range(num_rows)]
        is_writing = torch.ones(num_rows, dtype=torch.bool, device=self._device)
        for _ in range(self._max_action_tokens):
            tokens, logprobs = self._draw(temperatures)
            drawn = zip(written, is_writing.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
            for (token_ids, said), goes_on, token_id, logprob in drawn:
                if goes_on:
                    token_ids.append(token_id)
                    said.append(logprob)
            self._forward(tokens[:, None], is_writing.long()[:, None])
            is_writing &= tokens != self._stop
            if not is_writing.any():
                break
        reasons = [FinishReason.LENGTH if cut_off else FinishReason.STOP for cut_off in is_writing.tolist()]
        return [
            Completion(tuple(token_ids), tuple(logprobs), reason)
            for (token_ids, logprobs), reason in zip(written, reasons, strict=True)
        ]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(rows, device=self._device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self._logits = self._logits[index]

    def place(self) -> tuple[Tensor, Tensor]:
        """Where the conversations stand; see `go_back`."""
        return self._mask, self._logits

    def go_back(self, place: tuple[Tensor, Tensor]) -> None:
        """Forget what was read and written since."""
        num_since = self._mask.shape[1] - place[0].shape[1]
        self._mask, self._logits = place
        if num_since:
            self._cache.crop(-num_since)

    def _draw(self, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each row, and its logprob at temperature 1."""
        logprobs = self._logits.float().log_softmax(-1)
        scaled = (logprobs / temperatures.clamp(min=1e-6)[:, None]).softmax(-1)
        drawn = torch.multinomial(scaled, 1, generator=self._generator)[:, 0]
        tokens = torch.where(temperatures > 0, drawn, logprobs.argmax(-1))
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _forward(self, tokens: Tensor, mask: Tensor) -> None:
        """Read `tokens` (rows, new), of which `mask` says which are none."""
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        last = self._last_logits(tokens, positions, mask)
        # A row that read nothing keeps what it would say next.
        is_read = mask[:, -1:].bool()
        self._logits = last if self._logits.shape != last.shape else torch.where(is_read, last, self._logits)

    def _last_logits(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(rows, vocabulary), after the last column."""
        return self._network(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            logits_to_keep=1,
        ).logits[:, -1]

    def _close_holes(self) -> None:
        """Move every row's tokens together, where a fifth of the cache would be holes: long episodes have many."""
        longest = int(self._mask.sum(1).max())
        if self._mask.shape[1] < 1.25 * longest:
            return
        order = self._mask.argsort(dim=1, stable=True)[:, -longest:]
        self._mask = self._mask.gather(1, order)
        self._move_together(order)

    def _move_together(self, order: Tensor) -> None:
        """Keep of each row the columns `order` (rows, columns) alone."""
        layers: list[Any] = self._cache.layers
        for layer in layers:
            places = order[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, places), layer.values.gather(2, places)


# ------------------------------------------------------------------------------------------ keys and values


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, (rows, heads, tokens, channels) each, the start of larger tensors: transformers' own
    copies all of them at every token."""

    def __init__(self) -> None:
        super().__init__()
        self._slabs: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; gives all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._appended(0, self.keys, key_states), self._appended(1, self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def _appended(self, which: int, held: Tensor | None, new: Tensor) -> Tensor:
        assert held is not None
        slab, length = self._slabs[which], held.shape[2] if held.numel() else 0
        stop = length + new.shape[2]
        has_room = slab.numel() and slab.shape[0] == new.shape[0] and stop <= slab.shape[2]
        if not has_room or held.data_ptr() != slab.data_ptr():
            slab = self._slabs[which] = new.new_empty(*new.shape[:2], stop + ROOM_TOKENS, new.shape[3])
            if length:
                slab[:, :, :length] = held
        slab[:, :, length:stop] = new
        return slab[:, :, :stop]


def _grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The queries of a group of heads as further queries of the one that they share: transformers' own copies keys and
    values for each. (rows, heads, queries, channels) -> (rows, queries, heads, channels)"""
    num_rows, num_heads, num_queries, num_channels = query.shape
    group = num_heads // key.shape[1]
    if attention_mask is None and num_queries > 1:
        output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **others)
        return output, None
    stacked = query.reshape(num_rows, key.shape[1], group * num_queries, num_channels)
    mask = None if attention_mask is None else attention_mask.repeat(1, 1, group, 1)
    output = functional.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(query.shape).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
