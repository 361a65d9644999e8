"""The key with which the learner's commands ask a server: from a file or the environment, never from `ps`."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "STEPAGENT_API_KEY"
NO_KEY = "none"
"""An endpoint that asks for none takes any. An empty one the client would replace by the OPENAI_API_KEY it finds, which
is another endpoint's."""


def key_in(variable: str) -> str:
    """The key in a variable of the environment; one that is empty is none."""
    return os.environ.get(variable, "").strip() or NO_KEY


def without_key(text: str, key: str) -> str:
    """What another program said, without the key that it was asked with: some repeat it in their errors, and errors are
    stored and printed."""
    return text if key in ("", NO_KEY) else text.replace(key, "[the key]")


def api_key(file: Path | None) -> str:
    """The key to ask with; a server that asks for none takes any. Ends the process where the file cannot be read."""
    if file is None:
        return key_in(VARIABLE)
    try:
        return file.read_text("utf-8").strip() or NO_KEY
    except (OSError, ValueError) as error:
        raise SystemExit(f"--api-key-file {file} cannot be read: {error}") from error
