"""A test that may be looked at while the trials are still running, and stops as soon as the answer is known.

The error rate is spent over the looks: after a share t of the trials at most `level * t^2` of it (alpha spending: Lan
and DeMets 1983; this function: Kim and DeMets 1987). At each look the sign patterns that would have passed at an
earlier look, or would pass now, are counted, so that the error rate over all looks together is exact. An e-value, which
may be looked at for ever, was refused: with ten demonstrations it passes a gain of 30 points far too rarely.

A test is also given up: once even a true gain well above the observed one would hardly pass at the end (conditional
power: Lan and Wittes 1988), and where no gain was seen so far once the pairs that are left are too few. Giving up can
only lower the error rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import sqrt
from statistics import NormalDist

import numpy as np

from learner.evaluation.sign_flips import TIE, sign_patterns

MOST_LOOKS = 8
LEAST_SEEN = 24
"""Pairs before which no candidate passes early. What goes wrong in one case of ten is not seen in 24 cases with a
chance of 8 %, in ten cases with one of 35 %."""
HOPE = 1.5
"""Standard errors above the observed gain that the true one may be thought to lie, before a test is given up."""
LEAST_CHANCE = 0.05
"""A test is given up where its chance to pass, under that hope, is below."""
_BOUND_STEPS = 16
_NORMAL = NormalDist()


class Answer(StrEnum):
    """What a look at the gains says."""

    SHOWN = "shown"  # the candidate is better
    OPEN = "open"  # more trials may show it
    GIVEN_UP = "given_up"  # more trials would hardly show it
    NOT_SHOWN = "not_shown"  # all trials are done and have not shown it


@dataclass(slots=True)
class SequentialTest:
    """Whether a candidate gains, over up to `num_pairs` pairs; wrong at most in `level` of the cases."""

    num_pairs: int
    level: float
    looks: list[int] = field(default_factory=list)
    """After how many pairs it was looked. Some of those that were planned may drop out."""
    is_ended: bool = False
    """At the last look no more were to come, so that the whole error rate was spent."""
    answer: Answer = Answer.OPEN
    """Of the last look."""

    def planned_looks(self) -> list[int]:
        """The last is `num_pairs`."""
        step = max(1, -(-self.num_pairs // MOST_LOOKS))
        return [*range(step, self.num_pairs, step), self.num_pairs]

    def look(self, gains: Sequence[float], is_end: bool) -> Answer:
        """Look at all gains so far. `is_end`: no more will come."""
        self.looks.append(len(gains))
        self.is_ended = is_end
        if self._passes(gains):
            self.answer = Answer.SHOWN
        elif is_end:
            self.answer = Answer.NOT_SHOWN
        elif self._is_hopeless(gains):
            self.answer = Answer.GIVEN_UP
        return self.answer

    def lower_bound(self, gains: Sequence[float]) -> float | None:
        """The least mean gain that these looks do not refuse: a repeated confidence bound (Jennison, Turnbull 1989).

        At least zero where, and only where, a gain is shown. At least -1. None where these looks refuse nothing,
        whatever the gains: a test that is given up early has spent none of its error rate.
        """
        if not self._passes([1.0] * len(gains)):
            return None
        low, high = (0.0, 1.0) if self._passes(gains) else (-1.0, 0.0)
        for _ in range(_BOUND_STEPS):
            middle = (low + high) / 2
            if self._passes([gain - middle for gain in gains]):
                low = middle
            else:
                high = middle
        return low

    def _passes(self, gains: Sequence[float]) -> bool:
        """Whether the observed pattern of signs, at one of the looks, is among the few whose sum is highest."""
        if not gains:
            return False
        patterns, sums, begin = sign_patterns(self.num_pairs), np.zeros(1), 0
        has_passed = np.zeros(len(patterns), dtype=bool)
        for number, look in enumerate(self.looks):
            sums = sums + patterns[:, begin:look] @ np.asarray(gains[begin:look], dtype=float)
            is_last = self.is_ended and number == len(self.looks) - 1
            share = 1.0 if is_last else look / self.num_pairs if look >= LEAST_SEEN else 0.0
            may_pass = int(self.level * share**2 * len(sums) + TIE)
            has_passed |= _highest(sums, has_passed, may_pass - int(has_passed.sum()))
            begin = look
        return bool(has_passed[0])

    def _is_hopeless(self, gains: Sequence[float]) -> bool:
        """Whether no gain was seen and all that is left could not show one, or the sum, as a Brownian motion with a
        hopeful drift, would hardly be high enough in the end."""
        if sum(gains) <= 0 and not self._can_pass_still(gains):
            return True
        share = len(gains) / self.num_pairs
        spread = sqrt(sum(gain * gain for gain in gains))
        if share >= 1 or spread == 0:
            return False
        reached = sum(gains) / spread * sqrt(share)
        drift = (reached + HOPE * sqrt(share)) / share
        missing = _NORMAL.inv_cdf(1 - self.level) - reached - drift * (1 - share)
        return 1 - _NORMAL.cdf(missing / sqrt(1 - share)) < LEAST_CHANCE

    def _can_pass_still(self, gains: Sequence[float]) -> bool:
        """Whether it would pass if each pair that is left were all gain. Exact: with ten pairs six must gain."""
        at_best = [*gains, *[1.0] * (self.num_pairs - len(gains))]
        end = SequentialTest(self.num_pairs, self.level, [*self.looks, self.num_pairs], is_ended=True)
        return end._passes(at_best)


def _highest(sums: np.ndarray, is_out: np.ndarray, most: int) -> np.ndarray:
    """Which patterns, of those that are not out, have the highest sums: as many as may be, and all of a tie or none."""
    left = sums[~is_out]
    if most <= 0 or not len(left):
        return np.zeros(len(sums), dtype=bool)
    bound = -np.partition(-left, most)[most] if most < len(left) else -np.inf
    return ~is_out & (sums > bound + TIE)
