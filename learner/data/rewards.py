"""Step rewards: how expert-like each logged step of a cycle is, from three sources.

The sources do not share a scale: values compare within one cycle and one source. Rewarded is every logged step that a
cycle reads, by each source that can judge it: the policy's own actions, sampled at an expert's state or taken at their
own, the experts' steps, and the steps of episodes that are held out: to judge a step is not to learn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from policies.types import TokenIds
from runtime.store.learning_log import RewardSource, StepReward


def policy_actions_of(training_data: TrainingData) -> list[tuple[State, PolicyAction]]:
    """Every own action of the training data with its state, in order."""
    return [
        (state, action) for t in training_data.trajectories for state in t.states for action in state.policy_actions
    ]


@dataclass(frozen=True, slots=True)
class LoggedAction:
    """A logged step as it is rewarded: where it was taken, and what was done."""

    step_id: str
    state: State
    token_ids: TokenIds
    agrees: bool | None
    """Whether it means what an expert does there; None where none has answered."""


def logged_actions_of(training_data: TrainingData) -> list[LoggedAction]:
    """Every logged step of the training data, in order, and of what is held out beside it; each once, though two ways
    of an episode that branches may have it."""
    found = dict[str, LoggedAction]()
    for trajectory in (*training_data.trajectories, *training_data.held_out):
        for state in trajectory.states:
            for action in _taken_at(state, trajectory):
                found.setdefault(action.step_id, action)
    return list(found.values())


def _taken_at(state: State, trajectory: Trajectory) -> list[LoggedAction]:
    own = [LoggedAction(a.step_id, state, a.token_ids, a.agrees) for a in state.policy_actions]
    if trajectory.is_demonstration and state.expert is not None:
        own.append(LoggedAction(state.id, state, state.expert, True))
    return own


def agreement_rewards(cycle: str, training_data: TrainingData) -> list[StepReward]:
    """1 where an action means what the expert's does, 0 where not: StepAgent's comparison (arXiv 2411.03817).

    An expert's own step has 1. An action that no expert has answered has none.
    """
    return [
        StepReward(action.step_id, cycle, RewardSource.EXPERT_AGREEMENT, float(action.agrees))
        for action in logged_actions_of(training_data)
        if action.agrees is not None
    ]


def implicit_rewards(
    cycle: str,
    actions: Sequence[LoggedAction],
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
    cycle: str, actions: Sequence[LoggedAction], expert_logits: Sequence[float]
) -> list[StepReward]:
    """The length-controlled expert logit of each action: the reward of StepAgent's inverse RL (arXiv 2411.03817)."""
    return [
        StepReward(action.step_id, cycle, RewardSource.DISCRIMINATOR, logit)
        for action, logit in zip(actions, expert_logits, strict=True)
    ]
