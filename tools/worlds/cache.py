"""Where worlds keep what they make on this machine and can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/stepagent`, by default `~/.cache/stepagent`. Raises OSError where it cannot be made."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stepagent"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
