"""Which GPU the engine takes and which the learner; and where they share one, how much of its memory each.

vLLM takes its share once, at its start, and keeps it: what it does not leave free then, a learner never gets. The
learner holds the same base network once more, with a LoRA, its optimizer's state and the activations of
one packed batch. Sleeping the engine while the learner trains, as others do, was refused: the endpoint would be gone.

Not covered: MIG slices, other makers' GPUs. The allowances below are estimates; they were not measured on a GPU.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB = 1 << 30

MOST_FOR_ENGINE = 0.9
"""Share of a GPU's memory that vLLM takes by itself."""
LEARNER_PER_WEIGHT = 1.25
"""Bytes that the learner holds for a byte of the base network: the network, its LoRA and the optimizer's state."""
LEARNER_ALLOWANCE = 0.1
"""Share of the GPU's memory for the activations of a packed batch."""
LEARNER_CONTEXT_BYTES = 2 * GIB
"""CUDA's own context and what its allocator leaves unused."""
CACHE_PER_WEIGHT = 0.25
"""Bytes of keys and values that the engine wants at least, for a byte of the base network."""


@dataclass(frozen=True, slots=True)
class Gpu:
    id: str
    """As CUDA_VISIBLE_DEVICES names it: its number, or its UUID."""
    total_bytes: int


@dataclass(frozen=True, slots=True)
class GpuShare:
    """Who takes what."""

    engine_fraction: float | None = None
    """Share of each of its GPUs' memory for vLLM (`gpu_memory_utilization`); None: what vLLM takes by itself."""
    learner_environment: Mapping[str, str] = field(default_factory=dict)
    """To be set for the learner's process: which GPU it sees."""
    told: str = ""
    """A sentence for the terminal; empty where there is no GPU."""


def share_gpus(
    gpus: Sequence[Gpu], weight_bytes: int, num_for_engine: int = 1, users_fraction: float | None = None
) -> GpuShare:
    """Give the engine the first GPUs, and the learner the next one, or a part of the engine's last.

    `weight_bytes` are those of the base network as it is stored. `users_fraction` is what the user gives vLLM of each
    of its GPUs; what that leaves is the learner's, enough or not.
    """
    if not gpus:
        return GpuShare()
    ours = gpus[:num_for_engine]
    if len(gpus) > num_for_engine:
        learners = gpus[num_for_engine]
        told = f"vLLM on {_named(ours)}, the learner on {_named([learners])}"
        return GpuShare(None, {"CUDA_VISIBLE_DEVICES": learners.id}, told)
    if users_fraction is not None:
        told = f"vLLM takes {users_fraction:.2f} of {_named(ours)}, as you set it, the learner the rest"
        return GpuShare(None, {"CUDA_VISIBLE_DEVICES": ours[-1].id}, told)
    return _share_one(ours, weight_bytes)


def _share_one(ours: Sequence[Gpu], weight_bytes: int) -> GpuShare:
    shared = ours[-1]
    total = min(gpu.total_bytes for gpu in ours)  # vLLM takes the same share of each
    learner = LEARNER_PER_WEIGHT * weight_bytes + LEARNER_ALLOWANCE * total + LEARNER_CONTEXT_BYTES
    fraction = min(MOST_FOR_ENGINE, 1.0 - learner / total)
    if fraction * total < (1.0 + CACHE_PER_WEIGHT) * weight_bytes / len(ours):
        told = (
            f"vLLM on {_named(ours)}: a learner does not fit beside it and trains on the CPU; "
            "--engine-arg gpu_memory_utilization=... leaves it what you like"
        )
        return GpuShare(None, {"CUDA_VISIBLE_DEVICES": ""}, told)
    fraction = round(fraction, 2)
    told = (
        f"vLLM takes {fraction:.2f} of {_named(ours)} ({fraction * total / GIB:.1f} of {total / GIB:.1f} GiB), "
        "the learner the rest; --engine-arg gpu_memory_utilization=... sets it"
    )
    return GpuShare(fraction, {"CUDA_VISIBLE_DEVICES": shared.id}, told)


def _named(gpus: Sequence[Gpu]) -> str:
    return f"GPU {', '.join(gpu.id for gpu in gpus)}"


def num_gpus_of_engine(engine_args: Mapping[str, object]) -> int:
    """How many GPUs of this machine vLLM will use, by the arguments that are passed on to it."""
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    number = 1
    for size in sizes:
        value = str(given.get(size, 1))
        number *= int(value) if value.isdigit() else 1  # vLLM itself refuses what is no number
    return number


def fraction_of_user(engine_args: Mapping[str, object]) -> float | None:
    """The share of a GPU's memory that is passed on to vLLM; None where none is, or what is no number."""
    given = {name.replace("-", "_"): value for name, value in engine_args.items()}
    try:
        return float(str(given["gpu_memory_utilization"]))
    except (KeyError, ValueError):  # vLLM itself refuses what is no number
        return None


def weight_bytes_of(model_folder: Path) -> int:
    return sum(file.stat().st_size for file in model_folder.glob("model*.safetensors"))


def visible_gpus() -> list[Gpu]:
    """The GPUs that this process may use, in CUDA's order; none where there is no NVIDIA driver.

    Asks nvidia-smi: asking CUDA would take hundreds of megabytes of the first one for good.
    """
    command = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.strip()]
    by_name = {name: Gpu(name, int(mib) << 20) for index, uuid, mib in rows for name in (index, uuid)}
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [index for index, *_ in rows] if asked is None else [name.strip() for name in asked.split(",")]
    return [by_name[name] for name in names if name in by_name]
