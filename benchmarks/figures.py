"""How benchmarks put their repeats into figures, and what memory a process takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def spread(values: Sequence[float], digits: int) -> str:
    """`12.3 (11.0-14.5)`: the median, the least and the most; `-` where there is none."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of the others lie below."""
    return sorted(values)[percent * len(values) // 100]


def memory_mib(which: str = "VmRSS", pid: int | str = "self") -> float:
    """What a process holds in memory now (VmRSS), or held at most (VmHWM). Linux only."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith(which))


def forget_most_memory() -> None:
    """Let this process's VmHWM start anew. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
