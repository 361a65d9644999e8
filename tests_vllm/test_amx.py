"""16 bits on a processor with AMX: vLLM's process once died with SIGILL at the first token."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from policies.types import SamplingParams
from runtime.engines.vllm.on_cpu import BLOCK_SIZE, BLOCK_SIZE_WITHOUT_AMX, ask_for_amx, has_amx, safe_block_size
from tests_vllm.novice_adapters import NoviceAdapters, complete, engine_on

needs_amx = pytest.mark.skipif(not has_amx(), reason="no AMX here")


@needs_amx
@pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE_WITHOUT_AMX])
async def test_a_network_in_16_bits_answers(novice: NoviceAdapters, size: int):
    arguments = {"dtype": "bfloat16", "block_size": str(size)}
    async with engine_on(novice.model_folder, max_batch_size=4, engine_args=arguments) as engine:
        assert len(await complete(engine, novice.prompt(70), SamplingParams(max_tokens=8, temperature=0))) == 8


@needs_amx
def test_the_tile_registers_are_to_be_had():
    assert ask_for_amx()


@pytest.mark.parametrize(
    ("num_processes", "has", "may_use", "expected"),
    [(1, False, False, 32), (2, False, False, 32), (1, True, True, 32), (2, True, True, 16), (1, True, False, 16)],
)
def test_where_the_registers_are_not_asked_for_blocks_keep_vllm_from_using_them(
    num_processes: int, has: bool, may_use: bool, expected: int
):
    assert safe_block_size(32, num_processes, has, may_use) == expected
    assert safe_block_size(16, num_processes, has, may_use) == 16


def test_the_block_size_that_avoids_amx_is_one_with_which_vllm_avoids_it(monkeypatch: pytest.MonkeyPatch):
    """vLLM's own choice, on a processor that it is told has AMX."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert _get_attn_isa(torch.bfloat16, BLOCK_SIZE, 64) == "amx"
    assert _get_attn_isa(torch.bfloat16, BLOCK_SIZE_WITHOUT_AMX, 64) != "amx"
