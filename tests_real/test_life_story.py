"""A team's own path with a real model: fetched, served, asked, taught by ten transcripts, and its adapter swapped in.

SmolLM2-135M on the embedded engine. What a cycle of so few gradient steps teaches is not asked here: that it comes to
an end with a decision, and that a trained adapter is verified, acts and is taken back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from learner.objectives.objectives import Likelihood, action_sequence
from learner.options import TrainingOptions
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol
from policies.types import ToolCall, ToolCalls

ROOT = Path(__file__).parent.parent
ENDINGS = ("promoted", "refused", "no_lesson", "failed")
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CITIES = ("Oslo", "Cairo", "Lima", "Paris", "Quito", "Delhi", "Accra", "Seoul", "Perth", "Turin")


@pytest.fixture(scope="module")
def folder() -> Path:
    command = [sys.executable, "-m", "policies.fetch", "smollm2-135m"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return Path(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def url(folder: Path, state: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    learner = ("objectives=sft", "min-gradient-steps=2", "epochs=1", "num-samples=1")
    arguments = [part for option in learner for part in ("--learner-arg", option)]
    command = [sys.executable, "serve.py", "--model", str(folder), "--port", str(port), "--state", str(state)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--max-context", "2048", "--learn-every", "0", *arguments],
        cwd=ROOT,
        env=environment,
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
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def transcript(city: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}
    return {
        "tools": [WEATHER],
        "messages": [
            {"role": "user", "content": f"Do I need an umbrella in {city}?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "Rain."},
            {"role": "assistant", "content": f"Yes: it rains in {city}."},
        ],
    }


def test_it_answers(client: OpenAI, folder: Path) -> None:
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=folder.name, messages=question, temperature=0, max_tokens=24)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_required_tool_is_called_with_the_arguments_that_were_asked_for(client: OpenAI, folder: Path) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model=folder.name, messages=question, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=60
    )
    (call,) = answer.choices[0].message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})  # type: ignore[union-attr]


def test_ten_transcripts_are_imported_and_a_short_cycle_comes_to_its_end(url: str, tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    path.write_text("".join(json.dumps(transcript(city)) + "\n" for city in CITIES))
    command = [sys.executable, "-m", "learner", "import", str(path), "--url", url]
    imported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "10 imported, 0 known already, 0 refused" in imported.stdout
    cycle = httpx.post(f"{url}/learner/cycles", json={}, timeout=60).raise_for_status().json()
    deadline = time.monotonic() + 400
    while cycle["stage"] not in ENDINGS:
        assert time.monotonic() < deadline, cycle
        time.sleep(1)
        cycle = httpx.get(f"{url}/learner/cycles/{cycle['id']}", timeout=60).raise_for_status().json()
    assert cycle["stage"] in ("promoted", "refused"), cycle["message"]
    assert cycle["decisions"], "the gate has judged a candidate"


def test_a_trained_adapter_is_verified_acts_and_is_taken_back(
    url: str, client: OpenAI, folder: Path, tmp_path: Path
) -> None:
    protocol = ChatProtocol.load(folder)
    question: Any = [{"role": "user", "content": "Do I need an umbrella in Oslo?"}]
    prompt, action = protocol.completion_of(
        question, ToolCalls((ToolCall("c", "get_weather", {"city": "Oslo"}),)), [WEATHER]
    )
    trainer = Trainer(folder, None, TrainingOptions(min_gradient_steps=3, lr=1e-3))
    trainer.train(Likelihood("sft", (action_sequence(prompt, action, ("one",)),)))
    trainer.save(tmp_path / "adapter", [prompt], "# A test\n")
    body = {"path": str(tmp_path / "adapter"), "reason": "a test"}
    adapter = httpx.post(f"{url}/adapters", json=body, timeout=120).raise_for_status().json()
    assert adapter["state"] == "verified"
    before = httpx.get(f"{url}/adapters", timeout=60).json()["data"]
    was_acting = next((each["name"] for each in before if each["is_acting"]), "base")
    httpx.post(f"{url}/adapters/{adapter['name']}/promote", json={}, timeout=60).raise_for_status()
    assert _acting(client, folder) == adapter["name"]
    httpx.post(f"{url}/adapters/rollback", json={}, timeout=60).raise_for_status()
    assert _acting(client, folder) == was_acting


def _acting(client: OpenAI, folder: Path) -> str:
    question: Any = [{"role": "user", "content": f"Good morning, it is {time.time()}."}]
    raw = client.chat.completions.with_raw_response.create(model=folder.name, messages=question, max_tokens=4)
    return raw.headers["x-adapter"]
