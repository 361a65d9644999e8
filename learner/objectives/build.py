"""Makes objectives of a cycle's training data: which actions are scored, which go together, and what each is held
against.

`sft`, `dft`, `implicit`, `inverse` and `pivot` learn at states where an expert has answered: those of demonstrations
and, with `own_states`, the policy's own logged ones, which is what repairs the drift from the experts' paths (DAgger,
arXiv 1011.0686). `eto`, `rft` and `ppo` learn from whole own episodes and their outcomes, `sft_rft` from demonstrations
and own successes alike; `ppo` may hold on to experts' actions besides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from learner.data.training_data import State, TrainingData, Trajectory
from learner.objectives.dft import dft
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
from learner.objectives.pivot import pivot
from learner.objectives.states import (
    ActionRewards,
    NothingToLearn,
    drawn_from_policy,
    is_failure,
    labelled_states,
    no_disagreement,
    outcome_counts,
    own_actions,
    policy_gradient,
    taken_actions,
    up_to_first_slips,
    without_stale_actions,
)
from learner.objectives.successes import rft, sft_rft
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence
from policies.types import TokenIds


def objective_of(
    name: str, training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None = None
) -> Objective:
    """The objective of that name on the training data. `inverse` needs the discriminator, the others ignore it.

    Raises NothingToLearn, and ValueError for an unknown name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"no objective is called {name!r}; there are: {', '.join(OBJECTIVES)}")
    learned = without_stale_actions(up_to_first_slips(training_data), options)
    return OBJECTIVES[name](learned, options, discriminator)


# ------------------------------------------------------------------------------------- at experts' states


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
        raise NothingToLearn(no_disagreement(labelled))
    return StepPreference(
        tuple(sequences), tuple(pairs), frozenset(range(len(labelled))), options.beta, options.anchor_weight
    )


def _inverse(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> PolicyGradient:
    """Every own action by the discriminator's reward, with or without an expert's answer beside it."""
    if discriminator is None:
        raise ValueError("inverse takes its rewards from a discriminator, and none was given")
    own = drawn_from_policy(own_actions(training_data.trajectories))
    if not own:
        raise NothingToLearn("there is no own action to be rewarded that is fresh enough and drawn at temperature 1")
    advantages = normalised(discriminator.rewards([sequence for sequence, _ in own]))
    if not any(advantages):
        raise NothingToLearn(f"the discriminator rewards all {len(own)} own actions alike")
    return policy_gradient("inverse", own, advantages, training_data, options)


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
            f"no own episode failed on a demonstrated task: {outcome_counts(training_data.policy_episodes)}, "
            f"{len({each.task for each in training_data.demonstrations} - {None})} demonstrated tasks"
        )
    return TrajectoryPreference(tuple(sequences), tuple(pairs), options.beta)


Side = list[tuple[State, TokenIds]]
"""One side of a pair: states in order, and the action that was taken at each."""


def _expert_side(demonstration: Trajectory) -> Side:
    return [(state, state.expert) for state in demonstration.states if state.expert is not None]


def _own_side(trajectory: Trajectory) -> Side:
    return [(state, action.token_ids) for state in trajectory.states for action in state.policy_actions[:1]]


def _failures_at(task: str | None, own: Sequence[Trajectory]) -> list[Side]:
    found = [_own_side(each) for each in own if task is not None and each.task == task and is_failure(each)]
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


def _ppo(training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None) -> PolicyGradient:
    """Every own action by its episode's outcome, against the mean outcome of the episodes."""
    told = [own for own in training_data.policy_episodes if own.outcome is not None]
    judged = [own for own in told if drawn_from_policy(taken_actions([own]))]
    if told and not judged:
        raise NothingToLearn(
            f"no step of the {len(told)} own episodes with an outcome is fresh enough and was drawn at temperature 1, "
            "the only draw of its step"
        )
    advantages = normalised([own.outcome for own in judged if own.outcome is not None])
    if not any(advantages):
        raise NothingToLearn(
            f"the outcomes of all own episodes are equal: {outcome_counts(training_data.policy_episodes)}"
        )
    actions = [drawn_from_policy(taken_actions([own])) for own in judged]
    spread = [advantage for advantage, episode in zip(advantages, actions, strict=True) for _ in episode]
    return policy_gradient("ppo", [action for episode in actions for action in episode], spread, training_data, options)


OBJECTIVES: Mapping[str, Callable[[TrainingData, ObjectiveOptions, ActionRewards | None], Objective]] = {
    "sft": _sft,
    "sft_rft": sft_rft,
    "dft": dft,
    "implicit": _implicit,
    "inverse": _inverse,
    "pivot": pivot,
    "eto": _eto,
    "rft": rft,
    "ppo": _ppo,
}
"""By name: what makes each objective of training data without stale actions."""
TAKES_OUTCOMES = frozenset({"sft_rft", "eto", "rft", "ppo"})
"""The objectives that learn from outcomes of own episodes."""
