"""Packed linear layers multiply as plain ones do, and only where that pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from runtime.engines.embedded import packed_linear
from runtime.engines.embedded.lora import LoraRows, LoraWeights
from runtime.engines.embedded.packed_linear import MIN_WEIGHTS, pack_linears, packs

NUM_IN, NUM_OUT = 512, 1024 + 37
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def network_of(dtype: torch.dtype = torch.float32, has_bias: bool = False) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(NUM_IN, NUM_OUT, bias=has_bias), nn.Linear(NUM_OUT, 8))
    return network.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (8, 1), (3, 11), (1, 130)])
def test_it_multiplies_as_before(dtype: torch.dtype, has_bias: bool, shape: tuple[int, ...]) -> None:
    network = network_of(dtype, has_bias)
    rows = torch.randn(*shape, NUM_IN).to(dtype)
    linear = network[0]
    expected = functional.linear(rows.double(), linear.weight.double(), linear.bias.double() if has_bias else None)
    assert pack_linears(network) == packs(dtype)
    told = network[0](rows)
    assert told.dtype == dtype
    assert told.shape == expected.shape
    torch.testing.assert_close(told.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_16_bits_stay_as_they_are_where_the_processor_has_no_layout_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """There oneDNN raises an error: a server with --precision bfloat16 did not start on a processor without AVX512."""
    monkeypatch.setattr(packed_linear, "packs", lambda dtype: dtype == torch.float32)
    network = network_of(torch.bfloat16)
    assert pack_linears(network) == 0
    assert network[0](torch.randn(2, NUM_IN).bfloat16()).shape == (2, NUM_OUT)
    assert packs(torch.float32)
    assert not packs(torch.float16)


def test_small_layers_and_small_machines_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Linear(64, MIN_WEIGHTS // 64 - 1))
    assert pack_linears(small) == 0
    network = network_of()
    monkeypatch.setattr(packed_linear, "free_bytes", lambda: 9 * network[0].weight.nbytes)
    assert pack_linears(network) == 0
    assert "forward" not in vars(network[0])


def test_adapters_are_added_to_packed_layers() -> None:
    network = network_of()
    pack_linears(network)
    lora = LoraRows(network)
    a, b = torch.randn(4, NUM_IN), torch.randn(4, NUM_OUT)
    lora.add("one", {"0": LoraWeights(a, b)})
    rows = torch.randn(2, 1, NUM_IN)
    lora.choose(["one", None])
    told = network[0](rows)
    base = functional.linear(rows, network[0].weight)
    torch.testing.assert_close(told[0], base[0] + rows[0] @ a.T @ b, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(told[1], base[1], atol=1e-5, rtol=1e-4)
