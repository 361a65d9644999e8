"""How answers leave: as JSON, or as a stream of server-sent events; and what becomes of one that nobody reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


def json_answer(body: dict[str, Any], headers: Mapping[str, str]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


def sse_event(body: dict[str, Any], name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(body) + b"\n\n"


class Closable(Protocol):
    """Something that holds resources until it is closed."""

    async def aclose(self) -> None: ...


class EventStream(Response):
    """A body of server-sent events; they are no longer made once the client has hung up.

    Starlette's StreamingResponse was refused: its task group costs as much as all else that is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], source: Closable, headers: Mapping[str, str]) -> None:
        """`source` is what the events are made from; it is closed at the end, whether or not any was sent."""
        super().__init__(headers=headers)
        self._events = events
        self._source = source

    def init_headers(self, headers: Mapping[str, str] | None = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._source):
            with suppress(ClientGone):  # nobody reads on; uvicorn would log it as the app's failure
                await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


class ClientGone(Exception):
    """The client has hung up, and what was done for it has been ended."""


async def until_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Await the work, but cancel it where the client hangs up: nobody would read the answer. Raises ClientGone then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise ClientGone("the client has hung up")
    finally:
        gone.cancel()
        task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
