"""What the gate judges by: the same trial under the candidate and under the acting adapter, as a pair.

A pair is one task of a world, or one demonstrated task with all its demonstrations and their states. These share the
task's difficulty, so that they are no independent evidence: the task is the unit (cluster), however often it was
demonstrated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

TASKS = "tasks"
"""What a unit is where a world's tasks are tried."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one adapter did in one trial."""

    score: float
    """In [0, 1]: a task's outcome, or the share of a demonstration's states where it acts as the expert."""
    num_malformed: int
    """Actions that could not be read."""


UNFINISHED = Trial(0.0, 0)
"""As which a candidate's trial counts that did not come to an end."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One trial under both adapters."""

    unit: str
    """What was tried: a task's id, or the episode of a demonstrated task's oldest demonstration."""
    candidate: Trial
    acting: Trial
    fold: int | None = None
    """Which adapters were tried: those that were trained without this fold. None: the candidate itself."""

    @property
    def gain(self) -> float:
        """In [-1, 1]."""
        return self.candidate.score - self.acting.score

    @property
    def malformed_rise(self) -> int:
        return self.candidate.num_malformed - self.acting.num_malformed


def paired(unit: str, candidate: Trial | None, acting: Trial | None, fold: int | None = None) -> Pair | None:
    """None is a trial that did not come to an end.

    What the acting adapter did not finish is left out. What only the candidate did not finish has failed: else it
    would be judged by what it can do.
    """
    return None if acting is None else Pair(unit, candidate or UNFINISHED, acting, fold)


def merged(unit: str, pairs: Sequence[Pair]) -> Pair | None:
    """One pair of the pairs of a unit's parts: their mean score, and all actions that could not be read."""
    if len(pairs) < 2:
        return pairs[0] if pairs else None
    candidate, acting = _mean([pair.candidate for pair in pairs]), _mean([pair.acting for pair in pairs])
    return Pair(unit, candidate, acting, pairs[0].fold)


def _mean(trials: Sequence[Trial]) -> Trial:
    if all(trial is UNFINISHED for trial in trials):
        return UNFINISHED
    return Trial(fmean(trial.score for trial in trials), sum(trial.num_malformed for trial in trials))


def gains(pairs: Sequence[Pair]) -> list[float]:
    return [pair.gain for pair in pairs]


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """For the log: means, and what was tried, pair by pair, so that a decision can be checked later."""
    if not pairs:
        return {"num_trials": 0}
    return {
        "num_trials": len(pairs),
        "candidate_unfinished": sum(pair.candidate is UNFINISHED for pair in pairs),
        "candidate_score": fmean(pair.candidate.score for pair in pairs),
        "acting_score": fmean(pair.acting.score for pair in pairs),
        "gain": fmean(gains(pairs)),
        "candidate_malformed": sum(pair.candidate.num_malformed for pair in pairs),
        "acting_malformed": sum(pair.acting.num_malformed for pair in pairs),
        "pairs": [[pair.unit, pair.fold, pair.candidate.score, pair.acting.score] for pair in pairs],
    }
