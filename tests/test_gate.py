"""The gate: only what is surely better passes."""

from __future__ import annotations

import random

from learner.gate import decide
from tools.worlds.practice import Attempt


def attempts(outcomes: list[float], num_malformed: int = 0, error: str = "") -> list[Attempt]:
    return [Attempt(f"task/{n}", "ep", outcome, 5, num_malformed, error) for n, outcome in enumerate(outcomes)]


def test_a_clear_gain_passes_with_its_evidence() -> None:
    decision = decide(attempts([1.0] * 60 + [0.0] * 40), attempts([1.0] * 30 + [0.0] * 70))
    assert decision.promote
    assert decision.evidence["gain"] == 0.3
    assert 0 < decision.evidence["gain_low"] < 0.3


def test_equal_and_worse_candidates_are_refused() -> None:
    same = [1.0, 0.0] * 50
    assert not decide(attempts(same), attempts(same)).promote
    assert not decide(attempts([0.0] * 100), attempts(same)).promote


def test_noise_is_rarely_taken_for_a_gain() -> None:
    draw = random.Random(0)
    passed = [
        decide(*(attempts([float(draw.random() < 0.5) for _ in range(100)]) for _ in range(2))).promote
        for _ in range(400)
    ]
    assert sum(passed) / len(passed) < 0.08  # 5 % by design


def test_a_small_gain_on_few_tasks_is_not_enough() -> None:
    assert not decide(attempts([1.0] * 6 + [0.0] * 4), attempts([1.0] * 5 + [0.0] * 5)).promote


def test_more_malformed_actions_are_refused_whatever_the_gain() -> None:
    decision = decide(attempts([1.0] * 50, num_malformed=1), attempts([0.0] * 50))
    assert not decision.promote
    assert "malformed" in decision.reason


def test_tasks_that_one_side_could_not_finish_are_left_out() -> None:
    decision = decide(attempts([1.0] * 10), attempts([0.0] * 10, error="no answer"))
    assert not decision.promote
    assert decision.evidence == {"num_tasks": 0}
