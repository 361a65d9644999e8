"""What is watched of a training: every own action, and of many experts' actions some."""

from __future__ import annotations

import pytest

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.training.diagnostics import MAX_EXPERTS, WatchedActions


def demonstrations(number: int, length: int) -> TrainingData:
    own = (PolicyAction("own", (9,), (), None),)
    trajectories = [
        Trajectory(str(at), tuple(State(f"{at}/{step}", (1, 2), (at, step), own) for step in range(length)))
        for at in range(number)
    ]
    return TrainingData(tuple(trajectories))


@pytest.mark.parametrize("length", [1, 5, MAX_EXPERTS, 3 * MAX_EXPERTS])
@pytest.mark.parametrize("number", [0, 1, 4, MAX_EXPERTS, 10 * MAX_EXPERTS])
def test_of_many_experts_actions_some_are_watched_from_all_over(number: int, length: int) -> None:
    watched = WatchedActions.of(demonstrations(number, length))
    assert len(watched.policy_actions) == number * length
    assert min(number * length, MAX_EXPERTS // 2) <= len(watched.experts) <= MAX_EXPERTS
    actions = [action for _, action in watched.experts]
    assert len(set(actions)) == len(actions)


def test_watched_actions_of_one_trajectory_lie_side_by_side() -> None:
    """They share a context, which is computed once: of 76 orders 2,791 tokens are read, and 18,404 if taken singly."""
    watched = WatchedActions.of(demonstrations(76, 7), are_rewarded=False)
    orders = [action[0] for _, action in watched.experts]
    assert len(set(orders)) == 5
    assert max(orders) - min(orders) > 60


def test_logged_steps_are_scored_only_where_rewards_of_them_are_asked_for() -> None:
    data = demonstrations(3, 4)
    assert [action.step_id for action in WatchedActions.of(data).logged] == ["own"]
    assert WatchedActions.of(data, are_rewarded=False).logged == []
