"""The key with which the learner's commands ask a server: from the environment or a file, never from `ps`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

VARIABLE = "STEPAGENT_API_KEY"


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """`--api-key-file`, and a refusal of `--api-key` that says how."""
    parser.add_argument(
        "--api-key-file", type=Path, default=None, help=f"file that holds the server's API key; default: {VARIABLE}"
    )
    parser.add_argument("--api-key", action=_Refused, help=argparse.SUPPRESS)


def api_key(options: argparse.Namespace) -> str:
    """The key to ask with; a server that asks for none takes any. Ends the process where its file cannot be read."""
    if options.api_key_file is None:
        return os.environ.get(VARIABLE, "none")
    try:
        return options.api_key_file.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise SystemExit(f"--api-key-file {options.api_key_file} cannot be read: {error}") from error


class _Refused(argparse.Action):
    """An option that is refused for what it would show."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: str | Sequence[Any] | None, *_: object
    ) -> NoReturn:
        parser.error(
            f"every user of this machine can read a key on a command line (ps shows it): put it into {VARIABLE}, or "
            "into a file: --api-key-file FILE"
        )
