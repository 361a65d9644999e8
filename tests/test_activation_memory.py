"""A layer that is computed again gives the same gradient from less memory, and it is done where memory asks for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

import learner.training.activation_memory
from learner.packing.prefix_tree import ScoredSequence, Span, pack_sequences
from learner.packing.scoring import score, to_batch
from learner.packing.tree_attention import TREE_ATTENTION
from learner.training.activation_memory import activation_bytes, fits, layers_computed_again
from learner.training.trainer import fresh_lora
from tests.small_networks import CONFIGS, make_network, prompt_of

torch.set_num_threads(1)


def adapted(name: str, folder: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(
        make_network(CONFIGS[name](), folder), attn_implementation=TREE_ATTENTION
    )
    return get_peft_model(network, fresh_lora(4)).eval()


def kept_bytes_and_gradients(network: Any, how: Any, num_tokens: int) -> tuple[int, list[Tensor]]:
    """What a pass keeps for its gradient, its weights aside, and the gradient."""
    kept: dict[int, int] = {}
    weights = {weight.data_ptr() for weight in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    (pack,) = pack_sequences(
        [ScoredSequence(tuple(prompt_of(num_tokens)), (Span(num_tokens // 2, num_tokens),), "one")], num_tokens
    )
    with how, saved_tensors_hooks(note, lambda tensor: tensor):
        loss = -score(network, to_batch(pack, "cpu")).tokens.sum()
    network.zero_grad()
    loss.backward()
    return sum(kept.values()), [weight.grad.clone() for weight in network.parameters() if weight.requires_grad]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradient_is_the_same_from_less_memory(name: str, tmp_path: Path) -> None:
    network = adapted(name, tmp_path / "network")
    kept, expected = kept_bytes_and_gradients(network, nullcontext(), 200)
    kept_again, gradients = kept_bytes_and_gradients(network, layers_computed_again(network), 200)
    for gradient, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain)
    assert kept_again < kept / 3
    assert not network.training
    assert not any(module.training for module in network.modules()), "no dropout is left on"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_the_estimate_is_near_what_a_pass_keeps(name: str, tmp_path: Path) -> None:
    network = adapted(name, tmp_path / "network")
    kept = [kept_bytes_and_gradients(network, nullcontext(), num_tokens)[0] for num_tokens in (100, 300)]
    measured = (kept[1] - kept[0]) / 200
    assert 0.5 < activation_bytes(network.config, 1) / measured < 2.0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"bytes": 0}
    monkeypatch.setattr(learner.training.activation_memory, "free_bytes", lambda: found["bytes"])
    return found


def test_what_fits_is_kept(free: dict[str, int], tmp_path: Path) -> None:
    config, device = adapted("llama", tmp_path / "network").config, torch.device("cpu")
    free["bytes"] = 4 * activation_bytes(config, 100)
    assert fits(config, 200, device)
    assert not fits(config, 201, device)
