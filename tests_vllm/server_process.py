"""python serve.py --engine vllm as a process of its own, with vLLM's process under it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from tests.serving import NOVICE_FOLDER

MODEL = "novice_model"
QUESTION = "Order 1000 has come in. Please see to it."

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STEPAGENT_")}
ENVIRONMENT |= {"PYTHONUNBUFFERED": "1"}


class ServerProcess:
    """What a test may do to it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.said = ""

    def wait_until_serving(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith("listening"):
                return
        raise AssertionError(f"it ended before it served:\n{self.said}")

    def is_answering(self) -> bool:
        """Anything at all."""
        try:
            return bool(self.get("/health").status_code)
        except httpx.TransportError:
            return False

    def engine_process(self) -> int:
        """vLLM's process: the one child of the server that spawn made for it."""
        wait_until(lambda: bool(engine_processes_of(self.process.pid)), 60)
        (engine,) = engine_processes_of(self.process.pid)
        return engine

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30)

    def post(self, path: str, /, **body: Any) -> dict[str, Any]:
        response = httpx.post(f"{self.url}{path}", json=body, timeout=60)
        assert response.is_success, response.text
        return response.json()

    def answer(self, episode_id: str, **options: Any) -> tuple[str, str]:
        """(adapter, text) of one step with the client's tools, greedy."""
        body: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "tools": [], **options}
        headers = {"x-episode-id": episode_id}
        asked: list[Any] = [{"role": "user", "content": QUESTION}]
        raw = self.client().chat.completions.with_raw_response.create(
            model=MODEL, messages=asked, extra_headers=headers, **body
        )
        return raw.headers["x-adapter"], raw.parse().choices[0].message.content or ""

    def streamed(self, episode_id: str) -> tuple[str, int]:
        """The text of the same step, streamed, and the completion tokens it is said to have."""
        chunks = self.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=24, tools=[],
            stream=True, stream_options={"include_usage": True}, extra_headers={"x-episode-id": episode_id},
        )  # fmt: skip
        text, num_tokens = "", 0
        for chunk in chunks:
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
        return text, num_tokens

    def health(self) -> dict[str, Any]:
        return self.get("/health").json()

    def gauge(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"stepagent_engine_{name} "))

    def states(self, name: str) -> list[str]:
        adapters = {adapter["name"]: adapter for adapter in self.get("/v1/adapters").json()["data"]}
        return [event["state"] for event in adapters[name]["events"]]


@contextmanager
def serving(state: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server that was just started; the caller waits for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "serve.py", "--engine", "vllm", "--model", str(NOVICE_FOLDER), "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--state", str(state), "--threads", "1", *arguments],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield ServerProcess(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()


def engine_processes_of(parent: int) -> list[int]:
    """Processes that run and were spawned for vLLM: of this parent, under Python's spawn or vLLM's own title."""
    return [pid for pid, title in running_children(parent) if "spawn_main" in title or "EngineCor" in title]


def running_children(parent: int) -> Iterator[tuple[int, str]]:
    """(process id, command line)"""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            title = (folder / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if f"\nPPid:\t{parent}\n" in status and "State:\tZ" not in status:
            yield int(folder.name), title


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float) -> float:
    """Wait until something is so; returns how many seconds it took."""
    began = time.monotonic()
    while not is_so():
        assert time.monotonic() - began < timeout_s, "it did not happen in time"
        time.sleep(0.02)
    return time.monotonic() - began
