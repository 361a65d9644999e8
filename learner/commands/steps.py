"""python -m learner steps EPISODE: its steps with their rewards, and which of them lost it; no server is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing

from pydantic import Field
from pydantic_settings import CliPositionalArg

from learner.commands.server import ServerOptions, step_log_of
from learner.data.collect import main_line
from learner.data.explanation import Explanation, JudgedStep, lost_at, short
from runtime.store.episodes import Episode
from runtime.store.learning_log import LearningReader, RewardSource
from runtime.store.step_log import StepLog

_COLUMNS = {
    RewardSource.EXPERT_AGREEMENT: "agreement",
    RewardSource.DISCRIMINATOR: "discriminator",
    RewardSource.IMPLICIT: "implicit",
    RewardSource.JUDGE: "judge",
}


class StepsOptions(ServerOptions):
    """Show the steps of an episode along its main line, with the rewards of the newest cycles that judged them."""

    episode: CliPositionalArg[str]
    """Its id, as answers carry it in x-episode-id."""
    as_json: bool = Field(False, validation_alias="json")
    """Print JSON instead of a table."""


def run(options: StepsOptions) -> int:
    """Exit code 1 where there is no such episode."""
    log = step_log_of(options)
    if log is None:
        return 1
    with closing(log):
        episode = log.episode(options.episode)
        if episode is None:
            print(f"there is no episode {options.episode!r} in {options.state}", file=sys.stderr)
            return 1
        steps, num_beside, outcome = _judged(log, LearningReader(options.state), episode)
    lost = lost_at(steps, outcome)
    if options.as_json:
        print(json.dumps(_told(episode, steps, num_beside, outcome, lost), ensure_ascii=False))
    else:
        print("\n".join(_table(episode, steps, num_beside, outcome, lost)))
    return 0


def _judged(log: StepLog, rewards: LearningReader, episode: Episode) -> tuple[list[JudgedStep], int, float | None]:
    """The steps of its main line, how many lie beside it, and how it ended."""
    every = log.steps(episode.id)
    path, newest, outcomes = main_line(every), rewards.newest_rewards_of(episode.id), log.outcomes(episode.id)
    judged = [JudgedStep(step, newest.get(step.id, {}), log.corrections(step.id)) for step in path]
    return judged, len(every) - len(path), outcomes[-1].value if outcomes else None


def _told(
    episode: Episode, steps: Sequence[JudgedStep], num_beside: int, outcome: float | None, lost: Explanation | None
) -> dict[str, object]:
    return {
        "episode": episode.id,
        "actor": episode.actor.value,
        "task": episode.task,
        "adapter": episode.adapter,
        "outcome": outcome,
        "steps": [each.to_json() for each in steps],
        "num_steps_beside": num_beside,
        "lost_at": None if lost is None else lost.to_json(),
    }


def _table(
    episode: Episode, steps: Sequence[JudgedStep], num_beside: int, outcome: float | None, lost: Explanation | None
) -> list[str]:
    ended = "nobody has said how it ended" if outcome is None else f"outcome {outcome:g}"
    of = f", {episode.task}" if episode.task else ""
    lines = [f"{episode.id}  {episode.actor} {episode.adapter}{of}, {len(steps)} steps, {ended}"]
    rows = [["", "step", "action", *_COLUMNS.values()]]
    for each in steps:
        mark = ">" if lost is not None and lost.step_id == each.step.id else ""
        rows.append([mark, str(each.step.index), short(each.step.action), *(_cell(each, of) for of in _COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if num_beside:
        lines.append(f"{num_beside} more steps lie beside this line: other choices, or ways that were left")
    if not any(each.rewards for each in steps):
        lines.append("no cycle has rewarded these steps yet")
    lines.append(_verdict(outcome, lost))
    return lines


def _cell(judged: JudgedStep, source: RewardSource) -> str:
    value = judged.value(source)
    return "-" if value is None else f"{value:g}" if source is RewardSource.EXPERT_AGREEMENT else f"{value:+.2f}"


def _verdict(outcome: float | None, lost: Explanation | None) -> str:
    if lost is not None:
        how = "lost at" if outcome is not None else "doubtful:"
        return f"{how} step {lost.index}: {lost.reason}"
    if outcome == 1.0:
        return "it was not lost"
    return "nothing speaks against any step" + (": nobody has said how it ended" if outcome is None else "")
