"""What an inspection asks of the embedded engine: states per minute, prompt tokens spared, memory.

An expert's orders at the order desk; at every state of each the policy is sampled `--samples` times, as a learning
cycle does through the endpoint. All prompts begin with the same tools and rules, and the states of one order extend
each other.

Run: python -m benchmarks.inspection_load --model FOLDER [--demonstrations 24] [--max-tokens 48] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from langchain_core.utils.function_calling import convert_to_openai_tool

from benchmarks.figures import memory_mib
from policies.chat.chat_protocol import ChatProtocol
from policies.types import SamplingParams, TokenIds
from runtime.engines.embedded.engine import EmbeddedEngine
from tools.worlds.order_desk import OrderDesk

WORLD = OrderDesk()


def states_of(protocol: ChatProtocol, num_demonstrations: int) -> list[TokenIds]:
    """The prompt at every state of so many orders, in the order in which an inspection asks."""
    return [prompt for index in range(num_demonstrations) for prompt in states_of_order(protocol, index)]


def states_of_order(protocol: ChatProtocol, index: int) -> Iterator[TokenIds]:
    task = WORLD.task("train", index)
    episode, messages = WORLD.open(task), list(task.messages)
    tools = [convert_to_openai_tool(tool) for tool in episode.tools]
    while not episode.is_done:
        yield protocol.render(messages, tools)
        action = episode.expert_action()
        messages += [action, *episode.play(action)]


async def inspect(engine: EmbeddedEngine, prompts: Sequence[TokenIds], options: argparse.Namespace, ends: TokenIds):
    """Sample at every state, `--states-at-once` at a time; how many tokens were written."""
    places = asyncio.Semaphore(options.states_at_once)

    async def sample(prompt: TokenIds, seed: int) -> int:
        sampling = SamplingParams(max_tokens=options.max_tokens, seed=seed, stop_token_ids=ends)
        return len([token async for token in engine.generate(prompt, sampling, None)])

    async def inspect_state(prompt: TokenIds) -> int:
        async with places:
            return sum(await asyncio.gather(*(sample(prompt, seed) for seed in range(options.samples))))

    return sum(await asyncio.gather(*map(inspect_state, prompts)))


async def measure(options: argparse.Namespace) -> dict[str, float]:
    protocol = ChatProtocol.load(options.model)
    prompts = states_of(protocol, options.demonstrations)[: options.states]
    settings = {name: value for name in ("precision",) if (value := getattr(options, name)) is not None}
    engine = EmbeddedEngine(options.model, device="cpu", num_threads=1, **settings)
    try:
        await inspect(engine, prompts[:1], options, protocol.stop_token_ids)  # warms up; its prompt is known then
        before, began, cpu = memory_mib(), time.perf_counter(), time.process_time()
        written = await inspect(engine, prompts, options, protocol.stop_token_ids)
        seconds = time.perf_counter() - began
        return {
            "states": len(prompts),
            "prompt_tokens": options.samples * sum(map(len, prompts)),
            "computed_prompt_tokens": engine.num_prefilled_tokens,
            "written_tokens": written,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "states_per_minute": round(60 * len(prompts) / seconds, 1),
            "states_per_cpu_minute": round(60 * len(prompts) / (time.process_time() - cpu), 1),
            "resident_mib_before": round(before),
            "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
    finally:
        await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="An inspection's load on the embedded engine.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--demonstrations", type=int, default=24)
    parser.add_argument("--states", type=int, help="take the first so many states only")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--states-at-once", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--precision")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = asyncio.run(measure(options))
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<24} {value:>10,}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
