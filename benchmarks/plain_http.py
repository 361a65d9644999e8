"""A keep-alive HTTP client of a few lines: a library's client costs more than what the benchmarks measure."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

Piece = tuple[float, bytes]
"""When it came (time.perf_counter), and what."""


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer with status 200 or 201."""

    headers: dict[str, str]
    """By lower-case name."""
    pieces: list[Piece]
    """The body's chunks; of a body that is not chunked, the whole."""


class PlainClient:
    """One connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The answer's body. Raises RuntimeError for a status other than 200; asyncio's errors if the line breaks."""
        answer = await self.stream(path, body)
        return b"".join(piece for _, piece in answer.pieces)

    async def stream(self, path: str, body: dict[str, Any]) -> TimedAnswer:
        """The answer as it came, piece by piece. Raises as `post` does."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        content = json.dumps(body).encode()
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n".encode()
            + content
        )
        status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
        is_chunked = "chunked" in headers.get("transfer-encoding", "")
        pieces = await (_chunks(reader) if is_chunked else _whole(reader, headers))
        if status not in (200, 201):
            raise RuntimeError(f"{path} answered {status}: {pieces[0][1][:300]!r}")
        return TimedAnswer(headers, pieces)

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def _head(raw: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = raw.decode("latin-1").strip().split("\r\n")
    return int(first.split()[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}


async def _whole(reader: asyncio.StreamReader, headers: dict[str, str]) -> list[Piece]:
    content = await reader.readexactly(int(headers["content-length"]))
    return [(time.perf_counter(), content)]


async def _chunks(reader: asyncio.StreamReader) -> list[Piece]:
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        content = (await reader.readexactly(size + 2))[:-2]
        pieces.append((time.perf_counter(), content))
    await reader.readexactly(2)
    return pieces
