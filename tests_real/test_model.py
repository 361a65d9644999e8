"""The model that everybody can have, on the embedded engine itself: answers, required calls, schemas beside tools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from policies.chat.chat_protocol import ChatProtocol
from policies.chat.grammars import call_or_answer_grammar, tool_call_grammar
from policies.types import FinalAnswer, FinishReason, Message, SamplingParams, ToolCalls, ToolSchema
from runtime.engines.embedded.engine import EmbeddedEngine

WEATHER: ToolSchema = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
