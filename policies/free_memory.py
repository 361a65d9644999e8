"""How much memory a process could take now: of the machine, and of the container it runs in."""

from __future__ import annotations

import os
from pathlib import Path


def free_bytes() -> int:
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_container(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves; no limit is a very large one."""
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no container, or "max"
        return 1 << 62
