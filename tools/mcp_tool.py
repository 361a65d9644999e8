"""A tool of an MCP server, as LangChain sees it. The session behind it may change; the tool stays."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.tools import BaseTool

from tools.background_loop import BackgroundLoop


class McpTool(BaseTool):
    """Calls its server on the event loop that the server's session lives on.

    `StructuredTool` was refused: it takes arguments named `config`, `runtime` or `callbacks` for its own.
    """

    loop: BackgroundLoop
    """Where it has to run."""
    call: Callable[[dict[str, Any]], Awaitable[Any]]
    """Arguments to content. Raises ToolException with what the agent should know."""

    def _run(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("an MCP tool is asynchronous")

    async def _arun(self, /, **arguments: Any) -> Any:
        return await self.call(arguments)
