"""The gate: only what is surely better passes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from learner.evaluation.gate import LEAST_TRIALS, Trial, decide, student_quantile


def trials(scores: Sequence[float], num_malformed: int = 0) -> list[Trial | None]:
    return [Trial(score, num_malformed) for score in scores]


def test_a_clear_gain_passes_with_its_evidence() -> None:
    decision = decide(trials([1.0] * 60 + [0.0] * 40), trials([1.0] * 30 + [0.0] * 70))
    assert decision.promote
    assert decision.evidence["gain"] == 0.3
    assert 0 < decision.evidence["gain_low"] < 0.3


def test_equal_and_worse_candidates_are_refused() -> None:
    same = [1.0, 0.0] * 50
    assert not decide(trials(same), trials(same)).promote
    assert not decide(trials([0.0] * 100), trials(same)).promote


@pytest.mark.parametrize("num_candidates", [1, 3])
def test_noise_is_rarely_taken_for_a_gain_however_many_candidates_are_tried(num_candidates: int) -> None:
    draw = random.Random(0)

    def coin_flips() -> list[Trial | None]:
        return trials([float(draw.random() < 0.5) for _ in range(100)])

    passed = []
    for _ in range(400):
        acting = coin_flips()
        passed.append(any(decide(coin_flips(), acting, "tasks", num_candidates).promote for _ in range(num_candidates)))
    assert sum(passed) / len(passed) < 0.08  # 5 % by design


def test_a_small_gain_on_few_tasks_is_not_enough() -> None:
    assert not decide(trials([1.0] * 6 + [0.0] * 4), trials([1.0] * 5 + [0.0] * 5)).promote


def test_more_malformed_actions_are_refused_whatever_the_gain() -> None:
    decision = decide(trials([1.0] * 50, num_malformed=1), trials([0.0] * 50))
    assert not decision.promote
    assert "malformed" in decision.reason


def test_a_single_malformed_action_is_no_rise() -> None:
    """A candidate that gained 47 points was once refused for one action that could not be read."""
    candidate = [*trials([1.0] * 49), Trial(1.0, 1)]
    assert decide(candidate, trials([0.0] * 50)).promote


def test_trials_that_the_acting_adapter_could_not_finish_are_left_out() -> None:
    decision = decide(trials([1.0] * 10), [None] * 10)
    assert not decision.promote
    assert decision.evidence == {"num_trials": 0, "unit": "tasks"}
    assert f"needs {LEAST_TRIALS}" in decision.reason


def test_a_trial_that_only_the_candidate_could_not_finish_has_failed() -> None:
    """A candidate that won 40 tasks and broke off 60 was once promoted: the 60 were left out."""
    candidate: list[Trial | None] = [*trials([1.0] * 40), *[None] * 60]
    decision = decide(candidate, trials([1.0, 0.0] * 50))
    assert not decision.promote
    assert (decision.evidence["candidate_unfinished"], decision.evidence["candidate_score"]) == (60, 0.4)


def test_students_quantile_is_that_of_the_tables() -> None:
    for degrees, tabled in ((7, 1.8946), (10, 1.8125), (30, 1.6973), (100, 1.6602)):
        assert student_quantile(0.95, degrees) == pytest.approx(tabled, abs=2e-3)
