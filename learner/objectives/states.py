"""The states and actions that objectives are made of: where experts have answered, and what the policy did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.objectives import PolicyGradient, action_sequence
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence
from policies.types import TokenIds


class NothingToLearn(Exception):
    """No objective can be made of this training data, and why."""


class ActionRewards(Protocol):
    """What `inverse` needs of a discriminator."""

    def rewards(self, sequences: Sequence[ScoredSequence]) -> Sequence[float]:
        """One for each sequence, larger for what an expert would rather do."""
        ...


# ------------------------------------------------------------------------------------- at experts' states


@dataclass(frozen=True, slots=True)
class LabelledState:
    """A state with an expert's answer, and the sequences that are scored there."""

    episode_id: str
    state: State
    expert: TokenIds
    """The expert's action."""

    @property
    def expert_sequence(self) -> ScoredSequence:
        return self.sequence_of(self.expert)

    def sequence_of(self, action: TokenIds) -> ScoredSequence:
        """An action at this state."""
        return action_sequence(self.state.prompt, action, (self.episode_id, self.state.id))

    def with_policy_actions(self, own: tuple[PolicyAction, ...]) -> LabelledState:
        """The same state with further own actions."""
        return replace(self, state=replace(self.state, policy_actions=self.state.policy_actions + own))


def labelled_states(training_data: TrainingData, options: ObjectiveOptions) -> list[LabelledState]:
    """The states to learn experts' actions at, each once. Raises NothingToLearn where there is none."""
    answered = answered_states(training_data, options)
    if not answered:
        raise NothingToLearn("no expert has acted or answered at any state: import demonstrations, or add corrections")
    if not options.informative_only:
        return answered
    informative = [labelled for labelled in answered if labelled.state.is_informative]
    if not informative:
        raise NothingToLearn(no_disagreement(answered))
    return informative


def answered_states(training_data: TrainingData, options: ObjectiveOptions) -> list[LabelledState]:
    """Each state where an expert has acted or answered.

    A state that several episodes went through, with the same answer, has the own actions of all of them: counted each
    time, the first steps of every episode would outweigh the later ones, which are rarer and harder.
    """
    trajectories = training_data.trajectories if options.own_states else training_data.demonstrations
    found: dict[tuple[TokenIds, TokenIds], LabelledState] = {}
    for trajectory in trajectories:
        for state in trajectory.states:
            if state.expert is not None:
                new = LabelledState(trajectory.episode_id, state, state.expert)
                known = found.get((state.prompt, state.expert))
                found[state.prompt, state.expert] = known.with_policy_actions(state.policy_actions) if known else new
    return list(found.values())


def no_disagreement(labelled: Sequence[LabelledState]) -> str:
    """Why nothing is learned from where own actions and experts' differ: there is no such state."""
    num_known = sum(bool(each.state.policy_actions) for each in labelled)
    if not num_known:
        return (
            f"nobody knows what the policy does at the {len(labelled)} states where experts have acted or answered: "
            "let it be sampled there (num-samples)"
        )
    unknown = f", and was not sampled at {len(labelled) - num_known} more" if num_known < len(labelled) else ""
    return f"the policy did what the experts do at all {num_known} states where they have acted or answered{unknown}"


# ------------------------------------------------------------------------------------------- own actions


def is_failure(trajectory: Trajectory) -> bool:
    """Somebody said that it went wrong, in part at least."""
    return trajectory.outcome is not None and trajectory.outcome < 1.0


def outcome_counts(own: Sequence[Trajectory]) -> str:
    """`12 own episodes, 3 succeeded, 8 failed, 5 of them in part (only an outcome of exactly 1 is a success)`"""
    num_successes = sum(each.outcome == 1.0 for each in own)
    num_in_part = sum(is_failure(each) and each.outcome != 0.0 for each in own)
    in_part = f", {num_in_part} of them in part (only an outcome of exactly 1 is a success)" if num_in_part else ""
    return f"{len(own)} own episodes, {num_successes} succeeded, {sum(map(is_failure, own))} failed{in_part}"


def policy_gradient(
    name: str,
    own: Sequence[tuple[ScoredSequence, PolicyAction]],
    advantages: Sequence[float],
    training_data: TrainingData,
    options: ObjectiveOptions,
) -> PolicyGradient:
    """Own actions by their advantages, and the likelihood of experts' actions as an anchor, where there are any."""
    experts = (
        [labelled.expert_sequence for labelled in answered_states(training_data, options)]
        if options.anchor_weight
        else []
    )
    return PolicyGradient(
        name,
        (*experts, *(sequence for sequence, _ in own)),
        (*(0.0 for _ in experts), *advantages),
        (*(() for _ in experts), *(action.behavior_logprobs for _, action in own)),
        anchored=frozenset(range(len(experts))),
        anchor_weight=options.anchor_weight,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        kl_weight=options.kl_weight,
    )


def own_actions(trajectories: Sequence[Trajectory]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """Every own action in its context, as often as it was sampled: the frequencies are the policy's."""
    return [
        (action_sequence(state.prompt, action.token_ids, (trajectory.episode_id, state.id)), action)
        for trajectory in trajectories
        for state in trajectory.states
        for action in state.policy_actions
    ]


def taken_actions(episodes: Sequence[Trajectory]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """The action that was taken at each own state: what an episode's outcome speaks of."""
    taken = [
        replace(each, states=tuple(replace(state, policy_actions=state.policy_actions[:1]) for state in each.states))
        for each in episodes
    ]
    return own_actions(taken)


def drawn_from_policy(own: Sequence[tuple[ScoredSequence, PolicyAction]]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """Those whose importance ratio can be told."""
    return [(sequence, action) for sequence, action in own if action.behavior_logprobs]


def up_to_first_slips(training_data: TrainingData) -> TrainingData:
    """The same without the experts' answers behind the first slip of each own episode, but for what people corrected.

    Behind a slip the policy is where no expert would be. What he would do there is mostly what he would have done
    before, and a weak policy that imitates it there says the same thing again and again (benchmarks/RESULTS.md).
    """
    return replace(training_data, policy_episodes=tuple(map(_up_to_first_slip, training_data.policy_episodes)))


def _up_to_first_slip(episode: Trajectory) -> Trajectory:
    slips = (place for place, state in enumerate(episode.states) if state.is_slip)
    first = next(slips, len(episode.states))
    states = (
        state if place <= first or state.is_correction else _unanswered(state)
        for place, state in enumerate(episode.states)
    )
    return replace(episode, states=tuple(states))


def _unanswered(state: State) -> State:
    """As if no expert had been asked: what the policy did there may be learned where its episode succeeded."""
    own = tuple(replace(action, agrees=None) for action in state.policy_actions)
    return replace(state, expert=None, policy_actions=own)


def without_stale_actions(training_data: TrainingData, options: ObjectiveOptions) -> TrainingData:
    """The same states without own actions of policies too far behind the acting one."""

    def fresh(state: State) -> State:
        own = tuple(action for action in state.policy_actions if action.num_versions_old <= options.max_versions_old)
        return state if len(own) == len(state.policy_actions) else replace(state, policy_actions=own)

    def freshened(trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return tuple(replace(each, states=tuple(map(fresh, each.states))) for each in trajectories)

    return TrainingData(freshened(training_data.demonstrations), freshened(training_data.policy_episodes))
