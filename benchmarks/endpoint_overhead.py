"""What our endpoint adds to a request over the bare engine call, the durable log on.

    python -m benchmarks.endpoint_overhead [--repeats 5] [--json FILE]

The engine is scripted (16 tokens, given out at once), so that nothing but the endpoint is measured: HTTP, stitching,
chat template, parsing, log. The server runs in a process of its own, the client in another, with keep-alive and no
client library. Bare calls, plain and streamed requests, and the log with synchronous FULL and NORMAL take turns in
every repeat. The table gives medians over the repeats and, in brackets, their range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.plain_http import PlainClient

CONCURRENCY = (1, 8, 32)
NUM_REQUESTS = {1: 150, 8: 400, 32: 800}
NUM_TOKENS = 16
GOAL_MS, GOAL_PER_SECOND = 3.0, 500.0
BODY: dict[str, Any] = {
    "model": "scripted",
    "messages": [{"role": "user", "content": "Order 7000 has come in: the miniature barometer for Bruno Wilde."}],
    "tools": [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
        for name in ("look_up_customer", "check_item", "pick_item")
    ],
}


@dataclass(frozen=True, slots=True)
class Speed:
    """One round: median latency, and requests a second."""

    latency_ms: float
    per_second: float


def serve(pipe: Connection, synchronous: str) -> None:
    """The child process: a server with a scripted engine; answers `bare` on the pipe with the bare calls' speed."""
    import uvloop

    uvloop.run(_serve(pipe, synchronous))


async def _serve(pipe: Connection, synchronous: str) -> None:
    from policies.chat.chat_protocol import ChatProtocol
    from runtime.http.app import create_app
    from runtime.http.shutdown import server_of
    from runtime.startup import listen
    from tests.scripted_engine import ScriptedEngine
    from tests.serving import LIMITS, NOVICE_FOLDER, parts_of

    protocol = ChatProtocol.load(NOVICE_FOLDER)
    words = (*protocol.encode("x" * (NUM_TOKENS - 1)), protocol.stop_token_ids[0])
    engine = ScriptedEngine(lambda prompt, adapter: words, LIMITS)
    parts = parts_of(engine, protocol, Path(tempfile.mkdtemp()), served_name="scripted")
    writer = parts.log._writer
    assert writer is not None
    writer.connection.execute(f"PRAGMA synchronous = {synchronous}")
    sock = listen("127.0.0.1", 0)
    server = server_of(create_app(parts), parts.cutting)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    pipe.send(sock.getsockname()[1])
    while (command := await asyncio.to_thread(pipe.recv)) != "stop":
        pipe.send(await _bare(engine, protocol, command))
    server.should_exit = True
    await serving


async def _bare(engine: Any, protocol: Any, concurrency: int) -> Speed:
    from policies.types import SamplingParams

    prompt = protocol.render(BODY["messages"])
    sampling = SamplingParams(stop_token_ids=protocol.stop_token_ids)

    async def call() -> None:
        async for _ in engine.generate(prompt, sampling, None):
            pass

    return await timed([call] * concurrency, NUM_REQUESTS[concurrency])


async def timed(callers: list[Callable[[], Awaitable[object]]], num_calls: int) -> Speed:
    """Each caller calls, waits and calls again, until all calls are made."""
    left, latencies = iter(range(num_calls)), []

    async def keep_calling(call: Callable[[], Awaitable[object]]) -> None:
        for _ in left:
            began = time.perf_counter()
            await call()
            latencies.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(keep_calling(call) for call in callers))
    return Speed(statistics.median(latencies), num_calls / (time.perf_counter() - began))


async def request_speed(port: int, concurrency: int, stream: bool) -> Speed:
    clients = [PlainClient(port) for _ in range(concurrency)]
    body = {**BODY, "stream": stream}
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda client=client: client.post("/v1/chat/completions", body) for client in clients
    ]
    await asyncio.gather(*(call() for call in calls))  # connect, and warm up
    speed = await timed(calls, NUM_REQUESTS[concurrency])
    for client in clients:
        await client.close()
    return speed


def measure(repeats: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    servers: dict[str, tuple[Connection, int]] = {}
    for synchronous in ("FULL", "NORMAL"):
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, synchronous), daemon=True).start()
        servers[synchronous] = (ours, ours.recv())
    rows: dict[tuple[str, str, int], list[Speed]] = {}
    with tqdm(total=repeats * len(CONCURRENCY) * 5) as bar:
        for _ in range(repeats):
            for concurrency in CONCURRENCY:
                full = servers["FULL"][0]
                full.send(concurrency)
                rows.setdefault(("bare engine call", "", concurrency), []).append(full.recv())
                bar.update()
                for synchronous, (_, port) in servers.items():
                    for stream in (False, True):
                        speed = asyncio.run(request_speed(port, concurrency, stream))
                        name = "streamed" if stream else "plain"
                        rows.setdefault((name, synchronous, concurrency), []).append(speed)
                        bar.update()
    for pipe, _ in servers.values():
        pipe.send("stop")
    return [_row(*key, speeds) for key, speeds in sorted(rows.items(), key=lambda item: (item[0][2], item[0]))]


def _row(name: str, synchronous: str, concurrency: int, speeds: list[Speed]) -> dict[str, Any]:
    latencies, rates = [s.latency_ms for s in speeds], [s.per_second for s in speeds]
    return {
        "request": name,
        "synchronous": synchronous,
        "concurrency": concurrency,
        "latency_ms": statistics.median(latencies),
        "latency_ms_range": [min(latencies), max(latencies)],
        "per_second": statistics.median(rates),
        "per_second_range": [min(rates), max(rates)],
    }


def report(rows: list[dict[str, Any]]) -> None:
    print("| request | synchronous | concurrency | median latency, ms | requests/s |\n|---|---|---|---|---|")
    for row in rows:
        low, high = row["latency_ms_range"]
        slow, fast = row["per_second_range"]
        print(
            f"| {row['request']} | {row['synchronous']} | {row['concurrency']} | {row['latency_ms']:.2f} "
            f"({low:.2f}-{high:.2f}) | {row['per_second']:.0f} ({slow:.0f}-{fast:.0f}) |"
        )
    found = {(row["request"], row["synchronous"], row["concurrency"]): row for row in rows}
    bare = found["bare engine call", "", 1]["latency_ms"]
    for name in ("plain", "streamed"):
        added = found[name, "FULL", 1]["latency_ms"] - bare
        verdict = "met" if added < GOAL_MS else "not met"
        print(f"{name}, concurrency 1: {added:.2f} ms added (goal: under {GOAL_MS:g}: {verdict})")
        rate = found[name, "FULL", 32]["per_second"]
        verdict = "met" if rate >= GOAL_PER_SECOND else "not met"
        print(f"{name}, concurrency 32: {rate:.0f} logged requests/s (goal: {GOAL_PER_SECOND:g}: {verdict})")
        cost = found[name, "FULL", 1]["latency_ms"] - found[name, "NORMAL", 1]["latency_ms"]
        print(f"{name}: synchronous=FULL costs {cost:.2f} ms a request at concurrency 1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    arguments = parser.parse_args()
    table = measure(arguments.repeats)
    report(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))
