"""What a model is shown of a tool: OpenAI's form of a function."""

from __future__ import annotations

import json
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from tools.mcp_tool import McpTool


def schema_of(tool: BaseTool) -> dict[str, Any]:
    """Its name, description and JSON schema. That of an MCP tool stays as its server wrote it: LangChain's conversion
    resolves references and leaves titles out. Raises ValueError for what cannot be written as JSON."""
    if not isinstance(tool, McpTool):
        return _writable(tool.name, convert_to_openai_tool(tool))
    function = {"name": tool.name, "description": tool.description, "parameters": tool.args_schema}
    return _writable(tool.name, {"type": "function", "function": function})


def _writable(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the schema of the tool {name!r} cannot be written as JSON: {error}") from error
    return schema
