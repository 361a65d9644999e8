"""How many bytes the keys and values may take, and how long a sequence they can hold."""

from __future__ import annotations

import torch

from policies.free_memory import free_bytes
from runtime.engines.embedded.kv_memory import KvShape

SHARE_OF_FREE_MEMORY = 0.25
"""By default: a learner trains on the same machine, with the same network and its activations."""
SEQUENCES_PER_ROW = 2
"""Full contexts that are of use for each row of the batch: its own, and a kept prefix."""
DEFAULT_MAX_CONTEXT = 4096
MIN_CONTEXT = 16
GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10


def kv_budget(
    shape: KvShape, num_bytes: int | None, max_context: int | None, most_context: int, max_rows: int
) -> tuple[int, int]:
    """Bytes for keys and values, and the longest sequence, prompt and completion together.

    `num_bytes` and `max_context` are the user's, None where left to us; `most_context` is what the network was made
    for. Raises ValueError where both are set and do not go together, or nothing fits.
    """
    wanted = max_context or min(most_context, DEFAULT_MAX_CONTEXT)
    per_token = shape.bytes_per_token
    if num_bytes is None:
        num_bytes = min(
            int(SHARE_OF_FREE_MEMORY * free_on(shape.device)), SEQUENCES_PER_ROW * max_rows * wanted * per_token
        )
    fits = num_bytes // per_token
    if fits < (max_context or MIN_CONTEXT):
        raise ValueError(
            f"{named(num_bytes)} for keys and values hold {fits:,} tokens of this network ({per_token:,} bytes each), "
            f"and a context of {max_context or MIN_CONTEXT:,} is asked for, which takes "
            f"{named((max_context or MIN_CONTEXT) * per_token)}: give more --kv-memory, or a smaller --max-context"
        )
    return num_bytes, min(wanted, fits)


def context_cut(shape: KvShape, num_bytes: int, longest: int, max_context: int | None, most_context: int) -> str:
    """Why the longest sequence is shorter than wanted, and what to do; empty where it is not. As in `kv_budget`."""
    wanted = max_context or min(most_context, DEFAULT_MAX_CONTEXT)
    if longest >= wanted:
        return ""
    return (
        f"{named(num_bytes)} for keys and values hold {num_bytes // shape.bytes_per_token:,} tokens; this network "
        f"could read {wanted:,}: give more --kv-memory"
    )


def named(num_bytes: int) -> str:
    """In the largest unit of which there is a whole one."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} byte" + ("" if num_bytes == 1 else "s")


def free_on(device: torch.device) -> int:
    """Bytes that this process could take now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
