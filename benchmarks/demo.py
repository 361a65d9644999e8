"""make demo: an agent gets better while it serves, in one table.

    python -m benchmarks.demo [--state state] [--cycles 3] [--demonstrations 24] [--tasks 200]

Starts the server with the novice, imports expert demonstrations of training tasks, practises on other training tasks
through the endpoint, and triggers learner cycles over HTTP, with traffic going on while they run. After each cycle the
acting adapter is tried on held-out tasks, which nothing has learned from and no gate has seen. Everything speaks HTTP;
what is printed is what came out. The rows stand in STATE/demo/results.json, the curve beside them as results.png.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from langchain_core.utils.function_calling import convert_to_openai_tool
from openai import AsyncOpenAI, OpenAIError
from tqdm import tqdm

from benchmarks.transcripts import first_steps
from learner.client import Endpoint
from learner.practice import Attempt, PracticeOptions, practise, success_interval
from policies.types import BASE_ADAPTER, Message
from runtime.store.learning_log import ENDINGS
from tools.worlds.order_desk import OrderDesk, OrderDeskEpisode
from tools.worlds.world import Task

WORLD = OrderDesk()
NUM_AGREEMENT_TASKS = 20
"""Held-out tasks at whose expert states the step agreement is taken."""


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter, or one cycle that brought none."""

    adapter: str
    success_greedy: float
    success_greedy_low: float
    success_greedy_high: float
    success_t1: float
    success_t1_low: float
    success_t1_high: float
    num_tasks: int
    step_agreement: float
    """Share of an expert's states on held-out tasks at which the greedy action means what the expert's does."""
    cycle_seconds: float | None
    swap_seconds: float | None
    requests_failed: int
    """Of all requests since the row before, those during the cycle included."""
    verdict: str
    reason: str


# -------------------------------------------------------------------------------------------------- server


@contextmanager
def server(state: Path, arguments: Sequence[str], log_path: Path) -> Iterator[str]:
    """A server of our own; yields its URL."""
    command = [sys.executable, "serve.py", "--port", "0", "--state", str(state), "--learn-every", "0", *arguments]
    with log_path.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        yield _url_when_ready(process, log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def _url_when_ready(process: subprocess.Popen[bytes], log_path: Path) -> str:
    while process.poll() is None:
        for line in log_path.read_text().splitlines():
            if line.startswith("listening"):
                return line.split()[1].removesuffix("/v1")
        time.sleep(0.1)
    raise SystemExit(f"the server did not start:\n{log_path.read_text()}")


# ---------------------------------------------------------------------------------------------- experts


def write_demonstrations(path: Path, num_demonstrations: int, num_steps: int | None = None, first: int = 0) -> None:
    """Experts' conversations on training tasks, as OpenAI's fine-tuning JSONL; of each all steps, or so many."""
    with path.open("w") as file:
        for index in range(first, first + num_demonstrations):
            task = WORLD.task("train", index)
            episode, messages = WORLD.open(task), list(task.messages)
            while messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
                messages.append(episode.expert_action())
                messages += episode.play(messages[-1])
            tools = [convert_to_openai_tool(tool) for tool in episode.tools]
            shown = messages if num_steps is None else first_steps(messages, num_steps)
            file.write(json.dumps({"messages": shown, "tools": tools}) + "\n")


def expert_states(task: Task) -> Iterator[tuple[list[Message], OrderDeskEpisode]]:
    """The states of an expert's own way through a task, each with the world as it is there. Use one before the next."""
    episode, messages = WORLD.open(task), list(task.messages)
    while messages[-1]["role"] != "assistant":
        yield messages, episode
        messages = [*messages, action := episode.expert_action()]
        messages += episode.play(action)


# ---------------------------------------------------------------------------------------------- measuring


@dataclass(slots=True)
class Traffic:
    """Everything that is asked of the server, with one bar for all of it."""

    client: AsyncOpenAI
    num_failed: int = 0

    async def tries(self, what: str, tasks: Sequence[Task], options: PracticeOptions) -> list[Attempt]:
        with tqdm(total=len(tasks), desc=what, unit=" tasks", leave=False) as bar:
            attempts = await practise(self.client, WORLD, tasks, options, lambda _: bar.update())
        self.num_failed += sum(bool(attempt.error) for attempt in attempts)
        return attempts

    async def agreement(self, adapter: str) -> float:
        """The step agreement of a Row."""
        tools: Any = [convert_to_openai_tool(tool) for tool in WORLD.open(WORLD.task("heldout", 0)).tools]
        judged = []
        for index in tqdm(range(NUM_AGREEMENT_TASKS), desc="step agreement", unit=" tasks", leave=False):
            for messages, episode in expert_states(WORLD.task("heldout", index)):
                options: dict[str, Any] = {"messages": messages, "metadata": {"purpose": "evaluation"}}
                try:
                    answer = await self.client.chat.completions.create(
                        model=adapter, tools=tools, temperature=0.0, **options
                    )
                except OpenAIError:
                    self.num_failed += 1
                    judged.append(False)
                    continue
                said = answer.choices[0].message.model_dump(exclude_none=True)
                judged.append(episode.same_effect(said, episode.expert_action()))
        return sum(judged) / len(judged)


@dataclass(frozen=True, slots=True)
class CycleResult:
    """What a cycle came to."""

    seconds: float
    swap_seconds: float | None
    verdict: str
    reason: str


async def row_of(traffic: Traffic, adapter: str, num_tasks: int, result: CycleResult | None) -> Row:
    """Try an adapter on the held-out tasks."""
    tasks = [WORLD.task("heldout", index) for index in range(num_tasks)]
    rates = []
    for name, temperature in (("greedy", 0.0), ("T=1", 1.0)):
        options = PracticeOptions(adapter, temperature, "evaluation")
        attempts = await traffic.tries(f"{adapter}, held out, {name}", tasks, options)
        num_successes = sum(attempt.outcome for attempt in attempts)
        rates += [num_successes / num_tasks, *success_interval(num_successes, num_tasks)]
    agreement = await traffic.agreement(adapter)
    num_failed, traffic.num_failed = traffic.num_failed, 0
    return Row(
        adapter,
        *rates,
        num_tasks=num_tasks,
        step_agreement=agreement,
        cycle_seconds=result.seconds if result else None,
        swap_seconds=result.swap_seconds if result else None,
        requests_failed=num_failed,
        verdict=result.verdict if result else "",
        reason=result.reason if result else "the novice",
    )


def unchanged(before: Row, traffic: Traffic, result: CycleResult) -> Row:
    """A cycle that brought no new adapter: the figures of the acting one stand."""
    num_failed, traffic.num_failed = traffic.num_failed, 0
    return replace(
        before,
        cycle_seconds=result.seconds,
        swap_seconds=None,
        requests_failed=num_failed,
        verdict=result.verdict,
        reason=result.reason,
    )


async def run_cycle(traffic: Traffic, first_task: int) -> CycleResult:
    """Trigger a cycle and see it through, with practice going on beside it."""
    started: Any = await traffic.client.post("/learner/cycles", cast_to=object, body={})
    began, path = time.monotonic(), f"/learner/cycles/{started['id']}"
    practice = asyncio.create_task(_keep_practising(traffic, first_task))
    with tqdm(total=0, bar_format="{desc}", leave=False) as line:
        while (cycle := await _read(traffic.client, path))["stage"] not in ENDINGS:
            line.set_description_str(f"cycle: {cycle['stage']} {cycle['message']} {_share(cycle)}")
            await asyncio.sleep(0.5)
    seconds = time.monotonic() - began
    practice.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await practice
    swap_seconds = cycle["report"].get("seconds", {}).get("promote")
    return CycleResult(seconds, swap_seconds, cycle["stage"], cycle["message"])


async def _keep_practising(traffic: Traffic, first_task: int) -> None:
    """One task after the other, as a user would who does not mind the learner."""
    options = PracticeOptions(concurrency=1)
    for index in range(first_task, WORLD.splits["train"]):
        (attempt,) = await practise(traffic.client, WORLD, [WORLD.task("train", index)], options)
        traffic.num_failed += bool(attempt.error)


async def _read(client: AsyncOpenAI, path: str) -> Any:
    return await client.get(path, cast_to=object)


def _share(cycle: Any) -> str:
    return f"{cycle['done']}/{cycle['total']}" if cycle.get("total") else ""


# ------------------------------------------------------------------------------------------------- report


def table(rows: Sequence[Row]) -> str:
    """The rows in words and figures."""
    head = "adapter        greedy (95 %)      T=1 (95 %)         agreement  cycle s  swap s  failed  verdict"
    lines = [head, "-" * len(head)]
    for row in rows:
        greedy, t1 = (_rate(row, side) for side in ("greedy", "t1"))
        cycle = "-" if row.cycle_seconds is None else f"{row.cycle_seconds:.0f}"
        swap = "-" if row.swap_seconds is None else f"{row.swap_seconds:.2f}"
        lines.append(
            f"{row.adapter:<13}  {greedy:<17}  {t1:<17}  {row.step_agreement:>9.1%}  {cycle:>7}  {swap:>6}  "
            f"{row.requests_failed:>6}  {row.verdict}{': ' if row.verdict else ''}{row.reason}"
        )
    return "\n".join(lines)


def _rate(row: Row, side: str) -> str:
    rate, low, high = (getattr(row, f"success_{side}{end}") for end in ("", "_low", "_high"))
    return f"{100 * rate:5.1f} ({100 * low:.0f}-{100 * high:.0f})"


def draw(rows: Sequence[Row], path: Path) -> None:
    """The curve: success on held-out tasks, adapter by adapter."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    places = range(len(rows))
    for side, label in (("greedy", "greedy"), ("t1", "T = 1")):
        rates = [getattr(row, f"success_{side}") for row in rows]
        below = [rate - getattr(row, f"success_{side}_low") for rate, row in zip(rates, rows, strict=True)]
        above = [getattr(row, f"success_{side}_high") - rate for rate, row in zip(rates, rows, strict=True)]
        axes.errorbar(places, rates, yerr=[below, above], marker="o", capsize=4, label=label)
    axes.set_xticks(places, [f"{row.adapter}\n{row.verdict}" for row in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"success on {rows[0].num_tasks} held-out tasks")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------- main


async def story(url: str, options: argparse.Namespace, folder: Path) -> list[Row]:
    """The novice, then a row for each cycle."""
    traffic = Traffic(AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300))
    endpoint = Endpoint(traffic.client)
    rows = [await row_of(traffic, BASE_ADAPTER, options.tasks, None)]
    for number in range(options.cycles):
        first = options.demonstrations + 1000 * number
        tasks = [WORLD.task("train", first + index) for index in range(options.practice)]
        await traffic.tries(f"cycle {number + 1}, practice", tasks, PracticeOptions())
        result = await run_cycle(traffic, first + options.practice)
        acting = (await endpoint.parents())[0]
        if acting != rows[-1].adapter:
            rows.append(await row_of(traffic, acting, options.tasks, result))
        else:
            rows.append(unchanged(rows[-1], traffic, result))
        (folder / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=2))
        tqdm.write(table(rows[-1:]).splitlines()[-1])
    return rows


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--state", type=Path, default=Path("state"), help="a state folder; DIR/demo is made anew")
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--demonstrations", type=int, default=24, help="training tasks that an expert demonstrates")
    parser.add_argument("--practice", type=int, default=48, help="training tasks that are practised before a cycle")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks on which adapters are reported")
    parser.add_argument("--learner-arg", action="append", default=[], help="passed on: objectives=sft,implicit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with us in any case
    folder = options.state / "demo"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    passed_on = [part for given in options.learner_arg for part in ("--learner-arg", given)]
    with server(folder / "state", passed_on, folder / "server.log") as url:
        print(f"the novice is served at {url}/v1, its log is {folder / 'state' / 'agent.db'}")
        demonstrations = folder / "demonstrations.jsonl"
        write_demonstrations(demonstrations, options.demonstrations)
        imported = [sys.executable, "-m", "learner", "import", str(demonstrations), "--url", f"{url}/v1"]
        subprocess.run(imported, check=True)
        rows = asyncio.run(story(url, options, folder))
    draw(rows, folder / "results.png")
    print(f"\n{table(rows)}\n\n{time.monotonic() - began:.0f} s; rows and curve: {folder}/results.json, results.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
