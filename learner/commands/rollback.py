"""python -m learner rollback: lets act again what acted before."""

from __future__ import annotations

import json

from learner.commands.server import ServerOptions, ask


class RollbackOptions(ServerOptions):
    """Let act again what acted before the acting adapter."""

    reason: str = "asked by python -m learner rollback"
    """Kept with the change."""


def run(options: RollbackOptions) -> int:
    """Exit code 1 where the server does not do it."""
    answer = ask(options, lambda server: server.rollback(options.reason))
    print(json.dumps(answer) if answer else "nothing was changed")
    return 0 if answer else 1
