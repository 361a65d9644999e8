"""What a connection may cost before anybody has shown a key: uvicorn's protocol with bounds on size, time and number.

uvicorn itself waits for ever for the end of a request's head or body, takes a head of any length (at quadratic cost),
and leaves a client that does not read its answer alone with it. Refused: limits of a proxy alone, since the bare
server can be reached by whoever is on the machine; and another server, since the rest of uvicorn serves us well.

When all places are taken, a newcomer gets that of the connection that has said nothing useful for longest: a thousand
half-sent requests cannot keep out one whole one.
"""

from __future__ import annotations

import asyncio
import resource
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_RESERVED_FILES = 256
"""Of the files that the process may open yet: for the database's readers, adapters, the learner, tools."""


def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 4096
    num_open = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    return max(32, min(4096, soft - num_open - _RESERVED_FILES))


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may cost."""

    head_bytes: int = 32 * 1024
    """Of the request line and headers, and of what is no body between two pieces of a body, or after it."""
    head_s: float = 10.0
    """From the connection, or the first byte of a later request, to the end of its headers."""
    body_s: float = 60.0
    """From there to the end of the body."""
    unread_s: float = 120.0
    """How long a client may leave an answer unread."""
    connections: int = 0
    """Open at a time; 0: as many as the process may have files, less those it needs."""

    @property
    def most_connections(self) -> int:
        return self.connections or _most_connections()


DEFAULT_LIMITS = ConnectionLimits()


class _Phase(Enum):
    """What a connection is waiting for."""

    HEAD = auto()  # the end of a request's headers
    BODY = auto()  # the end of its body
    ANSWER = auto()  # our answer
    IDLE = auto()  # the next request; uvicorn's keep-alive time-out ends it


def guarded(limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """The protocol class with these limits, for `uvicorn.Config(http=...)`."""
    return type("GuardedProtocol", (_GuardedProtocol,), {"limits": limits, "most": limits.most_connections})


class _GuardedProtocol(HttpToolsProtocol):
    limits: ConnectionLimits
    most: int
    transport: Any
    cycle: Any

    def __init__(self, *values: Any, **more: Any) -> None:
        super().__init__(*values, **more)
        self._phase = _Phase.HEAD
        self._head_bytes = 0
        self._bytes_beside_body = 0
        """That came since the last piece of a body: sizes of its chunks, what is said beside them, trailers."""
        self._since = self.loop.time()
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------------------- what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for(_Phase.HEAD)
        if len(self.connections) > self.most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._phase is _Phase.IDLE:
            self._wait_for(_Phase.HEAD)
        if self._phase is _Phase.HEAD:
            self._head_bytes += len(data)
        elif self._phase is _Phase.BODY:
            self._bytes_beside_body += len(data)
        self._parse(data)
        if self._phase is _Phase.HEAD and self._head_bytes > self.limits.head_bytes:
            self._refuse(431, b"Request Header Fields Too Large", b"the request's headers are too large")
        if self._phase is _Phase.BODY and self._bytes_beside_body > self.limits.head_bytes:
            self._refuse(431, b"Request Header Fields Too Large", b"what comes with the request's body is too large")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.limits.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    # ------------------------------------------------------------------------------- what the parser calls

    def on_message_begin(self) -> None:
        if self._phase is not _Phase.HEAD:  # a request that follows on another's heels
            self._wait_for(_Phase.HEAD)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; one that comes after the body is a trailer, which nobody here reads: it would be kept beside the
        headers that the key was read from."""
        if self._phase is not _Phase.BODY:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.head_bytes:
            self._refuse(431, b"Request Header Fields Too Large", b"the request's headers are too large")
            return
        if self._offers_another_protocol():
            return
        self._wait_for(_Phase.BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._bytes_beside_body = 0
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is None or self.transport.is_closing() or self._offers_another_protocol():
            return
        self._wait_for(_Phase.IDLE if self.cycle.response_complete else _Phase.ANSWER)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._phase is _Phase.ANSWER:
            self._wait_for(_Phase.IDLE)
        super().on_response_complete()

    # ------------------------------------------------------------------------------------------ our own

    def _parse(self, data: bytes) -> None:
        """Java's client offers HTTP/2 with its first request. uvicorn says no to that, and the parser leaves the body
        out: here the request is read again without its offer, which a server may ignore (RFC 9110, 7.8)."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:
            if self._offers_another_protocol() and not self.transport.is_closing():
                head = self._head_without_offer()
                self.parser = HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
                self._parse(head + data[offer.args[0] :])
        except HttpParserError:
            self._refuse(400, b"Bad Request", b"this is no HTTP request that can be read")

    def _offers_another_protocol(self) -> bool:
        return self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers)

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version), *lines, b"", b""])

    def _wait_for(self, phase: _Phase) -> None:
        self._cancel()
        self._phase, self._since = phase, self.loop.time()
        if phase is _Phase.HEAD:
            self._head_bytes = 0
            self._late = self.loop.call_later(self.limits.head_s, self._is_late)
        elif phase is _Phase.BODY:
            self._bytes_beside_body = 0
            self._late = self.loop.call_later(self.limits.body_s, self._is_late)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _is_late(self) -> None:
        self._refuse(408, b"Request Timeout", b"the request did not come to its end in time")

    def _refuse(self, status: int, reason: bytes, said: bytes) -> None:
        """Say what is wrong, unless an answer is on its way already, and close."""
        self._cancel()
        if self.transport.is_closing():
            return
        is_silent = self.cycle is None or self.cycle.response_complete or not self.cycle.response_started
        if is_silent:
            body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":null}}' % said
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (status, reason, len(body)) + body)
        self.transport.close()

    def _make_room(self) -> None:
        """End the connection that has waited longest for its client; if none does, this one."""
        waiting = [
            each
            for each in self.connections
            if isinstance(each, _GuardedProtocol)
            and each is not self
            and each._phase in (_Phase.HEAD, _Phase.BODY, _Phase.IDLE)
            and not each.transport.is_closing()
        ]
        if waiting:
            min(waiting, key=lambda each: each._since).transport.abort()
        else:
            self._refuse(503, b"Service Unavailable", b"too many connections are open: try again in a moment")
