"""make demo-real: a real model gets better while it serves, in two tables.

    python -m benchmarks.demo_real [--model FOLDER] [--state state] [--part desk|bfcl|tau2_retail ...]

Neither part's world is known to the server, which has transcripts alone. At the order desk (`desk`), whose tasks we can
try: experts' demonstrations are imported, and learner cycles run one after the other, with practice between them; after
each, the acting adapter is tried on held-out tasks. On transcripts of another world (`bfcl`, `tau2_retail`: make
setup-worlds): those of its training tasks are imported, a cycle runs, and those of its held-out tasks tell at how many
of the expert's calls the greedy action means the same, before and after. Where a world's tasks differ in their tools,
the transcripts are those of one agent: the ones that need only what most tasks offer together (of BFCL that is a
broker: 47 and 13 transcripts, whose 10 tools make prompts of 1,300 tokens, nearly all of it shared; all of its 43 tools
make 6,400, and a gradient step of minutes on two cores). They offer the tools that any of them calls, after the world's
own instructions; no two of a split begin with the same request. `tau2_retail` is left out unless it is asked for: its
rules and records make prompts of 3,100 to 5,500 tokens, of which little is shared.

What is done is not done again: started anew after a stop, it goes on (STATE/demo-real holds rows and server states).
Without --model it is SmolLM2-135M, which comes from the package index.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any

from openai import AsyncOpenAI
from tqdm import tqdm

from benchmarks.colleagues import Conversation
from benchmarks.demo import server
from benchmarks.transcripts import expert_conversations, first_steps, interval, of_one_agent, states_of, tools_of
from learner.client import Endpoint
from learner.data.comparison import compare
from learner.practice import PracticeOptions, practise, success_interval
from policies.chat.chat_protocol import message_action
from policies.types import BASE_ADAPTER
from runtime.store.learning_log import ENDINGS
from tools.worlds import load_world
from tools.worlds.world import Message, World

LEARNING = ("objectives=sft", "discriminator=false", "implicit-rewards=false")
"""One objective, no rewards for others: a real model's minutes go into what is shown here."""
AT_DESK = ("trajectories-per-step=2", "lr=0.002", "num-samples=0", "held-out-share=0.25")
"""Small gradient steps, and a higher rate than the network's width would have. Judged by the demonstrations that are
held out: the server does not know the desk, and whole orders say little of a model that ships hardly any. A quarter is
enough that no folds are needed, which take three more trainings."""
FIRST_CYCLE, LATER_CYCLE = ("epochs=4",), ("epochs=1", "min-gradient-steps=64")
"""What is missing after the first cycle needs no four epochs more."""
ON_TRANSCRIPTS = (
    "epochs=2",
    "num-samples=0",
    "held-out-share=0.55",
    "trajectories-per-step=8",
    "min-gradient-steps=24",
)
"""More than half judge, so that few need to be trained without by folds, which takes up to three more trainings: of
BFCL's 47 transcripts 22 are held out, and one training without a fold lets the gate see the 24 that it wants. Eight to
a gradient step: most of a pack is the tools that all share, and is computed once."""
MAX_STEP_TOKENS = 160
"""Of a step in a task: an untrained model may go on for ever."""

Row = dict[str, Any]


class Results:
    """Rows by part, kept on disk as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, list[Row]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, part: str) -> list[Row]:
        return self.rows.setdefault(part, [])

    def add(self, part: str, row: Row) -> None:
        self.of(part).append(row)
        self._path.write_text(json.dumps(self.rows, indent=2))
        tqdm.write(f"{part}: {json.dumps(row)}")


# -------------------------------------------------------------------------------------------------- demonstrations


def write(path: Path, conversations: Sequence[Conversation], tools: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps({"messages": each, "tools": tools}) + "\n" for each in conversations))


def import_into(url: str, path: Path) -> None:
    subprocess.run([sys.executable, "-m", "learner", "import", str(path), "--url", f"{url}/v1"], check=True)


# -------------------------------------------------------------------------------------------------- cycles


async def run_cycle(client: AsyncOpenAI) -> Row:
    """Trigger a cycle and see it through."""
    cycle: Any = await client.post("/learner/cycles", cast_to=object, body={})
    began = time.monotonic()
    with tqdm(total=0, bar_format="{desc}", leave=False) as line:
        while cycle["stage"] not in ENDINGS:
            share = f"{cycle.get('done')}/{cycle['total']}" if cycle.get("total") else ""
            since = f"{time.monotonic() - began:.0f} s"
            line.set_description_str(f"cycle: {cycle['stage']} {cycle['message']} {share} {since}")
            await asyncio.sleep(1)
            cycle = await client.get(f"/learner/cycles/{cycle['id']}", cast_to=object)
    seconds = cycle["report"].get("seconds", {})
    return {"ended": cycle["stage"], "reason": cycle["message"], "seconds": time.monotonic() - began, "stages": seconds}


# -------------------------------------------------------------------------------------------------- the order desk


async def desk_row(client: AsyncOpenAI, world: World, adapter: str, num_tasks: int) -> Row:
    """Greedy success on held-out tasks."""
    options = PracticeOptions(adapter, 0.0, "evaluation", concurrency=16, max_tokens=MAX_STEP_TOKENS)
    began = time.monotonic()
    with tqdm(total=num_tasks, desc=f"{adapter}, held out", unit=" tasks", leave=False) as bar:
        tasks = [world.task("heldout", index) for index in range(num_tasks)]
        attempts = await practise(client, world, tasks, options, lambda _: bar.update())
    succeeded = sum(attempt.outcome for attempt in attempts)
    low, high = success_interval(succeeded, num_tasks)
    return {
        "adapter": adapter, "success": succeeded / num_tasks, "low": low, "high": high, "num_tasks": num_tasks,
        "malformed": sum(a.num_malformed for a in attempts), "errors": [a.error for a in attempts if a.error],
        "seconds": time.monotonic() - began,
    }  # fmt: skip


async def desk(url: str, results: Results, options: argparse.Namespace, folder: Path, number: int) -> None:
    """One cycle, counted from 1, and what it brought."""
    world, client = load_world("order_desk"), client_of(url)
    rows = results.of("desk")
    if not rows:
        conversations = expert_conversations(world, "train", options.demonstrations)
        write(folder / "desk.jsonl", conversations, tools_of(world, conversations))
        import_into(url, folder / "desk.jsonl")
        results.add("desk", await desk_row(client, world, BASE_ADAPTER, options.tasks))
    if number > 1:
        first = options.demonstrations + 1000 * number
        tasks = [world.task("train", first + index) for index in range(options.practice)]
        practice = PracticeOptions(concurrency=16, max_tokens=MAX_STEP_TOKENS)
        with tqdm(total=len(tasks), desc="practice", unit=" tasks", leave=False) as bar:
            await practise(client, world, tasks, practice, lambda _: bar.update())
    cycle = await run_cycle(client)
    acting = (await Endpoint(client).parents())[0]
    unchanged = next((row for row in rows if row["adapter"] == acting), None)
    row = unchanged or await desk_row(client, world, acting, options.tasks)
    results.add("desk", {**row, "cycle": cycle})


# -------------------------------------------------------------------------------------------------- transcripts


async def agreements(client: AsyncOpenAI, adapter: str, held_out: Sequence[Conversation], tools: Any) -> list[float]:
    """Of each transcript: the share of the expert's tool calls whose meaning the greedy action has. What an expert says
    is left out: in these worlds it is one sentence at every end."""
    states = [
        (place, before, expert)
        for place, messages in enumerate(held_out)
        for before, expert in states_of(messages)
        if expert.get("tool_calls")
    ]
    places = asyncio.Semaphore(8)
    with tqdm(total=len(states), desc=f"{adapter}, agreement", unit=" states", leave=False) as bar:

        async def agrees(before: Any, expert: Message) -> bool:
            metadata: Any = {"purpose": "evaluation"}
            async with places:
                answer = await client.chat.completions.create(
                    model=adapter, messages=before, tools=tools, temperature=0.0, max_tokens=MAX_STEP_TOKENS,
                    metadata=metadata,
                )  # fmt: skip
            bar.update()
            if "problem" in (answer.model_extra or {})["stepagent"]["choices"][0][0]:
                return False
            said = answer.choices[0].message.model_dump(exclude_none=True)
            return compare(message_action(said), message_action(expert)).agrees

        found = await asyncio.gather(*(agrees(list(before), expert) for _, before, expert in states))
    of = [
        [agreed for (at, *_), agreed in zip(states, found, strict=True) if at == place]
        for place in range(len(held_out))
    ]
    return [fmean(each) for each in of]


def of_agent(world: World, split: str, num_steps: int) -> list[Conversation]:
    """One agent's transcripts of a split's tasks, cut to so many steps."""
    experts = expert_conversations(world, split, world.splits[split])
    return of_one_agent(world, [first_steps(each, num_steps) for each in experts])


async def transcripts(name: str, url: str, results: Results, options: argparse.Namespace, folder: Path) -> None:
    client, rows, world = client_of(url), results.of(name), load_world(name)
    learned = of_agent(world, "train", options.steps)[: options.transcripts]
    held_out = of_agent(world, "heldout", options.steps)[: options.held_out]
    tools = tools_of(world, [*learned, *held_out])
    if not rows:
        write(folder / f"{name}.jsonl", learned, tools)
        import_into(url, folder / f"{name}.jsonl")
        results.add(name, agreement_row(BASE_ADAPTER, await agreements(client, BASE_ADAPTER, held_out, tools), None))
    if len(rows) < 2:
        cycle = await run_cycle(client)
        acting = (await Endpoint(client).parents())[0]
        each = rows[0]["each"] if acting == BASE_ADAPTER else await agreements(client, acting, held_out, tools)
        results.add(name, {**agreement_row(acting, each, rows[0]["each"]), "cycle": cycle})


def agreement_row(adapter: str, each: list[float], before: list[float] | None) -> Row:
    mean, low, high = interval(each)
    row: Row = {"adapter": adapter, "agreement": mean, "low": low, "high": high, "each": each}
    if before is not None:
        row["gain"] = interval([new - old for new, old in zip(each, before, strict=True)])
    return row


# -------------------------------------------------------------------------------------------------- report


def table(results: Results) -> str:
    lines = ["part          adapter        greedy, % (95 %)       on              cycle s  ended"]
    for part, rows in results.rows.items():
        for row in rows:
            rate = row["success" if part == "desk" else "agreement"]
            figure = f"{100 * rate:5.1f} ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
            on = f"{row['num_tasks']} tasks" if part == "desk" else f"{len(row['each'])} transcripts"
            cycle = row.get("cycle")
            gain = (
                f"; gain {100 * row['gain'][0]:+.1f} ({100 * row['gain'][1]:+.1f} to {100 * row['gain'][2]:+.1f})"
                if "gain" in row
                else ""
            )
            ended = f"{cycle['seconds']:7.0f}  {cycle['ended']}: {cycle['reason']}{gain}" if cycle else "      -"
            lines.append(f"{part:<12}  {row['adapter']:<13}  {figure:<21}  {on:<14}  {ended}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- main


def client_of(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)


def smollm2() -> Path:
    found = subprocess.run(
        [sys.executable, "-m", "policies.fetch", "smollm2-135m"], stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(found.stdout.splitlines()[-1])


def served(
    part: str, learning: Sequence[str], max_context: str, model: Path, options: argparse.Namespace, folder: Path
) -> AbstractContextManager[str]:
    """A server of a part's own, as often as it is asked for on the same state."""
    said = [text for each in (*LEARNING, *learning, *options.learner_arg) for text in ("--learner-arg", each)]
    return server(folder / part, ["--model", str(model), "--max-context", max_context, *said], folder / f"{part}.log")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_real", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M, brought from the package index")
    parser.add_argument("--state", type=Path, default=Path("state"))
    parser.add_argument("--part", nargs="+", default=["desk", "bfcl"], help="desk, bfcl, tau2_retail")
    parser.add_argument("--cycles", type=int, default=2, help="at the order desk")
    parser.add_argument("--demonstrations", type=int, default=128, help="at the order desk")
    parser.add_argument("--practice", type=int, default=16, help="tasks before a further cycle at the order desk")
    parser.add_argument("--tasks", type=int, default=32, help="held-out tasks at the order desk")
    parser.add_argument("--transcripts", type=int, default=48, help="that are imported, of another world")
    parser.add_argument("--held-out", type=int, default=24, help="transcripts that are kept from the server, at most")
    parser.add_argument("--steps", type=int, default=3, help="of each transcript, at most")
    parser.add_argument("--learner-arg", action="append", default=[], help="passed on: min-gradient-steps=12")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with us in any case
    model, folder, began = options.model or smollm2(), options.state / "demo-real", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "results.json")
    for part in options.part:
        if part == "desk":
            for number in range(max(1, len(results.of(part))), options.cycles + 1):
                learning = [*AT_DESK, *(FIRST_CYCLE if number == 1 else LATER_CYCLE)]
                with served(part, learning, "2048", model, options, folder) as url:
                    asyncio.run(desk(url, results, options, folder, number))
        else:
            with served(part, ON_TRANSCRIPTS, "8192", model, options, folder) as url:
                asyncio.run(transcripts(part, url, results, options, folder))
    cpu_seconds = sum(os.times()[:4])  # with the servers' and their learners': all have ended and were waited for
    spent = f"{time.monotonic() - began:.0f} s in this run, {cpu_seconds:.0f} s of CPU"
    print(f"\n{table(results)}\n\n{spent}; rows: {folder}/results.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
