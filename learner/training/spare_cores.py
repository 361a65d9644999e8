"""How many threads a training takes on a CPU: the cores that nobody else uses at the moment.

A training goes on for minutes beside a server that is idle most of the time, and then has work for a second core. It is
looked at again before each pack, some seconds apart: where others work meanwhile (the server, another program), the
next pack leaves them their cores. In between the learner's low priority does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

A_CORE_IS_FREE = 0.7
"""So much of a core must have been idle to be taken."""
MIN_INTERVAL_S = 1.0
"""Of a shorter look nothing can be said: the system counts in hundredths of a second."""


@dataclass(slots=True)
class SpareCores:
    """Looks at what others used since the last look."""

    num_cores: int
    """That we may run on."""
    seen: tuple[float, float, float]
    """At the last look: the clock, CPU seconds of all processes, and of this one."""
    look: Callable[[], tuple[float, float, float]]

    @classmethod
    def of_this_machine(cls) -> SpareCores | None:
        """None where it cannot be told (not Linux), or where there is one core only."""
        try:
            num_cores = len(os.sched_getaffinity(0))
            return cls(num_cores, _now(), _now) if num_cores > 1 else None
        except (AttributeError, OSError):
            return None

    def take(self) -> None:
        """Set torch's threads; they stay as they are where the last look was just now."""
        (before, all_before, own_before), (now, all_now, own_now) = self.seen, self.look()
        if now - before < MIN_INTERVAL_S:
            return
        self.seen = now, all_now, own_now
        others = max((all_now - all_before) - (own_now - own_before), 0.0) / (now - before)
        torch.set_num_threads(self.threads_beside(others))

    def threads_beside(self, others: float) -> int:
        """`others`: how many cores they used, on average."""
        return max(1, int(self.num_cores - others + (1 - A_CORE_IS_FREE)))


def _now() -> tuple[float, float, float]:
    """The clock, CPU seconds of all processes on the machine so far, and of this one."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (
        time.monotonic(),
        (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
        time.process_time(),
    )
