"""The gate's test: it may be looked at early, and errs no more often than it says, with few pairs as with many."""

from __future__ import annotations

import numpy as np
import pytest

from learner.evaluation.sequential import LEAST_SEEN, Answer, SequentialTest
from learner.evaluation.sign_flips import chance, fewest_pairs, sign_patterns


def looked_at(gains: list[float], level: float = 0.05) -> SequentialTest:
    """A test at all its looks, until it has an answer."""
    test = SequentialTest(len(gains), level)
    for look in test.planned_looks():
        if test.look(gains[:look], look == len(gains)) is not Answer.OPEN:
            break
    return test


def test_the_chance_of_differences_of_0_and_1_is_mcnemars() -> None:
    """9 better, 1 worse: at most one worse of ten, by a fair coin."""
    assert chance([1.0] * 9 + [-1.0] + [0.0] * 2) == pytest.approx(11 / 1024)


def test_many_pairs_are_tested_by_a_draw_of_patterns_among_them_the_observed_one() -> None:
    assert (sign_patterns(40)[0] == 1).all()
    exact, drawn = chance([1.0] * 9 + [-1.0] * 3), chance([1.0] * 9 + [-1.0] * 3 + [0.0] * 28)
    assert drawn == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("num_pairs", [6, 10, 16, 100])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_what_is_no_better_passes_as_rarely_as_promised_over_all_looks(num_pairs: int, level: float) -> None:
    """Differences of wildly different sizes, symmetric about nothing: 3 standard errors of 2,000 repeats as margin."""
    draw, num_passed, num_repeats = np.random.default_rng(num_pairs), 0, 2000
    for _ in range(num_repeats):
        gains = draw.choice([0.0, 0.1, 0.2, 1.0], size=num_pairs) * draw.choice([1.0, -1.0], size=num_pairs)
        num_passed += looked_at(list(gains), level).answer is Answer.SHOWN
    assert num_passed / num_repeats < level + 3 * (level / num_repeats) ** 0.5


def test_it_stops_early_where_the_gain_is_plain_and_where_there_is_none() -> None:
    better, worse = looked_at([1.0, 1.0, 0.0] * 33 + [1.0]), looked_at([0.0, -1.0, 0.0] * 33 + [0.0])
    assert (better.answer, worse.answer) == (Answer.SHOWN, Answer.GIVEN_UP)
    assert LEAST_SEEN <= better.looks[-1] < 50
    assert worse.looks[-1] < 50


def test_it_is_given_up_without_a_gain_once_too_few_pairs_are_left_to_show_one() -> None:
    """Of ten pairs six have to gain: after six without, four are left. A fold not tried spares a training."""
    alike, still_possible = looked_at([0.0] * 10, 0.03), looked_at([0.0] * 4 + [1.0] * 6, 0.03)
    assert (alike.answer, alike.looks[-1]) == (Answer.GIVEN_UP, 6)
    assert still_possible.answer is Answer.SHOWN


def test_nothing_passes_before_enough_was_seen_for_a_rare_harm_to_show() -> None:
    """Nine of ten a little better, one far worse: the first looks were once all the gate saw of a hundred tasks."""
    draw, num_passed = np.random.default_rng(0), 0
    for _ in range(400):
        gains = np.where(draw.random(24) < 0.1, -0.9, 0.1)
        num_passed += looked_at(list(gains)).answer is Answer.SHOWN
    assert num_passed / 400 < 0.08 + 3 * 0.014


def test_the_lower_bound_is_above_zero_where_a_gain_is_shown_and_only_there() -> None:
    draw = np.random.default_rng(1)
    seen = set()
    for mean in (-0.3, 0.0, 0.2, 0.4):
        for _ in range(20):
            gains = list(np.clip(draw.normal(mean, 0.4, size=12), -1, 1))
            test = looked_at(gains)
            low = test.lower_bound(gains[: test.looks[-1]])
            if low is None:
                assert test.answer is Answer.GIVEN_UP
                continue
            assert (low > 0) == (test.answer is Answer.SHOWN)
            assert -1 <= low <= np.mean(gains[: test.looks[-1]]) + 1e-6
            seen.add(test.answer)
    assert {Answer.SHOWN, Answer.NOT_SHOWN} <= seen


def test_where_none_of_the_error_rate_was_spent_there_is_no_lower_bound() -> None:
    """A test that was given up after six of 21 pairs was told to have a bound of -100 points."""
    given_up = SequentialTest(21, 0.03)
    given_up.look([0.2] * 6, False)
    assert given_up.lower_bound([0.2] * 6) is None
    too_few = looked_at([1.0] * 4, 0.03)
    assert (too_few.answer, too_few.lower_bound([1.0] * 4)) == (Answer.NOT_SHOWN, None)
    ended = SequentialTest(21, 0.03)
    ended.look([-1.0] * 21, True)
    assert ended.lower_bound([-1.0] * 21) == -1.0


def test_the_lower_bound_covers_the_true_gain() -> None:
    draw, num_above = np.random.default_rng(2), 0
    for _ in range(500):
        gains = list(0.3 + draw.choice([-0.3, -0.1, 0.1, 0.3], size=16))
        test = looked_at(gains)
        low = test.lower_bound(gains[: test.looks[-1]])
        num_above += low is not None and low > 0.3
    assert num_above / 500 < 0.05 + 3 * 0.01


def test_pairs_that_drop_out_do_not_use_up_the_last_look() -> None:
    test = SequentialTest(12, 0.05)
    assert test.look([1.0] * 7, is_end=True) is Answer.SHOWN


@pytest.mark.parametrize("level", [0.05, 0.03, 0.01])
def test_with_fewer_pairs_than_the_fewest_nothing_passes(level: float) -> None:
    fewest = fewest_pairs(level)
    assert looked_at([1.0] * (fewest - 1), level).answer is not Answer.SHOWN
    assert looked_at([1.0] * fewest, level).answer is Answer.SHOWN


def test_nothing_tried_shows_nothing() -> None:
    assert SequentialTest(8, 0.05).look([], is_end=True) is Answer.NOT_SHOWN
    assert looked_at([0.0] * 30).answer is Answer.GIVEN_UP
