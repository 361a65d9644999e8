"""Inspection: holds the policy's actions against an expert's, where experts have acted and where the policy has.

At the states of demonstrations the acting policy is sampled through the endpoint. At its own logged states the action
is there already, and an expert is asked; sampling more there was refused: an expert's answer teaches without them, and
own states are many. Both become training data in tokens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.client import StateTrial
from learner.data.collaborators import Collaborators
from learner.data.collect import Collected, LoggedEpisode, LoggedState
from learner.data.comparison import ComparedState, compare_state, report_on
from learner.data.experts import CORRECTION, ExpertAnswer, ask, same_effect_at
from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from policies.chat.chat_protocol import ChatProtocol, ChatProtocolError
from policies.chat.learnable import unlearnable
from policies.chat.read_back import misreading
from policies.types import Action, MalformedAction, TokenIds
from runtime.store.episodes import Actor, Step


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was seen: the training data, and how the actions compare."""

    training_data: TrainingData
    at_expert_states: list[ComparedState]
    at_policy_states: list[ComparedState]
    """Only the states where an expert answered."""
    num_answers: Counter[str] = field(default_factory=Counter)
    """Experts' answers at own states by their source; `nobody`: no expert knew; `unwritable`: no tokens say it."""

    def measures(self) -> dict[str, float]:
        """How many states teach something new, and how many do not, by the reason."""
        report = report_on([*self.at_expert_states, *self.at_policy_states])
        dropped = {f"num_{reason}": float(number) for reason, number in report.num_dropped.items()}
        return {"num_states": float(report.num_states), "num_informative": float(report.num_kept), **dropped}

    def report(self) -> dict[str, Any]:
        """For the cycle's report."""
        return {
            "demonstrated": report_on(self.at_expert_states).to_json(),
            "own": report_on(self.at_policy_states).to_json(),
            "expert_answers": dict(self.num_answers),
        }


async def inspect(
    who: Collaborators,
    collected: Collected,
    acting: str,
    num_samples: int,
    on_done: Callable[[], object] = lambda: None,
) -> Inspection:
    """Compare everywhere; `on_done` is called after each state.

    `num_samples` actions of the acting adapter are sampled at each state of a demonstration. Raises openai's errors
    where the endpoint does not answer.
    """
    demonstrations = collected.demonstrations
    demonstrated, at_expert_states = await inspect_demonstrations(who, demonstrations, acting, num_samples, on_done)
    episodes, at_policy_states, num_answers = await _inspect_policy_states(who, collected.policy_episodes, on_done)
    not_learned = (*collected.held_out, *collected.own_held_out, *collected.rewarded_alone, *collected.anchors)
    held_out = tuple(as_logged(each) for each in not_learned)
    training_data = TrainingData(tuple(demonstrated), tuple(episodes), held_out)
    return Inspection(training_data, at_expert_states, at_policy_states, num_answers)


# ------------------------------------------------------------------------------------------- demonstrations


async def inspect_demonstrations(
    who: Collaborators,
    demonstrations: Sequence[LoggedEpisode],
    adapter: str,
    num_samples: int,
    on_done: Callable[[], object] = lambda: None,
) -> tuple[list[Trajectory], list[ComparedState]]:
    """Sample an adapter at every state of the experts' episodes, and compare.

    The draws are those of a gate: where the same adapter has to try a state there, it has done so already.
    """
    places = [state for demonstration in demonstrations for state in demonstration.states()]
    draws = [[trial_of(state, number) for number in range(num_samples)] for state in places]
    sampled = await who.endpoint.sample(draws, adapter, on_done)
    states: dict[str, State] = {}
    compared = []
    for place, step_ids in zip(places, sampled, strict=True):
        samples = [step for step_id in step_ids if (step := who.log.step(step_id)) is not None]
        judge = same_effect_at(who.world, place)
        compared.append(compare_state([sample.action for sample in samples], place.step.action, judge))
        states[place.step.id] = _demonstrated_state(place.step, samples, compared[-1])
    trajectories = [
        Trajectory(d.episode.id, tuple(states[step.id] for step in d.path), d.episode.task, 1.0, is_demonstration=True)
        for d in demonstrations
    ]
    return trajectories, compared


def as_logged(episode: LoggedEpisode) -> Trajectory:
    """An episode that is not inspected: what was done in it, and no answer beside it."""
    is_demonstration = episode.episode.actor is Actor.EXPERT
    states = [
        _demonstrated_state(step, (), ComparedState(step.action, ()))
        if is_demonstration
        else State(step.id, step.prompt_token_ids, None, (_policy_action(step, None, episode.num_versions_old),))
        for step in episode.path
    ]
    outcome = 1.0 if is_demonstration else episode.outcome
    return Trajectory(episode.episode.id, tuple(states), episode.episode.task, outcome, is_demonstration)


def trial_of(state: LoggedState, number: int) -> StateTrial:
    """A draw at an expert's state, to be held against what the expert did there."""
    return StateTrial(state.messages, state.step.tools, number, most_tokens(state.step), state.step.episode_id)


def most_tokens(expert: Step) -> int:
    """Of an action that is held against an expert's: an untrained policy may go on for ever, and is wrong before."""
    return 2 * len(expert.completion_token_ids) + 64


def _demonstrated_state(expert: Step, samples: Sequence[Step], compared: ComparedState) -> State:
    own = tuple(
        _policy_action(sample, comparison.agrees)
        for sample, comparison in zip(samples, compared.comparisons, strict=True)
    )
    # The prompt as it is served now: a template may write a history afresh that the demonstration continued.
    prompt = samples[0].prompt_token_ids if samples else expert.prompt_token_ids
    return State(expert.id, prompt, expert.completion_token_ids, own)


def _policy_action(step: Step, agrees: bool | None, num_versions_old: int = 0) -> PolicyAction:
    behavior = step.behavior_logprobs if step.behavior_logprobs and step.sampling.is_policy else ()
    is_malformed = isinstance(step.action, MalformedAction)
    return PolicyAction(step.id, step.completion_token_ids, behavior, agrees, num_versions_old, is_malformed)


# ---------------------------------------------------------------------------------------------- own states


async def _inspect_policy_states(
    who: Collaborators, policy_episodes: Sequence[LoggedEpisode], on_done: Callable[[], object]
) -> tuple[list[Trajectory], list[ComparedState], Counter[str]]:
    places = [(episode, state) for episode in policy_episodes for state in episode.states()]

    async def answer_at(place: LoggedState) -> ExpertAnswer | None:
        answer = await ask(who.experts, place)
        on_done()
        return answer

    answers = await asyncio.gather(*(answer_at(place) for _, place in places))
    states: dict[str, State] = {}
    compared, num_answers = [], Counter[str]()
    for (episode, place), answer in zip(places, answers, strict=True):
        step = place.step
        expert = None if answer is None else _in_tokens(who.protocol, place, answer.action)
        agrees = None
        if answer is None or expert is None:
            num_answers["nobody" if answer is None else "unwritable"] += 1
        else:
            num_answers[answer.source] += 1
            judge = same_effect_at(who.world, place)
            compared.append(compare_state([step.action], answer.action, judge))
            agrees = compared[-1].comparisons[0].agrees
        action = _policy_action(step, agrees, episode.num_versions_old)
        is_correction = answer is not None and answer.source == CORRECTION
        states[step.id] = State(step.id, step.prompt_token_ids, expert, (action,), is_correction)
    trajectories = [
        Trajectory(e.episode.id, tuple(states[step.id] for step in e.path), e.episode.task, e.outcome)
        for e in policy_episodes
    ]
    return trajectories, compared, num_answers


def _in_tokens(protocol: ChatProtocol, place: LoggedState, action: Action) -> TokenIds | None:
    """An expert's action as the policy would have to write it; None where it cannot be written, or reads otherwise."""
    if unlearnable(action, place.step.tools):
        return None
    try:
        _, completion = protocol.completion_of(place.messages, action, place.step.tools)
    except (ChatProtocolError, ValueError):
        return None
    return None if misreading(protocol, completion, action, place.step.tools) else completion
