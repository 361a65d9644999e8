"""A server of the reference SDK that does all that test_mcp.py asks of it: answers, fails, hangs, dies."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import anyio
from mcp.server.fastmcp import Context, FastMCP, Image
from pydantic import BaseModel


class Line(BaseModel):
    item: str
    number: int = 1


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else ""


shop = FastMCP("shop", port=int(option("--http") or 0), log_level="ERROR")


def order(lines: list[Line]) -> str:
    """Order some things."""
    return ", ".join(f"{line.number} {line.item}" for line in lines)


def who() -> str:
    """The server's process."""
    return str(os.getpid())


def picture():
    """Text and an image."""
    return ["Here it is:", Image(data=b"\x89PNG", format="png")]


def nothing() -> list[str]:
    """No content at all."""
    return []


def record() -> dict[str, Any]:
    """Structured content."""
    return {"name": "globe", "price": 12}


def fail(text: str) -> str:
    """Go wrong."""
    raise ValueError(text)


def odd(config: str, runtime: str, callbacks: str) -> str:
    """Arguments with names that frameworks take for their own."""
    return config + runtime + callbacks


def repeat(text: str) -> str:
    """Say it back."""
    return text


async def sleep(seconds: float) -> str:
    """Sleep."""
    await anyio.sleep(seconds)
    return "awake"


def hang() -> str:
    """Block the whole server."""
    time.sleep(60)
    return "awake"


def environment() -> str:
    """All of it."""
    return "\n".join(f"{name}={value}" for name, value in os.environ.items())


def header(context: Context) -> str:
    """The request's authorization."""
    return context.request_context.request.headers["authorization"]


def die() -> str:
    """End the server."""
    os._exit(1)


def calculator(expression: str) -> str:
    """Has the name of a built-in tool."""
    return f"the shop's: {expression}"


if starts := option("--starts"):
    with Path(starts).open("a") as log:
        log.write(f"{os.getpid()}\n")
    if Path(f"{starts}.full").exists():
        sys.exit(1)
if "--empty" not in sys.argv:
    for tool in (order, who, picture, nothing, record, fail, odd, repeat, sleep, hang, environment, header, die):
        shop.add_tool(tool)
if "--calculator" in sys.argv:
    shop.add_tool(calculator)
shop.run("streamable-http" if option("--http") else "stdio")
if "--deaf" in sys.argv:  # does not end when its input does
    time.sleep(60)
