"""How benchmarks put their repeats into figures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], digits: int) -> str:
    """`12.3 (11.0-14.5)`: the median, the least and the most; `-` where there is none."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of the others lie below."""
    return sorted(values)[percent * len(values) // 100]
