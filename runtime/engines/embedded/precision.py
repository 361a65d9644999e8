"""In which numbers a network computes: on a CPU 32 bits, or 16 where it is asked to measure and is faster.

Processors with AMX or AVX512-bf16 multiply 16 bits up to several times faster, and read half the bytes; but attention
for a few queries may be slower, and others emulate them all. Which outweighs the other depends on the processor and on
the network's sizes, so one layer's work is timed at the start, with random numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import AutoConfig

from policies.adapters.base_network import read_base_network

Precision = Literal["auto", "measured", "float32", "bfloat16"]

MIN_WEIGHTS = 50_000_000
"""Networks below stay exact: their time goes by between the products."""
MIN_GAIN = 1.2
"""So many times faster must 16 bits be to be worth what they round away."""
NUM_DECODING = (1, 8, 32)
"""Completions at once."""
NUM_CACHED = 512
"""Tokens that each of them reads."""
NUM_PROMPT = 128
"""Tokens of a piece of a prompt."""
NUM_TRIES = 4


def choose_dtype(model_path: str | Path, precision: Precision, device: str) -> torch.dtype | Literal["auto"]:
    """The type to load a network's folder in; `auto` is the type it is stored in, which a GPU takes.

    On a CPU `auto` is 32 bits, in which an adapter's proof is made there and log probabilities are those that the
    trainer finds. `measured` takes what is faster: an adapter is verified in 16 bits, too (benchmarks/verification.py).
    """
    if precision in ("float32", "bfloat16"):
        return getattr(torch, precision)
    if device != "cpu":
        return "auto"
    if precision == "auto":
        return torch.float32
    if num_weights(model_path) < MIN_WEIGHTS or not has_16_bits():
        return torch.float32
    return torch.bfloat16 if gain_of_16_bits(Sizes.of(model_path)) >= MIN_GAIN else torch.float32


def num_weights(model_path: str | Path) -> int:
    return sum(map(math.prod, read_base_network(Path(model_path)).shapes.values()))


def has_16_bits() -> bool:
    """Whether this processor multiplies in bfloat16 by itself."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a network, as far as its time depends on them."""

    num_layers: int
    products: list[tuple[int, ...]]
    """The matrices of the first layer, (outputs, inputs) each."""
    head: tuple[int, int]
    num_heads: int
    num_key_heads: int
    head_dim: int

    @classmethod
    def of(cls, model_path: str | Path) -> Sizes:
        config: Any = AutoConfig.from_pretrained(model_path).get_text_config()
        shapes = read_base_network(Path(model_path)).shapes
        return cls(
            num_layers=config.num_hidden_layers,
            products=[shape for name, shape in shapes.items() if ".layers.0." in name and len(shape) == 2],
            head=(config.vocab_size, config.hidden_size),
            num_heads=config.num_attention_heads,
            num_key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )


@torch.inference_mode()
def gain_of_16_bits(sizes: Sizes) -> float:
    """How many times faster the network is in bfloat16 than in float32, in the geometric mean of some loads."""
    full, half = seconds_of(sizes, torch.float32), seconds_of(sizes, torch.bfloat16)
    return math.prod(one / other for one, other in zip(full, half, strict=True)) ** (1 / len(full))


def seconds_of(sizes: Sizes, dtype: torch.dtype) -> list[float]:
    """What a forward would take: for each number of rows that decode, then for a prompt."""
    layer = [torch.rand(shape).to(dtype) for shape in sizes.products]
    head = torch.rand(sizes.head).to(dtype)
    decoding = [
        sizes.num_layers * (best_of(multiply, layer, num) + best_of(attend, *queries_and_keys(sizes, num, dtype)))
        + best_of(multiply, [head], num)
        for num in NUM_DECODING
    ]
    return [*decoding, sizes.num_layers * best_of(multiply, layer, NUM_PROMPT)]


def multiply(matrices: list[torch.Tensor], num_rows: int) -> None:
    for matrix in matrices:
        functional.linear(matrix.new_ones(num_rows, matrix.shape[1]), matrix)


def queries_and_keys(sizes: Sizes, num_rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.rand(num_rows, sizes.num_key_heads, NUM_CACHED, sizes.head_dim).to(dtype)
    return keys[:, :, : sizes.num_heads // sizes.num_key_heads].contiguous(), keys


def attend(queries: torch.Tensor, keys: torch.Tensor) -> None:
    functional.scaled_dot_product_attention(queries, keys, keys)


def best_of(work: Callable[..., None], *arguments: Any) -> float:
    """Seconds, the least of several tries: what else runs only ever makes it slower. The first warms up."""
    seconds = []
    for _ in range(NUM_TRIES + 1):
        began = time.perf_counter()
        work(*arguments)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
