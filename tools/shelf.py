"""All tools that the server can run, by the names that agents and `--tools` call them: the built-in ones, import paths,
and the tables [tools.NAME] of the agents' file. Each source is loaded once, when it is first named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tools import TOOL_NAMES
from tools.bounds import ToolBounds

if TYPE_CHECKING:  # a second of import
    from langchain_core.tools import BaseTool

    from tools.background_loop import BackgroundLoop
    from tools.mcp_servers import McpAddress, McpServer


@dataclass(frozen=True, slots=True)
class ToolSource:
    """One table [tools.NAME]: where its tools come from, and what holds for each of them."""

    import_path: str = ""
    """`package.module:object`; empty for an MCP server."""
    mcp: McpAddress | None = None
    bounds: ToolBounds = field(default_factory=ToolBounds)
    allow: tuple[str, ...] | None = None
    """Names of the tools that may be used; None: all."""


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """Tools that an agent may use. No two have one name."""

    tools: tuple[BaseTool, ...] = ()
    bounds: Mapping[str, ToolBounds] = field(default_factory=dict)
    """By the tool's name, where its source sets any."""


class ToolShelf:
    """Loads tools by the names of their sources, and ends with `close` what it started."""

    def __init__(self, sources: Mapping[str, ToolSource] | None = None, search_corpus: Path | None = None) -> None:
        self._sources = sources or {}
        self._search_corpus = search_corpus
        self._loaded: dict[str, list[BaseTool]] = {}
        self._servers: list[McpServer] = []
        self._loop: BackgroundLoop | None = None

    def offer(self, names: Iterable[str]) -> OfferedTools:
        """The tools of these sources, in this order. A tool of an MCP server whose name is taken gets that of its
        server before its own. Raises ValueError, in words for the user, for whatever cannot be offered."""
        sources = list(dict.fromkeys(names))
        found = [(name, tool) for name in sources for tool in self._tools_of(name)]
        taken = Counter(tool.name for _, tool in found)
        tools, bounds = [], {}
        for source, tool in found:
            tool = self._apart(source, tool) if taken[tool.name] > 1 else tool
            tools.append(tool)
            if source in self._sources:
                bounds[tool.name] = self._sources[source].bounds
        if tools:
            from tools.imported import check_names

            check_names(tools, f"the tools {', '.join(sources)}")
        return OfferedTools(tuple(tools), bounds)

    def close(self) -> None:
        """End the MCP servers. Waits for them some seconds at most."""
        for server in self._servers:
            server.close()
        if self._loop is not None:
            self._loop.close()
        self._servers, self._loop = [], None

    def _tools_of(self, source: str) -> list[BaseTool]:
        if source not in self._loaded:
            self._loaded[source] = self._load(source)
        return self._loaded[source]

    def _load(self, name: str) -> list[BaseTool]:
        source = self._sources.get(name)
        if source is None:
            return [self._built_in(name)] if ":" not in name else _imported(name, None)
        if source.mcp is None:
            return _imported(source.import_path, source.allow)
        return self._of_server(name, source.mcp, source.allow)

    def _built_in(self, name: str) -> BaseTool:
        if name == "calculator":
            from tools.calculator import calculator

            return calculator
        if name == "search":
            from tools.search import search_tool

            if self._search_corpus is None:
                raise ValueError("the search tool needs a corpus: give --search-corpus FILE (see tools/search.py)")
            return search_tool(self._search_corpus)
        there = ", ".join((*TOOL_NAMES, *self._sources))
        raise ValueError(f"no tool is called {name!r}; there are: {there}, and any package.module:object")

    def _of_server(self, name: str, address: McpAddress, allow: tuple[str, ...] | None) -> list[BaseTool]:
        from tools.background_loop import BackgroundLoop
        from tools.imported import allowed, check_names, check_tool
        from tools.mcp_servers import McpServer, require_adapters

        require_adapters()
        self._loop = self._loop or BackgroundLoop("mcp-servers")
        server = McpServer(name, address, self._loop)
        tools = server.start()
        self._servers.append(server)
        chosen = allowed([*tools], allow, f"tools.{name}")
        for tool in chosen:
            check_tool(tool, f"tools.{name}")
        check_names(chosen, f"tools.{name}")
        return chosen

    def _apart(self, source: str, tool: BaseTool) -> BaseTool:
        """The tool by a name of its own, where it is an MCP server's; the others keep theirs."""
        from tools.imported import check_tool
        from tools.mcp_servers import plain_name
        from tools.mcp_tool import McpTool

        if not isinstance(tool, McpTool):
            return tool
        renamed = tool.model_copy(update={"name": f"{plain_name(source)}_{tool.name}"})
        check_tool(renamed, f"tools.{source}")
        return renamed


def _imported(path: str, allow: tuple[str, ...] | None) -> list[BaseTool]:
    from tools.imported import imported_tools

    return imported_tools(path, allow)
