"""`pivot`: the policy's own samples at states where they differ, rewarded for meaning what an expert's action means."""

from __future__ import annotations

from learner.data.training_data import PolicyAction, TrainingData
from learner.objectives.objectives import PolicyGradient, normalised
from learner.objectives.states import (
    ActionRewards,
    LabelledState,
    NothingToLearn,
    drawn_from_policy,
    labelled_states,
    policy_gradient,
)
from learner.options import ObjectiveOptions
from learner.packing.prefix_tree import ScoredSequence

MAX_AGREEMENT = 0.75
"""A state at which this share of the samples or more agrees with the expert is as good as mastered."""


def pivot(
    training_data: TrainingData, options: ObjectiveOptions, discriminator: ActionRewards | None
) -> PolicyGradient:
    """Own samples at pivots by their reward's advantage in the state's group: PivotRL (arXiv 2603.21383).

    A pivot is a state with 0 < mean reward < 0.75: where all samples are right, or all wrong, no sample is better than
    another. The reward of a sample is 1 where it means what the expert's action means, else 0. The filter is for the
    samples alone: experts' actions are held by likelihood everywhere, with `anchor_weight`.
    """
    labelled = labelled_states(training_data, options)
    own, advantages = list[tuple[ScoredSequence, PolicyAction]](), list[float]()
    for each in labelled:
        samples = _judged(each)
        rewards = [float(bool(action.agrees)) for _, action in samples]
        if samples and 0.0 < sum(rewards) / len(rewards) < MAX_AGREEMENT:
            own += samples
            advantages += normalised(rewards)
    if not own:
        raise NothingToLearn(f"no pivot among {len(labelled)} states: samples of each are all right, all wrong or few")
    return policy_gradient("pivot", own, advantages, training_data, options)


def _judged(labelled: LabelledState) -> list[tuple[ScoredSequence, PolicyAction]]:
    """The state's samples whose importance ratio can be told and that were held against the expert's action."""
    own = [(labelled.sequence_of(action.token_ids), action) for action in labelled.state.policy_actions]
    return [(sequence, action) for sequence, action in drawn_from_policy(own) if action.agrees is not None]
