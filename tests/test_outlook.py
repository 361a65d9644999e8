"""What is said of the evidence before anything is trained."""

from __future__ import annotations

import numpy as np
import pytest

from learner.evaluation.folds import ENOUGH_HELD_OUT
from learner.evaluation.outlook import (
    ERROR_RATE,
    POWER,
    Demonstrated,
    detectable_gain,
    evidence_outlook,
    import_outlook,
    student_quantile,
)
from learner.evaluation.sequential import Answer
from tests.test_sequential import looked_at


def test_a_few_demonstrations_show_a_large_gain_and_it_is_said_how_many_more_would_help() -> None:
    outlook = evidence_outlook(10, 52, "held-out demonstrations")
    assert outlook.can_show is not None
    assert 0.2 < outlook.can_show < 0.3
    after = evidence_outlook(10 + outlook.num_more, round(5.2 * (10 + outlook.num_more)))
    assert after.can_show == pytest.approx(outlook.would_show, abs=0.01)
    assert outlook.sentence == (
        f"with 10 held-out demonstrations of 52 states a gain of {100 * outlook.can_show:.0f} points or more can be "
        f"shown; {outlook.num_more} more demonstrations would show 20"
    )


@pytest.mark.parametrize("number", [0, 1, 5])
def test_too_few_to_show_anything_are_said_to_be(number: int) -> None:
    outlook = evidence_outlook(number, 5 * number)
    assert outlook.can_show is None
    assert outlook.num_more >= 6 - number
    assert "no gain can be shown: a decision needs 6 at the least" in outlook.sentence


def test_more_evidence_shows_less_and_more_candidates_need_more() -> None:
    shown = [evidence_outlook(number, 5 * number).can_show for number in (6, 8, 10, 12, 16, 24, 40, 100)]
    assert shown == sorted(shown, key=lambda gain: -(gain or 1.0))
    assert (evidence_outlook(10, 50, num_candidates=3).can_show or 1.0) > (evidence_outlook(10, 50).can_show or 0.0)
    assert (evidence_outlook(10, 50, spread=0.1).can_show or 1.0) < (evidence_outlook(10, 50).can_show or 0.0)


@pytest.mark.parametrize("number", [8, 10, 16, 40])
def test_a_gain_that_can_be_shown_is_shown_about_as_often_as_is_said(number: int) -> None:
    spread = 0.25
    gain = detectable_gain(number, spread, ERROR_RATE)
    assert gain is not None
    draw = np.random.default_rng(number)
    tests = [looked_at(list(draw.normal(gain, spread, size=number)), ERROR_RATE) for _ in range(400)]
    assert POWER - 0.12 < np.mean([test.answer is Answer.SHOWN for test in tests]) < POWER + 0.1


def test_after_an_import_all_demonstrations_judge_until_enough_are_held_out() -> None:
    assert import_outlook(Demonstrated(2, 2, 10), Demonstrated(8, 8, 40), held_out_share=0.2).num_pairs == 10
    held_out, others = Demonstrated(ENOUGH_HELD_OUT, ENOUGH_HELD_OUT, 120), Demonstrated(100, 100, 500)
    many = import_outlook(held_out, others, held_out_share=0.2)
    assert many.num_pairs == ENOUGH_HELD_OUT
    assert many.num_more == 5 * evidence_outlook(ENOUGH_HELD_OUT, 120).num_more


def test_copies_of_one_transcript_are_one_piece_of_evidence() -> None:
    """Twelve that differed by a clock alone were once said to show a gain of 30 points."""
    copies, none = Demonstrated(1, 12, 36), Demonstrated(0, 0, 0)
    outlook = import_outlook(none, copies, held_out_share=0.2)
    assert (outlook.num_pairs, outlook.can_show) == (1, None)
    assert outlook.sentence.startswith(
        "with 12 demonstrations of 1 task no gain can be shown: 5 other tasks are needed before anything can be; "
    )
    assert outlook.sentence.endswith(f"; {outlook.num_more} more demonstrations of other tasks would show 30")
    ten = evidence_outlook(10, 100, num_demonstrations=20)
    assert ten.can_show == evidence_outlook(10, 100).can_show
    assert ten.sentence.startswith("with 20 demonstrations of 10 tasks a gain of ")
    assert evidence_outlook(10, 52, num_demonstrations=10) == evidence_outlook(10, 52)


def test_of_a_worlds_tasks_the_gate_is_told_to_try_more_as_far_as_there_are_more() -> None:
    """More demonstrations were recommended, which show nothing where tasks are tried."""
    tasks = evidence_outlook(100, 0, "tasks")
    number = 100 + tasks.num_more
    assert tasks.num_more > 0
    assert tasks.sentence.endswith(f"; {number} tasks (--learner-arg gate-tasks={number}) would show 10")
    assert evidence_outlook(100, 0, "tasks", most=number) == tasks
    assert evidence_outlook(100, 0, "tasks", most=number - 1).num_more == 0
    assert "gate-tasks" not in evidence_outlook(100, 0, "tasks", most=100).sentence


def test_what_can_be_shown_already_is_not_to_be_collected_for() -> None:
    """30.4 points were told as 30, beside "1 more demonstration would show 30"."""
    for number in range(6, 40):
        for states in range(number, 12 * number):
            outlook = evidence_outlook(number, states)
            if outlook.num_more and outlook.can_show is not None:
                assert round(100 * outlook.would_show) < round(100 * outlook.can_show), (number, states)


def test_students_quantile_is_that_of_the_tables() -> None:
    for degrees, tabled in ((7, 1.8946), (10, 1.8125), (30, 1.6973), (100, 1.6602)):
        assert student_quantile(0.95, degrees) == pytest.approx(tabled, abs=2e-3)
