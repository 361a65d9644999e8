"""The proof beside an adapter: read with cached keys, it says what plain forward passes say, for every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.packing.tree_attention import TREE_ATTENTION
from learner.training.probing import NUM_TOKENS, make_probe
from policies.adapters.probe import Probe
from policies.types import TokenIds
from tests.small_networks import CONFIGS, make_network, prompt_of
from tests.tiny_adapters import randomise_lora

SHARED = tuple(prompt_of(30))
PROMPTS: list[TokenIds] = [
    (*SHARED, *prompt_of(9, 1)),
    tuple(prompt_of(5, 2)),
    (*SHARED, *prompt_of(9, 1), *prompt_of(12, 3)),
    SHARED,
    (*SHARED, *prompt_of(2, 4)),
]


def adapted(folder: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=TREE_ATTENTION)
    peft_model = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise_lora(peft_model, 1)
    return peft_model.eval()


@torch.no_grad()
def plain(network: Any, token_ids: list[int]) -> Tensor:
    return network(torch.tensor([token_ids])).logits[0, -1].float().log_softmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_probe_says_what_plain_passes_say(name: str, tmp_path: Path) -> None:
    network = adapted(make_network(CONFIGS[name](), tmp_path / "network"))
    probe: Probe = make_probe(network, "base", PROMPTS)
    assert {each.prompt_token_ids for each in probe.prompts} <= set(PROMPTS)
    for prompt in probe.prompts:
        token_ids = list(prompt.prompt_token_ids)
        assert len(prompt.continuation) == NUM_TOKENS
        for likeliest in prompt.continuation:
            adapter = plain(network, token_ids)
            with network.disable_adapter():
                base = plain(network, token_ids)
            assert likeliest[0].token_id == int(adapter.argmax())
            ids = [token.token_id for token in likeliest]
            assert [token.adapter_logprob for token in likeliest] == pytest.approx(adapter[ids].tolist(), abs=2e-4)
            assert [token.base_logprob for token in likeliest] == pytest.approx(base[ids].tolist(), abs=2e-4)
            token_ids.append(ids[0])


def test_what_prompts_share_is_read_once(tmp_path: Path) -> None:
    network = adapted(make_network(CONFIGS["llama"](), tmp_path / "network"))
    seen: list[int] = []
    network.get_base_model().get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel() if "input_ids" in kwargs else args[0].numel()),
        with_kwargs=True,
    )
    make_probe(network, "base", PROMPTS)
    shared = [prompt for prompt in PROMPTS if prompt[: len(SHARED)] == SHARED]
    unshared = sum(map(len, PROMPTS)) - (len(shared) - 1) * len(SHARED)
    assert sum(seen) <= 2 * (unshared + NUM_TOKENS * len(PROMPTS))
