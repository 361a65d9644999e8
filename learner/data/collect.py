"""Collects what a cycle learns from out of the log: the experts' episodes, and the policy's own that are fresh enough.

Own episodes are those with steps that no cycle has read yet, and a replay share of older ones: without replay an online
LoRA forgets (CLaaS, arXiv 2606.05559). Of the older ones those come first of which somebody has said meanwhile how they
ended. What a policy of long ago did is left out: its importance ratios say nothing.
But what a person took the trouble to correct is always learned, whoever acted there and however long ago.

Everything is of one agent: what another one did, was shown, or was told in its users' outcomes and corrections is not
read, also where both act by the same network or the same was said to both.

A task is held out as a whole, for the gate: its demonstrations are never trained on, nor what the policy did at it. So
are anchors, at which the gate sees whether a candidate forgets: those that the user lists, and a share of what users
were content with. A demonstration that another one repeats step by step counts once.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from learner.data.held_out import Conversation, HeldOut, is_held_out, split_of
from learner.data.repeated import repeated
from learner.data.training_data import NO_ANCESTOR
from learner.options import CollectionOptions
from policies.chat.chat_protocol import action_message
from policies.types import Message
from runtime.store.damage import Damaged
from runtime.store.episodes import Actor, Episode, Purpose, Step, new_messages_along
from runtime.store.own_episodes import MOST_COUNTED, OwnEpisodes
from runtime.store.step_log import StepLog
from tools.worlds.world import World

_NEWEST = 500
"""Episodes of an adapter among which anchors are looked for."""


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
    def conversation(self) -> Conversation:
        """What tells its task."""
        said = (message for step in self.path for message in (*step.new_messages, action_message(step.action)))
        episode = self.episode
        return Conversation(episode.id, episode.task, episode.metadata, tuple(said), episode.created_at)

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
    own_held_out: list[LoggedEpisode]
    """The policy's own at held-out tasks: their steps are rewarded, and never learned from."""
    rewarded_alone: list[LoggedEpisode]
    """What is rewarded, too, and neither learned from nor tried: of the policy's own the lines beside the main one
    (other choices of a step, ways that a client left), and demonstrations that others repeat."""
    anchors: list[LoggedEpisode]
    """What went well, or is to go well: never trained on either."""
    anchor_tasks: list[str]
    """Ids of the world's tasks."""
    last_step_id: str | None
    """The log was read up to this step."""
    groups_of: dict[str, frozenset[str]] = field(default_factory=dict)
    """By an episode, the names of the demonstrated tasks that it is of, one for a demonstration: what a fold keeps
    together, and what is one piece of evidence."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of episodes: collected, replayed, and left out by reason."""

    @property
    def read(self) -> list[LoggedEpisode]:
        """All that the cycle may train on, try or reward."""
        tried = [*self.held_out, *self.own_held_out, *self.anchors]
        return [*self.demonstrations, *self.policy_episodes, *tried, *self.rewarded_alone]


def collect(
    log: StepLog,
    last_step_id: str | None,
    parents: Sequence[str],
    options: CollectionOptions,
    seed: int,
    world: World | None = None,
    agent: str = "",
) -> Collected:
    """Read an agent's part of the log. `parents` names its acting adapter and the ancestors of that, newest first,
    `base` last.

    `world`: whose tasks the gate may try; what is of them is held out, whatever names it.
    """
    experts = _experts(log, agent)
    anchors, anchor_tasks = _listed_anchors(log, options.anchors, world, agent)
    anchors += _contented(log, parents, options, agent)
    apart = HeldOut.among(
        [expert.conversation for expert in experts],
        world,
        options.held_out_share,
        [anchor.conversation for anchor in anchors],
        anchor_tasks,
    )
    once, repeats = _told_once(experts)
    demonstrations, held_out, counts = _dealt(once, apart, options, seed)
    behind = {name: number for number, name in enumerate(parents)}
    own, last_step_id, own_counts = _own(log, last_step_id, behind, options, seed, agent)
    beside = [line for each in (*own, *anchors) for line in _beside(log, each)]
    own += _corrected(log, own, agent)
    trained, own_held_out = list[LoggedEpisode](), list[LoggedEpisode]()
    for each in own:
        (own_held_out if apart.covers(each.conversation) else trained).append(each)
    counts |= own_counts | {"own_held_out": len(own_held_out), "anchors": len(anchors) + len(anchor_tasks)}
    counts |= {"demonstrations_repeated": len(repeats)} if repeats else {}
    counts |= {"damaged_rows": len(log.damage)} if len(log.damage) else {}
    grouped = (*demonstrations, *held_out, *trained)
    groups_of = {each.episode.id: apart.groups(each.conversation) for each in grouped}
    rewarded_alone = [*beside, *repeats]
    return Collected(
        demonstrations,
        held_out,
        trained,
        own_held_out,
        rewarded_alone,
        anchors,
        anchor_tasks,
        last_step_id,
        groups_of,
        counts,
    )


@dataclass(frozen=True, slots=True)
class Dealt:
    """The demonstrations of a cycle without a world and anchors."""

    demonstrations: list[LoggedEpisode]
    """Those to train on."""
    held_out: list[LoggedEpisode]
    task_of: dict[str, str]
    """By episode, a name of the task that is demonstrated."""


def dealt_demonstrations(log: StepLog, options: CollectionOptions, agent: str = "") -> Dealt:
    """Those of an agent."""
    experts = _experts(log, agent)
    apart = HeldOut.among([expert.conversation for expert in experts], None, options.held_out_share)
    once, _ = _told_once(experts)
    demonstrations, held_out, _ = _dealt(once, apart, options, seed=0)
    task_of = {each.episode.id: min(apart.groups(each.conversation)) for each in (*demonstrations, *held_out)}
    return Dealt(demonstrations, held_out, task_of)


def _experts(log: StepLog, agent: str) -> list[LoggedEpisode]:
    return _readable(log, log.episodes(limit=1_000_000, actor=Actor.EXPERT, agent=agent))


def _told_once(experts: Sequence[LoggedEpisode]) -> tuple[list[LoggedEpisode], list[LoggedEpisode]]:
    """Those that are learned or tried, and those that another one repeats. All of them name their task."""
    names = repeated({each.episode.id: each.path for each in experts})
    once = [each for each in experts if each.episode.id not in names]
    return once, [each for each in experts if each.episode.id in names]


def _listed_anchors(
    log: StepLog, listed: Sequence[str], world: World | None, agent: str
) -> tuple[list[LoggedEpisode], list[str]]:
    """(episodes, the world's tasks). Raises ValueError for what is neither.

    One list may serve several agents: each takes its own episodes from it.
    """
    episodes, tasks = list[LoggedEpisode](), list[str]()
    for name in listed:
        if world is not None and split_of(name, world):
            tasks.append(name)
        elif (episode := log.episode(name)) is not None:
            episodes += [_logged(log, episode)] if episode.agent == agent else []
        else:
            raise ValueError(f"the anchor {name!r} is neither a logged episode nor a task of the world")
    return episodes, tasks


def _contented(log: StepLog, parents: Sequence[str], options: CollectionOptions, agent: str) -> list[LoggedEpisode]:
    """The newest own episodes of the anchors' share that users were content with, and nobody corrected."""
    corrected = set(log.corrected_steps(agent))
    found = list[LoggedEpisode]()
    for adapter in parents[: options.max_versions_old + 1]:
        wanted = {"purpose": Purpose.SERVE, "actor": Actor.POLICY, "adapter": adapter, "agent": agent}
        for episode in log.episodes(limit=_NEWEST, **wanted):
            if len(found) >= options.max_anchors:
                return found
            if not is_held_out(f"anchor {episode.id}", options.anchor_share):
                continue
            found += [
                logged
                for logged in _readable(log, [episode])
                if logged.outcome == 1.0 and corrected.isdisjoint(step.id for step in logged.path)
            ]
    return found


def _dealt(
    experts: Sequence[LoggedEpisode], apart: HeldOut, options: CollectionOptions, seed: int
) -> tuple[list[LoggedEpisode], list[LoggedEpisode], dict[str, int]]:
    """Those to train on, those held out, and how many there are."""
    held_out = [expert for expert in experts if expert.episode.id in apart.held_out_episodes - set(options.anchors)]
    demonstrations = [expert for expert in experts if expert.episode.id not in apart.held_out_episodes]
    counts = {"demonstrations": len(demonstrations), "held_out": len(held_out)}
    draw, most = random.Random(seed), options.max_demonstrations
    held_out, demonstrations = (
        draw.sample(side, most) if len(side) > most else side for side in (held_out, demonstrations)
    )
    return demonstrations, held_out, counts


def _own(
    log: StepLog, since: str | None, behind: Mapping[str, int], options: CollectionOptions, seed: int, agent: str
) -> tuple[list[LoggedEpisode], str | None, dict[str, int]]:
    """The newest with steps that no cycle has read, and a share of the others; the last step there is; counts."""
    # What was rolled back is no ancestor of what acts, however short the line is: it is left out.
    recent = [name for name, number in behind.items() if number <= options.max_versions_old]
    own = OwnEpisodes(log, recent, since, agent)
    last_step_id = own.last_step_id()
    num_replayed = max(int(options.max_own_episodes * options.replay_share), 0)
    replayed = _told_first(own, num_replayed, random.Random(seed))
    new = own.fresh(options.max_own_episodes + MOST_COUNTED)
    kept = new[: options.max_own_episodes - len(replayed)]
    counts = {"own_new": len(kept), "own_replayed": len(replayed)}
    counts |= {"own_too_old": own.num_too_old(), "own_over_limit": len(new) - len(kept)}
    return _readable(log, (*kept, *replayed), behind), last_step_id, counts


def _told_first(own: OwnEpisodes, limit: int, draw: random.Random) -> list[Episode]:
    """What is replayed: first what somebody has judged since it was read, which mostly taught nothing then."""
    found = {episode.id: episode for episode in (*own.told_since(limit), *own.old(limit, draw))}
    return list(found.values())[:limit]


def _corrected(log: StepLog, own: Sequence[LoggedEpisode], agent: str) -> list[LoggedEpisode]:
    """The ways to the corrected steps that are not on a path of `own`."""
    collected = {step.id for each in own for step in each.path}
    found = []
    for step_id in log.corrected_steps(agent):
        if step_id in collected:
            continue
        try:
            path = tuple(log.path_to(step_id))
            episode = log.episode(path[-1].episode_id) if path else None
        except Damaged as damaged:
            log.damage.note(damaged)
            continue
        if episode is not None and episode.actor is Actor.POLICY:
            found.append(LoggedEpisode(episode, path, None, NO_ANCESTOR))
            collected |= {step.id for step in path}
    return found


def _readable(
    log: StepLog, episodes: Iterable[Episode], behind: Mapping[str, int] | None = None
) -> list[LoggedEpisode]:
    """The episodes along their main lines; one with a damaged step is left out, and noted by the log. `behind` says how
    many versions an adapter is behind the acting one."""

    def read(episode: Episode) -> LoggedEpisode:
        return _logged(log, episode, behind[episode.adapter] if behind else 0)

    return list(log.damage.sound(episodes, read))


def _logged(log: StepLog, episode: Episode, num_versions_old: int = 0) -> LoggedEpisode:
    outcomes = log.outcomes(episode.id)
    path = main_line(log.steps(episode.id))
    return LoggedEpisode(episode, path, outcomes[-1].value if outcomes else None, num_versions_old)


def _beside(log: StepLog, own: LoggedEpisode) -> list[LoggedEpisode]:
    """The same episode along each of its other lines, from where it leaves those before."""
    steps, on_path = log.steps(own.episode.id), {step.id for step in own.path}
    by_id = {step.id: step for step in steps if step.id not in on_path}
    parents = {step.parent_id for step in steps}
    lines = list[LoggedEpisode]()
    for end in [step for step in by_id.values() if step.id not in parents]:
        line = _line_to(end, by_id)
        lines.append(replace(own, path=line))
        for step in line:
            del by_id[step.id]
    return lines


def main_line(steps: Sequence[Step]) -> tuple[Step, ...]:
    """From the first step to the newest one, along the parents; side branches are left out."""
    return _line_to(steps[-1], {step.id: step for step in steps}) if steps else ()


def _line_to(end: Step, by_id: Mapping[str, Step]) -> tuple[Step, ...]:
    step: Step | None = end
    line: list[Step] = []
    while step is not None:
        line.append(step)
        step = by_id.get(step.parent_id) if step.parent_id else None
    return tuple(reversed(line))
