"""A client that drives a world's tasks through a served endpoint and reports how they ended.

    python -m learner.practice --episodes 100

It runs the tools itself, like any client with tools of its own: the server needs to know nothing of the world. Each
outcome is reported back, so that the log tells which episodes went well.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool
from openai import AsyncOpenAI, OpenAIError
from tqdm import tqdm

from learner.api_key import add_key_options, api_key
from tools.worlds import WORLDS, load_world
from tools.worlds.world import Task, World

MAX_STEPS = 16


@dataclass(frozen=True, slots=True)
class Attempt:
    """One task, tried once through the endpoint."""

    task_id: str
    episode_id: str
    """The server's name for it; empty where no answer came."""
    outcome: float
    num_steps: int
    num_malformed: int
    error: str = ""
    """Why no outcome was reached; empty where one was."""


@dataclass(frozen=True, slots=True)
class PracticeOptions:
    """How tasks are tried."""

    model: str = ""
    """The served name, or an adapter's name to pin it; empty takes the first that the server lists."""
    temperature: float = 1.0
    purpose: str = "practice"
    """`practice` is learned from, `evaluation` is not."""
    concurrency: int = 8
    seed: int | None = None
    """Makes sampling repeatable; None draws afresh."""


async def practise(
    client: AsyncOpenAI,
    world: World,
    tasks: Sequence[Task],
    options: PracticeOptions,
    on_done: Callable[[Attempt], object] = lambda _: None,
) -> list[Attempt]:
    """Try each task once, several at a time; the attempts come in the order of the tasks."""
    model = options.model or (await client.models.list()).data[0].id
    places = asyncio.Semaphore(options.concurrency)

    async def attempt_in_turn(task: Task) -> Attempt:
        async with places:
            attempt = await _attempt(client, world, task, model, options)
            on_done(attempt)
            return attempt

    return list(await asyncio.gather(*(attempt_in_turn(task) for task in tasks)))


async def _attempt(client: AsyncOpenAI, world: World, task: Task, model: str, options: PracticeOptions) -> Attempt:
    episode = world.open(task)
    tools: Any = [convert_to_openai_tool(tool) for tool in episode.tools]
    messages: list[Any] = list(task.messages)
    metadata: Any = {"task": task.id, "purpose": options.purpose}
    episode_id, num_steps, num_malformed = "", 0, 0
    try:
        while num_steps < MAX_STEPS:
            answer = await client.chat.completions.create(
                model=model,
                messages=messages,
                tools=tools,
                temperature=options.temperature,
                seed=options.seed,
                metadata=metadata,
            )
            num_steps += 1
            step = (answer.model_extra or {})["stepagent"]["choices"][0][0]
            episode_id = step["episode_id"]
            num_malformed += "problem" in step
            message = answer.choices[0].message
            if not message.tool_calls:
                break
            messages.append({"role": "assistant", "content": message.content, "tool_calls": _calls(message)})
            messages.extend(episode.play(messages[-1]))
        await _report(client, episode_id, episode.outcome())
    except OpenAIError as error:
        if getattr(error, "code", None) == "context_length_exceeded":  # it went round in circles: its own failure
            return Attempt(task.id, episode_id, 0.0, num_steps, num_malformed)
        return Attempt(task.id, episode_id, 0.0, num_steps, num_malformed, str(error))
    return Attempt(task.id, episode_id, episode.outcome(), num_steps, num_malformed)


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call.model_dump(exclude_none=True) for call in message.tool_calls]


async def _report(client: AsyncOpenAI, episode_id: str, outcome: float) -> None:
    body = {"value": outcome, "source": "world"}
    await client.post(f"/episodes/{episode_id}/outcome", cast_to=object, body=body)


def success_interval(num_successes: float, num_tries: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % score interval of a success rate (Wilson 1927)."""
    if num_tries == 0:
        return 0.0, 1.0
    rate = num_successes / num_tries
    centre = rate + z * z / (2 * num_tries)
    spread = z * sqrt(rate * (1 - rate) / num_tries + z * z / (4 * num_tries * num_tries))
    scale = 1 + z * z / num_tries
    return (centre - spread) / scale, (centre + spread) / scale


def summary(attempts: Sequence[Attempt]) -> str:
    """One line: the success rate with its interval, and what went wrong."""
    finished = [attempt for attempt in attempts if not attempt.error]
    successes = sum(attempt.outcome for attempt in finished)
    low, high = success_interval(successes, len(finished))
    rate = successes / max(1, len(finished))
    malformed = sum(attempt.num_malformed for attempt in finished)
    line = f"success {rate:.1%} (95 % interval {low:.1%} to {high:.1%}) of {len(finished)} episodes"
    line += f", {malformed} malformed actions" if malformed else ""
    failed = [attempt for attempt in attempts if attempt.error]
    return line + (f", {len(failed)} failed requests, the first: {failed[0].error}" if failed else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m learner.practice", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--url", default=os.environ.get("STEPAGENT_URL", "http://127.0.0.1:8000/v1"), help="the endpoint"
    )
    add_key_options(parser)
    parser.add_argument("--world", default="order_desk", choices=sorted(WORLDS))
    parser.add_argument("--split", default="train", choices=("train", "validation", "heldout"))
    parser.add_argument("--episodes", type=int, default=100, help="how many tasks")
    parser.add_argument("--first", type=int, default=0, help="index of the first task")
    parser.add_argument(
        "--model", default="", help="served name, or an adapter's name to pin it; default: the acting one"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=None)
    return parser.parse_args()


async def _main(arguments: argparse.Namespace) -> int:
    world = load_world(arguments.world)
    size = world.splits[arguments.split]
    tasks = [world.task(arguments.split, (arguments.first + number) % size) for number in range(arguments.episodes)]
    # Only the training split is learned from; what reporting is done on must stay unseen.
    purpose = "practice" if arguments.split == "train" else "evaluation"
    options = PracticeOptions(arguments.model, arguments.temperature, purpose, arguments.concurrency, arguments.seed)
    client = AsyncOpenAI(base_url=arguments.url, api_key=api_key(arguments), max_retries=1)
    try:
        with tqdm(total=len(tasks), unit="episode") as bar:
            attempts = await practise(client, world, tasks, options, lambda _: bar.update())
    except OpenAIError as error:
        print(f"no answer from {arguments.url}: {error}; is the server up?")
        return 1
    print(summary(attempts))
    return 0 if not any(attempt.error for attempt in attempts) else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(_main(_arguments())))
