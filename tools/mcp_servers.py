"""Servers of the Model Context Protocol whose tools the agent may use: programs that are started, or addresses.

A session with each server is kept from the start to the end of this process, on an event loop of its own thread. A
server that dies, or that does not answer any more, is started again: at once the first time, then ever more slowly, up
to once a minute. Meanwhile its tools say so. A program gets a small environment (PATH, HOME and the like) and what the
configuration lists, never this process's own; it ends with this process, however that ends.

Not covered: a list of tools that changes while the server runs (the one it gave at the start stays); sampling,
elicitation, roots and resources.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.tools import ToolException

from tools.background_loop import BackgroundLoop
from tools.mcp_tool import McpTool

if TYPE_CHECKING:
    from langchain_mcp_adapters.sessions import Connection
    from mcp import ClientSession
    from mcp.types import CallToolResult, Tool

START_S = 60.0
"""For a server to start and to say what it can; a package runner may have to fetch it first."""
RESTART_S = 5.0
"""A call waits so long for a server that is being started again."""
PING_S = 5.0
"""For a server to show that it lives, once it did not answer a call in time."""
LONGEST_PAUSE_S = 60.0
"""Between two starts."""
LIVED_S = 60.0
"""A server that lived so long before it died is started again at once."""
CLOSE_S = 8.0
"""For a program to end: it is asked, then told (SIGTERM), then killed."""


@dataclass(frozen=True, slots=True)
class McpAddress:
    """Where a server is: a program, or the address of one that runs."""

    command: tuple[str, ...] = ()
    """The program and its arguments; empty for an address."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables of the program's environment; `${NAME}` in a value is that variable of this process."""
    cwd: Path | None = None
    """The folder it runs in; None: that of this process."""
    url: str = ""
    """Streamable HTTP; empty for a program."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each request to the address; `${NAME}` in a value is that variable of this process."""


class _NotTaken(Exception):
    """The server did not take the call: it may be asked again."""


class McpServer:
    """One server and the session with it. Its methods may be called from any thread."""

    def __init__(self, name: str, address: McpAddress, loop: BackgroundLoop) -> None:
        self.name = name
        self._address = address
        self._loop = loop
        self._session: ClientSession | None = None
        self._is_up = asyncio.Event()
        self._is_gone = asyncio.Event()
        """Set when the session of now has ended."""
        self._closing = asyncio.Event()
        self._was_up = False
        self._num_failed = 0
        """Starts in a row after which the server did not live long."""
        self._problem = ""
        """Why the last start failed; empty where it did not."""
        self._keeping: Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        """The same, as its loop knows it."""

    def start(self) -> list[McpTool]:
        """Its tools. Raises ValueError, in words for the user, where it cannot be started or reached."""
        if self._address.command:
            _require_program(self.name, self._address)
        # The library writes a traceback for each line that is no message: 200 MB a minute of a program that chats.
        logging.getLogger("mcp.client.stdio").setLevel(logging.CRITICAL)
        self._keeping = self._loop.submit(self._keep())
        listing = self._loop.submit(self._list())
        try:
            tools = listing.result(START_S)
        except Exception as error:
            listing.cancel()
            self.close()
            problem = self._problem or (
                "it did not answer in time" if isinstance(error, TimeoutError) else _told(error)
            )
            raise ValueError(f"the MCP server {self.name!r} ({self._place}) did not start: {problem}") from error
        if not tools:
            self.close()
            raise ValueError(f"the MCP server {self.name!r} ({self._place}) offers no tools")
        return [self._tool(each) for each in tools]

    def close(self) -> None:
        """End the session, and the program. Waits some seconds at most."""
        if self._keeping is None or self._keeping.done():
            return
        with suppress(TimeoutError):
            self._loop.submit(self._end()).result(CLOSE_S)

    # ------------------------------------------------------------------------------------- on the loop

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The content of a tool's result, as LangChain's content blocks; or its structured content where that is all.

        Raises ToolException where the tool failed, or its server is not there.
        """
        for _ in range(2):
            session, is_gone = await self._session_now()
            try:
                result = await self._asked(session, is_gone, tool, arguments)
            except _NotTaken:
                continue
            return _content(result)
        raise ToolException(f"the MCP server {self.name!r} has ended and is being started again: try again in a moment")

    async def _asked(
        self, session: ClientSession, is_gone: asyncio.Event, tool: str, arguments: dict[str, Any]
    ) -> CallToolResult:
        """Raises _NotTaken where it certainly did not run."""
        import anyio
        from mcp.shared.exceptions import McpError

        call = asyncio.ensure_future(session.call_tool(tool, arguments))
        ended = asyncio.ensure_future(is_gone.wait())
        try:
            await asyncio.wait({call, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise ToolException(f"the MCP server {self.name!r} ended during this call: it may have had its effect")
            return call.result()
        except asyncio.CancelledError:
            self._look_after(session, is_gone)
            raise
        except (anyio.ClosedResourceError, anyio.BrokenResourceError) as error:
            self._lost(is_gone)
            raise _NotTaken from error
        except McpError as error:
            if _is_unknown_session(error):
                self._lost(is_gone)
                raise _NotTaken from error
            if error.error.message == "Connection closed":
                self._lost(is_gone)
                said = f"the MCP server {self.name!r} ended during this call: it may have had its effect"
                raise ToolException(said) from error
            raise ToolException(f"the MCP server {self.name!r} refused: {error.error.message}") from error
        finally:
            call.cancel()
            ended.cancel()

    async def _session_now(self) -> tuple[ClientSession, asyncio.Event]:
        if not self._is_up.is_set() and not self._problem:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_up.wait(), RESTART_S)
        if self._session is None:
            why = f": {self._problem}" if self._problem else ""
            raise ToolException(f"the MCP server {self.name!r} is down and is being started again{why}")
        return self._session, self._is_gone

    def _look_after(self, session: ClientSession, is_gone: asyncio.Event) -> None:
        """A call was given up: see whether the server still answers."""
        looking = asyncio.ensure_future(self._ping(session, is_gone))
        _running.add(looking)
        looking.add_done_callback(_running.discard)

    async def _ping(self, session: ClientSession, is_gone: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(PING_S):
                await session.send_ping()
        except Exception:
            self._lost(is_gone)

    def _lost(self, is_gone: asyncio.Event) -> None:
        """The session is of no use any more. `is_gone` is its own: another may be there by now."""
        if is_gone is self._is_gone:
            self._is_up.clear()
            self._session = None
        is_gone.set()

    async def _keep(self) -> None:
        """Hold a session for as long as the server runs, one after another. Ends where the first start fails."""
        self._task = asyncio.current_task()
        while not self._closing.is_set():
            began = time.monotonic()
            self._is_gone = asyncio.Event()
            try:
                await self._hold(self._is_gone)
            except Exception as error:
                self._problem = "" if self._is_up.is_set() else _told(error)
            finally:
                self._lost(self._is_gone)
            if not self._was_up:
                return
            self._num_failed = 1 if time.monotonic() - began > LIVED_S else self._num_failed + 1
            if self._num_failed > 1:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), min(LONGEST_PAUSE_S, 2.0 ** (self._num_failed - 2)))

    async def _hold(self, is_gone: asyncio.Event) -> None:
        from langchain_mcp_adapters.sessions import create_session

        async with create_session(self._connection()) as session:
            async with asyncio.timeout(START_S):
                await session.initialize()
            self._session, self._problem, self._was_up = session, "", True
            self._is_up.set()
            await is_gone.wait()

    async def _list(self) -> list[Tool]:
        """All pages of its tools."""
        assert self._keeping is not None
        while not self._is_up.is_set():
            if self._problem:
                raise ValueError(self._problem)
            await asyncio.sleep(0.01)
        assert self._session is not None
        tools, cursor = [], None
        while True:
            page = await self._session.list_tools(cursor)
            tools += page.tools
            if not (cursor := page.nextCursor):
                return tools

    async def _end(self) -> None:
        self._closing.set()
        if not self._is_up.is_set() and self._task is not None:
            self._task.cancel()
        self._is_gone.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    def _tool(self, tool: Tool) -> McpTool:
        return McpTool(
            name=plain_name(tool.name),
            description=tool.description or tool.title or "",
            args_schema=tool.inputSchema,
            loop=self._loop,
            call=partial(self.call, tool.name),
        )

    @property
    def _place(self) -> str:
        return self._address.url or " ".join(self._address.command)

    def _connection(self) -> Connection:
        if self._address.url:
            headers = {name: _filled_in(value) for name, value in self._address.headers.items()}
            return {"transport": "streamable_http", "url": self._address.url, "headers": headers}
        env = {name: _filled_in(value) for name, value in self._address.env.items()}
        launcher = str(Path(__file__).with_name("with_parent.py"))
        arguments = [launcher, str(os.getpid()), *self._address.command]
        cwd = self._address.cwd
        return {"transport": "stdio", "command": sys.executable, "args": arguments, "env": env, "cwd": cwd}


_running: set[asyncio.Future[None]] = set()
"""Held here, else they might be collected while they run."""


def require_adapters() -> None:
    """Raises ValueError where the packages for MCP are not installed."""
    try:
        import langchain_mcp_adapters.sessions  # noqa: F401
    except ImportError as error:
        raise ValueError(f"MCP servers need the extra `mcp`: pip install -e '.[mcp]' ({error})") from error


def plain_name(name: str) -> str:
    """A tool's or server's name in the letters that models know tools by."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _require_program(name: str, address: McpAddress) -> None:
    program = address.command[0]
    folder = address.cwd or Path()
    if "/" in program and (folder / program).is_file():
        return
    if shutil.which(program, path=address.env.get("PATH", os.environ.get("PATH"))) is None:
        raise ValueError(
            f"the MCP server {name!r}: there is no program {program!r}; install it, or give its whole path"
        )


def _content(result: CallToolResult) -> Any:
    blocks = [_block(each) for each in result.content]
    if result.isError:
        said = "\n".join(block["text"] for block in blocks if block["type"] == "text")
        raise ToolException(said or "the tool failed and did not say why")
    if not blocks and result.structuredContent is not None:
        return result.structuredContent
    return blocks or ""


def _block(content: Any) -> dict[str, Any]:
    """LangChain's form of a content block; what is no text is named."""
    match content.type:
        case "text":
            return {"type": "text", "text": content.text}
        case "image" | "audio":
            return {"type": content.type, "mime_type": content.mimeType}
        case "resource_link":
            return {"type": "file", "mime_type": content.mimeType, "url": str(content.uri)}
        case "resource" if hasattr(content.resource, "text"):
            return {"type": "text", "text": content.resource.text}
        case "resource":
            return {"type": "file", "mime_type": content.resource.mimeType, "url": str(content.resource.uri)}
    return {"type": "text", "text": f"[{content.type}: not shown]"}


def _is_unknown_session(error: Any) -> bool:
    """A server over HTTP that was started anew answers 404; the SDK makes this of it."""
    return error.error.message == "Session terminated"


def _filled_in(value: str) -> str:
    """`${NAME}` becomes that variable. Raises ValueError where it is not set."""

    def variable(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise ValueError(f"the variable {found[1]} is not set")
        return os.environ[found[1]]

    return re.sub(r"\$\{([^}]+)\}", variable, value)


def _told(error: BaseException) -> str:
    """The reason within groups of errors, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
