"""Decides whether a candidate may act: the same trials under both adapters, and a lower bound on the gain.

A trial is a task of a world, or a held-out demonstration where there is no world. Comparing two bare rates was refused:
on a hundred tasks two equal policies easily differ by five points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import Any

ERROR_RATE = 0.05
"""How often, at most, a cycle promotes though nothing got better."""
LEAST_TRIALS = 8


@dataclass(frozen=True, slots=True)
class Trial:
    """How one policy did in one trial."""

    score: float
    """In [0, 1]."""
    num_malformed: int
    """Actions that could not be read."""


UNFINISHED = Trial(0.0, 0)
"""As which a candidate's trial counts that did not come to an end."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether to promote, why, and on what evidence."""

    promote: bool
    reason: str
    evidence: dict[str, Any]


def decide(
    candidate: Sequence[Trial | None], acting: Sequence[Trial | None], unit: str = "tasks", num_candidates: int = 1
) -> GateDecision:
    """Promote if the gain's lower bound is above zero, and that of the rise in malformed actions is not.

    The sequences are parallel; None is a trial that did not come to an end. Where the acting adapter did not finish, it
    is left out; where only the candidate did not, it has failed: else it would be judged by what it can do. The bounds
    are Student's on the paired differences, one-sided at 95 %; of the gain, higher where the best of several candidates
    is to be taken (Bonferroni).
    """
    pairs = [(new or UNFINISHED, old) for new, old in zip(candidate, acting, strict=True) if old]
    if len(pairs) < LEAST_TRIALS:
        words = f"only {len(pairs)} {unit} were finished under the acting adapter, and a decision needs {LEAST_TRIALS}"
        return GateDecision(False, words, {"num_trials": len(pairs), "unit": unit})
    gains = [new.score - old.score for new, old in pairs]
    gain, low = fmean(gains), _lower_bound(gains, num_candidates)
    rises = [new.num_malformed - old.num_malformed for new, old in pairs]
    malformed, was_malformed = (sum(trial.num_malformed for trial in side) for side in zip(*pairs, strict=True))
    evidence = {
        "num_trials": len(pairs),
        "unit": unit,
        "candidate_unfinished": sum(new is UNFINISHED for new, _ in pairs),
        "candidate_score": fmean(new.score for new, _ in pairs),
        "acting_score": fmean(old.score for _, old in pairs),
        "gain": gain,
        "gain_low": low,
        "candidate_malformed": malformed,
        "acting_malformed": was_malformed,
    }
    words = f"gain {gain:+.1%} on {len(pairs)} {unit}, lower bound {low:+.1%}"
    if _lower_bound(rises, 1) > 0:
        return GateDecision(False, f"malformed actions rose from {was_malformed} to {malformed} ({words})", evidence)
    return GateDecision(low > 0, words, evidence)


def _lower_bound(differences: Sequence[float], num_candidates: int) -> float:
    quantile = student_quantile(1 - ERROR_RATE / num_candidates, len(differences) - 1)
    return fmean(differences) - quantile * stdev(differences) / sqrt(len(differences))


def student_quantile(probability: float, degrees: int) -> float:
    """Student's t by its expansion around the normal quantile (Abramowitz and Stegun, 26.7.5); good from 5 degrees."""
    z = NormalDist().inv_cdf(probability)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3
