"""Makes objectives of a cycle's training data: which actions are scored, which go together, and what each is held
against.

`sft`, `implicit` and `inverse` learn at states where an expert has answered: those of demonstrations and, with
`own_states`, the policy's own logged ones, which is what repairs the drift from the experts' paths (DAgger,
arXiv 1011.0686). `eto`, `rft` and `ppo` learn from whole own episodes and their outcomes; `ppo` may hold on to experts'
actions besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.objectives import (
    Likelihood,
    Objective,
    Pair,
    PolicyGradient,
    StepPreference,
    TrajectoryPreference,
    action_sequence,
    normalised,
)
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


def objective_of(
    name: str, training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None = None
) -> Objective:
    """The objective of that name on the training data. `inverse` needs the discriminator, the others ignore it.

    Raises NothingToLearn, and ValueError for an unknown name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective is called {name!r}; there are: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](without_stale_actions(training_data, options), options, discriminator)


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
    answered = _answered(training_data, options)
    if not answered:
        raise NothingToLearn("no expert has acted or answered at any state: import demonstrations, or add corrections")
    if not options.informative_only:
        return answered
    informative = [labelled for labelled in answered if labelled.state.is_informative]
    if not informative:
        raise NothingToLearn(_no_disagreement(len(answered)))
    return informative


def _answered(training_data: TrainingData, options: ObjectiveOptions) -> list[LabelledState]:
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


def _no_disagreement(num_states: int) -> str:
    return f"the policy did what the experts do at all {num_states} states where they have acted or answered"


def _sft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Experts' actions, imitated."""
    return Likelihood("sft", tuple(labelled.expert_sequence for labelled in labelled_states(training_data, options)))


def _implicit(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> StepPreference:
    """Each expert's action against every own one that disagrees; those of one state weigh 1 together."""
    labelled = labelled_states(training_data, options)
    sequences, pairs = [each.expert_sequence for each in labelled], list[Pair]()
    for chosen, each in enumerate(labelled):
        rejected = each.state.disagreeing
        for action in rejected:
            pairs.append(Pair((chosen,), (len(sequences),), 1.0 / len(rejected)))
            sequences.append(each.sequence_of(action.token_ids))
    if not pairs:
        raise NothingToLearn(_no_disagreement(len(labelled)))
    return StepPreference(
        tuple(sequences), tuple(pairs), frozenset(range(len(labelled))), options.beta, options.anchor_weight
    )


def _inverse(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> PolicyGradient:
    """Every own action by the discriminator's reward, with or without an expert's answer beside it."""
    if discriminator is None:
        raise ValueError("inverse takes its rewards from a discriminator, and none was given")
    own = _drawn_from_policy(_own_actions(training_data.trajectories))
    if not own:
        raise NothingToLearn("there is no own action to be rewarded that is fresh enough and drawn at temperature 1")
    advantages = normalised(discriminator.rewards([sequence for sequence, _ in own]))
    if not any(advantages):
        raise NothingToLearn(f"the discriminator rewards all {len(own)} own actions alike")
    return _policy_gradient("inverse", own, advantages, training_data, options)


# ------------------------------------------------------------------------------------ whole own episodes


def _eto(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> TrajectoryPreference:
    """Each demonstration against every own failure on its task; the failures of one demonstration weigh 1 together."""
    sequences, pairs = list[ScoredSequence](), list[Pair]()
    for demonstration in training_data.demonstrations:
        expert, failures = _expert_side(demonstration), _failures_at(demonstration.task, training_data.policy_episodes)
        if not expert or not failures:
            continue
        chosen, *rejected = _lay_out(sequences, [expert, *failures], (demonstration.task,))
        pairs += [Pair(chosen, side, 1.0 / len(rejected)) for side in rejected]
    if not pairs:
        raise NothingToLearn(
            f"no own episode failed on a demonstrated task: {_outcomes(training_data.policy_episodes)}, "
            f"{len({each.task for each in training_data.demonstrations} - {None})} demonstrated tasks"
        )
    return TrajectoryPreference(tuple(sequences), tuple(pairs), options.beta)


Side = list[tuple[State, TokenIds]]
"""One side of a pair: states in order, and the action that was taken at each."""


def _expert_side(demonstration: Trajectory) -> Side:
    return [(state, state.expert) for state in demonstration.states if state.expert is not None]


def _own_side(trajectory: Trajectory) -> Side:
    return [(state, action.token_ids) for state in trajectory.states for action in state.policy_actions]


def _failures_at(task: str | None, own: Sequence[Trajectory]) -> list[Side]:
    found = [_own_side(each) for each in own if task is not None and each.task == task and _is_failure(each)]
    return [side for side in found if side]


def _lay_out(
    sequences: list[ScoredSequence], sides: Sequence[Side], owner: tuple[object, ...]
) -> list[tuple[int, ...]]:
    """Append the sides' sequences, which are scored together; returns the sequence indexes of each side."""
    places = []
    for side in sides:
        places.append(tuple(range(len(sequences), len(sequences) + len(side))))
        sequences += [action_sequence(state.prompt, action, owner) for state, action in side]
    return places


def _rft(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> Likelihood:
    """Own successes, imitated: rejection sampling fine-tuning (arXiv 2308.01825)."""
    sequences = tuple(
        sequence for sequence, _ in _own_actions([own for own in training_data.policy_episodes if own.outcome == 1.0])
    )
    if not sequences:
        raise NothingToLearn(f"no own episode succeeded: {_outcomes(training_data.policy_episodes)}")
    return Likelihood("rft", sequences)


def _ppo(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> PolicyGradient:
    """Every own action by its episode's outcome, against the mean outcome of the episodes."""
    judged = [
        own
        for own in training_data.policy_episodes
        if own.outcome is not None and _drawn_from_policy(_own_actions([own]))
    ]
    advantages = normalised([own.outcome for own in judged if own.outcome is not None])
    if not any(advantages):
        raise NothingToLearn(f"the outcomes of all own episodes are equal: {_outcomes(training_data.policy_episodes)}")
    actions = [_drawn_from_policy(_own_actions([own])) for own in judged]
    spread = [advantage for advantage, episode in zip(advantages, actions, strict=True) for _ in episode]
    return _policy_gradient(
        "ppo", [action for episode in actions for action in episode], spread, training_data, options
    )


def _is_failure(trajectory: Trajectory) -> bool:
    return trajectory.outcome is not None and trajectory.outcome < 1.0


def _outcomes(own: Sequence[Trajectory]) -> str:
    """`12 own episodes, 3 succeeded, 8 failed`"""
    num_successes = sum(each.outcome == 1.0 for each in own)
    return f"{len(own)} own episodes, {num_successes} succeeded, {sum(map(_is_failure, own))} failed"


# ------------------------------------------------------------------------------------------- own actions


def _policy_gradient(
    name: str,
    own: Sequence[tuple[ScoredSequence, PolicyAction]],
    advantages: Sequence[float],
    training_data: TrainingData,
    options: ObjectiveOptions,
) -> PolicyGradient:
    """Own actions by their advantages, and the likelihood of experts' actions as an anchor, where there are any."""
    experts = (
        [labelled.expert_sequence for labelled in _answered(training_data, options)] if options.anchor_weight else []
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


def _own_actions(trajectories: Sequence[Trajectory]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """Every own action in its context, as often as it was sampled: the frequencies are the policy's."""
    return [
        (action_sequence(state.prompt, action.token_ids, (trajectory.episode_id, state.id)), action)
        for trajectory in trajectories
        for state in trajectory.states
        for action in state.policy_actions
    ]


def _drawn_from_policy(own: Sequence[tuple[ScoredSequence, PolicyAction]]) -> list[tuple[ScoredSequence, PolicyAction]]:
    """Those whose importance ratio can be told."""
    return [(sequence, action) for sequence, action in own if action.behavior_logprobs]


def without_stale_actions(training_data: TrainingData, options: ObjectiveOptions) -> TrainingData:
    """The same states without own actions of policies too far behind the acting one."""

    def fresh(state: State) -> State:
        own = tuple(action for action in state.policy_actions if action.num_versions_old <= options.max_versions_old)
        return state if len(own) == len(state.policy_actions) else replace(state, policy_actions=own)

    def freshened(trajectories: Sequence[Trajectory]) -> tuple[Trajectory, ...]:
        return tuple(replace(each, states=tuple(map(fresh, each.states))) for each in trajectories)

    return TrainingData(freshened(training_data.demonstrations), freshened(training_data.policy_episodes))


OBJECTIVES: Mapping[str, Callable[[TrainingData, ObjectiveOptions, ActionRewards | None], Objective]] = {
    "sft": _sft,
    "implicit": _implicit,
    "inverse": _inverse,
    "eto": _eto,
    "rft": _rft,
    "ppo": _ppo,
}
"""By name: what makes each objective of training data without stale actions."""
