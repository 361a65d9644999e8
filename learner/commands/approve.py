"""python -m learner approve | decline: somebody's yes or no to a candidate that waits for it."""

from __future__ import annotations

import time

from pydantic_settings import CliPositionalArg

from learner.commands.server import ServerOptions, ask
from learner.terminal import plain


class ApproveOptions(ServerOptions):
    """Let act the candidate that waits for somebody's yes."""

    name: CliPositionalArg[str] = ""
    """The adapter; may be left out where only one waits."""


class DeclineOptions(ApproveOptions):
    """Refuse, for ever, the candidate that waits for somebody's yes."""

    reason: str = "somebody said no"
    """Kept with the refusal."""


def run(options: ApproveOptions) -> int:
    """Exit code 1 where the server does not do it, or where it is not clear which one is meant."""
    listed = ask(options, lambda server: server.waiting())
    if listed is None:
        return 1
    waiting = {adapter["name"]: adapter["proposal"] for adapter in listed}
    name = options.name or (next(iter(waiting)) if len(waiting) == 1 else "")
    if name not in waiting:
        if options.name:
            print(plain(f"{options.name} does not wait for a yes"))
        for each, proposal in waiting.items():
            print(plain(f"{each} waits since {time.ctime(proposal['created_at'])}: {proposal['reason']}"))
        print("name one of these" if waiting else "nothing waits")
        return 1
    return _answer(options, name)


def _answer(options: ApproveOptions, name: str) -> int:
    if isinstance(options, DeclineOptions):
        done = ask(options, lambda server: server.decline(name, options.reason))
        print(f"{name} is refused" if done else "nothing was changed")
    else:
        done = ask(options, lambda server: server.approve(name))
        print(f"{name} acts" if done else "nothing was changed")
    return 0 if done else 1
