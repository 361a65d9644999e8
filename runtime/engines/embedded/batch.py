"""The running batch of the embedded engine: which sequences run, one forward for all of them, one token for each.

Knows nothing of threads, requests or asyncio. Row i of the batch owns slot i of the KV cache; when a row leaves, the
last one moves into its slot.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from policies.types import Adapter, EngineError, FinishReason, SampledToken, SamplingParams, TokenIds
from runtime.engines.embedded.attention import AttentionMasks
from runtime.engines.embedded.grammar import Grammars, GrammarState
from runtime.engines.embedded.kv_cache import KvSlots
from runtime.engines.embedded.lora import LoraRows
from runtime.engines.embedded.sampling import Sampler

MIN_SHARED_TOKENS = 16
"""A common prefix shorter than this is computed again: copying it costs as much."""
MAX_PADDED_LENGTH = 1.33
"""Prompts are computed together where the longest has at most this many times the tokens of the shortest."""


@dataclass(eq=False, slots=True)
class Row:
    """One sequence on its way through the batch."""

    prompt_token_ids: TokenIds
    sampling: SamplingParams
    adapter: Adapter | None
    grammar: GrammarState | None
    token_ids: list[int] = field(init=False)
    """The prompt and what was sampled so far. The last one's keys and values are not computed yet."""
    uniforms: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.uniforms = random.Random(self.sampling.seed)

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    @property
    def num_sampled(self) -> int:
        return len(self.token_ids) - len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """A finished row's keys and values, for a prompt that begins alike."""

    token_ids: list[int]
    adapter_name: str | None


RowT = TypeVar("RowT", bound=Row)

Outcome = SampledToken | EngineError
"""What a step gave a row: its next token, or why the row cannot go on."""


class Batch(Generic[RowT]):
    """Up to `max_rows` sequences that decode together."""

    def __init__(
        self,
        network: PreTrainedModel,
        lora_rows: LoraRows,
        grammars: Grammars | None,
        max_rows: int,
        max_context_tokens: int,
    ) -> None:
        self.rows: list[RowT] = []
        self.num_prefilled_tokens = 0
        """Prompt tokens that went through the network."""
        self.num_reused_tokens = 0
        """Prompt tokens whose keys and values were there already."""
        self._network = network
        self._lora_rows = lora_rows
        self._grammars = grammars
        self._device = network.device
        self._max_context_tokens = max_context_tokens
        self._kv = KvSlots(network.config, 2 * max_rows, max_context_tokens, network.dtype, network.device)
        self._masks = AttentionMasks(network.config, network.dtype, network.device)
        self._kept: dict[int, KeptPrefix] = {}
        """By slot, least recently used first; the slots behind those of the rows."""
        self._free_slots = list(range(max_rows, 2 * max_rows))
        self._sampler: Sampler | None = None
        """For the rows as they are; None: a row joined or left since."""

    # ------------------------------------------------------------------------------------------- joining

    def join(self, arrivals: Sequence[RowT]) -> list[Outcome]:
        """Compute the arrivals' prompts, sample their first tokens, and let them run with the others.

        If this raises, no arrival has joined and the others are as they were.
        """
        num_running = len(self.rows)
        try:
            outcomes: dict[RowT, Outcome] = {}
            for wave in self._waves(arrivals):
                for group in self._alike(wave):
                    outcomes |= zip(group, self._prefill(group), strict=True)
            return [outcomes[row] for row in arrivals]
        except Exception:
            del self.rows[num_running:]
            raise
        finally:
            self._sampler = None

    def _waves(self, arrivals: Sequence[RowT]) -> list[list[RowT]]:
        """Split off the arrivals which begin like another arrival: they copy its prefix once it is computed.

        So the samples of one prompt (`n`, or an expert's state inspected) compute it once.
        """
        leaders: list[RowT] = []
        followers: list[RowT] = []
        for row in arrivals:
            follows = any(
                row.adapter_name == leader.adapter_name
                and common_prefix(row.token_ids, leader.token_ids) >= MIN_SHARED_TOKENS
                for leader in leaders
            )
            (followers if follows else leaders).append(row)
        return [wave for wave in (leaders, followers) if wave]

    def _alike(self, wave: Sequence[RowT]) -> list[list[RowT]]:
        """Split a wave into groups that have about as many tokens to compute each: padding costs as much as tokens."""
        lengths = {row: len(row.token_ids) - self._known_prefix(row)[0] for row in wave}
        groups: list[list[RowT]] = []
        for row in sorted(wave, key=lengths.__getitem__):
            if groups and lengths[row] <= MAX_PADDED_LENGTH * lengths[groups[-1][0]]:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def _prefill(self, arrivals: Sequence[RowT]) -> list[Outcome]:
        first = len(self.rows)
        self._kv.reserve(max(len(row.token_ids) for row in arrivals))
        starts = [self._copy_known_prefix(row, first + i) for i, row in enumerate(arrivals)]
        self.rows.extend(arrivals)
        logits = self._forward_prompts(arrivals, starts, first)
        self.num_prefilled_tokens += sum(len(row.token_ids) for row in arrivals) - sum(starts)
        self.num_reused_tokens += sum(starts)
        return self._sample(arrivals, logits, Sampler([row.sampling for row in arrivals], self._device))

    def _known_prefix(self, row: Row) -> tuple[int, int]:
        """How many of a prompt's tokens some slot knows under the same adapter, and which slot."""
        known = [(slot, running.token_ids[:-1], running.adapter_name) for slot, running in enumerate(self.rows)]
        known += [(slot, kept.token_ids, kept.adapter_name) for slot, kept in self._kept.items()]
        lengths = [(common_prefix(row.token_ids, ids), slot) for slot, ids, name in known if name == row.adapter_name]
        length, slot = max(lengths, default=(0, -1))
        length = min(length, len(row.token_ids) - 1)  # the last token is always computed: its logits are wanted
        return (length, slot) if length >= MIN_SHARED_TOKENS else (0, -1)

    def _copy_known_prefix(self, row: Row, slot: int) -> int:
        """Bring the longest known prefix of a prompt into its slot; how many tokens that is."""
        length, source = self._known_prefix(row)
        if length:
            self._kv.copy(source, slot, length)
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # now the most recently used
        return length

    def _forward_prompts(self, arrivals: Sequence[Row], starts: Sequence[int], first: int) -> torch.Tensor:
        """The logits (arrivals, vocabulary) after each prompt. Padded on the left, so that each ends in the last
        column."""
        suffixes = [row.token_ids[start:] for row, start in zip(arrivals, starts, strict=True)]
        width = max(len(suffix) for suffix in suffixes)
        pads = [width - len(suffix) for suffix in suffixes]
        ids = [[0] * pad + suffix for pad, suffix in zip(pads, suffixes, strict=True)]
        positions = [
            [0] * pad + list(range(start, start + width - pad)) for pad, start in zip(pads, starts, strict=True)
        ]
        pads_column = self._tensor(pads)[:, None]
        is_real = torch.arange(width, device=self._device) >= pads_column
        row_indices, _ = is_real.nonzero(as_tuple=True)
        position_ids = self._tensor(positions)
        last = first + len(arrivals)
        self._kv.aim(
            rows=slice(first, last),
            num_tokens=max(len(row.token_ids) for row in arrivals),
            slots=row_indices + first,
            positions=position_ids[is_real],
            chosen=is_real.flatten().nonzero()[:, 0],
        )
        self._lora_rows.choose([row.adapter_name for row in arrivals])
        return self._forward(self._tensor(ids), position_ids, max(len(row.token_ids) for row in arrivals))

    # ------------------------------------------------------------------------------------------- running

    def step(self) -> list[Outcome]:
        """One forward for all rows, and the next token of each, parallel to `rows`."""
        num_rows = len(self.rows)
        lengths = [len(row.token_ids) for row in self.rows]
        self._kv.reserve(max(lengths))
        positions = self._tensor(lengths) - 1
        self._kv.aim(slice(0, num_rows), max(lengths), torch.arange(num_rows, device=self._device), positions)
        self._lora_rows.choose([row.adapter_name for row in self.rows])
        ids = self._tensor([row.token_ids[-1] for row in self.rows])
        logits = self._forward(ids[:, None], positions[:, None], max(lengths))
        if self._sampler is None:
            self._sampler = Sampler([row.sampling for row in self.rows], self._device)
        return self._sample(self.rows, logits, self._sampler)

    def _forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
        output = self._network(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self._masks.build(position_ids, num_tokens),
            past_key_values=self._kv,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _sample(self, rows: Sequence[Row], logits: torch.Tensor, sampler: Sampler) -> list[Outcome]:
        self._forbid_by_grammar(rows, logits)
        uniforms = [row.uniforms.random() for row in rows] if sampler.draws_randomly else ()
        draws = sampler.draw(logits, uniforms)
        parts = zip(rows, draws.token_ids, draws.logprobs, draws.top_logprobs, strict=True)
        return [self._append(row, token_id, logprob, top) for row, token_id, logprob, top in parts]

    def _forbid_by_grammar(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        bound = [(i, row.grammar) for i, row in enumerate(rows) if row.grammar]
        if not bound:
            return
        assert self._grammars is not None
        allowed = torch.from_numpy(self._grammars.allowed_tokens([state for _, state in bound])).to(self._device)
        indices = self._tensor([i for i, _ in bound])
        logits[indices] = logits[indices].masked_fill(~allowed, float("-inf"))

    def _append(self, row: Row, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Outcome:
        if not math.isfinite(logprob):
            return EngineError("the network's output is not finite, or the grammar allows no token")
        row.token_ids.append(token_id)
        if row.grammar:
            try:
                row.grammar.advance(token_id)
            except EngineError as error:
                return error
        return SampledToken(token_id, logprob, top, self._finish_reason(row, token_id))

    def _finish_reason(self, row: Row, token_id: int) -> FinishReason | None:
        if token_id in row.sampling.stop_token_ids or (row.grammar and token_id in row.grammar.stop_token_ids):
            return FinishReason.STOP
        if row.num_sampled == row.sampling.max_tokens or len(row.token_ids) == self._max_context_tokens:
            return FinishReason.LENGTH
        return None

    # ------------------------------------------------------------------------------------------- leaving

    def leave(self, row: RowT, *, keep: bool) -> None:
        """Free a row's place. `keep`: its keys and values are sound, and may serve a prompt that begins alike."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        num_tokens = len(row.token_ids) - 1
        if not keep:
            self._kv.wipe(slot)
        elif num_tokens >= MIN_SHARED_TOKENS:
            self._keep(slot, KeptPrefix(row.token_ids[:-1], row.adapter_name))
        if slot != last:
            self._kv.copy(last, slot, len(self.rows[last].token_ids) - 1)
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        self._sampler = None

    def _keep(self, slot: int, prefix: KeptPrefix) -> None:
        """Copy a slot to those kept: over a prefix of it, or a free one, or the least recently used."""
        target = next((kept for kept, old in self._kept.items() if is_prefix(old, prefix)), None)
        if target is None:
            target = self._free_slots.pop() if self._free_slots else next(iter(self._kept))
        self._kept.pop(target, None)
        self._kv.copy(slot, target, len(prefix.token_ids))
        self._kept[target] = prefix

    def forget(self, adapter_name: str) -> None:
        """Drop what was kept of an adapter that is unloaded."""
        for slot in [slot for slot, kept in self._kept.items() if kept.adapter_name == adapter_name]:
            del self._kept[slot]
            self._free_slots.append(slot)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)


def is_prefix(old: KeptPrefix, new: KeptPrefix) -> bool:
    """Whether `new` knows all that `old` knows."""
    return old.adapter_name == new.adapter_name and new.token_ids[: len(old.token_ids)] == old.token_ids


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is many times faster than a loop."""
    if not left or not right or left[0] != right[0]:
        return 0
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
