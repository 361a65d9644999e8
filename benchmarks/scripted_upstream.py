"""An OpenAI-compatible server that answers at once with a script: what stands behind the gateways of gateway.py.

In vLLM's form: token ids and logprobs where they are asked for, else the text alone. It parses no template, runs no
network and logs nothing, so that what a gateway adds is nearly all that is measured.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

NUM_TOKENS = 16
PROMPT_TOKEN_IDS = list(range(60))


async def listen() -> asyncio.Server:
    """On a free port of the loopback."""
    return await asyncio.start_server(_converse, "127.0.0.1", 0)


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            body = json.loads(await reader.readexactly(length) or b"{}")
            writer.write(_streamed(body) if body.get("stream") else _answer(body))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


def _answer(body: dict[str, Any]) -> bytes:
    tokens = _tokens(body)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": "x" * (NUM_TOKENS - 1)},
        "finish_reason": "stop",
    }
    if body.get("logprobs"):
        choice["logprobs"] = {"content": tokens}
    answer = _envelope("chat.completion", choice)
    answer["usage"] = {"prompt_tokens": 60, "completion_tokens": NUM_TOKENS, "total_tokens": 60 + NUM_TOKENS}
    if body.get("return_token_ids"):
        answer["prompt_token_ids"] = PROMPT_TOKEN_IDS
        choice["token_ids"] = [0] * NUM_TOKENS
    content = json.dumps(answer).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


def _streamed(body: dict[str, Any]) -> bytes:
    events = [json.dumps(_chunk(body, place)) for place in range(NUM_TOKENS)]
    chunk: Callable[[str], bytes] = lambda data: _as_chunk(f"data: {data}\n\n".encode())  # noqa: E731
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(map(chunk, [*events, "[DONE]"])) + b"0\r\n\r\n"


def _chunk(body: dict[str, Any], place: int) -> dict[str, Any]:
    is_last = place == NUM_TOKENS - 1
    delta: dict[str, Any] = {} if is_last else {"content": "x"}
    choice: dict[str, Any] = {
        "index": 0,
        "delta": delta | ({"role": "assistant"} if place == 0 else {}),
        "finish_reason": "stop" if is_last else None,
    }
    if body.get("logprobs"):
        choice["logprobs"] = {"content": _tokens(body)[:1]}
    chunk = _envelope("chat.completion.chunk", choice)
    if body.get("return_token_ids"):
        choice["token_ids"] = [0]
        if place == 0:
            chunk["prompt_token_ids"] = PROMPT_TOKEN_IDS
    return chunk


def _tokens(_: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}] * NUM_TOKENS


def _envelope(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": "scripted", "choices": [choice]}


def _as_chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"
