"""How benchmarks put their repeats into figures, and what memory a process takes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def spread(values: Sequence[float], digits: int) -> str:
    """`12.3 (11.0-14.5)`: the median, the least and the most; `-` where there is none."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


STUDENT_T = (
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
    2.23,
    2.20,
    2.18,
    2.16,
    2.14,
    2.13,
    2.12,
    2.11,
    2.10,
)
"""Two-sided 95 %, of 2 values and more."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); NaN for one value."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    # Beyond the table within 0.01 of the right one.
    t = STUDENT_T[len(values) - 2] if len(values) - 2 < len(STUDENT_T) else 1.96 + 2.4 / (len(values) - 1)
    return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5


def each_of(known: Iterable[str], separator: str) -> Callable[[str], list[str]]:
    """What argparse reads an option by: names, each of them known."""

    there = list(known)

    def read(given: str) -> list[str]:
        names = given.split(separator)
        if unknown := [name for name in names if name not in there]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of: {f'{separator} '.join(there)}")
        return list(dict.fromkeys(names))

    return read


def counts(given: str) -> list[int]:
    """Numbers of 1 and more, with commas, each once: what argparse reads an option by."""
    numbers = sorted({int(number) for number in given.split(",")})
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"{numbers[0]} is below 1")
    return numbers


def from_to(given: str) -> range:
    """`1-5`, or `3` alone: what argparse reads an option by."""
    first, _, last = given.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found:
        raise argparse.ArgumentTypeError(f"{given} has nothing in it: from-to, such as 1-5")
    return found


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
