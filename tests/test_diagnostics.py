"""What is watched of a training: every own action, and of many experts' actions some."""

from __future__ import annotations

import pytest

from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.training.diagnostics import MAX_EXPERTS, WatchedActions


@pytest.mark.parametrize("number", [0, 1, MAX_EXPERTS, MAX_EXPERTS + 1, 10 * MAX_EXPERTS])
def test_of_many_experts_actions_some_are_watched_from_all_over(number: int) -> None:
    own = (PolicyAction("own", (9,), (), None),)
    states = tuple(State(str(place), (1, 2), (place,), own) for place in range(number))
    watched = WatchedActions.of(TrainingData((Trajectory("demonstration", states),)))
    assert len(watched.policy_actions) == number
    assert min(number, MAX_EXPERTS // 2) <= len(watched.experts) <= MAX_EXPERTS
    places = [action[0] for _, action in watched.experts]
    assert len(set(places)) == len(places)
    assert not places or max(places) >= number - number // MAX_EXPERTS - 2
