"""The running batch of the embedded engine: which sequences run, one forward for all of them, one token for each.

Knows nothing of threads, requests or asyncio. A row computes its tokens, prompt or sampled, in order; when all are
computed, the next one is sampled. Rows that have one token left decode together; the others read their prompts in
chunks. A row for whose next token there is no memory leaves and waits: what it computed may be gone when it comes back,
what it sampled is not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from transformers import PreTrainedModel

from policies.types import EngineError, FinishReason, SampledToken
from runtime.engines.embedded.attention import AttentionMasks
from runtime.engines.embedded.grammar import Grammars
from runtime.engines.embedded.kv_cache import KvCache, slot_order
from runtime.engines.embedded.kv_memory import CachedSequence, KvMemory
from runtime.engines.embedded.lora import LoraRows
from runtime.engines.embedded.prefill import ChunkSize, is_worth_waiting, longest_known_prefix, next_chunks
from runtime.engines.embedded.rows import BatchRow, EngineEvent
from runtime.engines.embedded.sampling import Sampler
from runtime.engines.embedded.shared_prefix import PrefixGroup, SharedPrefix, groups_by_prefix

ROOM_TO_WRITE = 64
"""Tokens that a row's first slot has room for beyond its prompt, if it may write so many."""

NOT_FINITE = "the network's output is not finite, or the grammar allows no token"

RowT = TypeVar("RowT", bound=BatchRow)


class Batch(Generic[RowT]):
    """Sequences that run together, in the order they came."""

    def __init__(
        self,
        network: PreTrainedModel,
        lora_rows: LoraRows,
        grammars: Grammars | None,
        memory: KvMemory,
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
        self._memory = memory
        self._bytes_per_token = memory.bytes_per_token // network.config.num_hidden_layers
        self._kv = KvCache()
        self._masks = AttentionMasks(network.config, network.dtype, network.device)
        self._chunk_size = ChunkSize()
        # Attention over a shared prefix is for CPUs, and for layers that see all of it.
        self._may_share = network.device.type == "cpu" and not self._masks.has_window
        self._decoding: list[RowT] = []
        """Those of the last step."""
        self._groups: list[PrefixGroup[RowT]] = []
        """Of `_decoding`."""
        self._sampled: list[RowT] = []
        """The rows that `_sampler` draws for, in their order."""
        self._sampler: Sampler | None = None

    # ------------------------------------------------------------------------------------ joining and leaving

    def is_worth_waiting(self, row: RowT) -> bool:
        """Whether a row had better join later: one that runs is computing what it begins with."""
        return is_worth_waiting(row, self._reading(), self._memory.sequences())

    def join(self, row: RowT) -> bool:
        """Let a row run, from the longest prefix that is known. False: there is no memory for it now."""
        length, source = longest_known_prefix(row, self._memory.sequences())
        if source is not None:
            self._memory.touch(source)
        cached = CachedSequence(row.token_ids, row.adapter_name)
        row.logprobs.clear()  # one that had to leave reads what it scores again
        room = 0 if row.num_scored else min(ROOM_TO_WRITE, row.sampling.max_tokens - row.num_sampled)
        if not self._memory.place(cached, min(len(row.token_ids) + room, self._max_context_tokens)):
            return False
        if source is not None and source.slab is not None:  # else its memory was needed for this row
            self._memory.copy(source, cached, length)
            self.num_reused_tokens += length
        row.cached = cached
        self.rows.append(row)
        self._sampler = None  # it may be a row that left: what is drawn until it decodes again is not counted there
        return True

    def leave(self, row: RowT, *, is_sound: bool) -> None:
        """Free a row's place. `is_sound`: its keys and values are finite, and may serve a prompt that begins alike."""
        assert row.cached is not None
        self.rows.remove(row)
        # Before its first token nobody has seen whether a row's numbers are finite.
        if is_sound and (row.num_sampled or row.logprobs):
            self._memory.keep(row.cached)
        else:
            self._memory.release(row.cached)
        row.cached = None

    def forget(self, adapter_name: str) -> None:
        """Drop what was kept of an adapter that is unloaded."""
        self._memory.forget(adapter_name)

    # ------------------------------------------------------------------------------------------- running

    def make_room(self) -> list[RowT]:
        """See that each row that decodes has room for its next token. Those who came last leave where there is none:
        they are returned, oldest first, to join again."""
        left: list[RowT] = []
        for row in list(self.rows):
            while row.cached is not None and not self._memory.grow(row.cached, len(row.token_ids)):
                youngest = self.rows[-1]
                self.leave(youngest, is_sound=True)
                left.insert(0, youngest)
        return left

    def step(self) -> list[tuple[RowT, EngineEvent]]:
        """Compute a chunk of the prompts that are being read, and the next token of each row that decodes."""
        decoding = [row for row in self.rows if row.num_left == 1 and not row.num_scored]
        reading = self._reading()
        events: list[tuple[RowT, EngineEvent]] = []
        for group in next_chunks(reading, self._chunk_size.tokens(is_waited_for=bool(decoding))):
            events += self._read(dict(group))
        return events + self._decode(decoding)

    def _reading(self) -> list[RowT]:
        return [row for row in self.rows if row.num_left > 1 or row.num_scored]

    def _read(self, chunks: dict[RowT, int]) -> list[tuple[RowT, EngineEvent]]:
        began = time.perf_counter()
        rows = in_slot_order(chunks)
        try:
            num_logits = max(1, *(num_wanted(row, row.num_computed, row.num_computed + chunks[row]) for row in rows))
            logits = self._forward(rows, [chunks[row] for row in rows], num_logits=num_logits)
            done = [place for place, row in enumerate(rows) if row.num_left == 0 and not row.num_scored]
            ready = [rows[place] for place in done]
            events = self._sample(ready, logits[done, -1], self._sampler_of(ready))
            events += self._score(rows, chunks, logits)
        except Exception as error:
            return failed(rows, f"computing the prompt failed: {error!r}")
        if not events and self._device.type == "cuda":
            torch.cuda.synchronize()  # the clock is read below
        num_tokens = sum(chunks.values())
        self.num_prefilled_tokens += num_tokens
        self._chunk_size.note(num_tokens, time.perf_counter() - began)
        return events

    def _decode(self, decoding: list[RowT]) -> list[tuple[RowT, EngineEvent]]:
        if not decoding:
            return []
        if decoding != self._decoding:
            self._decoding = decoding
            self._groups = groups_by_prefix(decoding, self._bytes_per_token) if self._may_share else []
        rows, shared = arranged(decoding, self._groups)
        if rows != self._sampled or self._sampler is None:
            self._sampled, self._sampler = rows, self._sampler_of(rows)
        self.num_prefilled_tokens += sum(row.num_sampled == 0 for row in rows)
        try:
            return self._sample(rows, self._forward(rows, [1] * len(rows), shared)[:, -1], self._sampler)
        except Exception as error:
            return failed(rows, f"a decoding step failed: {error!r}")

    def _sampler_of(self, rows: Sequence[BatchRow]) -> Sampler:
        samplings = [row.sampling for row in rows]
        if not any(sampling.has_penalties for sampling in samplings):
            return Sampler(samplings, self._device)
        prompts = [row.prompt_token_ids for row in rows]
        said = [row.token_ids[len(row.prompt_token_ids) :] for row in rows]
        return Sampler(samplings, self._device, prompts, said)

    def _forward(
        self,
        rows: Sequence[BatchRow],
        num_new: Sequence[int],
        shared: Sequence[SharedPrefix] = (),
        num_logits: int = 1,
    ) -> torch.Tensor:
        """Compute each row's next `num_new` tokens; gives the logits (rows, num_logits, vocabulary) after the last
        `num_logits` of them.

        Padded on the left, so that each row ends in the last column.
        """
        sequences = [row.cached for row in rows if row.cached is not None]
        width = max(num_new)
        ids, positions = [], []
        for cached, num in zip(sequences, num_new, strict=True):
            start, padding = cached.num_computed, [0] * (width - num)
            ids.append(padding + cached.token_ids[start : start + num])
            positions.append(padding + list(range(start, start + num)))
        is_real = None
        if width > 1:
            is_real = torch.arange(width, device=self._device) >= width - self._tensor(num_new)[:, None]
        position_ids = self._tensor(positions)
        ends = [cached.num_computed + num for cached, num in zip(sequences, num_new, strict=True)]
        self._kv.aim(sequences, position_ids, is_real, shared)
        self._lora_rows.choose([row.adapter_name for row in rows])
        output = self._network(
            input_ids=self._tensor(ids),
            position_ids=position_ids,
            attention_mask=self._masks.build(position_ids, max(ends)),
            past_key_values=self._kv,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        for cached, end in zip(sequences, ends, strict=True):
            cached.num_computed = end
        return output.logits.float()

    def _score(
        self, rows: Sequence[RowT], chunks: dict[RowT, int], logits: torch.Tensor
    ) -> list[tuple[RowT, EngineEvent]]:
        """Take the scored tokens' logprobs of what was just computed; gives the rows that have them all.

        `logits` are (rows, last computed tokens, vocabulary).
        """
        events: list[tuple[RowT, EngineEvent]] = []
        for row, last in zip(rows, logits, strict=True):
            if not row.num_scored:
                continue
            end = row.num_computed
            num = num_wanted(row, end - chunks[row], end)
            targets = row.token_ids[end - num + 1 : end + 1]  # nothing follows the last token
            if targets:
                predicted = last[-num:][: len(targets)].log_softmax(-1)
                row.logprobs += predicted.gather(1, self._tensor(targets)[:, None])[:, 0].tolist()
            if row.num_left == 0:
                is_finite = all(map(math.isfinite, row.logprobs))
                events.append((row, tuple(row.logprobs) if is_finite else EngineError(NOT_FINITE)))
        return events

    def _sample(self, rows: Sequence[RowT], logits: torch.Tensor, sampler: Sampler) -> list[tuple[RowT, EngineEvent]]:
        if not rows:
            return []
        self._forbid_by_grammar(rows, logits)
        uniforms = [row.uniforms.random() for row in rows] if sampler.draws_randomly else ()
        draws = sampler.draw(logits, uniforms)
        parts = zip(rows, draws.token_ids, draws.logprobs, draws.top_logprobs, strict=True)
        return [(row, self._append(row, token_id, logprob, top)) for row, token_id, logprob, top in parts]

    def _forbid_by_grammar(self, rows: Sequence[BatchRow], logits: torch.Tensor) -> None:
        bound = [(i, row.grammar) for i, row in enumerate(rows) if row.grammar]
        if not bound:
            return
        assert self._grammars is not None
        allowed = torch.from_numpy(self._grammars.allowed_tokens([state for _, state in bound])).to(self._device)
        indices = self._tensor([i for i, _ in bound])
        logits[indices] = logits[indices].masked_fill(~allowed, float("-inf"))

    def _append(self, row: BatchRow, token_id: int, logprob: float, top: tuple[tuple[int, float], ...]) -> EngineEvent:
        if not math.isfinite(logprob):
            return EngineError(NOT_FINITE)
        row.token_ids.append(token_id)
        if row.grammar:
            try:
                row.grammar.advance(token_id)
            except EngineError as error:
                return error
        return SampledToken(token_id, logprob, top, self._finish_reason(row, token_id))

    def _finish_reason(self, row: BatchRow, token_id: int) -> FinishReason | None:
        if token_id in row.sampling.stop_token_ids or (row.grammar and token_id in row.grammar.stop_token_ids):
            return FinishReason.STOP
        if row.num_sampled == row.sampling.max_tokens or len(row.token_ids) == self._max_context_tokens:
            return FinishReason.LENGTH
        return None

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)


def num_wanted(row: BatchRow, start: int, end: int) -> int:
    """Of a row's places from `start` to `end`, how many at the end have logits that are wanted for its scored tokens:
    those from the one before the first scored token on."""
    return max(0, end - max(start, row.num_reusable)) if row.num_scored else 0


def in_slot_order(rows: Sequence[RowT] | dict[RowT, int]) -> list[RowT]:
    """As `KvCache` wants them: rows whose keys lie side by side are computed together."""
    return sorted(rows, key=lambda row: slot_order(row.cached))  # type: ignore[arg-type]


def arranged(decoding: Sequence[RowT], groups: Sequence[PrefixGroup[RowT]]) -> tuple[list[RowT], list[SharedPrefix]]:
    """The rows of a forward, those of a group beside each other, and what these share."""
    grouped = {row for group in groups for row in group.rows}
    rows = in_slot_order([row for row in decoding if row not in grouped])
    shared = []
    for group in groups:
        shared.append(SharedPrefix(slice(len(rows), len(rows) + len(group.rows)), group.num_tokens))
        rows += in_slot_order(group.rows)
    return rows, shared


def failed(rows: Sequence[RowT], problem: str) -> list[tuple[RowT, EngineEvent]]:
    return [(row, EngineError(problem)) for row in rows]
