"""/v1/responses with the real client library: the same agent, the same log, OpenAI's newer form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, NotFoundError
from openai.types.responses import Response, ResponseFunctionToolCall

from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.tools import Toolbox
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served, parts_of, served, wait_until
from tools.calculator import calculator
from tools.worlds.order_desk import OrderDesk

LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "shelf"}}\n</tool_call>'


def ask(served: Served, **options: Any) -> Response:
    """A response, held to the library's own type."""
    body = {"model": MODEL, "input": "What is on the shelf?", **options}
    raw = served.client().responses.with_raw_response.create(**body)
    return Response.model_validate_json(raw.http_response.content, strict=True)


def events_of(served: Served, **options: Any) -> list[Any]:
    body = {"model": MODEL, "input": "What is on the shelf?", "stream": True, **options}
    return list(served.client().responses.create(**body))


def call_in(response: Response) -> ResponseFunctionToolCall:
    (call,) = (item for item in response.output if isinstance(item, ResponseFunctionToolCall))
    return call


# ------------------------------------------------------------------------------------------------- answering


def test_a_response_says_what_the_policy_says_and_names_its_step(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A globe.")
    response = ask(served)
    assert response.output_text == "A globe."
    assert response.status == "completed"
    step = served.parts.log.step(response.id.removeprefix("resp_"))
    assert step is not None
    assert response.usage is not None
    assert response.usage.input_tokens == len(step.prompt_token_ids)
    assert response.usage.output_tokens == len(step.completion_token_ids)


@pytest.mark.parametrize("effort", ["high", "as much as it takes"])
def test_an_effort_that_clients_cannot_read_is_not_repeated(serve_scripted: ServeScripted, effort: str) -> None:
    reasoning = ask(serve_scripted("A globe."), reasoning={"effort": effort}).reasoning
    assert reasoning is not None
    assert reasoning.effort == ("high" if effort == "high" else None)


def test_instructions_are_the_system_message(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    served = serve_scripted("A globe.")
    ask(served, instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is on the shelf?"}]
    (step,) = served.parts.log.steps_since(None, 10)
    assert list(step.new_messages) == messages
    assert step.prompt_token_ids == protocol.render(messages)


def test_the_client_runs_its_functions_and_the_response_goes_on_from_the_logged_step(
    serve_scripted: ServeScripted,
) -> None:
    served = serve_scripted(f"I will look.\n{CALL}", "A globe.")
    first = ask(served, tools=[LOOK])
    call = call_in(first)
    assert first.output_text == "I will look."
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "shelf"})
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "There is a globe."}
    second = ask(served, tools=[LOOK], previous_response_id=first.id, input=[output])
    assert second.output_text == "A globe."
    assert second.previous_response_id == first.id
    before, after = served.parts.log.steps_since(None, 10)
    assert (after.episode_id, after.parent_id) == (before.episode_id, before.id)
    told = before.prompt_token_ids + before.completion_token_ids
    assert after.prompt_token_ids[: len(told)] == told


def test_a_whole_conversation_as_input_is_recognised_too(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(f"I will look.\n{CALL}", "A globe.")
    question = {"role": "user", "content": "What is on the shelf?"}
    first = ask(served, tools=[LOOK], input=[question])
    said = [item.model_dump(mode="json", exclude_none=True) for item in first.output]
    output = {"type": "function_call_output", "call_id": call_in(first).call_id, "output": "There is a globe."}
    ask(served, tools=[LOOK], input=[question, *said, output])
    before, after = served.parts.log.steps_since(None, 10)
    assert after.parent_id == before.id


def test_a_response_after_tools_that_the_server_ran_goes_on_from_the_last_of_its_steps(
    novice_server: Served,
) -> None:
    question = OrderDesk().task("train", 3).messages[0]["content"]
    first = ask(novice_server, input=question, temperature=0)
    steps = (first.model_extra or {})["stepagent"]["steps"]
    assert len(steps) > 2
    second = ask(novice_server, previous_response_id=first.id, input="Thank you.", temperature=0)
    follow_up = novice_server.parts.log.step(second.id.removeprefix("resp_"))
    assert follow_up is not None
    assert follow_up.parent_id == steps[-1]["id"]
    assert follow_up.episode_id == steps[0]["episode_id"]


def test_an_answer_that_is_cut_off_is_incomplete(serve_scripted: ServeScripted) -> None:
    response = ask(serve_scripted("A globe and a lamp and much more."), max_output_tokens=3, tools=[LOOK])
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


def test_an_answer_can_be_held_to_a_schema(novice_server: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2, 3]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    text: Any = {"format": {"type": "json_schema", "name": "count", "schema": schema}}
    response = ask(novice_server, input="How many?", text=text)
    assert json.loads(response.output_text)["n"] in (1, 2, 3)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "look"}])
def test_a_call_that_is_required_is_made(novice_server: Served, choice: Any) -> None:
    at = {"type": "object", "properties": {"at": {"enum": ["shelf", "table"]}}, "required": ["at"]}
    tool: Any = {**LOOK, "parameters": {**at, "additionalProperties": False}}
    call = call_in(ask(novice_server, tools=[tool], tool_choice=choice, input="Hi"))
    assert call.name == "look"
    assert json.loads(call.arguments)["at"] in ("shelf", "table")


def test_without_choice_no_call_is_made(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(CALL)
    response = ask(served, tools=[LOOK], tool_choice="none")
    assert [item.type for item in response.output] == ["message"]
    (step,) = served.parts.log.steps_since(None, 10)
    assert len(step.tools) == 1


# ------------------------------------------------------------------------------------------------- streaming


def test_a_streams_events_come_in_openais_order_and_hold_the_same_answer(
    serve_scripted: ServeScripted, protocol: ChatProtocol
) -> None:
    engine = SayingEngine(protocol, f"I will look.\n{CALL}", pause_s=0.02)
    events = events_of(serve_scripted(engine=engine), tools=[LOOK])
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1, "it came in pieces"
    response = events[-1].response
    assert "".join(deltas) == response.output_text == "I will look."
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == response.output
    Response.model_validate(response.model_dump(warnings=False))


def test_a_response_whose_tools_the_server_runs_is_streamed_step_by_step(serve_scripted: ServeScripted) -> None:
    fly = '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'
    served = serve_scripted(fly, "I cannot fly.", toolbox=Toolbox([calculator]))
    events = events_of(served)
    steps = [event.model_extra["stepagent"]["step"] for event in events if "stepagent" in (event.model_extra or {})]
    assert [step["id"] for step in steps] == [served.parts.log.steps_since(None, 10)[0].id]
    assert events[-1].type == "response.completed"
    assert len(events[-1].response.model_extra["stepagent"]["steps"]) == 2


def test_the_librarys_stream_helper_puts_the_response_together(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(f"I will look.\n{CALL}")
    with served.client().responses.stream(model=MODEL, input="Hi", tools=[LOOK]) as stream:
        response = stream.get_final_response()
    assert response.output_text == "I will look."


def test_an_engine_that_dies_in_mid_stream_raises_in_the_client(
    protocol: ChatProtocol, serve_scripted: ServeScripted
) -> None:
    engine = SayingEngine(protocol, [65] * 1500, pause_s=0.005)
    running = serve_scripted(engine=engine)
    stream = running.client().responses.create(model=MODEL, input="Hi", stream=True)
    next(stream)
    engine.is_alive = False
    with pytest.raises(APIError, match="engine"):
        list(stream)
    assert running.parts.log.counts()["steps"] == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_cancels_the_engines_work(
    protocol: ChatProtocol, serve_scripted: ServeScripted, stream: bool
) -> None:
    engine = SayingEngine(protocol, [65] * 1500, pause_s=0.01)
    running = serve_scripted(engine=engine)
    async with httpx.AsyncClient(timeout=30) as client:
        body = {"model": MODEL, "input": "Hi", "stream": stream}
        asking = asyncio.create_task(client.post(f"{running.url}/v1/responses", json=body))
        await asyncio.to_thread(wait_until, lambda: sum(engine.num_said) > 3)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: engine.health().num_running == 0)
    assert max(engine.num_said) < 500
    assert running.parts.log.counts()["steps"] == 0


# ------------------------------------------------------------------------------------------------- refusing


@pytest.fixture(scope="module")
def server(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all that is refused."""
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path_factory.mktemp("responses"))) as running:
        yield running


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"conversation": "conv_1"}, "conversation: it is not supported here"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt: it is not supported here"),
        ({"background": True, "stream": True}, "is retrieved, not streamed"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "there is no item 'x'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "not input_image"),
        ({"input": []}, "at least 1 item"),
        ({"input": 3}, "valid list"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "which no message before it"),
        ({"max_output_tokens": -1}, "greater than or equal to 1"),
        ({"max_output_tokens": 10**9}, "context holds 2048"),
        ({"temperature": 9}, "less than or equal to 2"),
        ({"tool_choice": {"type": "function", "name": "fly"}}, "not among the tools"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs a schema"),
        ({"previous_response_id": "resp_nothing"}, "there is no response"),
        ({"previous_response_id": "chatcmpl-1"}, "should match pattern"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_a_sentence(
    server: Served, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadRequestError, match=sentence):
        ask(server, **options)
    assert server.parts.log.counts()["steps"] == 0


def test_what_was_not_sent_is_called_missing(server: Served) -> None:
    """Who sent chat's `messages` was told that `input` is no valid list."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
    answer = httpx.post(f"{server.url}/v1/responses", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "input: Field required")


def test_an_unknown_model_is_a_404(server: Served) -> None:
    with pytest.raises(NotFoundError, match="is not served here"):
        ask(server, model="gpt-9")


def test_instructions_replace_those_before(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    """As at OpenAI: they are not carried over, so a handoff swaps them and one without has none."""
    served = serve_scripted("A globe.", "A lamp.", "A clock.", "A vase.")
    first = ask(served, instructions="Be brief.")
    ask(served, previous_response_id=first.id, instructions="Be brief.", input="And below?")
    ask(served, previous_response_id=first.id, instructions="Be long.", input="And below?")
    ask(served, previous_response_id=first.id, input="And below?")
    steps = served.parts.log.steps_since(None, 10)
    assert [step.index for step in steps] == [0, 1, 1, 1]
    assert [step.prompt_change for step in steps] == [None, None, "system", "system"]
    told = [{"role": "user", "content": "What is on the shelf?"}, {"role": "assistant", "content": "A globe."}]
    asked = {"role": "user", "content": "And below?"}
    assert steps[2].prompt_token_ids == protocol.render([{"role": "system", "content": "Be long."}, *told, asked])
    assert steps[3].prompt_token_ids == protocol.render([*told, asked])
    assert served.parts.log.verify() == []


def test_a_response_that_was_never_answered_whole_cannot_be_continued(
    protocol: ChatProtocol, serve_scripted: ServeScripted
) -> None:
    """The client left after the first of several steps: that step is logged, but no answer ended there."""
    fly = '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'
    engine = SayingEngine(protocol, fly, [65] * 1500, pause_s=0.005)
    running = serve_scripted(engine=engine, toolbox=Toolbox([calculator]))
    stream = running.client().responses.create(model=MODEL, input="Hi", stream=True)
    started = next(stream).response.id
    wait_until(lambda: running.parts.log.counts()["steps"] == 1)
    stream.close()
    with pytest.raises(BadRequestError, match="answered to its end"):
        ask(running, previous_response_id=started)
