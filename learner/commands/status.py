"""python -m learner status: the newest cycles, from the state folder; no server is needed."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

from learner.commands.server import ServerOptions, has_state, step_log_of, unknown_agent
from learner.report import NOT_ASKED
from learner.terminal import plain
from runtime.store.learning_log import CycleStage, CycleStatus, LearningReader


class StatusOptions(ServerOptions):
    """Show the newest learner cycles, of all agents or of one: how each went, or where it is."""

    limit: int = 20
    """How many."""


def run(options: StatusOptions) -> int:
    if not has_state(options):
        return 1
    log = LearningReader(options.state)
    cycles = log.cycles(options.limit, agent=options.agent or None)
    if not cycles and (problem := _unknown(options)):
        print(plain(problem), file=sys.stderr)
        return 1
    print("1 cycle" if len(cycles) == 1 else f"{len(cycles)} cycles" + (", newest first" if cycles else ""))
    for status in cycles:
        seconds = status.created_at - status.started_at
        whose = f"{status.agent}  " if status.agent else ""
        stage, message = _as_of_now(log.as_of_now(status), log)
        print(f"{status.cycle}  {whose}{stage}  {seconds:.0f} s  {plain(message)}")
        for silent in _without_answer(status.report):
            print(f"    {plain(silent)}")
    return 0


def _unknown(options: StatusOptions) -> str:
    """What is wrong with the agent's name, in a sentence; empty where nothing is."""
    log = step_log_of(options) if options.agent else None
    if log is None:
        return ""
    with closing(log):
        return unknown_agent(log, options.agent)


def _without_answer(report: dict[str, Any]) -> list[str]:
    """Which experts and judges a cycle had to do without, and mostly why."""
    asked = {
        "experts gave no answer": report.get("expert_problems"),
        "the judge gave no scores": (report.get("judge") or {}).get("problems"),
    }
    failed = {
        what: {told: number for told, number in (why or {}).items() if told != NOT_ASKED} for what, why in asked.items()
    }
    return [
        f"{what} {sum(why.values())} times, mostly: {max(why, key=lambda told: why[told])}"
        for what, why in failed.items()
        if why
    ]


def _as_of_now(status: CycleStatus, log: LearningReader) -> tuple[CycleStage, str]:
    """(stage, message), where what was proposed has been judged since."""
    proposed = status.report.get("proposed") if status.stage is CycleStage.PROPOSED else None
    if isinstance(proposed, str) and (state := log.judged_since(proposed)):
        return status.stage, f"{proposed} waited for somebody's yes, and is {state} since"
    return status.stage, status.message
