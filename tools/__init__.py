"""Tools that the server runs for the agent: langchain-core tools, its own and those of others. Imports nothing of the
project above."""

TOOL_NAMES = ("calculator", "search")
"""Those that come with the server."""
