"""Step rewards: how expert-like each logged step of a cycle is, from three sources.

The sources do not share a scale: values compare within one cycle and one source. Every own action of a cycle's training
data, sampled at an expert's state or taken at the policy's own, has a sequence from each source that can judge it."""

from __future__ import annotations

from collections.abc import Sequence

from learner.data.training_data import PolicyAction, State, TrainingData
from runtime.store.learning_log import RewardSource, StepReward


def policy_actions_of(training_data: TrainingData) -> list[tuple[State, PolicyAction]]:
    """Every own action of the training data with its state, in order."""
    return [
        (state, action) for t in training_data.trajectories for state in t.states for action in state.policy_actions
    ]


def agreement_rewards(cycle: str, training_data: TrainingData) -> list[StepReward]:
    """1 where an own action means what the expert's does, 0 where not: StepAgent's comparison (arXiv 2411.03817).

    An action that no expert has answered has none.
    """
    judged = ((action, action.agrees) for _, action in policy_actions_of(training_data))
    return [
        StepReward(action.step_id, cycle, RewardSource.EXPERT_AGREEMENT, float(agrees))
        for action, agrees in judged
        if agrees is not None
    ]


def implicit_rewards(
    cycle: str,
    actions: Sequence[PolicyAction],
    logprobs: Sequence[float],
    ref_logprobs: Sequence[float],
    beta: float,
) -> list[StepReward]:
    """beta (log pi(a|s) - log ref(a|s)), StepAgent's implicit reward (arXiv 2411.03817; DPO, arXiv 2305.18290, eq. 5).

    pi is the candidate after training, ref the policy the cycle began with; logprobs are sums over an action's tokens,
    parallel to `actions`.
    """
    return [
        StepReward(action.step_id, cycle, RewardSource.IMPLICIT, beta * (logprob - ref_logprob))
        for action, logprob, ref_logprob in zip(actions, logprobs, ref_logprobs, strict=True)
    ]


def discriminator_rewards(
    cycle: str, actions: Sequence[PolicyAction], expert_logits: Sequence[float]
) -> list[StepReward]:
    """The length-controlled expert logit of each action: the reward of StepAgent's inverse RL (arXiv 2411.03817)."""
    return [
        StepReward(action.step_id, cycle, RewardSource.DISCRIMINATOR, logit)
        for action, logit in zip(actions, expert_logits, strict=True)
    ]
