"""Real PEFT adapters of a tiny random Qwen2, each with a true probe, for tests of everything that touches adapters."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from policies.adapters.base_network import read_base_network
from policies.adapters.probe import LikelyToken, Probe, ProbePrompt, read_probe, write_probe
from policies.types import SampledToken, TokenIds
from runtime.store.adapter_registry import AdapterRegistry
from tests.scripted_engine import Script

TOLERANCE = 1e-3
PROMPTS: tuple[TokenIds, ...] = ((3, 1, 4, 1, 5), (9, 2, 6), (5, 3, 5, 8, 9, 7, 9))
NUM_CONTINUED = 4
NUM_LIKELIEST = 8


class TinyNetwork:
    """A tiny base network in a folder of its own, and as many adapters of it as a test asks for."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
        )  # fmt: skip
        self.folder = folder
        self.model_folder = folder / "base"
        Qwen2ForCausalLM(config).save_pretrained(self.model_folder)
        self.network = read_base_network(self.model_folder)

    def adapter(self, seed: int) -> Path:
        """A sound adapter's folder, made once for each seed. Copy it before breaking it."""
        path = self.folder / f"adapter-{seed}"
        if not path.exists():
            self.write_adapter(path, seed)
        return path

    def copy(self, seed: int, path: Path) -> Path:
        return shutil.copytree(self.adapter(seed), path)

    def write_adapter(self, path: Path, seed: int, rank: int = 4, **settings: object) -> None:
        base = Qwen2ForCausalLM.from_pretrained(self.model_folder)
        settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 8, **settings}
        model = get_peft_model(base, LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))  # type: ignore[arg-type]
        randomise_lora(model, seed)
        model.save_pretrained(str(path))
        write_probe(path, true_probe(model, self.network.fingerprint))


def randomise_lora(model: PeftModel, seed: int) -> None:
    """Give both sides of every low-rank pair values that change what the network says."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))


def true_probe(model: PeftModel, base_fingerprint: str) -> Probe:
    """What a trainer writes down: its greedy continuations, with both networks' log probabilities along them."""
    model.eval()
    return Probe(base_fingerprint, TOLERANCE, tuple(_true_prompt(model, prompt) for prompt in PROMPTS))


@torch.no_grad()
def _true_prompt(model: PeftModel, prompt: TokenIds) -> ProbePrompt:
    token_ids, continuation = list(prompt), []
    for _ in range(NUM_CONTINUED):
        adapter = _next_logprobs(model, token_ids)
        with model.disable_adapter():
            base = _next_logprobs(model, token_ids)
        likeliest = adapter.topk(NUM_LIKELIEST).indices.tolist()
        continuation.append(tuple(LikelyToken(t, adapter[t].item(), base[t].item()) for t in likeliest))
        token_ids.append(likeliest[0])
    return ProbePrompt(prompt, tuple(continuation))


def _next_logprobs(model: PeftModel, token_ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([token_ids])).logits[0, -1].log_softmax(-1)


def faithful_script(registry: AdapterRegistry) -> Script:
    """A script that says under each adapter what that adapter's own probe says, and the same to any other prompt; under
    the base network what the newest adapter's probe says of it."""

    def say(prompt: TokenIds, name: str) -> list[int | SampledToken]:
        if name == "base":
            told = (_of_base(adapter.path, prompt) for adapter in registry.adapters()[::-1])
            return next(filter(None, told), [1, 2, 3])
        probe = read_probe(registry.adapter(name).path)
        continued = next((p for p in probe.prompts if p.prompt_token_ids == prompt), probe.prompts[0])
        return [_as_sampled(likeliest, "adapter_logprob") for likeliest in continued.continuation]

    return say


def forgetful_script(registry: AdapterRegistry) -> Script:
    """The silent failure: whatever adapter is asked for, the base network answers."""

    def say(prompt: TokenIds, name: str) -> list[int | SampledToken]:
        probe = read_probe(registry.adapter(name).path)
        continued = next(p for p in probe.prompts if p.prompt_token_ids == prompt)
        return [_as_sampled(likeliest, "base_logprob") for likeliest in continued.continuation]

    return say


def _of_base(adapter: Path, prompt: TokenIds) -> list[int | SampledToken]:
    """Nothing where its probe has not this prompt."""
    with suppress(OSError, ValueError):
        continued = next((each for each in read_probe(adapter).prompts if each.prompt_token_ids == prompt), None)
        return [_as_sampled(likeliest, "base_logprob") for likeliest in continued.continuation] if continued else []
    return []


def _as_sampled(likeliest: tuple[LikelyToken, ...], field: str) -> SampledToken:
    top = sorted(((token.token_id, getattr(token, field)) for token in likeliest), key=lambda pair: -pair[1])
    return SampledToken(*top[0], top_logprobs=tuple(top))
