"""What a training has freed goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from learner.training.freed_memory import hand_back_freed_memory

MIB = 1 << 20


def resident_mib() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_though_something_after_it_is_still_in_use() -> None:
    before = resident_mib()
    tensors = [torch.ones(MIB // 64 // 4) for _ in range(64 * 300)]  # 300 MiB in pieces of 16 KiB
    kept = tensors[-1]  # at the end: so the C library cannot shrink by itself
    assert resident_mib() > before + 250
    tensors.clear()
    hand_back_freed_memory()
    assert resident_mib() < before + 60
    assert kept[0] == 1
