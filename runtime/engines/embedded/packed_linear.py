"""Large linear layers on a CPU, their weights laid out once for oneDNN.

For a few rows at a time, which is what decoding many completions at once is, laying the weights out takes longer than
multiplying by them, and torch does it anew at every call. With SmolLM2's sizes, 8 rows and 32 bits the packed products
took 0.6 and the vocabulary's 0.5 of the CPU time (benchmarks/RESULTS.md). A single row needs no layout in 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from policies.free_memory import free_bytes

MIN_WEIGHTS = 1 << 19
"""Of a layer: smaller ones lose more by the call than they gain."""
SHARE_OF_FREE_MEMORY = 0.1
"""Most that the packed copies may take; a network whose layers need more stays as it is."""


def pack_linears(network: nn.Module) -> int:
    """Let the network's large linear layers multiply by packed copies; how many do so now. What hooks and readers of
    the weights see stays the same."""
    linears = [module for module in network.modules() if type(module) is nn.Linear and _is_worth_packing(module)]
    num_bytes = sum(each.weight.nbytes for each in linears)
    if num_bytes > SHARE_OF_FREE_MEMORY * free_bytes():
        return 0
    for linear in linears:
        linear.forward = _packed_forward(linear)  # pyright: ignore[reportAttributeAccessIssue]
    return len(linears)


def _is_worth_packing(linear: nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and packs(weight.dtype) and weight.numel() >= MIN_WEIGHTS


def packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN lays out such weights on this processor: 16 bits want AVX512, and raise an error on any other."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed_forward(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    is_exact = linear.weight.dtype == torch.float32

    def forward(rows: Tensor) -> Tensor:
        """(..., in features) -> (..., out features)"""
        if is_exact and rows.numel() == linear.in_features:
            return functional.linear(rows, linear.weight, linear.bias)
        return torch.ops.mkldnn._linear_pointwise(rows, packed, linear.bias, "none", [], "")

    return forward
