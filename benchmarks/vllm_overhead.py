"""Our endpoint, its durable log on, beside vLLM's own OpenAI server: the same vLLM, network, requests and settings.

    .venv-vllm/bin/python -m benchmarks.vllm_overhead [--model FOLDER] [--repeats 5] [--json FILE]

Two servers in processes of their own, each with vLLM's engine in one more, started with the same engine arguments and
environment: `python serve.py --engine vllm`, and `python -m vllm.entrypoints.launchers.api_server.entry` with its
request logs off. Each cell (concurrency, streamed or not) is asked of one and then of the other, in changing order, in
every repeat; the other is idle meanwhile. Requests are greedy and end at 64 tokens, so all make as many tokens of as
many, which is checked. Without --model the network is random, of the novice's shape: the novice's own answers are too
short. A real one is asked less often.

vLLM's server is asked twice, once without logprobs and once with those of the sampled tokens: ours always makes them,
for the log, and what they cost in the engine is no cost of the endpoint. The goals are held against the first.

Ratios are ours / theirs within a repeat. Servers, engines and the client share the machine's cores. `server` is the CPU
time of the HTTP process alone, a request: what the endpoint costs, whatever else runs on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm import tqdm

from benchmarks.figures import spread
from benchmarks.plain_http import PlainClient
from benchmarks.swap import ROOT, make_network

CONCURRENCY = (1, 8, 32)
NUM_REQUESTS = {1: 24, 8: 64, 32: 192}
NUM_REQUESTS_OF_REAL = {1: 2, 8: 16, 32: 64}
MAX_TOKENS = 64
MAX_BATCH_SIZE, MAX_CONTEXT = 32, 1024
MAX_DIFFERENCE = 0.02
"""Of the tokens of a cell's prompts, and of its answers: numbers are longer or shorter, and a batch's rounding may part
two answers."""
RATIO_GOAL, MORE_MS_GOAL = 0.97, 3.0
START_TIMEOUT_S = 300.0
OF_SECOND_ASKING = 501
"""The number of the first request: what this server has read in the cell before is in its cache."""
PATH, NAME = "/v1/chat/completions", "served"
OURS, THEIRS, WITH_LOGPROBS = "ours", "vLLM's", "vLLM's, with logprobs"


A_TOOL = {
    "type": "function",
    "function": {  # a description that is left out is written as "" by ours, as null by vLLM's
        "name": "look",
        "description": "The order, as it came in.",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One server, asked at one concurrency, once."""

    server: str
    concurrency: int
    is_streamed: bool
    repeat: int
    per_second: float
    """Requests."""
    latency_ms: float
    """Median."""
    first_token_ms: float
    """Median; of a request that is not streamed, the same as its latency."""
    server_cpu_ms: float
    """CPU time of the HTTP process, a request."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    port: int
    pid: int


# ------------------------------------------------------------------------------------------------- servers


@contextmanager
def our_server(network: Path, folder: Path) -> Iterator[Server]:
    options = ["--engine", "vllm", "--model", str(network), "--served-name", NAME, "--state", str(folder / "state")]
    options += ["--threads", "1", "--max-batch-size", str(MAX_BATCH_SIZE), "--max-context", str(MAX_CONTEXT)]
    options += ["--world", ""]
    with _process([sys.executable, "serve.py", *options], OURS, folder) as server:
        yield server


@contextmanager
def their_server(network: Path, folder: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *their_options(network)]
    with _process(command, THEIRS, folder) as server:
        yield server


def their_options(network: Path) -> list[str]:
    """Our engine's arguments, as vLLM's server reads them, and no logs."""
    from runtime.engines.vllm.settings import own_engine_args

    words = [
        f"--served-model-name={NAME}",
        "--disable-uvicorn-access-log",
        "--uvicorn-log-level=error",
        "--host=127.0.0.1",
    ]
    settings = own_engine_args(str(network), None, MAX_BATCH_SIZE, 4, 64, MAX_CONTEXT, None, 1)
    settings["structured_outputs_config"] = json.dumps({"backend": settings["structured_outputs_config"].backend})
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [option, *value]
        elif value is not None:
            words.append(f"{option}={value}")
    return words


@contextmanager
def _process(command: Sequence[str], name: str, folder: Path) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "server.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STEPAGENT_")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=output, stderr=output, env=environment
        )
        try:
            asyncio.run(_until_up(port, process))
            yield Server(name, port, process.pid)
        except (RuntimeError, TimeoutError):
            print(log.read_text()[-3000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait()


async def _until_up(port: int, process: subprocess.Popen[bytes]) -> None:
    """Raises RuntimeError where it answers with an error that will not pass, TimeoutError where it takes too long."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while process.poll() is None:
            try:
                await PlainClient(port).post(PATH, _body(0, is_streamed=False))
                return
            except (OSError, asyncio.IncompleteReadError):
                pass
            except RuntimeError as error:
                if "answered 503" not in str(error):
                    raise
            await asyncio.sleep(0.5)
    raise RuntimeError("the server has ended")


def cpu_seconds(pid: int) -> float:
    """User and system time of one process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------------ requests


def _body(number: int, is_streamed: bool, with_logprobs: bool = False) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "Look after the orders. Say what you are about to do before you do it."},
        {
            "role": "user",
            "content": f"Order {number} has come in: before anything else, write the numbers from 1 to 200, "
            "one after the other, separated by commas.",
        },
    ]
    body = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    body |= {"tools": [A_TOOL], "tool_choice": "none"}  # the client runs its own: one completion, and no more
    body |= {"logprobs": True, "top_logprobs": 0} if with_logprobs else {}
    return body | {"stream": is_streamed} | ({"stream_options": {"include_usage": True}} if is_streamed else {})


@dataclass(frozen=True, slots=True)
class Timed:
    latency_ms: float
    first_token_ms: float
    usage: tuple[int, int]
    """Tokens of the prompt and of the completion, as the server counts them."""


async def ask(client: PlainClient, number: int, is_streamed: bool, with_logprobs: bool) -> Timed:
    began = time.perf_counter()
    pieces = (await client.stream(PATH, _body(number, is_streamed, with_logprobs))).pieces
    content = b"".join(piece for _, piece in pieces)
    if is_streamed:
        events = [json.loads(event) for event in content.decode().split("data: ")[1:-1]]
        usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
        # The first piece may tell the role alone.
        first = next(at for at, piece in pieces if b'"content":"' in piece.replace(b'"content":""', b""))
    else:
        usage, first = json.loads(content)["usage"], pieces[-1][0]
    tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return Timed((pieces[-1][0] - began) * 1000, (first - began) * 1000, tokens)


async def measure_cell(
    server: Server, name: str, concurrency: int, is_streamed: bool, repeat: int, num_requests: int
) -> tuple[Cell, list[tuple[int, int]]]:
    """The cell, and the tokens of each request's prompt and answer."""
    clients = [PlainClient(server.port) for _ in range(concurrency)]
    with_logprobs = name == WITH_LOGPROBS
    await asyncio.gather(*(ask(client, 0, is_streamed, with_logprobs) for client in clients))  # connect
    first = repeat * 1000 + (OF_SECOND_ASKING if with_logprobs else 1)
    numbers = iter(range(first, first + num_requests))
    answers: dict[int, Timed] = {}

    async def keep_asking(client: PlainClient) -> None:
        for number in numbers:
            answers[number] = await ask(client, number, is_streamed, with_logprobs)

    cpu, began = cpu_seconds(server.pid), time.perf_counter()
    await asyncio.gather(*map(keep_asking, clients))
    seconds, cpu = time.perf_counter() - began, cpu_seconds(server.pid) - cpu
    for client in clients:
        await client.close()
    timed = list(answers.values())
    cell = Cell(
        name,
        concurrency,
        is_streamed,
        repeat,
        per_second=len(timed) / seconds,
        latency_ms=statistics.median(one.latency_ms for one in timed),
        first_token_ms=statistics.median(one.first_token_ms for one in timed),
        server_cpu_ms=1000 * cpu / len(timed),
    )
    return cell, [answers[number].usage for number in sorted(answers)]


def measure(model: Path | None, concurrencies: Sequence[int], repeats: int) -> list[Cell]:
    cells: list[Cell] = []
    num_requests = NUM_REQUESTS_OF_REAL if model else NUM_REQUESTS
    with tempfile.TemporaryDirectory() as folder, tqdm(total=repeats * len(concurrencies) * 6) as bar:
        network = model or make_network(Path(folder) / "network")
        homes = [Path(folder) / name for name in ("ours", "theirs")]
        for home in homes:
            home.mkdir()
        with our_server(network, homes[0]) as ours, their_server(network, homes[1]) as theirs:
            for repeat in range(repeats):
                for concurrency in concurrencies:
                    for is_streamed in (False, True):
                        asked = [(ours, OURS), (theirs, THEIRS), (theirs, WITH_LOGPROBS)]
                        tokens = []
                        for server, name in asked[repeat % 3 :] + asked[: repeat % 3]:
                            cell, usages = asyncio.run(
                                measure_cell(server, name, concurrency, is_streamed, repeat, num_requests[concurrency])
                            )
                            cells.append(cell)
                            tokens.append(usages)
                            bar.update()
                        require_equal_work(tokens)
    return cells


def require_equal_work(usages: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Of each server's requests, the tokens of prompt and answer. Raises RuntimeError where these differ, added up, by
    more than a fiftieth."""
    for kind, tokens in zip(("prompts", "answers"), zip(*map(_added_up, usages), strict=True), strict=True):
        if max(tokens) - min(tokens) > MAX_DIFFERENCE * max(tokens):
            raise RuntimeError(f"the servers did not do the same work: {kind} of {tokens} tokens")


def _added_up(usages: Sequence[tuple[int, int]]) -> tuple[int, int]:
    prompts, answers = zip(*usages, strict=True)
    return sum(prompts), sum(answers)


# -------------------------------------------------------------------------------------------------- report


def report(cells: Sequence[Cell]) -> None:
    print("| request | at once | server | requests/s | latency, ms | first token, ms | server, CPU ms |")
    print("|---|---|---|---|---|---|---|")
    measured = sorted({cell.concurrency for cell in cells})
    for is_streamed in (False, True):
        for concurrency in measured:
            for name in (OURS, THEIRS, WITH_LOGPROBS):
                found = select(cells, name, concurrency, is_streamed)
                row = [spread([getattr(cell, field) for cell in found], digits) for field, digits in COLUMNS]
                kind = "streamed" if is_streamed else "plain"
                print(f"| {kind} | {concurrency} | {name} | " + " | ".join(row) + " |")
    for is_streamed in (False, True):
        kind = "streamed" if is_streamed else "plain"
        for concurrency in measured:
            for against in (THEIRS, WITH_LOGPROBS):
                print(f"{kind}, {concurrency} at once: {verdict(cells, concurrency, is_streamed, against)}")


def verdict(cells: Sequence[Cell], concurrency: int, is_streamed: bool, against: str) -> str:
    """Ours against theirs, and whether the goal is met, which is held against the server without logprobs."""
    if concurrency == 1:
        more = paired(cells, 1, is_streamed, lambda ours, theirs: ours.latency_ms - theirs.latency_ms, against)
        told, goal = f"{spread(more, 2)} ms more than {against}", f"under {MORE_MS_GOAL:g}"
        is_met = statistics.median(more) < MORE_MS_GOAL
    else:
        ratios = paired(cells, concurrency, is_streamed, _requests_ratio, against)
        told, goal = f"{spread(ratios, 3)} of the requests/s of {against}", f"{RATIO_GOAL}"
        is_met = statistics.median(ratios) >= RATIO_GOAL
    return f"{told} (goal {goal}: {'met' if is_met else 'not met'})" if against == THEIRS else told


COLUMNS = (("per_second", 1), ("latency_ms", 1), ("first_token_ms", 1), ("server_cpu_ms", 1))


def select(cells: Sequence[Cell], name: str, concurrency: int, is_streamed: bool) -> list[Cell]:
    """The cells of one row, by repeat."""
    wanted = (name, concurrency, is_streamed)
    return [cell for cell in cells if (cell.server, cell.concurrency, cell.is_streamed) == wanted]


def _requests_ratio(ours: Cell, theirs: Cell) -> float:
    return ours.per_second / theirs.per_second


def paired(
    cells: Sequence[Cell],
    concurrency: int,
    is_streamed: bool,
    compare: Callable[[Cell, Cell], float],
    against: str,
) -> list[float]:
    """Ours against theirs, repeat by repeat."""
    ours, theirs = (select(cells, name, concurrency, is_streamed) for name in (OURS, against))
    return [compare(one, other) for one, other in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, help="a network's folder; default: a small random one")
    parser.add_argument("--at-once", type=int, nargs="+", default=list(CONCURRENCY), choices=CONCURRENCY)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="also write every cell here")
    arguments = parser.parse_args()
    measured = measure(arguments.model, arguments.at_once, arguments.repeats)
    report(measured)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cell) for cell in measured], indent=1))
