"""Tiny networks of several families, and their logprobs without packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from learner.packing.prefix_tree import ScoredSequence
from learner.packing.tree_attention import TREE_ATTENTION

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


EVERY_OTHER = ["sliding_attention", "full_attention"]


ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2_sliding": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, layer_types=EVERY_OTHER),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral_sliding": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma2": lambda: Gemma2Config(
        **SIZES, sliding_window=4, layer_types=EVERY_OTHER, query_pre_attn_scalar=8, attn_logit_softcapping=None
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=EVERY_OTHER, query_pre_attn_scalar=8),
    "gemma3_softcap": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=512, layer_types=EVERY_OTHER, final_logit_softcapping=2.0
    ),
}


def make_network(architecture: str) -> PeftModel:
    """A tiny random network with two random adapters, `policy` (active) and `other`."""
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture]()
    base = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    network = get_peft_model(base, lora, adapter_name="policy", autocast_adapter_dtype=False)
    network.add_adapter("other", lora, autocast_adapter_dtype=False)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    network.set_adapter("policy")
    return network.eval()


NETWORKS = {architecture: make_network(architecture) for architecture in ARCHITECTURES}


def plain_logprobs(network: PeftModel, row: ScoredSequence) -> Tensor:
    """The same by the book: one pass over one row, log-softmax everywhere, then the scored tokens."""
    logits = network(input_ids=torch.tensor([row.token_ids])).logits[0].to(torch.float64)
    logprobs = logits[:-1].log_softmax(-1).gather(1, torch.tensor(row.token_ids[1:])[:, None])[:, 0]
    return torch.cat([logprobs[span.start - 1 : span.stop - 1] for span in row.spans])
