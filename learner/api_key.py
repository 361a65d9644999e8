"""The key with which the learner's commands ask a server: from a file or the environment, never from `ps`."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "STEPAGENT_API_KEY"


def api_key(file: Path | None) -> str:
    """The key to ask with; a server that asks for none takes any. Ends the process where the file cannot be read."""
    if file is None:
        return os.environ.get(VARIABLE, "none")
    try:
        return file.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--api-key-file {file} cannot be read: {error}") from error
