"""Small random networks and adapters for tests of the embedded engine, and what transformers and PEFT say of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from policies.types import Adapter, SampledToken, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine

VOCAB_SIZE = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW: dict[str, Any] = {"sliding_window": 12}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-window": lambda: Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, **WINDOW),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, **WINDOW, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
}


def make_network(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)  # sharper distributions: a wrong mask or position shows in the logprobs
    network.save_pretrained(folder)
    return folder


def make_adapter(network_folder: Path, folder: Path, version: int, **options: Any) -> Adapter:
    torch.manual_seed(version)
    network = AutoModelForCausalLM.from_pretrained(network_folder)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    peft_model = get_peft_model(network, LoraConfig(**options))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    peft_model.save_pretrained(str(folder))
    return Adapter(f"agent-v{version:04d}", version, folder, options["r"], None, "0" * 64)


@asynccontextmanager
async def engine_on(folder: Path, *adapters: Adapter, **options: Any) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(folder, device="cpu", num_threads=1, **options)
    try:
        for adapter in adapters:
            await engine.load_adapter(adapter)
        yield engine
    finally:
        await engine.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB_SIZE), k=length)


async def complete(
    engine: EmbeddedEngine, prompt: list[int], sampling: SamplingParams, adapter: Adapter | None = None
) -> list[SampledToken]:
    return [token async for token in engine.generate(prompt, sampling, adapter)]


def ids_of(tokens: list[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


@torch.no_grad()
def plain_logprobs(folder: Path, adapter: Adapter | None, prompt: list[int], completion: list[int]) -> list[float]:
    """What transformers and PEFT say of a completion, in one forward without a cache."""
    network: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        network = PeftModel.from_pretrained(network, str(adapter.path)).eval()
    logits = network(input_ids=torch.tensor([prompt + completion])).logits[0]
    logprobs = torch.log_softmax(logits.float(), dim=-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def assert_as_plain(folder: Path, adapter: Adapter | None, prompt: list[int], tokens: list[SampledToken]) -> None:
    expected = plain_logprobs(folder, adapter, prompt, ids_of(tokens))
    assert [token.logprob for token in tokens] == pytest.approx(expected, abs=1e-4)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the engine's health is polled, by design
            await asyncio.sleep(0.001)


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change every tensor of an adapter's weights file."""
    file = folder / "adapter_model.safetensors"
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, file)
