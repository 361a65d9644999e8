"""What attacks cost: for each, how long a well-behaved client waits meanwhile, and how much memory the server takes.

    python -m benchmarks.attacks [--server CHECKOUT] [--only NAME ...]

`--server` names another checkout of this project whose server is attacked, for a comparison with a release before.
Each attack gets a server of its own with the novice and 1,024 files. One row an attack; the well-behaved client asks
for /health and for one token, and both answers are waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.figures import memory_mib

ROOT = Path(__file__).parent.parent
NUM_FILES = 1024
PATIENCE_S = 60.0
"""After which a client gives up."""
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Server:
    """A server process under attack."""

    process: subprocess.Popen[str]
    port: int
    state: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def memory_mib(self, which: str = "VmRSS") -> float:
        """What the process takes now (VmRSS), or took at most (VmHWM)."""
        return memory_mib(which, self.process.pid)


@contextmanager
def started(checkout: Path, prepare: Callable[[Path], object] | None = None, *options: str) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        if prepare is not None:
            state.mkdir()
            prepare(state)

        def few_files() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_FILES, NUM_FILES))

        process = subprocess.Popen(
            [sys.executable, "serve.py", "--port", "0", "--state", str(state), "--learn-every", "0", *options],
            cwd=checkout, text=True, stdout=subprocess.PIPE, preexec_fn=few_files,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            url = next(line for line in process.stdout if line.startswith("listening")).split()[1]
            server = Server(process, int(url.rsplit(":", 1)[1].split("/")[0]), state)
            good_client(server)  # what is loaded at the first request is no part of an attack
            yield server
        finally:
            process.kill()
            process.wait()


def message(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "novice_model", "messages": [{"role": "user", "content": text}], "tools": [], **more}


def good_client(server: Server) -> float:
    """Seconds until a well-behaved client has its answers; PATIENCE_S where it has none."""
    began = time.monotonic()
    with suppress(httpx.HTTPError), httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        client.get("/health")
        client.post(CHAT, json=message("Hello", max_tokens=1))
        return time.monotonic() - began
    return PATIENCE_S


def worst_while(server: Server, attack: Callable[[], object]) -> float:
    """The longest wait of clients that come one after the other while the attack goes on."""
    thread = threading.Thread(target=attack, daemon=True)
    thread.start()
    time.sleep(0.2)
    worst = good_client(server)
    while thread.is_alive():
        worst = max(worst, good_client(server))
    return worst


# ------------------------------------------------------------------------------------------------- attacks


def half_requests(server: Server) -> tuple[float, str]:
    """1,100 connections that send half of a request's head."""
    with ExitStack() as stack:
        for _ in range(1100):
            with suppress(OSError):
                one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
                one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        return good_client(server), ""


def endless_head(server: Server) -> tuple[float, str]:
    """A header of 60 MB."""
    sent = 0

    def send() -> None:
        nonlocal sent
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as one:
            one.sendall(b"GET /health HTTP/1.1\r\nx: ")
            for _ in range(960):
                one.sendall(b"a" * 65536)
                sent += 65536

    worst = worst_while(server, send)
    return worst, f"{sent / 2**20:.1f} MiB taken"


def large_prompt(server: Server) -> tuple[float, str]:
    """A prompt of 3.8 MB."""
    answers: list[int] = []

    def ask() -> None:
        answers.append(httpx.post(server.url + CHAT, json=message("x" * 3_800_000), timeout=PATIENCE_S).status_code)

    return worst_while(server, ask), f"{answers}"


def web_page(server: Server) -> tuple[float, str]:
    """Forms of another page, and another name for this machine."""
    form = {"content-type": "application/x-www-form-urlencoded", "origin": "http://evil.example"}
    said = [
        httpx.post(f"{server.url}/v1/learner/cycles", headers=form).status_code,
        httpx.post(f"{server.url}/v1/adapters/rollback", headers=form).status_code,
        httpx.get(f"{server.url}/v1/episodes", headers={"host": "evil.example"}).status_code,
    ]
    return good_client(server), f"{said}"


def large_metadata(server: Server) -> tuple[float, str]:
    """60 requests with 3.5 MB of metadata, then a list."""
    body = message("Hello", max_tokens=1, metadata={"text": "m" * 3_500_000})
    for number in range(60):
        httpx.post(server.url + CHAT, json={**body, "seed": number}, timeout=PATIENCE_S)
    size = 0

    def list_all() -> None:
        nonlocal size
        size = len(httpx.get(f"{server.url}/v1/episodes?limit=1000", timeout=PATIENCE_S).content)

    return worst_while(server, list_all), f"a page of {size / 2**20:.1f} MiB"


def long_episode(server: Server) -> tuple[float, str]:
    """Ten requests to one episode of 20,000 steps."""
    body = message("Go on", max_tokens=1, metadata={"episode_id": "long"})

    def go_on() -> None:
        for _ in range(10):
            httpx.post(server.url + CHAT, json=body, timeout=PATIENCE_S)

    return worst_while(server, go_on), ""


def fill_long_episode(checkout: Path) -> Callable[[Path], object]:
    """With the log of that checkout: its columns are its own affair."""
    program = """
import sys
from dataclasses import replace
from pathlib import Path
from runtime.store.episodes import *
from runtime.store.step_log import StepLog
from policies.types import FinalAnswer, FinishReason, SamplingParams
log = StepLog(Path(sys.argv[1]) / "agent.db")
log.append(Episode("long", Actor.POLICY, Purpose.SERVE, "base")).result()
one = Step("s", "long", None, 0, ({"role": "user", "content": "Go on"},), (), tuple(range(50)), (1, 2, 3),
           (-0.1, -0.1, -0.1), SamplingParams(), "base", FinalAnswer("Well."), FinishReason.STOP,
           StopReason.FINAL_ANSWER, (), "d", 1.0, 1.0, 1.0)
for start in range(0, 20000, 1000):
    log.append(*(replace(one, id=f"s{start + n}", conversation_digest=f"d{start + n}") for n in range(1000))).result()
log.close()
"""
    return lambda state: subprocess.run([sys.executable, "-c", program, str(state)], cwd=checkout, check=True)


def held_lock(server: Server) -> tuple[float, str]:
    """Another process holds the database's write lock."""
    other = sqlite3.connect(server.state / "agent.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    answer = httpx.post(server.url + CHAT, json=message("Hello", max_tokens=1), timeout=PATIENCE_S)
    took = time.monotonic() - began
    other.execute("ROLLBACK")
    return took, f"{answer.status_code}"


def flood(server: Server) -> tuple[float, str]:
    """1,500 long requests at once."""

    async def ask_all() -> list[int]:
        limits = httpx.Limits(max_connections=1500)
        async with httpx.AsyncClient(timeout=PATIENCE_S / 2, limits=limits) as client:
            body = message("Hello", max_tokens=400, temperature=2.0)

            async def ask() -> int:
                try:
                    return (await client.post(server.url + CHAT, json=body)).status_code
                except (httpx.HTTPError, OSError):
                    return 0

            return await asyncio.gather(*(ask() for _ in range(1500)))

    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.extend(asyncio.run(ask_all())), daemon=True)
    thread.start()
    time.sleep(5)
    took = good_client(server)
    thread.join()
    return took, ", ".join(f"{statuses.count(status)} x {status or 'none'}" for status in sorted(set(statuses)))


def ending(server: Server) -> tuple[float, str]:
    """SIGTERM with 40 streams: how many are told, and how long it takes."""

    async def stream(client: httpx.AsyncClient) -> str:
        last = ""
        body = message("Hello", stream=True, temperature=2.0, n=8)
        with suppress(httpx.HTTPError):
            async with client.stream("POST", server.url + CHAT, json=body) as answer:
                async for line in answer.aiter_lines():
                    last = line or last
        return "done" if last == "data: [DONE]" else "told" if '"error"' in last else "cut"

    async def all_streams() -> list[str]:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            streams = [asyncio.create_task(stream(client)) for _ in range(40)]
            await asyncio.sleep(1)
            server.process.terminate()
            return await asyncio.gather(*streams)

    began = time.monotonic()
    ends = asyncio.run(all_streams())
    return time.monotonic() - began, ", ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))


ATTACKS: dict[str, Callable[[Server], tuple[float, str]]] = {
    attack.__name__: attack
    for attack in (half_requests, endless_head, large_prompt, web_page, large_metadata, long_episode, held_lock, flood,
                   ending)
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server", type=Path, default=ROOT, help="the checkout whose server is attacked")
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the attacker's own
    print("| attack | a good client waits, s | memory before, MiB | at most, MiB | what else |\n|---|---|---|---|---|")
    for name in options.only:
        prepare = fill_long_episode(options.server) if name == "long_episode" else None
        with started(options.server, prepare) as server:
            before = most = server.memory_mib()
            waits, else_ = ATTACKS[name](server)
            with suppress(OSError, AssertionError):  # where it has ended
                most = server.memory_mib("VmHWM")
            print(f"| {ATTACKS[name].__doc__} | {waits:.2f} | {before:.0f} | {most:.0f} | {else_} |", flush=True)


if __name__ == "__main__":
    main()
