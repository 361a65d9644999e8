"""Hands back the memory that a training has freed: what the allocators keep, the engine beside it cannot have.

After a training of a network of 135 million weights the learner's process kept 9 GB that it had no use for.
"""

from __future__ import annotations

import ctypes
import gc

import torch


def hand_back_freed_memory() -> None:
    """To the system, and to other processes on the same GPU. Of the C libraries only glibc has to be told."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
