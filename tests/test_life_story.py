"""The life of a server, told through OpenAI's own client: asked, answered, followed up, judged, looked at."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageFunctionToolCall

from policies.chat.chat_protocol import ChatProtocol
from policies.types import FinalAnswer, ToolCalls
from runtime.agent.loop import RunLimits
from runtime.agent.tools import Toolbox
from runtime.store.episodes import Purpose, StopReason
from runtime.store.keys import KeyRing
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served
from tools.worlds.order_desk import OrderDesk

USER: Any = {"role": "user", "content": "What is on the shelf?"}
LOOK_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
WAIT_TOOL: dict[str, Any] = {"type": "function", "function": {"name": "wait"}}
LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "shelf"}}\n</tool_call>'


@tool
def look(at: str) -> str:
    """Look at a place."""
    return f"There is a globe on the {at}."


def ask(client: OpenAI, *messages: Any, **options: Any) -> ChatCompletion:
    """An answer, held to OpenAI's own type in strict mode."""
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=list(messages) or [USER], **options)
    return ChatCompletion.model_validate_json(raw.http_response.content, strict=True)


def ask_streaming(served: Served, *messages: Any, **options: Any) -> list[ChatCompletionChunk]:
    """The chunks of a streamed answer, each held to OpenAI's own type in strict mode."""
    body = {"model": MODEL, "messages": list(messages) or [USER], "stream": True, **options}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]


def text_of(answer: ChatCompletion, choice: int = 0) -> str:
    return answer.choices[choice].message.content or ""


def call_in(answer: ChatCompletion) -> ChatCompletionMessageFunctionToolCall:
    """The first call that the client is to run."""
    call = (answer.choices[0].message.tool_calls or [None])[0]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    return call


def streamed_text(chunks: list[ChatCompletionChunk], choice: int = 0) -> str:
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == choice)


def episode_of(served: Served, episode_id: str, **options: Any) -> dict[str, Any]:
    return httpx.get(f"{served.url}/v1/episodes/{episode_id}", params=options).raise_for_status().json()


# ------------------------------------------------------------------------------------------------- answering


def test_an_answer_names_its_episode_step_and_adapter(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A globe.")
    raw = served.client().chat.completions.with_raw_response.create(model=MODEL, messages=[USER])
    answer = ChatCompletion.model_validate_json(raw.http_response.content, strict=True)
    assert text_of(answer) == "A globe."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL
    step = served.parts.log.step(raw.headers["x-step-id"])
    assert step is not None
    assert step.action == FinalAnswer("A globe.")
    assert raw.headers["x-episode-id"] == step.episode_id
    assert raw.headers["x-adapter"] == "base"


def test_usage_counts_the_tokens_of_all_steps(serve_scripted: ServeScripted) -> None:
    engine_says = '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'
    served = serve_scripted(engine_says, "A globe.", toolbox=Toolbox([look]))
    answer = ask(served.client())
    steps = served.parts.log.steps(served.parts.log.episodes()[0].id)
    assert len(steps) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(step.prompt_token_ids) for step in steps)
    assert answer.usage.completion_tokens == sum(len(step.completion_token_ids) for step in steps)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_an_answer_is_the_same(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    engine = SayingEngine(protocol, "A brass globe, perhaps.", pause_s=0.02)
    chunks = ask_streaming(serve_scripted(engine=engine))
    assert streamed_text(chunks) == "A brass globe, perhaps."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4, "it came in pieces"


def test_the_usage_chunk_comes_last_and_only_when_asked_for(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A globe.", "A globe.")
    assert all(chunk.usage is None for chunk in ask_streaming(served))
    *others, last = ask_streaming(served, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in others)


def test_openais_client_reads_a_stream_to_its_end(serve_scripted: ServeScripted) -> None:
    client = serve_scripted("A globe.").client()
    with client.chat.completions.stream(model=MODEL, messages=[USER]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "A globe."


async def test_the_asynchronous_client_is_served_side_by_side(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["A globe."] * 8)
    async with served.async_client() as client:
        asked = (client.chat.completions.create(model=MODEL, messages=[USER]) for _ in range(8))
        answers = await asyncio.gather(*asked)
    assert {answer.choices[0].message.content for answer in answers} == {"A globe."}
    assert served.parts.log.counts()["episodes"] == 8


def test_what_was_logged_is_what_the_engine_saw(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    engine = SayingEngine(protocol, LOOK, "A globe.", "A lamp.")
    served = serve_scripted(engine=engine)
    client = served.client()
    first = ask(client, tools=[LOOK_TOOL])
    call = first.choices[0].message.tool_calls
    assert call is not None
    told = [USER, first.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call[0].id, "content": "globe"}]
    second = ask(client, *told, tools=[LOOK_TOOL])
    ask(client, *told, second.choices[0].message.to_dict(), USER, tools=[LOOK_TOOL])
    (episode,) = served.parts.log.episodes()
    steps = served.parts.log.steps(episode.id)
    assert [step.prompt_token_ids for step in steps] == engine.prompts
    for number, step in enumerate(steps[1:]):
        before = steps[number]
        assert step.parent_id == before.id
        told_ids = before.prompt_token_ids + before.completion_token_ids
        assert step.prompt_token_ids[: len(told_ids)] == told_ids
    assert served.parts.log.verify() == []


# ------------------------------------------------------------------------------------------------ client tools


def test_a_call_goes_to_the_client_whole_and_streamed_alike(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(LOOK, LOOK)
    whole = ask(served.client(), tools=[LOOK_TOOL])
    assert whole.choices[0].finish_reason == "tool_calls"
    function = call_in(whole).function
    assert (function.name, json.loads(function.arguments)) == ("look", {"at": "shelf"})
    entries = [choice for chunk in ask_streaming(served, tools=[LOOK_TOOL]) for choice in chunk.choices]
    assert entries[-1].finish_reason == "tool_calls"
    calls = [call for entry in entries for call in entry.delta.tool_calls or []]
    assert calls[0].function is not None
    assert (calls[0].index, calls[0].function.name, calls[0].function.arguments) == (0, "look", function.arguments)


def drive(client: OpenAI, index: int, act: Callable[[Any], Any] | None = None) -> tuple[float, list[str]]:
    """Do a task of the order desk with tools on the client's side. Returns the outcome and the episodes' ids."""
    world = OrderDesk()
    task = world.task("heldout", index)
    episode, episode_ids = world.open(task), []
    messages: list[Any] = list(task.messages)
    tools: Any = [convert_to_openai_tool(each) for each in episode.tools]
    for _ in range(15):
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, tools=tools, temperature=0, metadata={"task": task.id}
        )
        answer = ChatCompletion.model_validate_json(raw.http_response.content, strict=True)
        episode_ids.append(raw.headers["x-episode-id"])
        message = answer.choices[0].message.to_dict()
        results = episode.play(message)
        messages += [message, *results]
        if not results:
            break
    return episode.outcome(), episode_ids


def test_a_client_that_runs_the_tools_is_led_through_whole_tasks(novice_server: Served) -> None:
    client = novice_server.client()
    outcomes = []
    for index in range(8):
        outcome, episode_ids = drive(client, index)
        outcomes.append(outcome)
        assert len(set(episode_ids)) == 1, "all its requests are one episode"
        steps = novice_server.parts.log.steps(episode_ids[0])
        assert len(steps) == len(episode_ids)
        assert [step.index for step in steps] == list(range(len(steps)))
        assert all(step.stop_reason is StopReason.CLIENT_TOOLS for step in steps[:-1])
        episode = novice_server.parts.log.episode(episode_ids[0])
        assert episode is not None
        assert episode.task == f"order_desk/heldout/{index}"
    assert 0 < sum(outcomes) < 8, "a real novice: some tasks it does, some it does not"


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_can_be_required(novice_server: Served, tool_choice: Any) -> None:
    client = novice_server.client()
    answer = ask(client, tools=[LOOK_TOOL, WAIT_TOOL], tool_choice=tool_choice, seed=3, max_tokens=400)
    choice = answer.choices[0]
    # A string of this novice's may outgrow the limit; what must not happen is an answer without a call.
    assert choice.finish_reason in ("tool_calls", "length")
    if choice.finish_reason == "tool_calls":
        assert call_in(answer).function.name in (("look", "wait") if tool_choice == "required" else ("look",))


def test_a_named_tool_is_the_one_that_is_called(novice_server: Served) -> None:
    choice = {"type": "function", "function": {"name": "wait"}}
    answer = ask(novice_server.client(), tools=[LOOK_TOOL, WAIT_TOOL], tool_choice=choice, seed=1)
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call_in(answer).function.name == "wait"


def test_tool_choice_none_keeps_the_tools_in_the_prompt_and_takes_no_call(serve_scripted: ServeScripted) -> None:
    """Without them the prompt would be another one, and a conversation that goes on would lose its beginning."""
    served = serve_scripted(LOOK, "A globe.", LOOK)
    client = served.client()
    first = ask(client, tools=[LOOK_TOOL])
    told = [
        USER,
        first.choices[0].message.to_dict(),
        {"role": "tool", "tool_call_id": call_in(first).id, "content": "?"},
    ]
    second = ask(client, *told, tools=[LOOK_TOOL], tool_choice="none")
    assert text_of(second) == "A globe."
    before, after = served.parts.log.steps(served.parts.log.episodes()[0].id)
    assert after.tools == before.tools
    served_ids = before.prompt_token_ids + before.completion_token_ids
    assert after.prompt_token_ids[: len(served_ids)] == served_ids
    third = ask(client, tools=[LOOK_TOOL], tool_choice="none")
    assert (third.choices[0].finish_reason, third.choices[0].message.tool_calls) == ("stop", None)
    assert text_of(third) == LOOK


@pytest.mark.parametrize("options", [{}, {"tools": []}, {"tools": None}])
def test_an_empty_list_of_tools_is_no_list(serve_scripted: ServeScripted, options: dict[str, Any]) -> None:
    """The server then runs its own tools, as without the field."""
    served = serve_scripted(LOOK, "A globe.", toolbox=Toolbox([look]))
    assert text_of(ask(served.client(), **options)) == "A globe."


@pytest.mark.parametrize("options", [{}, {"tools": []}])
def test_without_any_tools_an_answer_is_one_step(serve_scripted: ServeScripted, options: dict[str, Any]) -> None:
    """It was sixteen of "there is no tool", and `max_tokens` bounded each of them."""
    served = serve_scripted(LOOK, LOOK, toolbox=Toolbox())
    answer = ask(served.client(), max_tokens=12, **options)
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12
    assert served.parts.log.counts()["steps"] == 1


def test_a_request_says_whose_tools_it_wants(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(LOOK, "A globe.", "I see nothing.", toolbox=Toolbox([look], is_default=False))
    client = served.client()
    assert text_of(ask(client, extra_headers={"x-stepagent-tools": "server"})) == "A globe."
    assert text_of(ask(client)) == "I see nothing."
    assert [bool(step.tools) for step in served.parts.log.steps_since(None, 10)] == [True, True, False]
    with pytest.raises(BadRequestError, match="x-stepagent-tools: 'mine' is not one of server, client"):
        ask(client, extra_headers={"x-stepagent-tools": "mine"})


def test_max_tokens_bounds_the_whole_of_a_run(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(LOOK, LOOK, LOOK, "A globe.", toolbox=Toolbox([look]))
    answer = ask(served.client(), max_tokens=90)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 90
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_the_server_ran_are_not_told_as_the_clients_where_a_limit_ends_the_run(
    serve_scripted: ServeScripted, stream: bool
) -> None:
    """Sent whole, the answer had `tool_calls` of a tool that the client does not have; streamed it had none."""
    served = serve_scripted(LOOK, toolbox=Toolbox([look]), limits=RunLimits(max_steps=1))
    if stream:
        deltas = [chunk.choices[0].delta for chunk in ask_streaming(served)]
        assert not any(delta.tool_calls for delta in deltas)
    else:
        (choice,) = ask(served.client()).choices
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")
    assert served.parts.log.steps_since(None, 1)[0].stop_reason is StopReason.STEP_LIMIT


# ------------------------------------------------------------------------------------------- server-run tools


def test_a_server_run_episode_shows_each_step_as_it_happens(novice_server: Served) -> None:
    task = OrderDesk().task("heldout", 21)
    chunks = ask_streaming(novice_server, *task.messages, temperature=0)
    extras: list[Any] = [chunk.to_dict().get("stepagent") for chunk in chunks]
    steps = [extra["step"] for extra in extras if extra]
    assert len(steps) >= 3
    assert [step["index"] for step in steps] == list(range(len(steps)))
    assert [step["stop_reason"] is None for step in steps] == [True] * (len(steps) - 1) + [False]
    assert all(step["tool_results"] for step in steps[:-1])
    assert all(choice.delta.tool_calls is None for chunk in chunks for choice in chunk.choices)
    log = novice_server.parts.log
    episode = log.episode(steps[0]["episode_id"])
    assert episode is not None
    assert episode.task == task.id, "the conversation itself tells which task it is"
    assert [step.id for step in log.steps(episode.id)] == [step["id"] for step in steps]
    assert [outcome.source for outcome in log.outcomes(episode.id)] == ["world"]


def test_a_follow_up_question_is_the_same_episode(novice_server: Served) -> None:
    client = novice_server.client()
    asked: list[Any] = list(OrderDesk().task("heldout", 22).messages)
    first = client.chat.completions.with_raw_response.create(model=MODEL, messages=asked, temperature=0)
    answer = first.parse().choices[0].message
    told: list[Any] = [*asked, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "Thanks."}]
    second = client.chat.completions.with_raw_response.create(model=MODEL, messages=told, max_tokens=20)
    assert second.headers["x-episode-id"] == first.headers["x-episode-id"]
    steps = novice_server.parts.log.steps(first.headers["x-episode-id"])
    last = novice_server.parts.log.step(second.headers["x-step-id"])
    assert last is not None
    follow_up = next(step for step in steps if step.new_messages == ({"role": "user", "content": "Thanks."},))
    assert isinstance(steps[0].action, ToolCalls), "it stands on calls that the client never saw"
    assert follow_up.prompt_token_ids[: len(steps[0].prompt_token_ids)] == steps[0].prompt_token_ids


def test_the_servers_own_tools_are_run(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(f"Let me look.\n{LOOK}", "A globe.", toolbox=Toolbox([look]))
    answer = ask(served.client())
    assert text_of(answer) == "Let me look.\n\nA globe."
    steps = served.parts.log.steps(served.parts.log.episodes()[0].id)
    assert steps[0].tool_results[0].content == "There is a globe on the shelf."


# ---------------------------------------------------------------------------------------- episodes by name


@pytest.mark.parametrize("how", ["header", "metadata"])
def test_an_episode_can_be_named(serve_scripted: ServeScripted, how: str) -> None:
    served = serve_scripted("Hi.", "Good day.")
    named: dict[str, Any] = (
        {"extra_headers": {"x-episode-id": "mine-1"}} if how == "header" else {"metadata": {"episode_id": "mine-1"}}
    )
    client = served.client()
    ask(client, **named)
    ask(client, {"role": "user", "content": "Something else"}, **named)
    (episode,) = served.parts.log.episodes()
    assert episode.id == "mine-1"
    assert len(served.parts.log.steps("mine-1")) == 2


def test_two_named_episodes_with_the_same_words_stay_apart(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Hi."] * 4)
    client = served.client()
    for episode_id in ("one", "two"):
        ask(client, metadata={"episode_id": episode_id})
    for episode_id in ("one", "two"):
        ask(client, USER, {"role": "assistant", "content": "Hi."}, USER, metadata={"episode_id": episode_id})
    for episode_id in ("one", "two"):
        steps = served.parts.log.steps(episode_id)
        assert [step.index for step in steps] == [0, 1]


async def test_two_requests_may_begin_the_same_episode_at_once(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Hi."] * 6)
    async with served.async_client() as client:
        asked = (
            client.chat.completions.create(model=MODEL, messages=[USER], metadata={"episode_id": "ours"})
            for _ in range(6)
        )
        await asyncio.gather(*asked)
    assert len(served.parts.log.steps("ours")) == 6


def test_what_the_client_says_of_an_episode_is_kept(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Hi.")
    ask(served.client(), metadata={"purpose": "evaluation", "task": "chess/train/3", "team": "blue"})
    (episode,) = served.parts.log.episodes()
    assert (episode.purpose, episode.task, episode.metadata) == (Purpose.EVALUATION, "chess/train/3", {"team": "blue"})


# ------------------------------------------------------------------------------------------------- sampling


def test_the_same_seed_gives_the_same_tokens(novice_server: Served) -> None:
    create = novice_server.client().chat.completions.with_raw_response.create

    def sampled(seed: int) -> tuple[int, ...]:
        hello: Any = [{"role": "user", "content": "Hello there"}]
        raw = create(model=MODEL, messages=hello, tools=[], seed=seed, max_tokens=20)
        step = novice_server.parts.log.step(raw.headers["x-step-id"])
        assert step is not None
        return step.completion_token_ids

    drawn = [sampled(seed) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


def test_several_choices_are_several_steps_of_one_episode(novice_server: Served) -> None:
    raw = novice_server.client().chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Anything, thrice"}], n=3, seed=5, max_tokens=12, tools=[]
    )
    answer = ChatCompletion.model_validate_json(raw.http_response.content, strict=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    steps = novice_server.parts.log.steps(raw.headers["x-episode-id"])
    assert len(steps) == 3
    assert sorted(step.sampling.seed or 0 for step in steps) == [5, 6, 7]
    assert all(step.parent_id is None for step in steps)


def test_several_choices_stream_side_by_side(serve_scripted: ServeScripted) -> None:
    chunks = ask_streaming(serve_scripted("One globe.", "Two globes."), n=2)
    assert sorted(streamed_text(chunks, choice) for choice in (0, 1)) == ["One globe.", "Two globes."]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop", "stop"]


def test_stop_texts_end_the_answer(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A globe. A lamp.", "A globe. A lamp.", "A globe. A lamp.")
    client = served.client()
    assert text_of(ask(client, stop=" A lamp")) == "A globe."
    assert text_of(ask(client, stop=["nothing", "lobe"])) == "A g"
    assert streamed_text(ask_streaming(served, stop=["lamp"])) == "A globe. A "


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_is_kept(serve_scripted: ServeScripted, name: str) -> None:
    answer = ask(serve_scripted("A globe on a shelf.").client(), **{name: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


def test_logprobs_are_those_of_the_tokens(novice_server: Served, protocol: ChatProtocol) -> None:
    raw = novice_server.client().chat.completions.with_raw_response.create(
        model=MODEL, messages=[USER], logprobs=True, top_logprobs=3, seed=1, max_tokens=8, tools=[]
    )  # fmt: skip
    answer = ChatCompletion.model_validate_json(raw.http_response.content, strict=True)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries
    step = novice_server.parts.log.step(raw.headers["x-step-id"])
    assert step is not None
    assert step.behavior_logprobs is not None
    for entry, token_id, logprob in zip(entries, step.completion_token_ids, step.behavior_logprobs, strict=False):
        assert entry.token == protocol.decode([token_id])
        assert entry.logprob == pytest.approx(logprob, abs=1e-5)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob >= entry.logprob - 1e-6
        assert math.exp(entry.top_logprobs[0].logprob) <= 1.0
    streamed = ask_streaming(novice_server, logprobs=True, top_logprobs=3, seed=1, max_tokens=8, tools=[])
    in_stream = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert [entry.token for entry in in_stream] == [entry.token for entry in entries]


@pytest.mark.parametrize("options", [{}, {"tools": [{"type": "function", "function": {"name": "look"}}]}])
def test_with_tool_choice_none_the_client_never_gets_a_call(novice_server: Served, options: dict[str, Any]) -> None:
    """The novice calls a tool on any order, also where none is on offer."""
    question = OrderDesk().task("train", 5).messages[0]
    answer = ask(novice_server.client(), question, tool_choice="none", temperature=0, **options)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    steps = (answer.model_extra or {})["stepagent"]["choices"][0]
    assert all(step["tool_results"] == [] for step in steps)


def test_an_answer_can_be_held_to_a_schema(novice_server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}, "many": {"type": "boolean"}},
        "required": ["colour", "many"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    answer = ask(novice_server.client(), response_format=wanted, seed=2, tools=[])
    said = json.loads(text_of(answer))
    assert said["colour"] in ("red", "blue")
    assert isinstance(said["many"], bool)


# ------------------------------------------------------------------------------------- looking, judging


def test_an_outcome_is_reported_and_the_newest_counts(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Hi.")
    ask(served.client(), metadata={"episode_id": "mine"})
    for value in (0.0, 1.0):
        response = httpx.post(f"{served.url}/v1/episodes/mine/outcome", json={"value": value, "note": "Thanks!"})
        assert response.status_code == 201
        assert response.json()["episode_id"] == "mine"
    assert [outcome["value"] for outcome in episode_of(served, "mine")["outcomes"]] == [0.0, 1.0]


def test_episodes_are_listed_in_pages_newest_first(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Hi."] * 5)
    client = served.client()
    for number in range(5):
        ask(client, {"role": "user", "content": f"Question {number}"})
    seen, after = [], None
    while True:
        params = {"limit": 2} | ({"after": after} if after else {})
        page = httpx.get(f"{served.url}/v1/episodes", params=params).json()
        seen += [episode["id"] for episode in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert len(seen) == 5
    assert seen == sorted(seen, reverse=True)


def test_episodes_can_be_chosen_by_purpose_and_task(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Hi."] * 3)
    client = served.client()
    ask(client, metadata={"purpose": "practice", "task": "chess/train/1", "episode_id": "a"})
    ask(client, metadata={"purpose": "practice", "task": "chess/test/1", "episode_id": "b"})
    ask(client, metadata={"episode_id": "c"})

    def ids(**params: str) -> list[str]:
        return [e["id"] for e in httpx.get(f"{served.url}/v1/episodes", params=params).json()["data"]]

    assert ids(purpose="practice") == ["b", "a"]
    assert ids(task_prefix="chess/train/") == ["a"]
    assert ids(adapter="agent-v0001") == []
    assert ids(actor="policy") == ["c", "b", "a"]


def test_an_episode_is_read_with_its_steps_and_on_demand_their_tokens(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(LOOK)
    ask(served.client(), tools=[LOOK_TOOL], metadata={"episode_id": "mine"})
    (step,) = episode_of(served, "mine")["steps"]
    assert step["action"]["tool_calls"][0]["function"]["name"] == "look"
    assert step["new_messages"] == [USER]
    assert "prompt_token_ids" not in step
    (with_tokens,) = episode_of(served, "mine", with_tokens=True)["steps"]
    logged = served.parts.log.steps("mine")[0]
    assert tuple(with_tokens["prompt_token_ids"]) == logged.prompt_token_ids
    assert len(with_tokens["behavior_logprobs"]) == len(with_tokens["completion_token_ids"])


def test_models_are_listed_and_read(serve_scripted: ServeScripted) -> None:
    client = serve_scripted().client()
    assert [model.id for model in client.models.list()] == [MODEL, "base"]
    assert Model.model_validate(client.models.retrieve("base").to_dict(), strict=True).id == "base"
    with pytest.raises(NotFoundError, match="'gpt-5' is not served here"):
        client.models.retrieve("gpt-5")


def test_the_base_network_can_be_asked_for_by_name(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Hi.")
    served.client().chat.completions.create(model="base", messages=[USER])
    assert served.parts.log.episodes()[0].adapter == "base"


def test_health_tells_what_acts_and_what_is_logged(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    engine = SayingEngine(protocol, "Hi.")
    served = serve_scripted(engine=engine)
    ask(served.client())
    health = httpx.get(f"{served.url}/health")
    assert health.status_code == 200
    assert health.json()["acting"] == "base"
    assert health.json()["log"]["steps"] == 1
    engine.is_alive = False
    assert httpx.get(f"{served.url}/health").status_code == 503


def test_metrics_count_answers_and_steps(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Hi.")
    ask(served.client())
    with pytest.raises(BadRequestError):
        ask(served.client(), n=0)
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'stepagent_steps_total{action="FinalAnswer",adapter="base",agent=""} 1.0' in metrics
    assert 'stepagent_requests_total{route="/v1/chat/completions",status="200"} 1.0' in metrics
    assert 'stepagent_requests_total{route="/v1/chat/completions",status="400"} 1.0' in metrics


def test_with_an_api_key_nobody_else_is_answered(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Hi.", keys=KeyRing(operator_secret="s3cret"))
    assert text_of(ask(served.client(api_key="s3cret"))) == "Hi."
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
        refused = httpx.get(f"{served.url}/v1/models", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{served.url}/health").status_code == 200
