"""python -m learner status: the newest cycles, from the state folder; no server is needed."""

from __future__ import annotations

from learner.commands.server import ServerOptions, has_state
from runtime.store.learning_log import LearningReader


class StatusOptions(ServerOptions):
    """Show the newest learner cycles, of all agents or of one: how each went, or where it is."""

    limit: int = 20
    """How many."""


def run(options: StatusOptions) -> int:
    if not has_state(options):
        return 1
    cycles = LearningReader(options.state).cycles(options.limit, agent=options.agent or None)
    print(f"{len(cycles)} cycles" + (", newest first" if len(cycles) > 1 else ""))
    for status in cycles:
        seconds = status.created_at - status.started_at
        whose = f"{status.agent}  " if status.agent else ""
        print(f"{status.cycle}  {whose}{status.stage}  {seconds:.0f} s  {status.message}")
    return 0
