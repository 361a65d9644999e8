"""Adapters of a network as PEFT writes them, and what transformers and PEFT say: the reference of these tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from policies.adapters.base_network import read_base_network
from policies.adapters.files import WEIGHTS_FILE, weights_digest
from policies.adapters.probe import write_probe
from policies.types import Adapter, Engine, SampledToken, SamplingParams
from runtime.engines.vllm.engine import VllmEngine
from tests.tiny_adapters import randomise_lora, true_probe

TOLERANCE = 1e-3
"""Nats. What float32 on two different attention kernels may differ by."""

RANK = 4
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class NoviceAdapters:
    """Adapters by version, each made once, of one base network."""

    def __init__(self, model_folder: Path, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model_folder, self.folder = model_folder, folder
        self.network = read_base_network(model_folder)
        self.vocab_size: int = self.network_of(None).config.vocab_size

    def adapter(self, version: int, **settings: Any) -> Adapter:
        """Even versions change every linear layer, odd ones a part of them."""
        path = self.folder / f"agent-v{version:04d}"
        if not path.exists():
            modules = ALL_LINEAR if version % 2 == 0 else ["q_proj", "v_proj", "down_proj"]
            self.write(path, version, **{"target_modules": modules, **settings})
        return Adapter(path.name, version, path, settings.get("r", RANK), None, weights_digest(path))

    def write(self, path: Path, seed: int, **settings: Any) -> None:
        config = LoraConfig(**{"r": RANK, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.model_folder), config)
        randomise_lora(model, seed)
        model.save_pretrained(str(path))
        write_probe(path, true_probe(model, self.network.fingerprint))

    def network_of(self, adapter: Adapter | None) -> Any:
        network: Any = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=torch.float32)
        if adapter is not None:
            network = PeftModel.from_pretrained(network, str(adapter.path))
        return network.eval()

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        return random.Random(seed).choices(range(self.vocab_size), k=length)

    def expect(self, adapter: Adapter | None, prompt: Sequence[int], tokens: Sequence[SampledToken]) -> None:
        """Every sampled token has the logprob that transformers and PEFT give it."""
        expected = self.logprobs(adapter, prompt, ids_of(tokens))
        chosen = expected.gather(1, torch.tensor(ids_of(tokens))[:, None])[:, 0].tolist()
        assert [token.logprob for token in tokens] == pytest.approx(chosen, abs=TOLERANCE)

    def expect_likeliest(self, adapter: Adapter | None, prompt: Sequence[int], tokens: Sequence[SampledToken]) -> None:
        """Every sampled token is the reference's own greedy choice, or as good as it: two kernels break ties apart."""
        expected = self.logprobs(adapter, prompt, ids_of(tokens))
        chosen = expected.gather(1, torch.tensor(ids_of(tokens))[:, None])[:, 0]
        assert float((expected.max(dim=-1).values - chosen).max()) <= TOLERANCE

    @torch.no_grad()
    def logprobs(self, adapter: Adapter | None, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
        """(completion, vocabulary) of float: one forward pass without a cache."""
        logits = self.network_of(adapter)(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)[len(prompt) - 1 : -1]

    def greedy(self, adapter: Adapter | None, prompt: Sequence[int], num_tokens: int) -> list[int]:
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        ids = self.network_of(adapter).generate(input_ids=torch.tensor([list(prompt)]), **options, eos_token_id=None)
        return ids[0, len(prompt) :].tolist()


@asynccontextmanager
async def engine_on(folder: Path, **options: Any) -> AsyncIterator[VllmEngine]:
    engine = await VllmEngine.start(folder, num_threads=1, **options)
    try:
        yield engine
    finally:
        await engine.close()


async def complete(
    engine: Engine, prompt: Sequence[int], sampling: SamplingParams, adapter: Adapter | None = None
) -> list[SampledToken]:
    return [token async for token in engine.generate(prompt, sampling, adapter)]


def ids_of(tokens: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def rewrite(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change every tensor of an adapter's weights file."""
    file = folder / WEIGHTS_FILE
    save_file({name: change(tensor).contiguous() for name, tensor in load_file(file).items()}, file)


async def until(is_so: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)
