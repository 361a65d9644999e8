"""What a training has freed goes back to the system."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.figures import memory_mib
from learner.training.freed_memory import hand_back_freed_memory

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_though_something_after_it_is_still_in_use() -> None:
    hand_back_freed_memory()  # what tests before this one have freed would be filled first
    before = memory_mib()
    tensors = [torch.ones(MIB // 64 // 4) for _ in range(64 * 300)]  # 300 MiB in pieces of 16 KiB
    kept = tensors[-1]  # at the end: so the C library cannot shrink by itself
    assert memory_mib() > before + 250
    tensors.clear()
    hand_back_freed_memory()
    assert memory_mib() < before + 60
    assert kept[0] == 1
