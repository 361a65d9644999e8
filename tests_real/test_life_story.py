"""A team's own path with a real model: fetched, served, asked, taught by ten transcripts, and its adapter swapped in.

SmolLM2-135M on the embedded engine. What a cycle of so few gradient steps teaches is not asked here: that it comes to
an end with a decision, and that a trained adapter is verified, acts and is taken back. Its transcripts have one step
each: what an untrained policy writes at their states, until it is stopped, is most of the cycle's time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from benchmarks.cycle_stages import CITIES, WEATHER, transcript
from learner.objectives.objectives import Likelihood, action_sequence
from learner.options import TrainingOptions
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol
from policies.types import ToolCall, ToolCalls
from runtime.store.learning_log import ENDINGS
from tests_real.server_process import ROOT, answer_to, client_of, required_call, serving

NUM_TRANSCRIPTS = 10
LEARNING = (
    "objectives=sft", "discriminator=false", "implicit-rewards=false", "min-gradient-steps=2", "epochs=1",
    "num-samples=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    learning = [part for option in LEARNING for part in ("--learner-arg", option)]
    with serving(sys.executable, folder, tmp_path_factory.mktemp("state"), learning) as url:
        yield url


@pytest.fixture
def client(url: str) -> OpenAI:
    return client_of(url)


def test_fetching_again_is_quick_and_prints_the_same(folder: Path) -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "policies.fetch", "smollm2-135m"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(again.stdout.splitlines()[-1]) == folder
    assert time.monotonic() - began < 30.0
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert {path.suffix for path in folder.iterdir()} <= {"", ".json", ".jinja", ".safetensors"}, "nothing is left over"


def test_it_answers(client: OpenAI, folder: Path) -> None:
    assert "Paris" in answer_to(client, folder.name, "What is the capital of France?")


def test_a_required_tool_is_called_with_the_arguments_that_were_asked_for(client: OpenAI, folder: Path) -> None:
    assert required_call(client, folder.name) == ("get_weather", {"city": "Paris"})


def test_ten_transcripts_are_imported_and_a_short_cycle_comes_to_its_end(url: str, tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    path.write_text("".join(json.dumps(transcript(city, num_steps=1)) + "\n" for city in CITIES[:NUM_TRANSCRIPTS]))
    command = [sys.executable, "-m", "learner", "import", str(path), "--url", url]
    imported = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "10 imported, 0 known already, 0 refused" in imported.stdout
    cycle = httpx.post(f"{url}/learner/cycles", json={}, timeout=60).raise_for_status().json()
    deadline = time.monotonic() + 450
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
