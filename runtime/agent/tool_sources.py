"""From the tables [tools.NAME] of `agents.toml` to the sources that tools are loaded from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from runtime.agents import McpServer, ToolTable
from tools.bounds import ToolBounds
from tools.mcp_servers import McpAddress
from tools.shelf import ToolSource


def tool_sources(tables: Mapping[str, ToolTable], folder: Path | None) -> dict[str, ToolSource]:
    """By their names. `folder` is the file's: a server's program runs there, or in a folder below it."""
    return {name: _source(table, folder) for name, table in tables.items()}


def _source(table: ToolTable, folder: Path | None) -> ToolSource:
    bounds = ToolBounds(table.timeout_s)
    if table.max_output_chars is not None:
        bounds = ToolBounds(table.timeout_s, table.max_output_chars)
    return ToolSource(table.import_path or "", _address(table.mcp, folder), bounds, table.allow)


def _address(server: McpServer | None, folder: Path | None) -> McpAddress | None:
    if server is None:
        return None
    cwd = folder / server.cwd if folder and server.cwd else folder
    return McpAddress(server.words, server.env, cwd, server.url or "", server.headers)
