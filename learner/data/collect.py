"""Collects what a cycle learns from out of the log: the experts' episodes, and the policy's own that are fresh enough.

Own episodes are those with steps that no cycle has read yet, and a replay share of older ones: without replay an online
LoRA forgets (CLaaS, arXiv 2606.05559). What a policy of long ago did is left out: its importance ratios say nothing.
But what a person took the trouble to correct is always learned, whoever acted there and however long ago.

A task is held out as a whole, for the gate: its demonstrations are never trained on, nor what the policy did at it.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from learner.data.held_out import is_held_out
from learner.data.training_data import NO_ANCESTOR
from policies.chat_protocol import action_message
from policies.types import Message
from runtime.store.episodes import Actor, Episode, Purpose, Step, new_messages_along
from runtime.store.step_log import StepLog

LEARNED_FROM = (Purpose.SERVE, Purpose.PRACTICE)
_PAGE = 2000


@dataclass(frozen=True, slots=True)
class CollectionOptions:
    """What is collected."""

    held_out_share: float = 0.2
    """Of the demonstrations; never trained on."""
    max_demonstrations: int = 256
    """Of those to train on, drawn anew each cycle, and of those held out: each of their states is sampled at."""
    max_own_episodes: int = 256
    """Of the policy's own; the newest count."""
    replay_share: float = 0.25
    """Of `max_own_episodes`: kept for episodes that an earlier cycle has read already."""
    max_versions_old: int = 2
    """An own episode whose adapter is further behind the acting one is left out."""


@dataclass(frozen=True, slots=True)
class LoggedEpisode:
    """One episode along its main line, from the first step to its newest."""

    episode: Episode
    path: tuple[Step, ...]
    outcome: float | None
    """The newest that was said; None where nobody said."""
    num_versions_old: int = 0
    """How many versions its adapter is behind the acting one; NO_ANCESTOR where the acting one does not stem from it,
    or where only the corrections along the path count."""

    @property
    def held_out_name(self) -> str:
        """What decides whether it is held out: its task, or where that has no name all that the agent was told in it.

        An episode and the demonstration that it was promoted to have the same one. What the user began with was
        refused as a name: many agents are always greeted alike.
        """
        if self.episode.task is not None:
            return self.episode.task
        messages = [message for step in self.path for message in step.new_messages]
        told = [message.get("content") for message in messages if message["role"] in ("user", "tool")]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def states(self) -> list[LoggedState]:
        return [LoggedState(self.episode.task, self.path[: number + 1]) for number in range(len(self.path))]


@dataclass(frozen=True, slots=True)
class LoggedState:
    """Where a logged step was taken."""

    task: str | None
    path: tuple[Step, ...]
    """The steps before, and last the one that was taken here."""

    @property
    def step(self) -> Step:
        return self.path[-1]

    @property
    def messages(self) -> list[Message]:
        """The conversation before the step."""
        messages = list[Message]()
        for step, new_messages in new_messages_along(self.path):
            messages += new_messages
            if step is not self.step:
                messages.append(action_message(step.action))
        return messages


@dataclass(frozen=True, slots=True)
class Collected:
    """What the log holds for a cycle."""

    demonstrations: list[LoggedEpisode]
    held_out: list[LoggedEpisode]
    """Demonstrations that are never trained on; the gate's."""
    policy_episodes: list[LoggedEpisode]
    last_step_id: str | None
    """The log was read up to this step."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of episodes: collected, replayed, and left out by reason."""


def collect(
    log: StepLog, last_step_id: str | None, parents: Sequence[str], options: CollectionOptions, seed: int
) -> Collected:
    """Read the log. `parents` names the acting adapter and its ancestors, newest first, `base` last."""
    demonstrations, held_out, counts = _demonstrations(log, options, seed)
    fresh, last_step_id = _episodes_since(log, last_step_id)
    behind = {name: number for number, name in enumerate(parents)}
    own, own_counts = _own(log, fresh, behind, options, seed)
    own += _corrected(log, own)
    kept_apart = {expert.held_out_name for expert in held_out}
    trained = [each for each in own if each.held_out_name not in kept_apart]
    counts |= own_counts | {"own_held_out": len(own) - len(trained)}
    return Collected(demonstrations, held_out, trained, last_step_id, counts)


def _demonstrations(
    log: StepLog, options: CollectionOptions, seed: int
) -> tuple[list[LoggedEpisode], list[LoggedEpisode], dict[str, int]]:
    """Those to train on, those held out, and how many there are."""
    experts = [_logged(log, episode) for episode in log.episodes(limit=1_000_000, actor=Actor.EXPERT)]
    sides = {True: list[LoggedEpisode](), False: list[LoggedEpisode]()}
    for expert in experts:
        sides[is_held_out(expert.held_out_name, options.held_out_share)].append(expert)
    counts = {"demonstrations": len(sides[False]), "held_out": len(sides[True])}
    draw, most = random.Random(seed), options.max_demonstrations
    demonstrations, held_out = (draw.sample(side, most) if len(side) > most else side for side in sides.values())
    return held_out, demonstrations, counts


def _episodes_since(log: StepLog, last_step_id: str | None) -> tuple[set[str], str | None]:
    """Ids of the episodes with steps logged after that one, and the last step there is."""
    found: set[str] = set()
    while steps := log.steps_since(last_step_id, _PAGE):
        found |= {step.episode_id for step in steps}
        last_step_id = steps[-1].id
    return found, last_step_id


def _own(
    log: StepLog, fresh: set[str], behind: Mapping[str, int], options: CollectionOptions, seed: int
) -> tuple[list[LoggedEpisode], dict[str, int]]:
    learnable = [
        episode
        for purpose in LEARNED_FROM
        for episode in log.episodes(limit=1_000_000, purpose=purpose, actor=Actor.POLICY)
    ]
    # What was rolled back is no ancestor of what acts, however short the line is: it is left out.
    recent = [e for e in learnable if e.adapter in behind and behind[e.adapter] <= options.max_versions_old]
    new = sorted((e for e in recent if e.id in fresh), key=lambda e: e.id, reverse=True)
    old = sorted((e for e in recent if e.id not in fresh), key=lambda e: e.id)
    num_replayed = min(len(old), max(int(options.max_own_episodes * options.replay_share), 0))
    kept = new[: options.max_own_episodes - num_replayed]
    replayed = random.Random(seed).sample(old, num_replayed)
    own = [_logged(log, episode, behind[episode.adapter]) for episode in (*kept, *replayed)]
    counts = {"own_new": len(kept), "own_replayed": len(replayed)}
    counts |= {"own_too_old": len(learnable) - len(recent), "own_over_limit": len(new) - len(kept)}
    return own, counts


def _corrected(log: StepLog, own: Sequence[LoggedEpisode]) -> list[LoggedEpisode]:
    """The ways to the corrected steps that are not on a path of `own`."""
    collected = {step.id for each in own for step in each.path}
    found = []
    for step_id in log.corrected_steps():
        if step_id in collected:
            continue
        path = tuple(log.path_to(step_id))
        episode = log.episode(path[-1].episode_id) if path else None
        if episode is not None and episode.actor is Actor.POLICY:
            found.append(LoggedEpisode(episode, path, None, NO_ANCESTOR))
            collected |= {step.id for step in path}
    return found


def _logged(log: StepLog, episode: Episode, num_versions_old: int = 0) -> LoggedEpisode:
    outcomes = log.outcomes(episode.id)
    path = main_line(log.steps(episode.id))
    return LoggedEpisode(episode, path, outcomes[-1].value if outcomes else None, num_versions_old)


def main_line(steps: Sequence[Step]) -> tuple[Step, ...]:
    """From the first step to the newest one, along the parents; side branches are left out."""
    by_id = {step.id: step for step in steps}
    step = steps[-1] if steps else None
    line: list[Step] = []
    while step is not None:
        line.append(step)
        step = by_id.get(step.parent_id) if step.parent_id else None
    return tuple(reversed(line))
