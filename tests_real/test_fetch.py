"""The model that everybody can have: brought from the package index, converted, served by the embedded engine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from policies.chat.chat_protocol import ChatProtocol
from policies.chat.grammars import call_or_answer_grammar, tool_call_grammar
from policies.types import FinalAnswer, FinishReason, Message, SamplingParams, ToolCalls, ToolSchema
from runtime.engines.embedded.engine import EmbeddedEngine

ROOT = Path(__file__).parent.parent
WEATHER: ToolSchema = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


def fetched(*arguments: str, cache: Path) -> tuple[Path, float]:
    """The folder that the command prints, and the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "policies.fetch", "smollm2-135m", *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return Path(run.stdout.splitlines()[-1]), time.monotonic() - began


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(cache: Path) -> Path:
    return fetched(cache=cache)[0]


@pytest.fixture(scope="module")
def protocol(folder: Path) -> ChatProtocol:
    return ChatProtocol.load(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path, protocol: ChatProtocol) -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(folder, tokenizer=protocol.tokenizer, device="cpu", num_threads=1)
    yield engine
    await engine.close()


async def said(
    engine: EmbeddedEngine, protocol: ChatProtocol, prompt: tuple[int, ...], grammar: str | None = None
) -> tuple[int, ...]:
    sampling = SamplingParams(max_tokens=48, temperature=0, stop_token_ids=protocol.stop_token_ids, grammar=grammar)
    return tuple([token.token_id async for token in engine.generate(prompt, sampling, None)])


async def test_fetching_again_is_quick_and_prints_the_same(folder: Path, cache: Path) -> None:
    again, seconds = fetched(cache=cache)
    assert again == folder == cache / "stepagent" / "models" / "smollm2-135m"
    assert seconds < 10.0
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["smollm2-135m"], "nothing else is left behind"


async def test_it_answers_a_question(engine: EmbeddedEngine, protocol: ChatProtocol) -> None:
    question: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]
    action = protocol.parse(await said(engine, protocol, protocol.render(question)))
    assert isinstance(action, FinalAnswer)
    assert "Paris" in action.text


async def test_it_calls_a_tool_that_is_required(engine: EmbeddedEngine, protocol: ChatProtocol) -> None:
    question: list[Message] = [{"role": "user", "content": "What is the weather in Paris?"}]
    prompt = protocol.render(question, (WEATHER,))
    grammar = tool_call_grammar(protocol, (WEATHER,))
    action = protocol.parse(await said(engine, protocol, prompt, grammar), FinishReason.STOP, (WEATHER,))
    assert isinstance(action, ToolCalls)
    assert [(call.name, call.arguments) for call in action.calls] == [("get_weather", {"city": "Paris"})]


async def test_with_a_schema_beside_tools_it_ends_and_is_read(engine: EmbeddedEngine, protocol: ChatProtocol) -> None:
    question: list[Message] = [{"role": "user", "content": "Which city is the capital of France? Answer in JSON."}]
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    grammar = call_or_answer_grammar(protocol, (WEATHER,), schema)
    completion = await said(engine, protocol, protocol.render(question, (WEATHER,)), grammar)
    assert completion[-1] in protocol.stop_token_ids, "a closed schema does not run on to the limit"
    action = protocol.parse(completion, FinishReason.STOP, (WEATHER,))
    assert isinstance(action, ToolCalls) or "city" in action.text
