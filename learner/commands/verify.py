"""python -m learner verify: reads a whole state folder and says what is wrong with it; no server is needed."""

from __future__ import annotations

from learner.commands.server import ServerOptions, has_state
from learner.terminal import plain
from runtime.store.soundness import problems_of


class VerifyOptions(ServerOptions):
    """Check a state folder: every row can be read, every step rebuilds to what was served, every adapter's files are
    those registered."""


def run(options: VerifyOptions) -> int:
    """Exit code 1 where anything is wrong, or where there is nothing to check."""
    if not has_state(options):
        return 1
    problems = list(problems_of(options.state))
    print("\n".join(map(plain, problems)) if problems else f"{options.state} is sound")
    return 1 if problems else 0
