"""Tokens per second of the embedded engine beside transformers: `generate` one by one, `generate` in static batches,
and continuous batching (`ContinuousBatchingManager`, which `generate_batch` runs on); and beside vLLM where that is
installed, for a network of `--model`, which has the tokenizer that vLLM wants.

All do equal work: the same prompts (40-200 tokens) and the same forced completion lengths (8-128 tokens), sampled at
temperature 1. They take turns in every repeat, so that a slow moment of the machine meets them all. Static batches
group the requests by arrival; as many requests as `concurrency` are in flight for the others. The network is a
random-weight Qwen2 (3 layers, hidden 128, vocabulary 1000, float32), or that of `--model`, in the numbers that our
engine chooses for it, one thread. Peers serve adapters as PEFT loads
them, not merged. Rows of mixed adapters go through PEFT's `adapter_names` in static batches; continuous batching packs
all rows into one, where those names have no place, so it runs a manager for each adapter side by side.

Run: python -m benchmarks.embedded_engine [--model FOLDER] [--rows base,adapter,mixed] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen2Config
from transformers.utils import logging as transformers_logging

from policies.types import Adapter, Engine, SamplingParams
from runtime.engines.embedded.engine import EmbeddedEngine
from runtime.engines.embedded.precision import Precision, choose_dtype

VOCAB_SIZE = 1000
"""Prompts are drawn from so many tokens; every network that is measured has them."""
NUM_REQUESTS = {1: 4, 8: 16, 32: 64}
"""By concurrency: enough for two rounds of static batches."""
MAX_CONTEXT_TOKENS = 512
ADAPTERS = {"base": 0, "adapter": 1, "mixed": 3}
"""How many adapters the rows use in turn; mixed rows are base too."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request: `adapter` counts from 0, None is the base."""

    prompt_token_ids: list[int]
    num_tokens: int
    adapter: int | None


LoadNetwork = Callable[[], Any]
"""A fresh copy of the network, as transformers loads it."""

Contestant = Callable[[Sequence[Work], int], None]
"""Serves all the work, with at most so many requests at once."""


def draw_work(seed: int, concurrency: int, adapters: str) -> list[Work]:
    draw = random.Random(f"{seed}/{concurrency}/{adapters}")
    choices = {"base": [None], "adapter": [0], "mixed": [None, 0, 1, 2]}[adapters]
    return [
        Work(draw.choices(range(VOCAB_SIZE), k=draw.randint(40, 200)), draw.randint(8, 128), choices[i % len(choices)])
        for i in range(NUM_REQUESTS[concurrency])
    ]


# ------------------------------------------------------------------------------------------- what is compared


class OurEngine:
    """An engine of ours, through its public interface, on an event loop as in the server."""

    def __init__(self, start: Callable[[], Awaitable[Engine]], adapters: Sequence[Adapter]) -> None:
        self._loop = asyncio.new_event_loop()
        self._engine = self._loop.run_until_complete(start())
        self._adapters = adapters
        for adapter in adapters:
            self._loop.run_until_complete(self._engine.load_adapter(adapter))

    def __call__(self, work: Sequence[Work], concurrency: int) -> None:
        self._loop.run_until_complete(self._serve(iter(work), concurrency))

    async def _serve(self, work: Iterator[Work], concurrency: int) -> None:
        await asyncio.gather(*(self._client(work) for _ in range(concurrency)))

    async def _client(self, work: Iterator[Work]) -> None:
        for one in work:
            adapter = None if one.adapter is None else self._adapters[one.adapter]
            sampling = SamplingParams(max_tokens=one.num_tokens)
            tokens = [token async for token in self._engine.generate(one.prompt_token_ids, sampling, adapter)]
            assert len(tokens) == one.num_tokens

    def close(self) -> None:
        self._loop.run_until_complete(self._engine.close())
        self._loop.close()


async def embedded(folder: Path, precision: Precision) -> Engine:
    return EmbeddedEngine(
        folder, num_threads=1, device="cpu", max_context_tokens=MAX_CONTEXT_TOKENS, precision=precision
    )


async def vllm_on_cpu(folder: Path, precision: Precision) -> Engine:
    from runtime.engines.vllm.engine import VllmEngine

    return await VllmEngine.start(
        folder, num_threads=1, max_context_tokens=MAX_CONTEXT_TOKENS, engine_args={"dtype": precision}
    )


class Static:
    """`generate` in batches of the concurrency, padded on the left; all rows run as long as the longest."""

    def __init__(self, load: LoadNetwork, adapters: Sequence[Adapter]) -> None:
        self._base = load()
        self._peft: Any = with_adapters(load(), adapters) if adapters else None

    @torch.inference_mode()
    def __call__(self, work: Sequence[Work], concurrency: int) -> None:
        for start in range(0, len(work), concurrency):
            self._batch(work[start : start + concurrency])

    def _batch(self, works: Sequence[Work]) -> None:
        width = max(len(work.prompt_token_ids) for work in works)
        pads = [width - len(work.prompt_token_ids) for work in works]
        length = max(work.num_tokens for work in works)
        self._network_for(works)(
            input_ids=torch.tensor([[0] * pad + work.prompt_token_ids for pad, work in zip(pads, works, strict=True)]),
            attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
            generation_config=sampling_config(max_new_tokens=length, min_new_tokens=length),
        )

    def _network_for(self, works: Sequence[Work]) -> Callable[..., Any]:
        used = {work.adapter for work in works}
        if used == {None}:
            return self._base.generate
        if len(used) == 1:
            return self._peft.generate  # adapter 0 is the active one
        names = ["__base__" if work.adapter is None else str(work.adapter) for work in works]
        return lambda **inputs: self._peft.generate(**inputs, adapter_names=names)


class OneByOne(Static):
    def __call__(self, work: Sequence[Work], concurrency: int) -> None:
        super().__call__(work, 1)


class Continuous:
    """transformers' continuous batching, a manager for each adapter; they are started before the clock is."""

    def __init__(self, load: LoadNetwork, adapters: Sequence[Adapter]) -> None:
        self._networks: dict[int | None, Any] = {None: load()}
        for number, adapter in enumerate(adapters):
            peft_model = with_adapters(load(), [adapter])
            self._networks[number] = peft_model.get_base_model()
        self._managers: dict[tuple[int | None, int], Any] = {}

    def __call__(self, work: Sequence[Work], concurrency: int) -> None:
        adapters = dict.fromkeys(one.adapter for one in work)
        managers = {adapter: self._manager(adapter, concurrency // len(adapters)) for adapter in adapters}
        wanted: dict[int | None, dict[str, int]] = {adapter: {} for adapter in adapters}
        for one in work:
            request_id = managers[one.adapter].add_request(one.prompt_token_ids, max_new_tokens=one.num_tokens)
            wanted[one.adapter][request_id] = one.num_tokens
        for adapter, manager in managers.items():
            self._collect(manager, wanted[adapter])

    def _collect(self, manager: Any, wanted: dict[str, int]) -> None:
        while wanted:
            result = manager.get_result(timeout=30)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == wanted.pop(result.request_id)

    def _manager(self, adapter: int | None, concurrency: int) -> Any:
        key = (adapter, concurrency)
        if key not in self._managers:
            config = ContinuousBatchingConfig(
                page_size=32, num_blocks=512, max_batch_tokens=1024, max_requests_per_batch=concurrency
            )
            manager: Any = self._networks[adapter].init_continuous_batching(
                generation_config=sampling_config(max_new_tokens=128), continuous_batching_config=config
            )
            manager.start()
            self._managers[key] = manager
        return self._managers[key]

    def close(self) -> None:
        for manager in self._managers.values():
            manager.stop(block=True)


def sampling_config(**lengths: int) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, pad_token_id=0, eos_token_id=-1, **lengths)


def with_adapters(network: Any, adapters: Sequence[Adapter]) -> Any:
    peft_model = PeftModel.from_pretrained(network, str(adapters[0].path), adapter_name="0")
    for i, adapter in enumerate(adapters[1:], start=1):
        peft_model.load_adapter(str(adapter.path), adapter_name=str(i))
    return peft_model.eval()


# ------------------------------------------------------------------------------------------------ the network


def make_network(folder: Path) -> Path:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_adapter(network_folder: Path, folder: Path, version: int) -> Adapter:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    network = AutoModelForCausalLM.from_pretrained(network_folder)
    peft_model = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules=modules))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft_model.save_pretrained(str(folder))
    return Adapter(f"agent-v{version:04d}", version, folder, 16, None, "")


# ----------------------------------------------------------------------------------------------- the measuring

Rates = dict[tuple[str, int, str], list[float]]
"""Tokens/s of each repeat, by (adapters, concurrency, contestant)."""


def measure(
    contestants: dict[str, Contestant], kinds: Sequence[str], concurrencies: Sequence[int], repeats: int
) -> Rates:
    """All contestants in turn on the same work, which is fresh in every repeat: no cache knows its prompts."""
    rates: Rates = {}
    for seed in range(-1, repeats):  # -1 warms up
        for adapters in kinds:
            for concurrency in concurrencies:
                work = draw_work(seed, concurrency, adapters)
                for name, contestant in contestants.items():
                    if not is_entered(name, concurrency, adapters):
                        continue
                    rate = tokens_per_second(contestant, work[:2] if seed < 0 else work, concurrency)
                    if seed >= 0:
                        rates.setdefault((adapters, concurrency, name), []).append(rate)
                        print(f"{adapters}, {concurrency} at once, {name}: {rate:.1f} tokens/s", file=sys.stderr)
    return rates


def is_entered(name: str, concurrency: int, adapters: str) -> bool:
    if adapters == "mixed":
        return concurrency == 32 and name != "one by one"
    return concurrency == 1 if name == "one by one" else not (name == "static" and concurrency == 1)


def tokens_per_second(contestant: Contestant, work: Sequence[Work], concurrency: int) -> float:
    start = time.perf_counter()
    contestant(work, concurrency)
    return sum(one.num_tokens for one in work) / (time.perf_counter() - start)


def print_table(rates: Rates, names: Sequence[str]) -> None:
    print("tokens/s: median of the repeats (least-most)\n")
    print(f"{'rows':<8} {'at once':>7}  " + "".join(f"{name:<22}" for name in names))
    for adapters in ADAPTERS:
        for concurrency in NUM_REQUESTS:
            cells = [rates.get((adapters, concurrency, name)) for name in names]
            if any(cells):
                print(f"{adapters:<8} {concurrency:>7}  " + "".join(f"{cell_text(cell):<22}" for cell in cells))


def cell_text(rates: list[float] | None) -> str:
    return f"{statistics.median(rates):6.0f} ({min(rates):.0f}-{max(rates):.0f})" if rates else "     -"


def print_goals(rates: Rates) -> None:
    """Ratios within a repeat, then the median: what slowed the machine slowed both."""
    print()
    for adapters in ADAPTERS:
        for factor, concurrency, peer, peer_concurrency in (
            (3.0, 8, "one by one", 1),
            (1.2, 32, "static", 32),
            (1.5, 32, "continuous", 32),
        ):
            if not {(adapters, concurrency, "embedded"), (adapters, peer_concurrency, peer)} <= rates.keys():
                continue
            ours, theirs = rates[adapters, concurrency, "embedded"], rates[adapters, peer_concurrency, peer]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            verdict = "met" if ratio >= factor else "MISSED"
            print(f"goal {verdict}: {adapters} at {concurrency}: {ratio:.2f}x {peer} (wanted {factor}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description="The embedded engine beside transformers, in tokens/s.")
    parser.add_argument("--model", type=Path, help="a network's folder; default: a small one with random weights")
    parser.add_argument("--rows", default=",".join(ADAPTERS), help="kinds of rows to measure, separated by commas")
    parser.add_argument("--precision", default="auto", choices=get_args(Precision))
    parser.add_argument("--at-once", type=int, nargs="+", default=list(NUM_REQUESTS), choices=NUM_REQUESTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write every repeat's tokens/s to this file")
    options = parser.parse_args()
    kinds = options.rows.split(",")
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        network = options.model or make_network(Path(folder) / "network")
        dtype = choose_dtype(network, options.precision, "cpu")
        precision: Precision = "bfloat16" if dtype == torch.bfloat16 else "float32"
        versions = range(1, 1 + max(ADAPTERS[kind] for kind in kinds))
        adapters = [make_adapter(network, Path(folder) / str(version), version) for version in versions]

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(network, dtype=dtype).eval()

        continuous = Continuous(load, adapters)
        engines = {"embedded": OurEngine(partial(embedded, network, precision), adapters)}
        if options.model and find_spec("vllm"):
            engines["vLLM"] = OurEngine(partial(vllm_on_cpu, network, precision), adapters)
        contestants: dict[str, Contestant] = {
            "one by one": OneByOne(load, adapters),
            "static": Static(load, adapters),
            "continuous": continuous,
            **engines,
        }
        print(f"{network.name}, {precision}")
        rates = measure(contestants, kinds, options.at_once, options.repeats)
        for engine in engines.values():
            engine.close()
        continuous.close()
    print_table(rates, list(contestants))
    print_goals(rates)
    if options.json:
        rows = [{"rows": a, "at_once": c, "name": n, "tokens_per_second": r} for (a, c, n), r in rates.items()]
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
