"""Where tools run: each call of a synchronous tool in a thread of its own, the asynchronous ones on an event loop
beside the server's. A tool is foreign code: it may block, hang, or end its thread, and the server goes on.

Python cannot end a thread. A call that is given up is left behind; a tool that left too many behind is not called
again until one of them has ended. The threads are daemons: the server ends with them running. A thread pool was
refused: a few hanging calls would fill it, and its threads are waited for when the process ends.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from copy import deepcopy
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool, Tool, ToolException

from tools.background_loop import BackgroundLoop
from tools.mcp_tool import McpTool

MAX_LEFT_BEHIND = 8
"""Calls of one tool that were given up and still run; and event loops that an asynchronous tool blocked."""
MAX_RUNNING = 256
"""Threads of all tools together."""
STUCK_AFTER_S = 1.0
"""For an event loop to show that it still turns, once a call on it was given up."""

Read = Callable[[Any], str]
"""Makes text of a tool's output."""
Turn = AbstractContextManager[None]
"""What a call holds while it runs."""


class TooManyCalls(ToolException):
    """So many calls hang that no more are begun."""


class ToolThreads:
    """Runs tools beside the event loop that awaits them, and remembers what was left behind."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(MAX_RUNNING)
        self._left_behind: defaultdict[tuple[str, str], list[threading.Thread]] = defaultdict(list)
        """By the tool's world and its name."""
        self._async_tools = _AsyncTools()

    async def run(
        self, tool: BaseTool, arguments: Mapping[str, Any], read: Read, turn: Turn | None = None, world: str = ""
    ) -> str:
        """What `read`, called where the tool runs, makes of its output; `turn` is held there meanwhile. `world` is that
        of a world's tool: another world may have one of the same name. Raises what the tool raises, and TooManyCalls;
        an exception that would end a thread or a task becomes a ToolException."""
        turn = turn or nullcontext()
        if isinstance(tool, McpTool):
            return await tool.loop.run(_called(tool, arguments, read, turn))
        if is_async(tool):
            return await self._async_tools.run(_called(tool, arguments, read, turn))
        return await self._in_thread(tool, arguments, read, turn, world)

    async def _in_thread(self, tool: BaseTool, arguments: Mapping[str, Any], read: Read, turn: Turn, world: str) -> str:
        left_behind = self._still_running(world, tool.name)
        if len(left_behind) >= MAX_LEFT_BEHIND:
            raise TooManyCalls(f"{tool.name} hangs: {len(left_behind)} earlier calls of it have not ended yet")
        if not self._places.acquire(blocking=False):
            raise TooManyCalls(f"{MAX_RUNNING} tool calls are running already; call it again later")
        answer: Future[str] = Future()
        thread = threading.Thread(
            target=copy_context().run,
            args=(self._work, tool, arguments, read, turn, answer),
            name=f"tool-{tool.name}",
            daemon=True,
        )
        thread.start()
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            left_behind.append(thread)
            raise

    def _work(self, tool: BaseTool, arguments: Mapping[str, Any], read: Read, turn: Turn, answer: Future[str]) -> None:
        """What the thread does. Its caller may have gone: `answer` is cancelled then, and takes nothing."""
        try:
            with turn:
                text = read(_no_coroutine(tool, tool.invoke(_own(arguments))))
        except BaseException as error:
            self._places.release()
            if answer.set_running_or_notify_cancel():
                answer.set_exception(_as_tool_error(error))
        else:
            self._places.release()
            if answer.set_running_or_notify_cancel():
                answer.set_result(text)

    def _still_running(self, world: str, name: str) -> list[threading.Thread]:
        threads = self._left_behind[world, name]
        threads[:] = [thread for thread in threads if thread.is_alive()]
        return threads


class _AsyncTools:
    """One event loop for all asynchronous tools, so that what they share between calls stays theirs. Where a tool
    blocks it, it is left behind and the next call begins another."""

    def __init__(self) -> None:
        self._loop: BackgroundLoop | None = None
        self._beat: Future[None] | None = None
        """Done once the loop has turned after the last call that was given up; None where none was."""
        self._given_up_at = 0.0
        self._stuck: list[tuple[BackgroundLoop, Future[None]]] = []

    async def run(self, call: Coroutine[Any, Any, str]) -> str:
        try:
            loop = self._turning_loop()
        except TooManyCalls:
            call.close()
            raise
        try:
            return await loop.run(call)
        except asyncio.CancelledError:
            self._beat, self._given_up_at = loop.submit(_nothing()), time.monotonic()
            raise

    def _turning_loop(self) -> BackgroundLoop:
        self._free_those_that_turn_again()
        has_beaten = self._beat is None or self._beat.done()
        if self._loop is not None and not has_beaten and time.monotonic() - self._given_up_at > STUCK_AFTER_S:
            assert self._beat is not None
            self._stuck.append((self._loop, self._beat))
            self._loop = None
        if len(self._stuck) >= MAX_LEFT_BEHIND:
            raise TooManyCalls("asynchronous tools hang: they block the event loop that they are given")
        if self._loop is None:
            self._loop, self._beat = BackgroundLoop("async-tools"), None
        return self._loop

    def _free_those_that_turn_again(self) -> None:
        for loop, beat in list(self._stuck):
            if beat.done():
                self._stuck.remove((loop, beat))
                loop.close()


def is_async(tool: BaseTool) -> bool:
    """Whether it has a coroutine of its own; LangChain's `ainvoke` would take a pool's thread for the others."""
    if isinstance(tool, StructuredTool | Tool):
        return tool.coroutine is not None
    return type(tool)._arun is not BaseTool._arun


async def _called(tool: BaseTool, arguments: Mapping[str, Any], read: Read, turn: Turn) -> str:
    try:
        with turn:
            return read(await tool.ainvoke(_own(arguments)))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _as_tool_error(error) from error
    except Exception:
        raise
    except BaseException as error:
        raise _as_tool_error(error) from error


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """For the tool to change as it likes: the action that they are of is still to be logged."""
    return deepcopy(dict(arguments))


async def _nothing() -> None:
    """Takes one turn of the loop that it is given to."""


def _as_tool_error(error: BaseException) -> Exception:
    """StopIteration cannot be raised into a future; the others would end who awaits them."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return ToolException(f"it ended with {type(error).__name__}{f' ({error})' if str(error) else ''}")


def _no_coroutine(tool: BaseTool, output: Any) -> Any:
    if inspect.iscoroutine(output):
        output.close()
        raise ToolException(f"{tool.name} gave back a coroutine: it has to be made of an `async def` as such")
    return output
