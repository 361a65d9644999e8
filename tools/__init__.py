"""Tools that the server runs for the agent: langchain-core tools, one a file. Imports nothing of the project above."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a second of import that a simulator's process does without
    from langchain_core.tools import BaseTool

TOOL_NAMES = ("calculator", "search")


def load_tools(names: Iterable[str], search_corpus: Path | None = None) -> list[BaseTool]:
    """The tools of these names, in this order. Raises ValueError for an unknown name or a missing corpus."""
    return [_load_tool(name, search_corpus) for name in names]


def _load_tool(name: str, search_corpus: Path | None) -> BaseTool:
    if name == "calculator":
        from tools.calculator import calculator

        return calculator
    if name == "search":
        from tools.search import search_tool

        if search_corpus is None:
            raise ValueError("the search tool needs a corpus: give --search-corpus FILE (see tools/search.py)")
        return search_tool(search_corpus)
    raise ValueError(f"no tool is called {name!r}; there are: {', '.join(TOOL_NAMES)}")
