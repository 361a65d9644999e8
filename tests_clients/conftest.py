"""The server that all clients speak to, and what it logged."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parent.parent
SERVER_PYTHON = os.environ.get("SERVER_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
MODEL = "novice"


def call(name: str, /, **arguments: Any) -> str:
    """A call as the served model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@dataclass(frozen=True)
class Server:
    url: str

    def says(self, *texts: str) -> None:
        """What is said next, one text a step."""
        self._post("/script", {"says": texts})

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What was logged since `says`."""
        with urlopen(f"{self.url}/steps") as answer:
            return json.load(answer)

    def _post(self, path: str, body: dict[str, Any]) -> None:
        headers = {"content-type": "application/json"}
        urlopen(Request(f"{self.url}{path}", json.dumps(body).encode(), headers)).close()


def require_one_chain(steps: Sequence[dict[str, Any]], num_steps: int, num_rewritten: int = 0) -> None:
    """All steps are one episode, each stands on the one before, and all but a few on its very tokens."""
    assert len(steps) == num_steps, steps
    assert len({step["episode_id"] for step in steps}) == 1, steps
    assert [step["index"] for step in steps] == list(range(num_steps)), steps
    rewritten = [step for step in steps[1:] if not step["is_token_exact"]]
    assert len(rewritten) <= num_rewritten, rewritten


@pytest.fixture(scope="session")
def running() -> Iterator[Server]:
    command = [SERVER_PYTHON, "-m", "tests_clients.scripted_server"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """It is found by every library that reads OpenAI's variables of the environment."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
    monkeypatch.setenv("OPENAI_API_BASE", f"{running.url}/v1")
    running.says()
    return running
