"""The embedded engine's attention masks: who sees what, and how they lie in memory."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from runtime.engines.embedded.attention import AttentionMasks

WORD_BYTES = 16
"""CUDA's kernels read a mask in words of so many, and die of a row that begins between two of them. Where the number of
keys is no multiple of 8, PyTorch copies the mask into such rows itself; elsewhere it takes it as it lies."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_every_part_of_a_mask_begins_at_a_word(dtype: torch.dtype, num_queries: int) -> None:
    masks = AttentionMasks(LlamaConfig(), dtype, torch.device("cpu"))
    for num_tokens in range(1, 70):
        positions = torch.arange(num_tokens - num_queries, num_tokens).clamp(min=0).expand(5, -1)
        mask = masks.build(positions, num_tokens)
        assert isinstance(mask, torch.Tensor)
        for first_row in range(5):
            part = mask[first_row:, :, :, :num_tokens]
            begins = [part[row, 0, query].data_ptr() for row in range(len(part)) for query in range(num_queries)]
            assert all(begin % WORD_BYTES == 0 for begin in begins)


def test_a_query_sees_what_came_before_it_and_itself() -> None:
    masks = AttentionMasks(LlamaConfig(), torch.float32, torch.device("cpu"))
    mask = masks.build(torch.tensor([[2, 3], [0, 1]]), 4)
    assert isinstance(mask, torch.Tensor)
    assert (mask == 0).sum(-1).tolist() == [[[3, 4]], [[1, 2]]]
