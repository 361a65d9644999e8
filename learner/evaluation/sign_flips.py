"""The sign-flip test: how likely a sum of paired differences is, if either adapter could have been the better one.

Where the candidate is no better, each pair's difference is as likely to be positive as negative. So all patterns of
signs are equally likely, and the observed sum is held against the sums that the other patterns give (Fisher 1935, The
Design of Experiments, 21; for differences of 0 and 1 it is McNemar's exact test). It needs no normal distribution and
keeps its error rate at six pairs as at six hundred. A t test was refused: with few pairs of few values its error rate
is not what it says.

What is not covered: an adapter that is a little better nearly everywhere and far worse in a rare case may have a mean
gain of zero, and passes where the rare case was not tried. No test on few pairs can see that; a canary can.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import floor, log2

import numpy as np

NUM_PATTERNS = 4096
"""Of signs. So many pairs as 2 to their number does not exceed it are tested by all patterns there are; of more pairs
so many are drawn, the observed one among them, which keeps the error rate exact (Hemerik and Goeman 2018)."""
TIE = 1e-9
"""Sums that differ by less are equal."""


@lru_cache(maxsize=16)
def sign_patterns(num_pairs: int) -> np.ndarray:
    """(patterns, pairs) of +1 and -1; the first row is the observed pattern: all +1."""
    if 2**num_pairs <= NUM_PATTERNS:
        bits = np.arange(2**num_pairs)[:, None] >> np.arange(num_pairs)
        return np.asfortranarray(1.0 - 2.0 * (bits & 1))
    patterns = np.random.default_rng(0).choice([1.0, -1.0], size=(NUM_PATTERNS, num_pairs))
    patterns[0] = 1.0
    return np.asfortranarray(patterns)  # columns are read: the pairs between two looks


def chance(differences: Sequence[float]) -> float:
    """How often, at most, a sum as large as this comes about by chance alone (the one-sided p value)."""
    sums = sign_patterns(len(differences)) @ np.asarray(differences, dtype=float)
    return float(np.mean(sums >= sums[0] - TIE))


def fewest_pairs(level: float) -> int:
    """With fewer pairs nothing can be shown at this error rate, however large the gain: 2^-n is above it."""
    return floor(-log2(level) - TIE) + 1
