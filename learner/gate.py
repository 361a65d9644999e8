"""Decides whether a candidate may act: the same tasks under both adapters, and a lower bound on the gain.

Comparing two bare rates was refused: on a hundred tasks two equal policies easily differ by five points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from tools.worlds.practice import Attempt

ONE_SIDED_95 = 1.645
"""Of the normal distribution."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Whether to promote, why, and on what evidence."""

    promote: bool
    reason: str
    evidence: dict[str, Any]


def decide(candidate: Sequence[Attempt], acting: Sequence[Attempt]) -> GateDecision:
    """Promote if the lower end of the gain's one-sided 95 % interval is above zero and malformed actions did not rise.

    The attempts are paired by task; a task that either could not finish (no answer came) is left out.
    """
    pairs = [(new, old) for new, old in zip(candidate, acting, strict=True) if not new.error and not old.error]
    if len(pairs) < 2:
        return GateDecision(False, "fewer than two tasks were finished under both adapters", {"num_tasks": len(pairs)})
    gains = [new.outcome - old.outcome for new, old in pairs]
    gain = fmean(gains)
    low = gain - ONE_SIDED_95 * stdev(gains) / sqrt(len(gains))
    malformed = [sum(attempt.num_malformed for attempt in side) for side in zip(*pairs, strict=True)]
    evidence = {
        "num_tasks": len(pairs),
        "candidate_success": fmean(new.outcome for new, _ in pairs),
        "acting_success": fmean(old.outcome for _, old in pairs),
        "gain": gain,
        "gain_low": low,
        "candidate_malformed": malformed[0],
        "acting_malformed": malformed[1],
    }
    words = f"gain {gain:+.1%} on {len(pairs)} tasks, lower bound {low:+.1%}"
    if malformed[0] > malformed[1]:
        return GateDecision(False, f"malformed actions rose from {malformed[1]} to {malformed[0]} ({words})", evidence)
    return GateDecision(low > 0, words, evidence)
