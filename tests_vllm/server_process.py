"""python serve.py --engine vllm as a process of its own, with vLLM's process under it."""

from __future__ import annotations

import os
import re
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

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("STEPAGENT_")}
ENVIRONMENT |= {"PYTHONUNBUFFERED": "1"}


class ServerProcess:
    """What a test may do to it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said = ""
        self.url = ""

    def wait_until_serving(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"listening +(http://\S+)/v1", line):
                self.url = found[1]
                return
        raise AssertionError(f"it ended before it served:\n{self.said}")

    def engine_process(self) -> int:
        """vLLM's process: the one child of the server that spawn made for it."""
        wait_until(lambda: bool(engine_processes_of(self.process.pid)), 60)
        (engine,) = engine_processes_of(self.process.pid)
        return engine

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = httpx.post(f"{self.url}{path}", json=body, timeout=60)
        assert response.is_success, response.text
        return response.json()


@contextmanager
def serving(state: Path, *arguments: str) -> Iterator[ServerProcess]:
    """A server that was just started; the caller waits for it."""
    command = [sys.executable, "serve.py", "--engine", "vllm", "--model", str(NOVICE_FOLDER), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--state", str(state), "--threads", "1", *arguments],
        cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield ServerProcess(process)
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
