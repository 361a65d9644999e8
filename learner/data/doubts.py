"""Steps of demonstrations that something contradicts: their outcome, an expert who knows the way, or their peers.

Demonstrations are noisy in real life, and imitation learns a mistake as faithfully as the rest. Nothing is thrown away
here: what is doubted is listed, with the reason, for somebody to withdraw or correct. Peers are other demonstrations at
the same state, which have gone through the same conversation by meaning. What only a trained network can say of a
state that no other demonstration has been at is in `learner/training/cross_fit.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from learner.data.collect import LoggedEpisode, LoggedState
from learner.data.comparison import compare
from learner.data.experts import CORRECTION, Expert, ask, same_effect_at
from learner.data.explanation import short
from learner.data.same_state import state_key
from policies.chat.meaning import meaning
from policies.types import MalformedAction
from tools.worlds.world import World


class DoubtKind(StrEnum):
    """What contradicts a step; the strongest first."""

    EXPERT = "expert"  # a correction, the task's world or a stronger model would do something else
    OUTCOME = "outcome"  # its demonstration is said to have failed, and nothing names the step: its last one is listed
    PEERS = "peers"  # most other demonstrations that were at this state did something else
    UNLIKELY = "unlikely"  # a network that was trained on the other demonstrations would not do it


@dataclass(frozen=True, slots=True)
class Doubt:
    """A step of a demonstration that something contradicts."""

    episode_id: str
    step_id: str
    index: int
    kind: DoubtKind
    action: str
    """What was done, in a line."""
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


async def doubts_of(
    demonstrations: Sequence[LoggedEpisode],
    experts: Sequence[Expert],
    world: World | None,
    unlikely: Sequence[Doubt] = (),
) -> list[Doubt]:
    """By demonstration and step, then what is only `unlikely`; of several reasons against one step the strongest.

    `experts` are asked at every step. Where the world's would do the same, peers and networks are not heard; a person's
    word stands beside theirs. The outcome is named where no expert contradicts a step of its demonstration.
    """
    by_step = {doubt.step_id: doubt for doubt in _by_peers(demonstrations, world)}
    only_unlikely = {doubt.step_id: doubt for doubt in unlikely if doubt.step_id not in by_step}
    asked = await asyncio.gather(*(_by_experts(each, experts, world) for each in demonstrations))
    for demonstration, (doubts, confirmed) in zip(demonstrations, asked, strict=True):
        stronger = {doubt.step_id: doubt for doubt in doubts or _by_outcome(demonstration)}
        for step_id in (*confirmed, *stronger):
            by_step.pop(step_id, None)
            only_unlikely.pop(step_id, None)
        by_step |= stronger
    steps = [step.id for demonstration in demonstrations for step in demonstration.path]
    return [*(by_step[step_id] for step_id in dict.fromkeys(steps) if step_id in by_step), *only_unlikely.values()]


def doubted(state: LoggedState, kind: DoubtKind, reason: str) -> Doubt:
    step = state.step
    return Doubt(step.episode_id, step.id, step.index, kind, short(step.action), reason)


# ------------------------------------------------------------------------------------------------ evidence


def _by_outcome(demonstration: LoggedEpisode) -> list[Doubt]:
    if demonstration.outcome is None or demonstration.outcome == 1.0:
        return []
    reason = f"the demonstration is said to have ended with outcome {demonstration.outcome:g}"
    return [doubted(state, DoubtKind.OUTCOME, reason) for state in demonstration.states()[-1:]]


async def _by_experts(
    demonstration: LoggedEpisode, experts: Sequence[Expert], world: World | None
) -> tuple[list[Doubt], list[str]]:
    """What they contradict, and the ids of the steps that others than people confirm."""
    states = demonstration.states()
    doubts, confirmed = list[Doubt](), list[str]()
    for state, answer in zip(states, await asyncio.gather(*(ask(experts, each) for each in states)), strict=True):
        if answer is None:
            continue
        if compare(state.step.action, answer.action, same_effect_at(world, state)).agrees:
            confirmed += [state.step.id] if answer.source != CORRECTION else []
        else:
            reason = f"{answer.source} would do this: {short(answer.action)}"
            doubts.append(doubted(state, DoubtKind.EXPERT, reason))
    return doubts, confirmed


def _by_peers(demonstrations: Sequence[LoggedEpisode], world: World | None) -> list[Doubt]:
    """Where two or more demonstrations were at one state, the steps that fewer than half of the others agree with."""
    at_state: dict[str, list[LoggedState]] = {}
    for demonstration in demonstrations:
        for state in demonstration.states():
            at_state.setdefault(state_key(state), []).append(state)
    return [doubt for group in at_state.values() if len(group) > 1 for doubt in _minority(group, world)]


def _minority(group: Sequence[LoggedState], world: World | None) -> list[Doubt]:
    alike = dict[Hashable, list[LoggedState]]()  # few mean different things, however many they are
    for state in group:
        alike.setdefault(_meant_by(state), []).append(state)
    num_others, doubts = len(group) - 1, list[Doubt]()
    for states in alike.values():
        against = _against(states[0], [others for others in alike.values() if others is not states], world)
        num_against = sum(map(len, against))
        if 2 * num_against > num_others:
            did = short(against[0][0].step.action)
            reason = f"{num_against} of {num_others} other demonstrations at this state did otherwise: {did}"
            doubts += [doubted(state, DoubtKind.PEERS, reason) for state in states]
    return doubts


def _against(
    state: LoggedState, others: Sequence[list[LoggedState]], world: World | None
) -> Sequence[list[LoggedState]]:
    """Those of the others, by what they mean, that a world does not find to be the same in effect."""
    effect = same_effect_at(world, state)
    if effect is None:
        return others
    return [each for each in others if not compare(state.step.action, each[0].step.action, effect).agrees]


def _meant_by(state: LoggedState) -> Hashable:
    """Equal for what `compare` finds to be the same; what cannot be read agrees with nothing."""
    action = state.step.action
    try:
        return state.step.id if isinstance(action, MalformedAction) else meaning(action)
    except RecursionError:
        return state.step.id
