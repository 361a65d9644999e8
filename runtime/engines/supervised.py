"""An engine that is started again when it dies: behind one `Engine`, one real engine after the other.

While none is up, requests are refused at once and `health` says why. A new engine is shown to the server only when
the acting adapter is loaded and verified on it again (`restore`): until then its adapters are not those that the
server believes to be loaded. Restarting the whole server was refused: leases and open episodes would be lost with it.

Not covered: an acting adapter that kills every engine it is loaded into. The engine is then tried again for ever,
ever more slowly, until somebody rolls back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from policies.types import (
    Adapter,
    Engine,
    EngineError,
    EngineHealth,
    EngineLimits,
    SampledToken,
    SamplingParams,
)

_log = logging.getLogger(__name__)

_is_restoring: ContextVar[bool] = ContextVar("is_restoring", default=False)
"""Set in the task that restores the acting adapter: it alone may use an engine that nobody else sees yet."""

WATCH_EVERY_S = 0.1
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Pauses between two tries double from the first to the longest."""
STEADY_AFTER_S = 60.0
"""An engine that lived this long died of something new: the pauses begin with the shortest again."""


StartEngine = Callable[[Callable[[str], None]], Awaitable[Engine]]
"""Starts an engine, and tells what it is at."""


class SupervisedEngine:
    """The `Engine` protocol of policies/types.py on an engine that may be replaced. Serves after `start`."""

    def __init__(self, start_engine: StartEngine, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._start_engine = start_engine
        self._first_pause_s = first_pause_s
        self._engine: Engine | None = None
        self._limits: EngineLimits | None = None
        self._is_ready = False
        self._problem = "the engine has not been started"
        self._is_starting = False
        self._problem_since = time.monotonic()
        self._watching: asyncio.Task[None] | None = None
        self.num_restarts = 0
        """How often an engine has been replaced since the server started."""

    async def start(self, restore: Callable[[], Awaitable[Any]]) -> None:
        """Start the first engine, restore the acting adapter on it, and watch over it from now on.

        Raises what starting it raises: an engine that never ran is not tried again.
        """
        await self._bring_up(restore)
        self._watching = asyncio.create_task(self._watch(restore))

    @property
    def limits(self) -> EngineLimits:
        """Of the engine that is up, or was the last."""
        if self._limits is None:
            raise EngineError(self._told())
        return self._limits

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, adapter: Adapter | None, *, stream: bool = True
    ) -> AsyncIterator[SampledToken]:
        """See `Engine.generate`."""
        completion = self._usable().generate(prompt_token_ids, sampling, adapter, stream=stream)
        async with contextlib.aclosing(completion) as tokens:  # type: ignore[type-var]
            async for token in tokens:
                yield token

    async def score(
        self, prompt_token_ids: Sequence[int], completion_token_ids: Sequence[int], adapter: Adapter | None
    ) -> tuple[float, ...]:
        """See `Engine.score`."""
        return await self._usable().score(prompt_token_ids, completion_token_ids, adapter)

    async def load_adapter(self, adapter: Adapter) -> None:
        """See `Engine.load_adapter`."""
        await self._usable().load_adapter(adapter)

    async def unload_adapter(self, adapter: Adapter) -> None:
        """See `Engine.unload_adapter`."""
        await self._usable().unload_adapter(adapter)

    def loaded_adapters(self) -> tuple[Adapter, ...]:
        """None while no engine is up: what a dead one held is gone."""
        return self._usable().loaded_adapters() if self.health().is_alive else ()

    def health(self) -> EngineHealth:
        try:
            health = self._usable().health()
        except EngineError as error:
            health = EngineHealth(False, 0, 0, str(error), self._is_starting)
        return replace(health, num_restarts=self.num_restarts)

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait({self._watching})
        await self._take_down("the engine is closed")

    # ------------------------------------------------------------------------------------ one after the other

    def _usable(self) -> Engine:
        if self._engine is None or not (self._is_ready or _is_restoring.get()):
            raise EngineError(self._told())
        return self._engine

    def _told(self) -> str:
        """What is the matter, and for how long, where that will pass."""
        if not self._is_starting:
            return self._problem
        return f"{self._problem} ({time.monotonic() - self._problem_since:.0f} s so far)"

    def _set_problem(self, problem: str, is_starting: bool) -> None:
        self._problem, self._is_starting, self._problem_since = problem, is_starting, time.monotonic()

    async def _watch(self, restore: Callable[[], Awaitable[Any]]) -> None:
        loop = asyncio.get_running_loop()
        pause = self._first_pause_s
        while True:
            began = loop.time()
            problem = await self._until_dead()
            _log.error("the engine has died: %s", problem)
            if loop.time() - began > STEADY_AFTER_S:
                pause = self._first_pause_s
            pause = await self._replace(restore, problem, pause)

    async def _until_dead(self) -> str:
        assert self._engine is not None
        while (health := self._engine.health()).is_alive:  # noqa: ASYNC110 - the protocol has no event for it
            await asyncio.sleep(WATCH_EVERY_S)
        return health.problem

    async def _replace(self, restore: Callable[[], Awaitable[Any]], problem: str, pause: float) -> float:
        """Try until an engine is up. Returns the next pause."""
        while True:
            await self._take_down(f"the engine has died ({problem}); it is started again after {pause:.0f} s", True)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            try:
                await self._bring_up(restore)
            except Exception as error:  # whatever it is, the next try may do better
                _log.exception("the engine could not be started again")
                problem = str(error)
            else:
                self.num_restarts += 1
                _log.warning("the engine is up again")
                return pause

    async def _bring_up(self, restore: Callable[[], Awaitable[Any]]) -> None:
        self._set_problem("the engine is starting", is_starting=True)
        self._engine = await self._start_engine(self._tell_stage)
        self._limits = self._engine.limits
        self._set_problem("the acting adapter is being loaded into the engine", is_starting=True)
        try:
            with _restoring():
                await restore()
        except BaseException:
            await self._take_down("the acting adapter could not be loaded")
            raise
        self._is_ready = True

    def _tell_stage(self, stage: str) -> None:
        self._set_problem(f"the engine is starting: {stage}", is_starting=True)

    async def _take_down(self, problem: str, is_starting: bool = False) -> None:
        engine, self._engine = self._engine, None
        self._is_ready = False
        self._set_problem(problem, is_starting)
        if engine is not None:
            await engine.close()


@contextlib.contextmanager
def _restoring() -> Iterator[None]:
    token = _is_restoring.set(True)
    try:
        yield
    finally:
        _is_restoring.reset(token)
