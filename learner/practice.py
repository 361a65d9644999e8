"""A client that drives a world's tasks through a served endpoint and reports how they ended.

    python -m learner.practice --episodes 100

It runs the tools itself, like any client with tools of its own: the server needs to know nothing of the world. Where
the world has a user who goes on after an answer, it says what he says. Each outcome is reported back, so that the log
tells which episodes went well. With `--record FILE` a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any, TextIO, TypeVar

from openai import APIConnectionError, AsyncOpenAI, OpenAIError
from tqdm import tqdm

from learner.api_key import api_key
from learner.endpoint_url import endpoint_url
from policies.command_line import refuse_keys
from tools.ending import ending_in_time
from tools.schemas import schema_of
from tools.worlds import WORLDS, load_world
from tools.worlds.blame import blaming, outcome_of, told_by, tools_of
from tools.worlds.threads import WorldThreads
from tools.worlds.world import Message, Task, World, WorldEpisode, WorldFailed, max_steps_of, require_messages

WORLD_TIMEOUT_S = 60.0

Result = TypeVar("Result")


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
    max_tokens: int | None = None
    """Most tokens of a step; None: as many as the server lets it write."""


async def practise(
    client: AsyncOpenAI,
    world: World,
    tasks: Sequence[Task],
    options: PracticeOptions,
    on_done: Callable[[Attempt], object] = lambda _: None,
) -> list[Attempt]:
    """Try each task once, several at a time; the attempts come in the order of the tasks."""
    model = options.model or (await client.models.list()).data[0].id
    places, threads = asyncio.Semaphore(options.concurrency), WorldThreads(world.name)

    async def attempt_in_turn(task: Task) -> Attempt:
        async with places:
            attempt = await _attempt(client, world, threads, task, model, options)
            on_done(attempt)
            return attempt

    return list(await asyncio.gather(*(attempt_in_turn(task) for task in tasks)))


async def _attempt(
    client: AsyncOpenAI, world: World, threads: WorldThreads, task: Task, model: str, options: PracticeOptions
) -> Attempt:
    messages: list[Any] = []
    metadata: Any = {"task": task.id, "purpose": options.purpose}
    bound: Any = {"max_tokens": options.max_tokens} if options.max_tokens else {}
    episode_id, outcome, num_steps, num_malformed = "", 0.0, 0, 0

    async def in_world(method: str, function: Callable[..., Result], *arguments: Any) -> Result:
        return await threads.ask(partial(_blamed, world.name, method, function, *arguments), WORLD_TIMEOUT_S)

    try:
        await in_world("task", require_messages, task.messages)
        messages.extend(task.messages)
        episode = await in_world("open", world.open, task)
        tools = await in_world("tools", _tools_of, world.name, episode)
        while num_steps < max_steps_of(world):
            answer = await client.chat.completions.create(
                model=model,
                messages=messages,
                tools=tools,
                temperature=options.temperature,
                seed=step_seed(options.seed, task, num_steps),
                metadata=metadata,
                **bound,
            )
            num_steps += 1
            step = (answer.model_extra or {})["stepagent"]["choices"][0][0]
            episode_id = step["episode_id"]
            if "problem" in step:
                num_malformed += 1
                break
            messages.append(_message(answer.choices[0].message))
            told = await in_world("play", told_by, world.name, episode, messages[-1])
            if not told:
                break
            messages.extend(told)
            if told[-1]["role"] == "user":  # a new turn may bring new tools
                tools = await in_world("tools", _tools_of, world.name, episode)
        outcome = await in_world("outcome", outcome_of, world.name, episode)
        await _report(client, episode_id, outcome)
    except OpenAIError as error:
        if getattr(error, "code", None) == "context_length_exceeded":  # it went round in circles: its own failure
            return Attempt(task.id, episode_id, 0.0, num_steps, num_malformed)
        return Attempt(task.id, episode_id, 0.0, num_steps, num_malformed, str(error))
    except WorldFailed as error:
        return Attempt(task.id, episode_id, 0.0, num_steps, num_malformed, str(error))
    return Attempt(task.id, episode_id, outcome, num_steps, num_malformed)


def _blamed(world: str, method: str, function: Callable[..., Result], *arguments: Any) -> Result:
    with blaming(world, method):
        return function(*arguments)


def _tools_of(world: str, episode: WorldEpisode) -> Any:
    return [schema_of(tool) for tool in tools_of(world, episode)]


def _message(said: Any) -> Message:
    message = {"role": "assistant", "content": said.content}
    return message | {"tool_calls": _calls(said)} if said.tool_calls else message


def step_seed(seed: int | None, task: Task, num_steps: int) -> int | None:
    """Another one at every step of every task: one seed for all would give all of them the same luck."""
    if seed is None:
        return None
    return int(hashlib.sha256(f"{seed} {task.id} {num_steps}".encode()).hexdigest()[:15], 16)


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


class Record:
    """Attempts, one JSON line each, so that a run can be stopped and goes on where it was. Raises ValueError for what
    is no such file, and where another run writes it."""

    def __init__(self, path: Path, options: PracticeOptions) -> None:
        self._options = {"model": options.model, "temperature": options.temperature, "seed": options.seed}
        self._made: list[Attempt] = []
        """Those that ended with an error are left out, and tried again."""
        self._file: TextIO = path.open("a+", encoding="utf-8", newline="")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another run writes {path}: wait until it ends, or name another file") from None
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the run was ended while it wrote this line
            self._file.truncate(len("".join(lines[:-1]).encode()))
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                attempt, made_with = Attempt(**entry["attempt"]), entry["options"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number} is no attempt: {error}") from error
            if made_with == self._options and not attempt.error:
                self._made.append(attempt)

    @property
    def attempts(self) -> dict[str, Attempt]:
        """The newest by task."""
        return {attempt.task_id: attempt for attempt in self._made}

    def known_and_missing(self, tasks: Sequence[Task]) -> tuple[list[Attempt], list[Task]]:
        """Of these tasks the attempts that were made, and what is left to try: a task that is to be tried several times
        is known as often as it was tried."""
        made, known, missing = defaultdict[str, list[Attempt]](list), list[Attempt](), list[Task]()
        for attempt in reversed(self._made):
            made[attempt.task_id].append(attempt)
        for task in tasks:
            if made[task.id]:
                known.append(made[task.id].pop())
            else:
                missing.append(task)
        return known, missing

    def add(self, attempt: Attempt) -> None:
        self._file.write(json.dumps({"options": self._options, "attempt": asdict(attempt)}) + "\n")
        self._file.flush()


def _from(least: int) -> Callable[[str], int]:
    """Reads a whole number from there on."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")

    return read


def _temperature(text: str) -> float:
    with suppress(ValueError):
        if 0.0 <= float(text) <= 2.0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 2")


def _arguments() -> argparse.Namespace:
    refuse_keys(sys.argv[1:])
    parser = argparse.ArgumentParser(prog="python -m learner.practice", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--url", default=os.environ.get("STEPAGENT_URL", "http://127.0.0.1:8000/v1"), help="the endpoint"
    )
    parser.add_argument(
        "--api-key-file", type=Path, default=None, help="file of the server's API key; default: STEPAGENT_API_KEY"
    )
    parser.add_argument("--world", default="order_desk", help=f"{', '.join(sorted(WORLDS))}, or module:Class")
    parser.add_argument("--split", default="train", choices=("train", "validation", "heldout"))
    parser.add_argument("--episodes", type=_from(1), default=100, help="how many tasks")
    parser.add_argument("--first", type=_from(0), default=0, help="index of the first task")
    parser.add_argument(
        "--model", default="", help="served name, or an adapter's name to pin it; default: the acting one"
    )
    parser.add_argument("--temperature", type=_temperature, default=1.0)
    parser.add_argument("--concurrency", type=_from(1), default=8)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--record", type=Path, default=None, help="JSONL file of attempts; what is in it is not tried again"
    )
    return parser.parse_args()


async def _main(arguments: argparse.Namespace) -> int:
    # Only the training split is learned from; what reporting is done on must stay unseen.
    purpose = "practice" if arguments.split == "train" else "evaluation"
    options = PracticeOptions(arguments.model, arguments.temperature, purpose, arguments.concurrency, arguments.seed)
    try:
        world = load_world(arguments.world)
        record = Record(arguments.record, options) if arguments.record else None
    except (ValueError, OSError, WorldFailed) as error:
        print(f"cannot start: {error}")
        return 2
    if (size := world.splits[arguments.split]) == 0:
        print(f"{world.name} has no tasks in its split {arguments.split}")
        return 2
    try:
        with blaming(world.name, "task"):
            indices = [(arguments.first + number) % size for number in range(arguments.episodes)]
            tasks = [world.task(arguments.split, index) for index in indices]
    except WorldFailed as error:
        print(f"cannot start: the world {arguments.world} opens no task: {error}")
        return 2
    known, missing = record.known_and_missing(tasks) if record else ([], tasks)
    client = AsyncOpenAI(base_url=endpoint_url(arguments.url), api_key=api_key(arguments.api_key_file), max_retries=1)

    def done(attempt: Attempt) -> None:
        bar.update()
        if record is not None:
            record.add(attempt)

    try:
        with tqdm(total=len(tasks), initial=len(known), unit="episode") as bar:
            attempts = known + await practise(client, world, missing, options, done)
    except APIConnectionError as error:
        print(f"no answer from {arguments.url}: {error}; is the server up?")
        return 1
    except OpenAIError as error:
        print(f"{arguments.url} did not do it: {error}")
        return 1
    except OSError as error:  # a full disk
        print(f"{arguments.record} cannot be written: {error.strerror}; the same command goes on from what is in it")
        return 1
    print(summary(attempts))
    return 0 if not any(attempt.error for attempt in attempts) else 1


if __name__ == "__main__":
    with ending_in_time():
        raise SystemExit(asyncio.run(_main(_arguments())))
