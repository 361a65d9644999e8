"""python serve.py with a real model, as a process of its own, and what both engines must do with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.cycle_stages import WEATHER

ROOT = Path(__file__).parent.parent


@contextmanager
def serving(python: str | Path, model: Path, state: Path, arguments: Sequence[str]) -> Iterator[str]:
    """Its URL, up to and with /v1."""
    command = [str(python), "serve.py", "--model", str(model), "--port", "0", "--state", str(state), *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STEPAGENT_")}
    with subprocess.Popen(
        [*command, "--max-context", "2048", "--learn-every", "0"],
        cwd=ROOT,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if line.startswith("listening"):
                    break
            else:
                raise AssertionError("".join(said))
            yield line.split()[1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.communicate(timeout=60)


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=180)


def answer_to(client: OpenAI, model: str, question: str) -> str:
    messages: Any = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=24)
    return answer.choices[0].message.content or ""


def required_call(client: OpenAI, model: str) -> tuple[str, Any]:
    """Name and arguments of the tool that it has to call."""
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model=model, messages=messages, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=60
    )  # type: ignore[call-overload]
    (call,) = answer.choices[0].message.tool_calls or ()
    return call.function.name, json.loads(call.function.arguments)
