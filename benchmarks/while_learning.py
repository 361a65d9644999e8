"""What users feel of a learner cycle: beside an idle server, and beside a server that stops while it trains.

    python -m benchmarks.while_learning [--engine embedded|vllm] [--model FOLDER] [--repeats 3] [--json FILE]

One server (python serve.py, the novice or the model of FOLDER) with a team's demonstrations in it; a few users ask it
for one step of an order after the other, streamed. A real model's cycle is a short one, else it takes an hour: of each
demonstration two steps, one objective, held-out demonstrations as judges. In each repeat it is measured three times, in
changing order, from the base network:

- idle: nothing is learned;
- ours: a learner cycle runs beside the serving, asked for over HTTP, from its first stage to its ending;
- stopped: the same cycle, but from its first gradient to its last no request is let through, which is the design of
  trainers that put their engine to sleep. In their favour: the engine's going to sleep and waking up take no time here,
  and the time that a request waits is not counted as a gap between tokens.

`answering` is the share of the cycle's seconds in which some user got a token. Gaps are taken over the whole cycle, and
once more while it trains. Everything shares the machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool
from openai import AsyncOpenAI
from tqdm import tqdm

from benchmarks.demo import WORLD, expert_states, write_demonstrations
from benchmarks.figures import percentile, spread
from benchmarks.plain_http import PlainClient
from benchmarks.swap import NAME, NOVICE_FOLDER, Answered, served, streamed
from learner.__main__ import main as learner_command
from learner.client import Endpoint
from policies.types import BASE_ADAPTER
from runtime.store.learning_log import ENDINGS

NUM_USERS = 4
NUM_DEMONSTRATIONS, NUM_DEMONSTRATIONS_OF_REAL, NUM_STEPS_OF_REAL = 24, 48, 2
CYCLE_OF_REAL = (
    "objectives=sft", "discriminator=false", "implicit-rewards=false", "num-samples=0", "gate-tasks=0",
    "held-out-share=0.5", "epochs=1", "min-gradient-steps=12",
)  # fmt: skip
MAX_TOKENS = 64
"""Of an answer: an untrained model may go on for ever."""
NUM_TASKS = 40
"""Whose states users ask at."""
IDLE_S = 30.0
WAYS = ("idle", "ours", "stopped")
POLL_S = 0.1

Span = tuple[float, float]
"""Since when and until when (time.perf_counter)."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a user, from the moment it was wanted."""

    wanted_at: float
    answer: Answered

    @property
    def seconds(self) -> float:
        return self.answer.came_at[-1] - self.wanted_at


@dataclass(slots=True)
class Users:
    """People who want one step after the other; `is_open` holds their requests back while it is not set."""

    port: int
    is_open: asyncio.Event
    asks: list[Ask] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def keep_asking(self, user: int, bodies: Sequence[dict[str, Any]], is_over: asyncio.Event) -> None:
        client, draw = PlainClient(self.port), Random(user)
        while not is_over.is_set():
            wanted_at = time.perf_counter()
            await self.is_open.wait()
            try:
                self.asks.append(Ask(wanted_at, await streamed(client, draw.choice(bodies))))
            except (RuntimeError, OSError, EOFError) as error:
                self.failures.append(repr(error))
                client = PlainClient(self.port)
        await client.close()


def bodies() -> list[dict[str, Any]]:
    """Requests for a step at each state of some experts' ways."""
    states = [messages for index in range(NUM_TASKS) for messages, _ in expert_states(WORLD.task("validation", index))]
    tools = [convert_to_openai_tool(tool) for tool in WORLD.open(WORLD.task("validation", 0)).tools]
    asked = {"model": NAME, "tools": tools, "stream": True, "logprobs": True, "temperature": 1.0}
    asked |= {"max_completion_tokens": MAX_TOKENS}
    return [{**asked, "messages": messages, "metadata": {"purpose": "evaluation"}} for messages in states]


# ----------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Stretch:
    """One way, measured once."""

    way: str
    seconds: float
    training_seconds: float
    verdict: str
    requests_per_second: float
    latency_s: tuple[float, float]
    """Of a request, from when it was wanted: median and 95th percentile."""
    longest_s: float
    gap_ms: tuple[float, float]
    """Between two arrivals of one answer, median and 95th percentile: tokens that come together are one."""
    gap_training_ms: float | None
    """The 95th percentile while it trains; None where nothing does, or nobody is answered."""
    answering: float
    """Share of the whole seconds in which some token reached a user."""
    failed: int


async def measure(port: int, way: str, asked: Sequence[dict[str, Any]]) -> Stretch:
    """One way under load, from the base network."""
    client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)
    is_open, is_over = asyncio.Event(), asyncio.Event()
    is_open.set()
    users = Users(port, is_open)
    asking = [asyncio.create_task(users.keep_asking(user, asked, is_over)) for user in range(NUM_USERS)]
    await asyncio.sleep(1.0)
    began = time.perf_counter()
    if way == "idle":
        await asyncio.sleep(IDLE_S)
        training, verdict = [], ""
    else:
        training, verdict = await see_a_cycle_through(client, is_open, stops=way == "stopped")
    ended = time.perf_counter()
    is_over.set()
    is_open.set()
    await asyncio.gather(*asking)
    await back_to_base(Endpoint(client))
    return stretch(way, users, began, ended, training, verdict)


async def see_a_cycle_through(client: AsyncOpenAI, is_open: asyncio.Event, stops: bool) -> tuple[list[Span], str]:
    """Ask for a cycle and wait for its ending: when it trained, and what came of it."""
    started: Any = await client.post("/learner/cycles", cast_to=object, body={})
    training_since, training = None, list[Span]()
    while True:
        cycle: Any = await client.get(f"/learner/cycles/{started['id']}", cast_to=object)
        is_training, now = cycle["stage"] == "train", time.perf_counter()
        if is_training and training_since is None:
            training_since = now
            if stops:
                is_open.clear()
        if not is_training and training_since is not None:
            training.append((training_since, now))
            training_since = None
            is_open.set()
        if cycle["stage"] in ENDINGS:
            return training, f"{cycle['stage']}: {cycle['message']}"
        await asyncio.sleep(POLL_S)


async def back_to_base(endpoint: Endpoint) -> None:
    while (await endpoint.parents())[0] != BASE_ADAPTER:
        await endpoint.rollback("the next measurement begins at the base network")


def stretch(way: str, users: Users, began: float, ended: float, training: Sequence[Span], verdict: str) -> Stretch:
    done = [ask for ask in users.asks if began <= ask.answer.came_at[-1] <= ended]
    tokens = [at for ask in users.asks for at in ask.answer.came_at if began <= at <= ended]
    gaps = gaps_ms(done, (began, ended))
    gaps_training = [gap for span in training for gap in gaps_ms(done, span)]
    num_seconds = int(ended - began)
    served_in = {int(at - began) for at in tokens} & set(range(num_seconds))
    latencies = [ask.seconds for ask in done]
    return Stretch(
        way,
        ended - began,
        sum(until - since for since, until in training),
        verdict,
        len(done) / (ended - began),
        (statistics.median(latencies), percentile(latencies, 95)),
        max(latencies),
        (statistics.median(gaps), percentile(gaps, 95)),
        percentile(gaps_training, 95) if gaps_training else None,
        len(served_in) / num_seconds,
        len(users.failures),
    )


def gaps_ms(asks: Sequence[Ask], span: Span) -> list[float]:
    """Between two arrivals of one answer that both came within the span."""
    return [
        (later - earlier) * 1000
        for ask in asks
        for earlier, later in pairwise(sorted(set(ask.answer.came_at)))
        if span[0] <= earlier and later <= span[1]
    ]


# -------------------------------------------------------------------------------------------------- report


def report(stretches: Sequence[Stretch]) -> None:
    heads = [
        "",
        "requests/s",
        "latency p50, s",
        "p95, s",
        "longest, s",
        "gap p50, ms",
        "p95, ms",
        "p95 in training, ms",
    ]
    heads += ["answering", "cycle, s", "training, s"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for way in dict.fromkeys(one.way for one in stretches):
        found = [one for one in stretches if one.way == way]
        cells = [
            spread([one.requests_per_second for one in found], 1),
            *(spread([one.latency_s[at] for one in found], 2) for at in (0, 1)),
            spread([one.longest_s for one in found], 1),
            *(spread([one.gap_ms[at] for one in found], 1) for at in (0, 1)),
            spread([gap for one in found if (gap := one.gap_training_ms) is not None], 1),
            spread([100 * one.answering for one in found], 0) + " %",
            *(spread([value for one in found if (value := of(one))], 0) for of in (_cycle, _training)),
        ]
        print(f"| {way} | " + " | ".join(cells) + " |")
    print(f"failed requests: {sum(one.failed for one in stretches)}")
    for one in stretches:
        if one.verdict:
            print(f"{one.way}: {one.verdict}")


def _cycle(one: Stretch) -> float:
    return 0.0 if one.way == "idle" else one.seconds


def _training(one: Stretch) -> float:
    return one.training_seconds


def run(options: argparse.Namespace, folder: Path) -> list[Stretch]:
    demonstrations, state, asked, stretches = folder / "demonstrations.jsonl", folder / "state", bodies(), []
    ways, is_real = options.ways.split(","), options.model is not None
    state.mkdir()
    shown = (NUM_DEMONSTRATIONS_OF_REAL, NUM_STEPS_OF_REAL) if is_real else (NUM_DEMONSTRATIONS,)
    write_demonstrations(demonstrations, *shown)
    server = served(
        options.model or NOVICE_FOLDER, state, options.engine, "order_desk", CYCLE_OF_REAL if is_real else ()
    )
    with server as port, tqdm(total=options.repeats * len(ways)) as bar:
        learner_command(["import", str(demonstrations), "--url", f"http://127.0.0.1:{port}/v1"])
        asyncio.run(measure(port, "idle", asked))  # warm up
        for repeat in range(options.repeats):
            for place in range(len(ways)):
                way = ways[(repeat + place) % len(ways)]
                bar.set_description(way)
                stretches.append(asyncio.run(measure(port, way, asked)))
                bar.update()
    return stretches


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--model", type=Path, help="a network's folder; default: the novice")
    parser.add_argument("--ways", default=",".join(WAYS), help="by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the stretches here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stretches = run(options, Path(folder))
    model = options.model.name if options.model else "the novice"
    print(f"{options.engine} engine, {model}, {NUM_USERS} users, median of {options.repeats} repeats (least-most)")
    report(stretches)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in stretches], indent=1))


if __name__ == "__main__":
    main()
