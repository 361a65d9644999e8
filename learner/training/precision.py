"""In which numbers a base network is held while an adapter of it is trained.

On a GPU in those that it is stored in, in which the engine serves it there: beside an engine in 32 bits, an adapter of
the novice that was trained in 16 was refused, 0.22 nats off. On a CPU in 32 bits, or in 16 where the processor
multiplies them by itself (AMX, AVX512-bf16) and one layer's work, forward and backward, is measured to be faster so.
The adapter and its gradient are of 32 bits in any case, and its probe is made in the 32 bits that the engine computes
in on a CPU.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from policies.adapters.base_network import read_base_network

Precision = Literal["auto", "float32", "bfloat16"]

MIN_WEIGHTS = 50_000_000
"""Networks below stay exact, and on one thread: their time goes by between the products."""
MIN_GAIN = 2.0
"""So many times faster must the products be in 16 bits: what stands between them is not (4.2 times faster products
made a SmolLM2's training 1.5 times faster)."""
NUM_TOKENS = 512
"""Of a pack."""
NUM_TRIES = 3


def training_dtype(base: Path, precision: Precision, device: str) -> torch.dtype:
    if precision != "auto":
        return getattr(torch, precision)
    if num_weights(base) < MIN_WEIGHTS:
        return torch.float32
    if device != "cpu":
        stored = AutoConfig.from_pretrained(base).get_text_config().dtype
        return torch.float32 if stored == torch.float32 else torch.bfloat16  # float16 has no gradients to speak of
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    shapes = read_base_network(base).shapes
    layer = [shape for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2]
    return torch.bfloat16 if gain_of_16_bits(layer) >= MIN_GAIN else torch.float32


def num_weights(base: Path) -> int:
    return sum(map(math.prod, read_base_network(base).shapes.values()))


def gain_of_16_bits(shapes: list[tuple[int, ...]]) -> float:
    """How many times faster a layer's products are, forward and backward; `shapes` are (outputs, inputs) each."""
    return _seconds(shapes, torch.float32) / _seconds(shapes, torch.bfloat16)


def _seconds(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> float:
    """The least of several tries: what else runs only ever makes it slower. The first warms up."""
    weights = [torch.rand(shape).to(dtype) for shape in shapes]
    inputs = [torch.rand(NUM_TOKENS, shape[1]).to(dtype).requires_grad_() for shape in shapes]
    return min([_once(weights, inputs) for _ in range(NUM_TRIES + 1)][1:])


def _once(weights: list[Tensor], inputs: list[Tensor]) -> float:
    began = time.perf_counter()
    for weight, given in zip(weights, inputs, strict=True):
        functional.linear(given, weight).sum().backward()
    return time.perf_counter() - began
