"""What today's clients send beside the plain form, and what must become of it."""

from __future__ import annotations

import json
from datetime import datetime
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from policies.types import MalformedAction
from runtime.agent.tools import Toolbox
from runtime.store.keys import KeyRing, KeyStore
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served

USER: Any = {"role": "user", "content": "What is on the shelf?"}
AT = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
LOOK_TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": AT}}


def call(at: str, name: str = "look") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"at": "{at}"}}}}\n</tool_call>'


def post(served: Served, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    asked = {"model": MODEL, "messages": [USER], **body}
    if path == "/v1/responses":
        asked = {"input": "What is on the shelf?", **asked}
        del asked["messages"]
    response = httpx.post(f"{served.url}{path}", json=asked, timeout=60)
    assert response.status_code == 200, response.text
    return response


def message_of(response: httpx.Response) -> dict[str, Any]:
    return response.json()["choices"][0]["message"]


# --------------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_an_answer_ends_with_its_first(serve_scripted: ServeScripted, stream: bool) -> None:
    served = serve_scripted(f"{call('shelf')}\n{call('table')}")
    post(served, tools=[LOOK_TOOL], parallel_tool_calls=False, stream=stream)
    (step,) = served.parts.log.steps_since(None, 10)
    assert [made.arguments for made in getattr(step.action, "calls", ())] == [{"at": "shelf"}]
    written = served.parts.protocol.decode(step.completion_token_ids)
    assert "table" not in written, "what was sampled after it is not in the step"


def test_a_forced_call_that_is_cut_off_is_told_as_far_as_it_got(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(call("shelf"))
    response = post(served, tools=[LOOK_TOOL], tool_choice="required", max_tokens=12)
    message = message_of(response)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert message["content"] is None
    [cut] = message["tool_calls"]
    assert cut["id"].startswith("call_")
    (step,) = served.parts.log.steps_since(None, 10)
    assert isinstance(step.action, MalformedAction)


@pytest.mark.parametrize("form", ["tools", "functions", "responses", "messages"])
def test_a_call_that_was_cut_off_anywhere_can_be_sent_back(novice_server: Served, form: str) -> None:
    """Clients keep their history as it was told: an answer that is refused in it is the end of the conversation."""
    function = LOOK_TOOL["function"]
    anthropic = {"name": "look", "input_schema": function["parameters"]}
    asked: dict[str, Any] = {
        "tools": {"tools": [LOOK_TOOL], "tool_choice": "required"},
        "functions": {"functions": [function], "function_call": {"name": "look"}},
        "responses": {"tools": [{"type": "function", **function}], "tool_choice": "required"},
        "messages": {"tools": [anthropic], "tool_choice": {"type": "any"}},
    }[form]
    route, most, said = {
        "responses": ("responses", "max_output_tokens", "input"),
        "messages": ("messages", "max_tokens", "messages"),
    }.get(form, ("chat/completions", "max_tokens", "messages"))

    def ask(history: list[Any], num_tokens: int) -> httpx.Response:
        body = {"model": MODEL, said: history, most: num_tokens, "temperature": 0, **asked}
        return httpx.post(f"{novice_server.url}/v1/{route}", json=body, timeout=60)

    for num_tokens in range(1, 14):
        answer = ask([USER], num_tokens).json()
        match form:
            case "responses":
                told = answer["output"]
                back = [
                    {"type": "function_call_output", "call_id": item["call_id"], "output": "It was cut off."}
                    for item in told
                    if item["type"] == "function_call"
                ]
            case "messages":
                told = [{"role": "assistant", "content": answer["content"]}] if answer["content"] else []
                results = [
                    {"type": "tool_result", "tool_use_id": block["id"], "content": "It was cut off."}
                    for block in answer["content"]
                    if block["type"] == "tool_use"
                ]
                back = [{"role": "user", "content": results}] if results else []
            case _:
                message = answer["choices"][0]["message"]
                told = [message]
                back = [
                    {"role": "tool", "tool_call_id": call["id"], "content": "It was cut off."}
                    for call in message.get("tool_calls", ())
                ]
                if call := message.get("function_call"):
                    back = [{"role": "function", "name": call["name"], "content": "It was cut off."}]
        more = ask([USER, *told, *back, {"role": "user", "content": "Again."}], 20)
        assert more.status_code == 200, (num_tokens, told, more.text)


def test_functions_are_tools_of_an_older_form(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(call("shelf"), "A globe.")
    function = LOOK_TOOL["function"]
    first = post(served, functions=[function], function_call="auto")
    message = message_of(first)
    assert first.json()["choices"][0]["finish_reason"] == "function_call"
    assert message["function_call"]["name"] == "look"
    assert "tool_calls" not in message
    result = {"role": "function", "name": "look", "content": "A globe."}
    post(served, messages=[USER, message, result], functions=[function])
    before, after = served.parts.log.steps_since(None, 10)
    assert after.parent_id == before.id
    assert after.prompt_change is None


def test_results_are_put_in_the_order_of_their_calls(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    served = serve_scripted(f"{call('shelf')}\n{call('table')}", "Both.", "Both.")
    message = message_of(post(served, tools=[LOOK_TOOL]))
    results = [
        {"role": "tool", "tool_call_id": made["id"], "content": json.loads(made["function"]["arguments"])["at"]}
        for made in message["tool_calls"]
    ]
    for order in (results, results[::-1]):
        post(served, tools=[LOOK_TOOL], messages=[USER, message, *order])
    _, one, other = served.parts.log.steps_since(None, 10)
    assert one.prompt_token_ids == other.prompt_token_ids


def test_a_response_format_beside_tools_leaves_the_choice(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(call("shelf"), '{"n": 1}')
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "count", "schema": schema}}
    first = post(served, tools=[LOOK_TOOL], response_format=wanted)
    assert message_of(first)["tool_calls"][0]["function"]["name"] == "look"
    assert message_of(post(served, tools=[LOOK_TOOL], response_format=wanted))["content"] == '{"n": 1}'
    grammars = [step.sampling.grammar for step in served.parts.log.steps_since(None, 10)]
    assert all(grammar is not None and "look" in grammar and "integer" in grammar for grammar in grammars)


def test_arguments_stream_as_they_are_written(protocol: ChatProtocol, serve_scripted: ServeScripted) -> None:
    served = serve_scripted(engine=SayingEngine(protocol, call("a shelf that is far away"), pause_s=0.02))
    events = post(served, tools=[LOOK_TOOL], stream=True).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "{" in event]
    pieces = [piece for chunk in chunks for piece in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert len(pieces) > 3
    assert [piece.get("id") is not None for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == {"at": "a shelf that is far away"}


# --------------------------------------------------------------------------------------- fields and warnings


@pytest.mark.parametrize(
    "messages",
    [
        [USER, {"role": "assistant", "content": None}, USER],
        [USER, {"role": "assistant", "content": None, "refusal": "I will not."}, USER],
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not."}]}, USER],
        [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "a", "type": None, "function": {"name": "look", "arguments": None}}]},
         {"role": "tool", "tool_call_id": "a", "content": "?", "name": None}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "function": {"name": "look"}}]},
         {"role": "tool", "tool_call_id": "a", "content": "?"}],
        [{"role": "developer", "content": [{"type": "text", "text": "Hi", "extra": None}]}, {**USER, "name": None}],
    ],
)  # fmt: skip
def test_nulls_stand_wherever_openai_allows_them(serve_scripted: ServeScripted, messages: list[Any]) -> None:
    tool = {"type": "function", "function": {"name": "look", "description": None, "parameters": None, "strict": None}}
    served = serve_scripted("Well.")
    response = post(served, messages=messages, tools=[tool], stream_options={"include_usage": None}, stop=None)
    assert message_of(response)["content"] == "Well."


@pytest.mark.parametrize(
    ("path", "tools"),
    [
        ("/v1/chat/completions", [LOOK_TOOL, {"type": "custom", "custom": {"name": "x"}}]),
        ("/v1/responses", [{"type": "function", "name": "look", "parameters": AT}, {"type": "web_search"}]),
        ("/v1/messages", [{"name": "look", "input_schema": AT}, {"type": "web_search_20250305", "name": "search"}]),
    ],
)
def test_tools_of_other_types_are_left_out_with_a_warning(
    serve_scripted: ServeScripted, path: str, tools: list[Any]
) -> None:
    served = serve_scripted("Well.")
    warning = post(served, path, tools=tools, max_tokens=100).headers["x-stepagent-warning"]
    assert str(tools[1]["type"]) in warning
    (step,) = served.parts.log.steps_since(None, 10)
    assert [tool["function"]["name"] for tool in step.tools] == ["look"]


def test_what_has_no_effect_is_accepted(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Well.", "Well.", "Well.")
    post(served, store=True, service_tier="flex", verbosity="low", prompt_cache_key="x", modalities=["text"])
    assert "web_search_options" in post(served, web_search_options={}, user="Ann").headers.get(
        "x-stepagent-warning", "web_search_options"
    )
    include = ["reasoning.encrypted_content", "web_search_call.action.sources"]
    body: Any = {"include": include, "store": False, "reasoning": {"effort": "low", "summary": "auto"}}
    post(served, "/v1/responses", truncation="auto", **body)


def test_logprobs_are_of_what_is_shown(serve_scripted: ServeScripted) -> None:
    from tests.test_life_story import look

    served = serve_scripted(call("shelf"), "A brass globe.", toolbox=Toolbox([look]))
    response = post(served, logprobs=True)
    told = "".join(entry["token"] for entry in response.json()["choices"][0]["logprobs"]["content"])
    assert told == message_of(response)["content"] == "A brass globe."
    usage = response.json()["usage"]
    shown = usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"]
    assert shown == len(served.parts.protocol.encode("A brass globe.")) + 1, "and the end of the turn"


# ------------------------------------------------------------------------------------------- whose episode


def test_two_users_who_say_the_same_are_two_episodes(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Well."] * 4)
    told = [USER, {"role": "assistant", "content": "Well."}, USER]
    for user in ("Ann", "Bob"):
        post(served, user=user)
    ids = [post(served, messages=told, safety_identifier=user).headers["x-episode-id"] for user in ("Ann", "Bob")]
    episodes = [served.parts.log.episode(each) for each in ids]
    assert [episode.user for episode in episodes if episode] == ["Ann", "Bob"]
    assert [len(served.parts.log.steps(each)) for each in ids] == [2, 2]


def test_a_named_episode_with_another_prompt_is_a_chain(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(*["Well."] * 3)
    for number in range(3):
        messages = [{"role": "system", "content": f"It is {number} o'clock."}, {**USER, "content": f"Q{number}"}]
        post(served, messages=messages, metadata={"episode_id": "mine"})
    steps = served.parts.log.steps("mine")
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.prompt_change for step in steps] == [None, "history", "history"]
    assert served.parts.log.verify() == []


def test_a_clock_in_the_system_message_does_not_end_an_episode(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("There is a brass globe on it, I think.", "You are welcome.")
    said = {"role": "assistant", "content": "There is a brass globe on it, I think."}
    post(served, messages=[{"role": "system", "content": "It is 1."}, USER])
    later = [{"role": "system", "content": "It is 2."}, USER, said, {"role": "user", "content": "Thanks."}]
    post(served, messages=later)
    before, after = served.parts.log.steps_since(None, 10)
    assert (after.parent_id, after.prompt_change) == (before.id, "system")
    assert list(after.new_messages) == later
    assert after.prompt_token_ids == served.parts.protocol.render(later)


# --------------------------------------------------------------------------------------------- /v1/messages


def test_a_message_in_anthropics_form(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A brass globe. A lamp.", "A brass globe.")
    body: Any = {"max_tokens": 50, "system": [{"type": "text", "text": "Be brief."}]}
    message = post(served, "/v1/messages", **body).json()
    assert (message["type"], message["stop_reason"]) == ("message", "end_turn")
    assert message["content"] == [{"type": "text", "text": "A brass globe. A lamp."}]
    (step,) = served.parts.log.steps_since(None, 10)
    assert message["usage"]["input_tokens"] == len(step.prompt_token_ids)
    stopped = post(served, "/v1/messages", **body, stop_sequences=["globe"]).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "globe")
    counted = post(served, "/v1/messages/count_tokens", system=body["system"]).json()
    assert counted == {"input_tokens": len(step.prompt_token_ids)}


def test_models_have_openais_form_and_anthropics(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    listed = httpx.get(f"{served.url}/v1/models").json()
    model, *others = listed["data"]
    assert (listed["object"], listed["has_more"], listed["first_id"]) == ("list", False, MODEL)
    assert listed["last_id"] == [model, *others][-1]["id"]
    assert (model["id"], model["object"], model["type"], model["display_name"]) == (MODEL, "model", "model", MODEL)
    assert datetime.fromisoformat(model["created_at"]).timestamp() == model["created"]
    assert httpx.get(f"{served.url}/v1/models/{MODEL}").json() == model


def test_an_error_has_anthropics_form_there(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    response = httpx.post(f"{served.url}/v1/messages", json={"model": MODEL, "messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_what_is_refused_before_a_route_is_reached_has_anthropics_form_there_too(
    serve_scripted: ServeScripted, tmp_path: Path, path: str
) -> None:
    """No key, a strange page, too much: middleware answers those."""
    asking = serve_scripted(keys=KeyRing(KeyStore(tmp_path / "keys.db"), "s3cret"))
    told = {
        "authentication_error": httpx.post(f"{asking.url}{path}", json={}),
        "permission_error": httpx.post(
            f"{serve_scripted().url}{path}", json={}, headers={"origin": "http://evil.example"}
        ),
        "not_found_error": httpx.post(f"{asking.url}{path}/nowhere", headers={"x-api-key": "s3cret"}),
    }
    for kind, answer in told.items():
        assert answer.json()["type"] == "error", answer.text
        assert answer.json()["error"]["type"] == kind, answer.text
    announced = HTTPConnection(asking.url.removeprefix("http://"), timeout=10)
    announced.putrequest("POST", path)
    announced.putheader("x-api-key", "s3cret")
    announced.putheader("content-length", str(10**12))
    announced.endheaders()
    assert json.loads(announced.getresponse().read())["error"]["type"] == "request_too_large"
    announced.close()
    elsewhere = httpx.post(f"{asking.url}/v1/messages-of-others", json={})
    assert elsewhere.json()["error"]["code"] == "invalid_api_key"


# --------------------------------------------------------------------------------------------- /v1/responses


def test_a_response_is_kept_until_it_is_deleted(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("A globe.", "A lamp.")
    first = post(served, "/v1/responses", metadata={"a": "b"}).json()
    url = f"{served.url}/v1/responses/{first['id']}"
    kept = httpx.get(url).json()
    assert {**kept, "created_at": 0} == {**first, "created_at": 0}
    assert [event for event in httpx.get(url, params={"stream": "true"}).text.split("\n\n") if "completed" in event]
    assert httpx.post(f"{url}/cancel").status_code == 400
    assert httpx.delete(url).json()["deleted"] is True
    assert httpx.get(url).status_code == httpx.delete(url).status_code == 404
    unstored = post(served, "/v1/responses", store=False).json()
    assert httpx.get(f"{served.url}/v1/responses/{unstored['id']}").status_code == 404
    assert served.parts.log.counts()["steps"] == 2


def test_a_background_response_runs_on_and_can_be_cancelled(
    protocol: ChatProtocol, serve_scripted: ServeScripted
) -> None:
    engine = SayingEngine(protocol, "A globe.", [65] * 1500, pause_s=0.01)
    served = serve_scripted(engine=engine)
    started = post(served, "/v1/responses", background=True).json()
    assert started["status"] == "in_progress"
    url = f"{served.url}/v1/responses/{started['id']}"
    for _ in range(200):
        if (now := httpx.get(url).json())["status"] == "completed":
            break
    assert now["output"][0]["content"][0]["text"] == "A globe."
    second = post(served, "/v1/responses", background=True).json()
    cancelled = httpx.post(f"{served.url}/v1/responses/{second['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert served.parts.log.counts()["steps"] == 1
