"""What a model is shown of a tool: OpenAI's form of a function."""

from __future__ import annotations

from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from tools.mcp_tool import McpTool


def schema_of(tool: BaseTool) -> dict[str, Any]:
    """Its name, description and JSON schema. That of an MCP tool stays as its server wrote it: LangChain's conversion
    resolves references and leaves titles out."""
    if not isinstance(tool, McpTool):
        return convert_to_openai_tool(tool)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.args_schema}
    return {"type": "function", "function": function}
