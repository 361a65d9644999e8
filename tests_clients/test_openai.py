"""openai's own library: chat, streams, responses in every form."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

from tests_clients.conftest import MODEL, Server, call, require_one_chain

LOOK: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}},
}
LOOK_AT: Any = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"at": {}}}}


def test_a_chat_with_tools(server: Server) -> None:
    server.says(call("look", at="shelf"), "A globe.")
    client, messages = OpenAI(), [{"role": "user", "content": "What is there?"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK], parallel_tool_calls=False)
    [made] = first.choices[0].message.tool_calls or []
    messages += [first.choices[0].message, {"role": "tool", "tool_call_id": made.id, "content": "A globe."}]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=[LOOK], store=False, user="Ann")
    assert second.choices[0].message.content == "A globe."
    assert len(server.steps) == 2


def test_a_stream_tells_the_arguments_as_they_are_written(server: Server) -> None:
    server.says(call("look", at="a shelf that is far away"))
    pieces = []
    with OpenAI().chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Look!"}], tools=[LOOK]
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
        final = stream.get_final_completion()
    [made] = final.choices[0].message.tool_calls or []
    assert "".join(pieces) == made.function.arguments
    assert json.loads(made.function.arguments) == {"at": "a shelf that is far away"}


def test_responses_go_on_in_every_way(server: Server) -> None:
    server.says("One.", "Two.", "Three.")
    client = OpenAI()
    first = client.responses.create(model=MODEL, input="First?", include=["reasoning.encrypted_content"])
    second = client.responses.create(model=MODEL, input="Second?", previous_response_id=first.id, truncation="auto")
    reference: Any = {"type": "item_reference", "id": second.output[0].id}
    items: Any = [
        {"role": "user", "content": "First?"},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "Second?"},
        reference,
        {"role": "user", "content": "Third?"},
    ]
    third = client.responses.create(model=MODEL, input=items, store=False, reasoning={"effort": "low"})
    assert third.output_text == "Three."
    require_one_chain(server.steps, 3)
    assert client.responses.retrieve(first.id).output_text == "One."
    assert [item.content[0].text for item in client.responses.input_items.list(first.id)] == ["First?"]
    client.responses.delete(first.id)


def test_a_response_streams_its_calls(server: Server) -> None:
    server.says(f"Let me look.\n{call('look', at='shelf')}")
    with OpenAI().responses.stream(model=MODEL, input="Look!", tools=[LOOK_AT]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert "response.function_call_arguments.delta" in kinds
