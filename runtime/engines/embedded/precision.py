"""In which numbers a network computes: on a CPU, 16 bits where the processor was seen to be faster with them.

Processors with AMX or AVX512-bf16 multiply 16 bits up to several times faster, and read half the bytes; others emulate
them and are slower. Which it is depends on the sizes too, so the products of one layer are timed at the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

from policies.adapters.base_network import read_base_network

Precision = Literal["auto", "float32", "bfloat16"]

MIN_WEIGHTS = 50_000_000
"""Networks below stay exact: their time goes by between the products."""
MIN_GAIN = 1.2
"""So many times faster must 16 bits be to be worth what they round away."""
NUM_ROWS = (1, 8, 128)
"""A single completion, several, and a prompt."""
NUM_TRIES = 5

Shapes = Sequence[tuple[int, ...]]


def choose_dtype(model_path: str | Path, precision: Precision, device: str) -> torch.dtype | Literal["auto"]:
    """The type to load a network's folder in; `auto` is the type it is stored in, which a GPU takes."""
    if precision != "auto":
        return getattr(torch, precision)
    if device != "cpu":
        return "auto"
    shapes = read_base_network(Path(model_path)).shapes
    if sum(map(math.prod, shapes.values())) < MIN_WEIGHTS or not has_16_bits():
        return torch.float32
    return torch.bfloat16 if gain_of_16_bits(products_of_a_layer(shapes)) >= MIN_GAIN else torch.float32


def has_16_bits() -> bool:
    """Whether this processor multiplies in bfloat16 by itself."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def products_of_a_layer(shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """The matrices of the first layer, (outputs, inputs) each."""
    return [shape for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2]


@torch.inference_mode()
def gain_of_16_bits(shapes: Shapes) -> float:
    """How many times faster a layer's products are in bfloat16 than in float32, in the geometric mean of `NUM_ROWS`."""
    times = {dtype: seconds_of(shapes, dtype) for dtype in (torch.float32, torch.bfloat16)}
    pairs = zip(times[torch.float32], times[torch.bfloat16], strict=True)
    return math.prod(full / half for full, half in pairs) ** (1 / len(NUM_ROWS))


def seconds_of(shapes: Shapes, dtype: torch.dtype) -> list[float]:
    """By the number of rows."""
    layers = [torch.ones(shape, dtype=dtype) for shape in shapes]
    return [best_of(lambda: multiply(layers, num_rows)) for num_rows in NUM_ROWS]  # noqa: B023 (called at once)


def multiply(layers: Sequence[torch.Tensor], num_rows: int) -> None:
    for layer in layers:
        functional.linear(layer.new_ones(num_rows, layer.shape[1]), layer)


def best_of(work: Callable[[], None]) -> float:
    """The least of several: what else runs only ever makes it slower. The first warms up."""
    seconds = []
    for _ in range(NUM_TRIES + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
