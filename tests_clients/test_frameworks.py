"""Agent frameworks, as their documentation says to use them: only the base URL is ours."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel

from tests_clients.conftest import MODEL, Server, call, require_one_chain


class Place(BaseModel):
    """Where something is."""

    name: str


FOUND = '{"name": "shelf"}'

# ---------------------------------------------------------------------------------------------- openai-agents


def agents_model(server: Server, kind: str) -> Any:
    from agents import OpenAIChatCompletionsModel, OpenAIResponsesModel, set_tracing_disabled
    from openai import AsyncOpenAI

    set_tracing_disabled(True)
    model = {"chat": OpenAIChatCompletionsModel, "responses": OpenAIResponsesModel}[kind]
    return model(model=MODEL, openai_client=AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none"))


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents_runs_tools(server: Server, kind: str) -> None:
    from agents import Agent, ModelSettings, Runner, function_tool

    @function_tool
    def look(at: str) -> str:
        """Look at a place."""
        return f"There is a globe on the {at}."

    server.says(call("look", at="shelf"), "A globe.")
    settings = ModelSettings(store=False, parallel_tool_calls=False)
    agent = Agent(
        "finder", instructions="Find it.", tools=[look], model=agents_model(server, kind), model_settings=settings
    )
    result = Runner.run_sync(agent, "What is on the shelf?")
    assert result.final_output == "A globe."
    require_one_chain(server.steps, 2)


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents_hands_off(server: Server, kind: str) -> None:
    from agents import Agent, Runner

    model = agents_model(server, kind)
    seller = Agent("seller", instructions="Sell things to people.", model=model)
    greeter = Agent("greeter", instructions="Greet people.", handoffs=[seller], model=model)
    server.says(call("transfer_to_seller"), "It costs ten.")
    result = Runner.run_sync(greeter, "What does the miniature globe on the shelf cost, please?")
    assert result.final_output == "It costs ten."
    require_one_chain(server.steps, 2, num_rewritten=1)
    assert [step["change"] for step in server.steps] in ([None, "system"], [None, "history"])


@pytest.mark.parametrize("kind", ["chat", "responses"])
def test_openai_agents_with_a_clock_and_an_output_type(server: Server, kind: str) -> None:
    from agents import Agent, Runner, function_tool

    hours = iter(range(100))

    @function_tool
    def look(at: str) -> str:
        """Look at a place."""
        return "A globe."

    def instructions(context: Any, agent: Any) -> str:
        return f"It is {next(hours)} o'clock."

    server.says(call("look", at="shelf"), FOUND)
    agent = Agent(
        "finder", instructions=instructions, tools=[look], output_type=Place, model=agents_model(server, kind)
    )
    result = Runner.run_sync(agent, "Where is the miniature globe that I am looking for?")
    assert result.final_output == Place(name="shelf")
    require_one_chain(server.steps, 2, num_rewritten=1)


# ------------------------------------------------------------------------------------- LangChain, LangGraph


def chat_openai(server: Server, **options: Any) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key="none", **options)


def langchain_look() -> Any:
    from langchain_core.tools import tool

    @tool
    def look(at: str) -> str:
        """Look at a place."""
        return f"There is a globe on the {at}."

    return look


@pytest.mark.parametrize("options", [{}, {"use_responses_api": True}, {"streaming": True}])
def test_langchain_create_agent(server: Server, options: dict[str, Any]) -> None:
    from langchain.agents import create_agent

    server.says(call("look", at="shelf"), "A globe.")
    agent = create_agent(chat_openai(server, **options), tools=[langchain_look()], system_prompt="Find it.")
    result = agent.invoke({"messages": [{"role": "user", "content": "What is on the shelf?"}]})
    assert result["messages"][-1].text == "A globe."
    require_one_chain(server.steps, 2)


def test_langchain_structured_output_by_function_calling(server: Server) -> None:
    server.says(call("Place", name="shelf"))
    model = chat_openai(server).with_structured_output(Place, method="function_calling")
    assert model.invoke("Where is it?") == Place(name="shelf")


def test_langchain_provider_strategy_beside_tools(server: Server) -> None:
    from langchain.agents import create_agent
    from langchain.agents.structured_output import ProviderStrategy

    server.says(call("look", at="shelf"), FOUND)
    agent = create_agent(chat_openai(server), tools=[langchain_look()], response_format=ProviderStrategy(Place))
    result = agent.invoke({"messages": [{"role": "user", "content": "Where is the globe?"}]})
    assert result["structured_response"] == Place(name="shelf")
    require_one_chain(server.steps, 2)


def test_langgraph_prebuilt_agent_with_memory(server: Server) -> None:
    from langchain.agents import create_agent
    from langgraph.checkpoint.memory import MemorySaver

    server.says(call("look", at="shelf"), "A globe.", "You are welcome.")
    agent = create_agent(chat_openai(server), tools=[langchain_look()], checkpointer=MemorySaver())
    thread: Any = {"configurable": {"thread_id": "one"}}
    for words in ("What is on the shelf?", "Thank you."):
        result = agent.invoke({"messages": [{"role": "user", "content": words}]}, thread)
    assert result["messages"][-1].text == "You are welcome."
    require_one_chain(server.steps, 3)


# ------------------------------------------------------------------------------------------------ pydantic-ai


def pydantic_model(server: Server, kind: str) -> Any:
    from pydantic_ai.models import openai as models
    from pydantic_ai.providers.openai import OpenAIProvider

    model = {"chat": models.OpenAIChatModel, "responses": models.OpenAIResponsesModel}[kind]
    return model(MODEL, provider=OpenAIProvider(base_url=f"{server.url}/v1", api_key="none"))


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("output", ["tool", "native"])
def test_pydantic_ai(server: Server, kind: str, output: str) -> None:
    from pydantic_ai import Agent, NativeOutput

    answer = call("final_result", name="shelf") if output == "tool" else FOUND
    server.says(call("look", at="shelf"), answer)
    output_type: Any = Place if output == "tool" else NativeOutput(Place)
    agent = Agent(pydantic_model(server, kind), output_type=output_type, system_prompt="Find it.")

    @agent.tool_plain
    def look(at: str) -> str:
        """Look at a place."""
        return "A globe."

    assert agent.run_sync("Where is it?").output == Place(name="shelf")
    require_one_chain(server.steps, 2)


def test_pydantic_ai_streams(server: Server) -> None:
    from pydantic_ai import Agent

    server.says("A globe, I think.")

    async def ask() -> str:
        async with Agent(pydantic_model(server, "chat")).run_stream("What is it?") as result:
            return await result.get_output()

    assert asyncio.run(ask()) == "A globe, I think."


# ---------------------------------------------------------------------------------------- smolagents, llm


def test_smolagents_tool_calling_agent(server: Server) -> None:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    @tool
    def look(at: str) -> str:
        """Look at a place.

        Args:
            at: The place.
        """
        return f"There is a globe on the {at}."

    server.says(call("look", at="shelf"), call("final_answer", answer="A globe."))
    model = OpenAIServerModel(model_id=MODEL, api_base=f"{server.url}/v1", api_key="none")
    agent = ToolCallingAgent(tools=[look], model=model, verbosity_level=0)
    assert agent.run("What is on the shelf?") == "A globe."
    require_one_chain(server.steps, 2, num_rewritten=1)


def test_smolagents_code_agent(server: Server) -> None:
    from smolagents import CodeAgent, OpenAIServerModel

    server.says(
        "Thought: I compute it first.\n<code>\nprint(6 * 7)\n</code>",
        "Thought: That is the answer that was wanted.\n<code>\nfinal_answer(42)\n</code>",
    )
    model = OpenAIServerModel(model_id=MODEL, api_base=f"{server.url}/v1", api_key="none")
    assert CodeAgent(tools=[], model=model, verbosity_level=0).run("What is 6 times 7?") == 42
    require_one_chain(server.steps, 2, num_rewritten=1)


def test_llm(server: Server, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n  supports_tools: true\n"
        "  supports_schema: true\n"
    )
    import llm

    def look(at: str) -> str:
        """Look at a place."""
        return "A globe."

    model = llm.get_model("ours")
    model.key = "none"
    server.says(call("look", at="shelf"), "A globe.", FOUND)
    assert model.chain("What is it?", tools=[look]).text() == "A globe."
    require_one_chain(server.steps, 2)
    assert model.prompt("Where is it?", schema=Place).text() == FOUND


# ------------------------------------------------------------------------------------------------- anthropic


def test_anthropic_with_tools(server: Server) -> None:
    from anthropic import Anthropic

    look: Any = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
    search: Any = {"type": "web_search_20250305", "name": "web_search"}
    client = Anthropic(base_url=server.url, api_key="none")
    messages: Any = [{"role": "user", "content": "What is on the shelf?"}]
    server.says(f"Let me look.\n{call('look', at='shelf')}", "A globe.")
    asked: Any = {"model": MODEL, "max_tokens": 500, "system": "Find it.", "tools": [look, search]}
    first = client.messages.create(messages=messages, **asked)
    assert (first.stop_reason, [block.type for block in first.content]) == ("tool_use", ["text", "tool_use"])
    made: Any = first.content[1]
    result = {"type": "tool_result", "tool_use_id": made.id, "content": "A globe."}
    messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = client.messages.create(messages=messages, **asked)
    assert (second.stop_reason, second.content[0].text) == ("end_turn", "A globe.")
    require_one_chain(server.steps, 2)
    assert client.messages.count_tokens(model=MODEL, messages=messages, system="Find it.").input_tokens > 20


def test_anthropic_streams(server: Server) -> None:
    from anthropic import Anthropic

    look: Any = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
    server.says(f"Let me look.\n{call('look', at='shelf')}")
    messages: Any = [{"role": "user", "content": "What is on the shelf?"}]
    client = Anthropic(base_url=server.url, api_key="none")
    with client.messages.stream(model=MODEL, max_tokens=500, messages=messages, tools=[look]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "Let me look."
    made: Any = final.content[1]
    assert (made.name, made.input, final.stop_reason) == ("look", {"at": "shelf"}, "tool_use")


def test_anthropic_lists_models(server: Server) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=server.url, api_key="none")
    names = [model.id for model in client.models.list()]
    assert MODEL in names
    model = client.models.retrieve(MODEL)
    assert (model.type, model.display_name) == ("model", MODEL)
    assert abs(datetime.now(UTC) - model.created_at) < timedelta(days=1)
    type(model).model_validate(model.model_dump())  # the client itself checks nothing
