"""How the server ends: what runs is let finish for a while, and what is cut then is told so in its own form.

uvicorn stops taking connections, waits, and cancels: a client would see a stream that breaks off. Here every run that
is still going when the time is over raises ServerStopping where it waits for its next event, and each endpoint says
that as it says any error: a status, or an error event in the stream.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

from runtime.http.connections import DEFAULT_LIMITS, ConnectionLimits, guarded

T = TypeVar("T")

AFTER_CUT_S = 3
"""For what is cut to be told so and to reach its client."""


class ServerStopping(Exception):
    """The server ends, and the time for what was running is over."""


class Cutting:
    """The tasks that wait for a run's next event; `cut` ends their waiting."""

    def __init__(self) -> None:
        self.is_cut = False
        self._waiting: set[asyncio.Task[object]] = set()

    def cut(self) -> None:
        """Let everything that waits, and will wait, raise ServerStopping."""
        self.is_cut = True
        for task in self._waiting:
            task.cancel()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around an await that must end when the server does. Cancelling the task is a hundred times cheaper than to
        race every token against an event."""
        if self.is_cut:
            raise ServerStopping("the server is stopping")
        task = asyncio.current_task()
        assert task is not None
        self._waiting.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.is_cut and task.uncancel() == 0:
                raise ServerStopping("the server is stopping: ask again in a moment") from None
            raise
        finally:
            self._waiting.discard(task)

    async def next_of(self, events: AsyncIterator[T]) -> T:
        with self.waiting():
            return await anext(events)


class DrainingServer(uvicorn.Server):
    """uvicorn's server, ending as said above."""

    def __init__(self, config: uvicorn.Config, cutting: Cutting, grace_s: float) -> None:
        super().__init__(config)
        self._cutting = cutting
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(self._grace_s, self._cutting.cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()


def server_of(
    app: ASGIApp,
    cutting: Cutting,
    *,
    log_level: str = "error",
    grace_s: float = 10.0,
    limits: ConnectionLimits = DEFAULT_LIMITS,
) -> DrainingServer:
    """A server with bounds on what a connection may cost, which ends without breaking off in mid-sentence."""
    config = uvicorn.Config(
        app,
        http=guarded(limits),
        ws="none",
        log_level=log_level,
        timeout_graceful_shutdown=round(grace_s + AFTER_CUT_S),
    )
    return DrainingServer(config, cutting, grace_s)
