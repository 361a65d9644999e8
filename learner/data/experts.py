"""Who can say what an expert would have done at a logged state: a correction, the task's world, or a stronger model.

An expert at the agent's own states is what repairs covariate shift: demonstrations alone never show how to get out of
the states that only the agent gets into (DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

from learner.data.collect import LoggedState
from learner.data.comparison import SameEffect
from learner.data.other_model import OtherModel
from policies.chat.chat_protocol import action_message, message_action, text_of
from policies.types import Action, MalformedAction, Message, ToolCalls
from runtime.store.damage import Damaged
from runtime.store.episodes import Actor, Correction, Step
from runtime.store.step_log import StepLog
from tools.worlds.blame import blaming, told_by
from tools.worlds.threads import patiently
from tools.worlds.world import UnknownTask, World, WorldEpisode, WorldFailed, require_action, task_named

_log = logging.getLogger(__name__)

CORRECTION = "correction"
"""The source of what a person said."""


@dataclass(frozen=True, slots=True)
class ExpertAnswer:
    """What an expert would do at a state."""

    action: Action
    source: str
    """`CORRECTION`, `world`, or the model's name."""


class Expert(Protocol):
    """Somebody who may know what to do at a logged state."""

    async def answer(self, state: LoggedState) -> ExpertAnswer | None:
        """None where this expert cannot say. Never raises for what the log holds."""
        ...


@dataclass(frozen=True, slots=True)
class Corrections:
    """What people said should have been done, as it was logged; the newest counts.

    What was said of an episode counts for the demonstration that it was promoted to.
    """

    log: StepLog

    async def answer(self, state: LoggedState) -> ExpertAnswer | None:
        corrections = self.log.corrections(state.step.id) or self._where_it_came_from(state)
        return ExpertAnswer(corrections[-1].action, CORRECTION) if corrections else None

    def _where_it_came_from(self, state: LoggedState) -> list[Correction]:
        """Corrections of the step that a promoted step stems from: the one at which the same was said before."""
        try:
            episode = self.log.episode(state.step.episode_id)
            if episode is None or episode.actor is not Actor.EXPERT:  # a client may say anything of its own
                return []
            same = [step for step in self._corrected(episode.metadata.get("promoted_from")) if _is_at(state, step[1])]
        except Damaged:
            return []
        return same[-1][0] if same else []

    def _corrected(self, episode_id: Any) -> Iterator[tuple[list[Correction], list[Step]]]:
        """(its corrections, the path to it) of each corrected step of an episode."""
        for step in self.log.steps(episode_id) if isinstance(episode_id, str) else ():
            if corrections := self.log.corrections(step.id):
                yield corrections, self.log.path_to(step.id)


def _is_at(state: LoggedState, path: Sequence[Step]) -> bool:
    return LoggedState(state.task, tuple(path)).messages == state.messages


@dataclass(frozen=True, slots=True)
class WorldExpert:
    """A world whose own expert may know the way."""

    world: World
    problems: Counter[str] = field(default_factory=Counter)
    """Why it said nothing though it was asked, counted: a world may be anybody's code."""

    async def answer(self, state: LoggedState) -> ExpertAnswer | None:
        try:
            episode = open_at(self.world, state)
            if episode is None:
                return None
            action = patiently(self.world.name, partial(_expert_action, self.world.name, episode))
        except WorldFailed as error:
            self.problems[str(error)] += 1
            return None
        return None if action is None else ExpertAnswer(action, "world")


def _expert_action(world: str, episode: WorldEpisode) -> Action | None:
    with blaming(world, "expert_action"):
        message = episode.expert_action()
        if message is None:
            return None
        require_action(message)
        return message_action(message)


@dataclass(slots=True)
class ModelExpert(OtherModel):
    """A stronger model behind an OpenAI-compatible URL. Where it does not answer, the state goes without an expert."""

    async def answer(self, state: LoggedState) -> ExpertAnswer | None:
        options: Any = {"tools": list(state.step.tools)} if state.step.tools else {}
        said = await self.message(state.messages, **options)
        try:
            return None if said is None else ExpertAnswer(_answered_action(said, state.step), self.model)
        except ValueError as error:
            self.note(error)
            return None


def _answered_action(said: Message, step: Step) -> Action:
    """The action that another model answers at a step. Raises ValueError for a call where it was offered no tools."""
    action = message_action(said)
    if isinstance(action, ToolCalls) and not step.tools:
        raise ValueError(f"it calls {action.calls[0].name} where no tools were offered")
    return action


async def ask(experts: Sequence[Expert], state: LoggedState) -> ExpertAnswer | None:
    """The first of the experts, in their order, who knows."""
    for expert in experts:
        if (answer := await expert.answer(state)) is not None:
            return answer
    return None


# --------------------------------------------------------------------------------------------------- worlds


def open_at(world: World | None, state: LoggedState) -> WorldEpisode | None:
    """The world as it was when a logged step was taken: its task opened again and the calls replayed.

    None for another world's task, and where the log saw other results than the world now gives: then the world tells
    another story than the one that was lived, and its expert does not know the way. Raises WorldFailed for what the
    world raises, and where it hangs.
    """
    if world is None or state.task is None:
        return None
    try:
        return patiently(world.name, partial(_led_to, world, state.task, state.path))
    except UnknownTask:
        return None


def _led_to(world: World, task: str, path: Sequence[Step]) -> WorldEpisode | None:
    with blaming(world.name, "open"):
        episode = world.open(task_named(world, task))
    for step, following in pairwise(path):
        if not isinstance(step.action, MalformedAction):
            told = [_said(message) for message in told_by(world.name, episode, action_message(step.action))]
            roles = {role for role, _ in told}  # where the world has nothing to say, a user may say what he likes
            if told != [said for message in following.new_messages if (said := _said(message))[0] in roles]:
                return None
    return episode


def _said(message: Message) -> tuple[str, str]:
    return message["role"], text_of(message)


def same_effect_at(world: World | None, state: LoggedState) -> SameEffect | None:
    """The world's judgement, at a logged state, whether two actions lead to the same place; None without one."""
    try:
        episode = open_at(world, state)
    except WorldFailed as error:
        _log.warning("actions are compared without their effect: %s", error)
        return None
    return None if world is None or episode is None else partial(_same_effect, world.name, episode)


def _same_effect(world: str, episode: WorldEpisode, message_a: Message, message_b: Message) -> bool:
    def judged() -> bool:
        with blaming(world, "same_effect"):
            return bool(episode.same_effect(message_a, message_b))

    try:
        return patiently(world, judged)
    except WorldFailed as error:
        _log.warning("two actions are taken for different ones: %s", error)
        return False
