"""The embedded engine: a causal network from a folder, with PEFT adapters, served in this process.

One thread runs the batch; a request that comes while others run joins them at the next token. transformers' own
continuous batching (`ContinuousBatchingManager`) was looked at first and runs on CPU, but it cannot stand here: its
seed is one for the whole batch, it reports the sampled token's logprob only and none of the likeliest tokens, it
takes no adapter per request, and it is slower than this on small networks (benchmarks/embedded_engine.py).

Memory for keys and values is bounded by bytes (`kv_memory`). A request that does not fit now waits; the longest that
fits bounds the context, so what can never fit is refused before it runs.

Not covered: quantised weights, several GPUs. vLLM does those.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from policies.adapters.probe import tolerance_in
from policies.types import Adapter, EngineError, EngineHealth, EngineLimits, SampledToken, SamplingParams
from runtime.engines.checks import check_loaded, check_place, check_request, check_scored, check_unused
from runtime.engines.embedded.adapter_weights import read_adapter
from runtime.engines.embedded.batch import Batch
from runtime.engines.embedded.grammar import Grammars
from runtime.engines.embedded.kv_budget import context_cut, kv_budget
from runtime.engines.embedded.kv_memory import KvMemory, KvShape
from runtime.engines.embedded.lora import LoraRows, LoraWeights
from runtime.engines.embedded.network import load_network
from runtime.engines.embedded.precision import Precision
from runtime.engines.embedded.rows import BatchRow, EngineEvent

logger = logging.getLogger(__name__)

MAX_LOOKED_AT = 64
"""Waiting requests that are looked at in a step for one that may join."""


@dataclass(eq=False, slots=True)
class Request(BatchRow):
    """A row, and the coroutine that waits for its tokens."""

    loop: asyncio.AbstractEventLoop = field(kw_only=True)
    events: asyncio.Queue[EngineEvent] = field(default_factory=asyncio.Queue, kw_only=True)
    is_cancelled: bool = field(default=False, kw_only=True)
    """Set by the coroutine when nobody reads on; the thread sees it at its next step."""


class EmbeddedEngine:
    """The `Engine` protocol of policies/types.py on transformers and PEFT."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        tokenizer: Any = None,
        device: str = "auto",
        precision: Precision = "auto",
        max_batch_size: int = 32,
        max_adapters: int = 4,
        max_rank: int = 64,
        max_context_tokens: int | None = None,
        kv_memory_bytes: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load the network and start the thread. Raises ValueError where the memory does not hold the context.

        `tokenizer` is only needed for grammars. `device` is a torch device, or `auto`: a GPU if there is one.
        `precision` auto is 32 bits on a CPU, and the network's own type on a GPU; see precision.py.
        `kv_memory_bytes`, for keys and values, defaults to a quarter of what is free, if the batch has use for so much.
        `max_context_tokens` defaults to what the network was made for, at most 4096, and what that memory holds.
        `num_threads` are torch's.
        """
        self._network = load_network(model_path, device, precision)
        config, shape = self._network.config, KvShape.of(self._network)
        num_bytes, longest = kv_budget(
            shape, kv_memory_bytes, max_context_tokens, config.max_position_embeddings, max_batch_size
        )
        cut = context_cut(shape, num_bytes, longest, max_context_tokens, config.max_position_embeddings)
        if cut:
            logger.warning("the context is short: %s", cut)
        self._limits = EngineLimits(
            max_context_tokens=longest,
            max_adapters=max_adapters,
            max_rank=max_rank,
            vocab_size=config.vocab_size,
            supports_grammar=tokenizer is not None,
            logprob_tolerance=tolerance_in(self._network.dtype),
            context_cut=cut,
        )
        self._grammars = Grammars(tokenizer, config.vocab_size) if tokenizer is not None else None
        self._lora_rows = LoraRows(self._network)
        self._memory = KvMemory(shape, num_bytes, longest, max_kept=2 * max_batch_size)
        self._batch: Batch[Request] = Batch(self._network, self._lora_rows, self._grammars, self._memory, longest)
        self._max_batch_size = max_batch_size
        self._num_threads = num_threads
        self._adapters: dict[str, Adapter] = {}
        # What the coroutines hand to the thread; both deques and `_problem` are guarded by the condition.
        self._work = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._commands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._problem = ""
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Request, EngineEvent]]] = {}
        self._thread = threading.Thread(target=self._run, name="embedded-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------- what the coroutines call

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def num_prefilled_tokens(self) -> int:
        """Prompt tokens that went through the network since the start."""
        return self._batch.num_prefilled_tokens

    @property
    def num_reused_tokens(self) -> int:
        """Prompt tokens that an earlier request's keys and values spared since the start."""
        return self._batch.num_reused_tokens

    @property
    def kv_memory_bytes(self) -> int:
        """Taken by keys and values so far."""
        return self._memory.num_bytes

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        """See `Engine.generate`. A grammar that does not compile is an EngineError too."""
        check_request(prompt_token_ids, sampling, self._limits)
        check_loaded(adapter, self._adapters)
        grammar = None
        if sampling.grammar is not None:
            assert self._grammars is not None
            grammar = await asyncio.to_thread(self._grammars.start, sampling.grammar, sampling.stop_token_ids)
        loop = asyncio.get_running_loop()
        request = Request(tuple(prompt_token_ids), sampling, adapter, grammar, loop=loop)
        self._submit(request)
        try:
            while True:
                event = await request.events.get()
                if isinstance(event, EngineError):
                    raise event
                assert isinstance(event, SampledToken)
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            request.is_cancelled = True

    async def score(
        self, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], adapter: Adapter | None
    ) -> tuple[float, ...]:
        """See `Engine.score`. A row of the batch, read like a prompt in chunks beside those that run."""
        check_scored(prompt_token_ids, completion_token_ids, self._limits)
        check_loaded(adapter, self._adapters)
        token_ids, num_scored = (*prompt_token_ids, *completion_token_ids), len(completion_token_ids)
        loop = asyncio.get_running_loop()
        request = Request(token_ids, SamplingParams(max_tokens=1), adapter, None, num_scored, loop=loop)
        self._submit(request)
        try:
            event = await request.events.get()
        finally:
            request.is_cancelled = True
        if isinstance(event, EngineError):
            raise event
        assert isinstance(event, tuple)
        return event

    async def load_adapter(self, adapter: Adapter) -> None:
        """See `Engine.load_adapter`. The files are read beside the running batch; only the last move stops it."""
        check_place(adapter, self._adapters, self._limits)
        weights = await asyncio.to_thread(read_adapter, adapter.path, self._network, self._limits.max_rank)
        await self._command(lambda: self._install(adapter, weights))

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See `Engine.unload_adapter`."""
        await self._command(lambda: self._remove(adapter))

    def loaded_adapters(self) -> tuple[Adapter, ...]:
        return tuple(self._adapters.values())

    def health(self) -> EngineHealth:
        with self._work:
            return EngineHealth(not self._problem, len(self._batch.rows), len(self._waiting), self._problem)

    async def close(self) -> None:
        """See `Engine.close`."""
        with self._work:
            self._problem = self._problem or "the engine is closed"
            self._work.notify()
        await asyncio.to_thread(self._thread.join)

    def _submit(self, request: Request) -> None:
        with self._work:
            if self._problem:
                raise EngineError(self._problem)
            self._waiting.append(request)
            self._work.notify()

    async def _command(self, action: Callable[[], None]) -> None:
        """Have the thread do something between two steps."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it will be done, also where the one who asks has gone away meanwhile
        with self._work:
            if self._problem:
                raise EngineError(self._problem)
            self._commands.append((action, done))
            self._work.notify()
        await asyncio.wrap_future(done)

    # --------------------------------------------------------------------------------- what the thread does

    def _run(self) -> None:
        try:
            if self._num_threads is not None:
                torch.set_num_threads(self._num_threads)  # OpenMP counts threads per calling thread
            with torch.inference_mode():
                while self._wait_for_work():
                    self._obey()
                    self._step()
        except BaseException as error:
            logger.exception("the engine's thread died")
            self._stop(f"the engine's thread died: {error!r}")
        self._stop("the engine is closed")

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine is to end."""
        with self._work:
            self._work.wait_for(lambda: self._problem or self._batch.rows or self._waiting or self._commands)
            return not self._problem

    def _obey(self) -> None:
        while self._commands:
            action, done = self._commands.popleft()
            try:
                action()
                done.set_result(None)
            except Exception as error:
                done.set_exception(error)

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        left = self._batch.make_room()
        with self._work:
            self._waiting.extendleft(reversed(left))
        self._settle(self._batch.step())
        self._deliver()

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._batch.rows if row.is_cancelled]:
            self._batch.leave(row, is_sound=True)
        with self._work:
            for request in [request for request in self._waiting if request.is_cancelled]:
                self._waiting.remove(request)

    def _admit(self) -> None:
        """Let those join who waited longest, as many as find a place and memory."""
        with self._work:
            waiting = list(itertools.islice(self._waiting, MAX_LOOKED_AT))
        for request in waiting:
            if len(self._batch.rows) == self._max_batch_size:
                return
            if self._batch.is_worth_waiting(request):
                continue
            if not self._batch.join(request):
                return
            with self._work:
                self._waiting.remove(request)

    def _settle(self, events: Sequence[tuple[Request, EngineEvent]]) -> None:
        """Post what a step gave, and let those leave who are done or failed."""
        for request, event in events:
            self._post(request, event)
            if isinstance(event, EngineError):
                self._batch.leave(request, is_sound=False)
            elif isinstance(event, tuple) or event.finish_reason is not None:
                self._batch.leave(request, is_sound=True)

    def _post(self, request: Request, event: EngineEvent) -> None:
        self._outbox.setdefault(request.loop, []).append((request, event))

    def _deliver(self) -> None:
        """Hand a step's events over: one call per event loop, however many rows ran."""
        outbox, self._outbox = self._outbox, {}
        for loop, posts in outbox.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed, and with it everyone who waits there
                loop.call_soon_threadsafe(put_events, posts)

    def _install(self, adapter: Adapter, weights: Mapping[str, LoraWeights]) -> None:
        check_place(adapter, self._adapters, self._limits)
        self._lora_rows.add(adapter.name, weights)
        self._adapters[adapter.name] = adapter

    def _remove(self, adapter: Adapter) -> None:
        check_loaded(adapter, self._adapters)
        with self._work:
            check_unused(adapter, sum(one.adapter == adapter for one in (*self._batch.rows, *self._waiting)))
        del self._adapters[adapter.name]
        self._lora_rows.remove(adapter.name)
        self._batch.forget(adapter.name)

    def _stop(self, problem: str) -> None:
        """Refuse what comes from now on, and end all that is pending."""
        with self._work:
            self._problem = self._problem or problem
            requests = [*self._batch.rows, *self._waiting]
            self._waiting.clear()
            self._batch.rows.clear()
            commands = list(self._commands)
            self._commands.clear()
        for request in requests:
            self._post(request, EngineError(self._problem))
        for _, done in commands:
            done.set_exception(EngineError(self._problem))
        self._deliver()


def put_events(posts: Sequence[tuple[Request, EngineEvent]]) -> None:
    """Runs on the event loop."""
    for request, event in posts:
        request.events.put_nowait(event)
