"""A token attends to its ancestors, whatever block it falls into."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import learner.packing.tree_attention
from learner.packing.prefix_tree import Pack, ScoredSequence, Span, pack_sequences
from learner.packing.tree_attention import TREE_ATTENTION, Tree, tree_attention

torch.set_num_threads(1)


def forest(num_sequences: int = 30) -> tuple[Pack, Tree]:
    draw = random.Random(5)
    rows: list[ScoredSequence] = []
    for number in range(num_sequences):
        stem = draw.choice(rows).token_ids if rows and number % 5 else ()
        token_ids = stem[: draw.randint(0, len(stem))] + tuple(draw.randrange(9) for _ in range(draw.randint(2, 20)))
        rows.append(ScoredSequence(token_ids, (Span(1, 2),), owner=number))
    [pack] = pack_sequences(rows, token_budget=10_000)
    return pack, Tree(torch.from_numpy(pack.subtree_ends), torch.from_numpy(pack.depths))


def expected_visibility(pack: Pack, window: int | None) -> torch.Tensor:
    size = pack.num_tokens

    def sees(query: int, key: int) -> bool:
        is_near = window is None or bool(pack.depths[query] - pack.depths[key] < window)
        return key <= query < pack.subtree_ends[key] and is_near

    return torch.tensor([[sees(query, key) for key in range(size)] for query in range(size)])


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("block_tokens", [1, 16, 100, 10_000])
def test_blocks_attend_as_one_dense_mask_does(
    window: int | None, block_tokens: int, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner.packing.tree_attention, "BLOCK_TOKENS", block_tokens)
    pack, tree = forest()
    tree = replace(tree, is_long=is_long)
    query, key, value = torch.randn(3, 1, 4, pack.num_tokens, 8, dtype=torch.float64, requires_grad=True).unbind()
    key, value = key[:, :2], value[:, :2]  # two query heads share a key head
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    output, _ = tree_attention(module, query, key, value, None, tree=tree, sliding_window=window, scaling=0.3)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(2, dim=1),
        value.repeat_interleave(2, dim=1),
        attn_mask=expected_visibility(pack, window),
        scale=0.3,
    ).transpose(1, 2)
    torch.testing.assert_close(output, dense)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad((output * weights).sum(), (query, key, value))
    expected = torch.autograd.grad((dense * weights).sum(), (query, key, value))
    for gradient, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize("window", [None, 3])
def test_in_16_bits_blocks_attend_as_one_dense_mask_does_in_64(window: int | None) -> None:
    """Written out as products there: outputs and gradients are off by what 8 bits of a mantissa round away."""
    pack, tree = forest()
    half = torch.randn(3, 1, 4, pack.num_tokens, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    query, key, value = half.requires_grad_().unbind()
    module = torch.nn.Module()
    output, _ = tree_attention(module, query, key[:, :2], value[:, :2], None, tree=tree, sliding_window=window)
    exact_query, exact_key, exact_value = half.detach().double().requires_grad_().unbind()
    exact = torch.nn.functional.scaled_dot_product_attention(
        exact_query,
        exact_key[:, :2].repeat_interleave(2, dim=1),
        exact_value[:, :2].repeat_interleave(2, dim=1),
        attn_mask=expected_visibility(pack, window),
    ).transpose(1, 2)
    assert far_apart(output, exact) < 0.01
    gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    expected = torch.autograd.grad(exact.square().sum(), (exact_query, exact_key, exact_value))
    for gradient, plain in zip(gradients, expected, strict=True):
        assert far_apart(gradient, plain) < 0.02


def far_apart(rough: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference, relative to the exact one's."""
    return ((rough.double() - exact).norm() / exact.norm()).item()


def test_keys_of_other_trees_and_ended_branches_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner.packing.tree_attention, "BLOCK_TOKENS", 10)
    rows = [ScoredSequence((tree, *range(100, 109)), (Span(1, 2),), owner=tree) for tree in range(50)]
    [pack] = pack_sequences(rows, token_budget=500)
    tree = Tree(torch.from_numpy(pack.subtree_ends), torch.from_numpy(pack.depths))
    assert [block.mask.numel() for block in tree.blocks(None, torch.float32)] == [100] * 50


def test_in_a_long_pack_masks_grow_with_its_tokens_and_nothing_is_copied_where_it_lies_in_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner.packing.tree_attention, "BLOCK_TOKENS", 10)
    ends, depths = torch.full((1000,), 1000), torch.arange(1000)
    blocks = Tree(ends, depths, is_long=True).blocks(None, torch.float32)
    assert [block.mask.numel() for block in blocks] == [100] * 100
    assert [block.keys for block in blocks] == [slice(0, 10 * number) for number in range(1, 101)]
    assert sum(block.mask.numel() for block in Tree(ends, depths).blocks(None, torch.float32)) > 500_000


@pytest.mark.parametrize("window", [None, 3, 1000])
def test_flex_attention_is_given_the_same_mask(window: int | None) -> None:
    """The kernel needs CUDA, its mask does not: tiles it skips are unseen, tiles it does not look into are all seen."""
    draw = random.Random(1)
    stem = tuple(draw.randrange(9) for _ in range(400))
    rows = [ScoredSequence(stem[:length] + (9,) * 90, (Span(1, 2),), owner=length) for length in (20, 300, 400)]
    [pack] = pack_sequences([*rows, ScoredSequence((8, 8), (Span(1, 2),), owner="other")], token_budget=10_000)
    tree = Tree(torch.from_numpy(pack.subtree_ends), torch.from_numpy(pack.depths))
    expected, positions = expected_visibility(pack, window), torch.arange(pack.num_tokens)
    mask = tree.block_mask(window)
    sees = mask.mask_mod(torch.tensor(0), torch.tensor(0), positions[:, None], positions[None, :])
    assert torch.equal(sees, expected)
    tiles = expected.new_zeros(len(positions), len(positions))
    for query in range(0, len(positions), 128):
        for key in range(0, len(positions), 128):
            tile = slice(query, query + 128), slice(key, key + 128)
            if key // 128 in listed(mask.full_kv_num_blocks, mask.full_kv_indices, query // 128):
                assert expected[tile].all()
                tiles[tile] = True
            elif key // 128 in listed(mask.kv_num_blocks, mask.kv_indices, query // 128):
                tiles[tile] = True
    assert not (expected & ~tiles).any()
    assert mask.full_kv_num_blocks is not None
    assert bool(mask.full_kv_num_blocks.sum()) == (window != 3)
    assert tiles.float().mean() < 0.6  # it does skip


def listed(counts: torch.Tensor | None, indices: torch.Tensor | None, query_tile: int) -> list[int]:
    assert counts is not None
    assert indices is not None
    return indices[0, 0, query_tile, : counts[0, 0, query_tile]].tolist()


def test_masks_are_made_once_for_all_layers() -> None:
    _, tree = forest()
    assert tree.blocks(3, torch.float32) is tree.blocks(3, torch.float32)
    assert tree.blocks(3, torch.float32) is not tree.blocks(None, torch.float32)


def test_without_a_tree_the_network_answers_as_with_sdpa() -> None:
    """Also for left-padded batches, which a causal kernel alone would get wrong."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, use_sliding_window=True, sliding_window=3, max_window_layers=1,
    )  # fmt: skip
    network = Qwen2ForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    batch["attention_mask"][0, :4] = 0
    with torch.no_grad():
        network.set_attn_implementation("sdpa")
        expected = network(**batch).logits
        network.set_attn_implementation(TREE_ATTENTION)
        torch.testing.assert_close(network(**batch).logits, expected)
