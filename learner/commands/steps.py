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
from learner.data.explanation import Explanation, JudgedStep, lost_at, short, to_compare
from learner.terminal import columns, padded, plain, width
from runtime.store.damage import Damaged
from runtime.store.episodes import Episode, Step
from runtime.store.learning_log import LearningReader, RewardSource
from runtime.store.step_log import StepLog

_COLUMNS = {
    RewardSource.EXPERT_AGREEMENT: "agreement",
    RewardSource.DISCRIMINATOR: "discriminator",
    RewardSource.IMPLICIT: "implicit",
    RewardSource.JUDGE: "judge",
}


_COLUMNS_BESIDE = 57
"""Of a terminal, that a line takes beside the action."""


class StepsOptions(ServerOptions):
    """Show the steps of an episode along its main line, with their rewards: of each source those of one cycle, the one
    that judged most of them and of equals the newest; of agreement the newest. Steps beside that line are in the
    JSON."""

    episode: CliPositionalArg[str]
    """Its id, as answers carry it in x-episode-id."""
    as_json: bool = Field(False, validation_alias="json")
    """Print JSON instead of a table."""


def run(options: StepsOptions) -> int:
    """Exit code 1 where there is no such episode, or it is damaged."""
    log = step_log_of(options)
    if log is None:
        return 1
    with closing(log):
        try:
            episode = log.episode(options.episode)
            if episode is None:
                how = "was erased from" if log.erased_among([options.episode]) else "is not in"
                print(f"the episode {options.episode!r} {how} {options.state}", file=sys.stderr)
                return 1
            steps, beside, outcome = _judged(log, LearningReader(options.state), episode)
        except Damaged as damaged:
            print(f"{damaged}: it cannot be shown (docs/OPERATIONS.md, Damage)", file=sys.stderr)
            return 1
    lost = lost_at(steps, outcome)
    if options.as_json:
        print(json.dumps(_told(episode, steps, beside, outcome, lost)))
    else:
        print("\n".join(map(plain, _table(episode, steps, len(beside), outcome, lost))))
    return 0


def _judged(
    log: StepLog, rewards: LearningReader, episode: Episode
) -> tuple[list[JudgedStep], list[JudgedStep], float | None]:
    """The steps of its main line, those beside it, and how it ended."""
    every, given = log.steps(episode.id), rewards.rewards_of(episode.id)
    path, outcomes = main_line(every), log.outcomes(episode.id)
    on_path = {step.id for step in path}

    def judged(steps: Sequence[Step]) -> list[JudgedStep]:
        ids = {step.id for step in steps}
        known = to_compare([reward for reward in given if reward.step_id in ids])
        return [JudgedStep(step, known.get(step.id, {}), log.corrections(step.id)) for step in steps]

    beside = [step for step in every if step.id not in on_path]
    return judged(path), judged(beside), outcomes[-1].value if outcomes else None


def _told(
    episode: Episode,
    steps: Sequence[JudgedStep],
    beside: Sequence[JudgedStep],
    outcome: float | None,
    lost: Explanation | None,
) -> dict[str, object]:
    return {
        "episode": episode.id,
        "actor": episode.actor.value,
        "task": episode.task,
        "adapter": episode.adapter,
        "outcome": outcome,
        "steps": [each.to_json() for each in steps],
        "num_steps_beside": len(beside),
        "steps_beside": [each.to_json() for each in beside],
        "lost_at": None if lost is None else lost.to_json(),
    }


def _table(
    episode: Episode, steps: Sequence[JudgedStep], num_beside: int, outcome: float | None, lost: Explanation | None
) -> list[str]:
    ended = "nobody has said how it ended" if outcome is None else f"outcome {outcome:g}"
    of = f", {episode.task}" if episode.task else ""
    lines = [f"{episode.id}  {episode.actor} {episode.adapter}{of}, {len(steps)} steps, {ended}"]
    rows = [["", "step", "action", *_COLUMNS.values()]]
    most_letters = max(16, min(72, columns() - _COLUMNS_BESIDE))
    for each in steps:
        mark = ">" if lost is not None and lost.step_id == each.step.id else ""
        rows.append(
            [mark, str(each.step.index), short(each.step.action, most_letters), *(_cell(each, of) for of in _COLUMNS)]
        )
    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(padded, row, widths)).rstrip() for row in rows]
    if num_beside:
        lines.append(f"{num_beside} more steps lie beside this line: other choices, or ways that were left (--json)")
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
