"""What a tool may be called, how long one may take, and how much of what it says is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""What the server and OpenAI's clients take as a name."""


@dataclass(frozen=True, slots=True)
class ToolBounds:
    """The limits of each call of a tool."""

    timeout_s: float | None = None
    """Most seconds; None: as long as the server gives every tool."""
    max_output_chars: int = 20_000
    """Characters of its output, or of its error, that the agent is shown."""
