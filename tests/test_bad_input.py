"""Whatever a client sends: the right 4xx in OpenAI's form, what to change in one sentence, and a server unharmed."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served, parts_of, served, wait_until

USER: Any = {"role": "user", "content": "Hi"}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look"}}
DEEP = '{"a":' * 300 + "1" + "}" * 300
"""JSON that can be read, and not written into the log."""


@pytest.fixture(scope="module")
def server(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all that is thrown at it."""
    with served(parts_of(SayingEngine(protocol), protocol, tmp_path_factory.mktemp("bad"))) as running:
        yield running


@pytest.fixture(autouse=True)
def answers_the_next_good_request(server: Served) -> Iterator[None]:
    """After each test: nothing was logged that was not answered, nothing runs on, a good request is answered."""
    yield
    wait_until(lambda: server.parts.engine.health().num_running == 0)
    response = post(server, {"model": MODEL, "messages": [USER]})
    assert response.status_code == 200, response.text
    assert server.parts.log.verify() == []


def post(server: Served, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    """Post JSON; bytes and text go as they are."""
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=30, **options)


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [USER], **changes}


def refusal(response: httpx.Response, status: int = 400) -> str:
    """The sentence of a refusal in OpenAI's form."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10
    assert "Traceback" not in error["message"]
    return error["message"]


# ------------------------------------------------------------------------------------------------ no JSON


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"not json", b'{"model": "novice",}', b"{'model': 'novice'}", b"\x00", b'{"model": "a\x01b"}',
        b'{"model": NaN}', b'{"model": Infinity}', b'{"model": -Infinity}', b"[" * 100_000, b'{"a":' * 50_000,
        b'{"model": "\xff\xfe"}', b"\xff\xfe\x00", b'{"model": "\xed\xa0\xbd"}', b"\xef\xbb\xbf{",
        b'{"model": "\\ud83d"}',
        b'{"seed": 01}', b'{"seed": 1' + b"0" * 400 + b"}", b'{"a": "' + b"x" * 100,
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused(server: Served, body: bytes) -> None:
    assert "JSON" in (message := refusal(post(server, body))) or "nested" in message


@pytest.mark.parametrize("body", [b"null", b"3", b'"text"', b"[]", b"true", b"[{}]"])
def test_json_that_is_no_object_is_refused(server: Served, body: bytes) -> None:
    refusal(post(server, body))


@pytest.mark.parametrize(
    "headers", [{"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}]
)
def test_another_content_type_is_refused(server: Served, headers: dict[str, str]) -> None:
    refusal(post(server, chat(), headers=headers))


@pytest.mark.parametrize("where", ["metadata", "tools", "schema"])
@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "1e999", '"\\ud83d"', "9" * 5000, "[" * 900 + "]" * 900, '{"a":' * 500 + "1" + "}" * 500],
)
def test_odd_values_in_free_places_never_break_the_server(server: Served, where: str, value: str) -> None:
    free = {
        "metadata": f'"metadata": {{"odd": {value}}}',
        "tools": f'"tools": [{{"type": "function", "function": {{"name": "x", "parameters": {{"odd": {value}}}}}}}]',
        "schema": '"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": ' + value + "}}}",
    }
    response = post(server, f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hi"}}], {free[where]}}}')
    if response.status_code != 200:
        refusal(response)


# ---------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": "{}"}}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 3}]}]}, "messages.0.tool_calls.0.id"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": "2"}, "n"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": "10"}, "max_completion_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"logit_bias": {"x": 10}}, "logit_bias"),
        ({"logit_bias": {"99999": 10}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_p": 2}, "min_p"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"stop": ""}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [None]}, "stop"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"tools": "look"}, "tools"),
        ({"tools": [3]}, "tools.0"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": 3}}]}, "tools.0.function.parameters"),
        ({"tool_choice": "maybe", "tools": [LOOK]}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"purpose": "fun"}}, "metadata.purpose"),
        ({"metadata": {"episode_id": "a b"}}, "metadata.episode_id"),
        ({"metadata": {"episode_id": "x" * 200}}, "metadata.episode_id"),
        ({"metadata": {"task": 3}}, "metadata.task"),
        ({"stream_options": "usage"}, "stream_options"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(server: Served, changes: dict[str, Any], param: str) -> None:
    response = post(server, chat(**changes))
    assert refusal(response).startswith(param)
    named = response.json()["error"]["param"]
    assert named == param or named.startswith(f"{param}."), named


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"tools": [LOOK, LOOK]}, "two tools have the same name"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "'fly', which is not"),
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "none were given"),
        ({"response_format": {"type": "json_schema"}}, "needs a json_schema"),
        ({"tools": [LOOK], "functions": [{"name": "look"}]}, "send tools alone"),
        ({"max_tokens": 10**9}, "the model's context holds 2048"),
        ({"max_completion_tokens": 2049}, "the model's context holds 2048"),
        ({"metadata": {"task": "order_desk/train/99999999"}}, "there is no task"),
        ({"metadata": {"task": "order_desk/nowhere/1"}}, "there is no task"),
        ({"metadata": {"task": "order_desk"}}, "there is no task"),
        ({"metadata": {"task": "order_desk/train/-1"}}, "there is no task"),
        ({"metadata": {"task": "order_desk/train/" + "9" * 5000}}, "there is no task"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "shorten it"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "only text"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "only text"),
        ({"messages": [{"role": "user", "content": [{"type": ["a"]}]}]}, "only text"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": "{"}}]}]}, "the arguments of x"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": "[1]"}}]}]}, "the arguments of x"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": "[" * 3000}}]}]}, "arguments of x"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": DEEP}}]}]}, "more than 100 deep"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "x", "arguments": '{"a": ' + "9" * 5000 + "}"}}]}]},
            "the arguments of x"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "call_9", "content": "?"}]}, "call_9"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_says_what_to_change(server: Served, changes: dict[str, Any], advice: str) -> None:
    assert advice in refusal(post(server, chat(**changes)))


@pytest.mark.parametrize(
    "schema",
    [{"type": "circle"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}, {"properties": 3}, {"enum": []}],
)
def test_a_schema_that_no_answer_fits_is_refused(server: Served, schema: dict[str, Any]) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    refusal(post(server, chat(response_format=wanted)))
    tool = {"type": "function", "function": {"name": "x", "parameters": schema}}
    refusal(post(server, chat(tools=[tool], tool_choice="required")))


def test_an_unknown_model_is_not_found(server: Served) -> None:
    for model in ("gpt-5", "", "novice ", "../../etc/passwd", "agent-v0001"):
        response = post(server, chat(model=model))
        assert "GET /v1/models" in refusal(response, 404)
        assert response.json()["error"]["code"] == "model_not_found"


def test_a_prompt_longer_than_the_context_says_how_long_it_is(server: Served) -> None:
    response = post(server, chat(messages=[{"role": "user", "content": "é" * 5000}]))
    assert "10003 tokens long" in refusal(response)
    assert response.json()["error"]["code"] == "context_length_exceeded"
    streamed = post(server, chat(messages=[{"role": "user", "content": "é" * 5000}], stream=True))
    assert "shorten it" in refusal(streamed), "also where a stream was asked for: nothing has been sent yet"


def test_text_of_any_kind_is_answered(server: Served) -> None:
    for text in ("", "\x00", "\u2028", "<|im_end|>", "<|im_start|>system\n", "</tool_call>", "😀", "‮", "a\u0300" * 50):
        assert post(server, chat(messages=[{"role": "user", "content": text}])).status_code == 200


def test_null_means_the_default_as_openais_client_sends_it(server: Served) -> None:
    names = ("stop", "seed", "n", "stream", "temperature", "top_p", "logprobs", "top_logprobs", "max_tokens", "tools",
             "tool_choice", "response_format", "metadata", "frequency_penalty", "presence_penalty", "logit_bias",
             "stream_options", "max_completion_tokens", "top_k")  # fmt: skip
    response = post(server, chat(**dict.fromkeys(names)))
    assert response.status_code == 200, response.text


# ------------------------------------------------------------------------------------------------ large bodies


def test_a_large_body_is_refused_by_its_announced_length(server: Served) -> None:
    assert "larger than" in refusal(post(server, b'{"model": "' + b"x" * 10_000_000), 413)


def test_a_large_body_is_refused_also_where_its_length_is_not_announced(server: Served) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "'
        for _ in range(100):
            yield b"x" * 100_000

    headers = {"content-type": "application/json"}
    try:
        response = httpx.post(f"{server.url}/v1/chat/completions", content=pieces(), headers=headers, timeout=30)
    except httpx.WriteError:
        return  # the server answered and closed while the client was still sending
    assert "larger than" in refusal(response, 413)


@pytest.mark.parametrize("length", ["-5", "abc", "5, 6", "99999999999999999999"])
def test_a_false_length_does_no_harm(server: Served, length: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
        sock.sendall(head.encode())
        assert b" 4" in sock.recv(1000)[:15]


def test_a_client_that_hangs_up_while_it_sends_does_no_harm(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as sock:
        sock.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"model"')


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "gzip, br"])
def test_a_packed_body_is_refused_by_what_it_is(server: Served, encoding: str) -> None:
    """It was "not valid JSON: surrogates not allowed at character 0"."""
    packed = gzip.compress(json.dumps(chat()).encode())
    assert f"comes as {encoding}" in refusal(post(server, packed, headers={"content-encoding": encoding}), 415)


def test_a_body_that_says_it_is_not_packed_is_read(server: Served) -> None:
    assert post(server, chat(), headers={"content-encoding": "identity"}).status_code == 200


# ---------------------------------------------------------------------------------------------- other routes


def test_what_is_not_there_is_not_found(server: Served) -> None:
    for path in ("/v1/episodes/ep_none", "/v1/models/none", "/v2/anything", "/v1/episodes/%00", "/v1/models/%ff"):
        refusal(httpx.get(f"{server.url}{path}"), 404)
    refusal(post(server, {"value": 1.0}, "/v1/episodes/ep_none/outcome"), 404)


def test_the_wrong_method_is_refused(server: Served) -> None:
    response = httpx.get(f"{server.url}/v1/chat/completions")
    assert refusal(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "params",
    [
        {"limit": "0"},
        {"limit": "-1"},
        {"limit": "1001"},
        {"limit": "x"},
        {"limit": "9" * 50},
        {"purpose": "fun"},
        {"actor": "x"},
    ],
)
def test_a_wrong_listing_is_refused(server: Served, params: dict[str, str]) -> None:
    refusal(httpx.get(f"{server.url}/v1/episodes", params=params))


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "/v1/episodes?agnet=support", "agnet"),
        ("GET", "/v1/export?format=openai&min_outcom=1", "min_outcom"),
        ("DELETE", "/v1/episodes?key=ann&usr=bob", "usr"),
        ("GET", "/v1/keys?agent=support", "agent"),
    ],
)
def test_a_misspelled_filter_is_refused(server: Served, method: str, path: str, param: str) -> None:
    """It was passed over: all was listed, exported, or erased for good, where a part was meant."""
    assert param in refusal(httpx.request(method, f"{server.url}{path}"))


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "/v1/keys", {"name": "ann", "role": "use", "agent": "support"}, "agent"),
        ("POST", "/v1/demonstrations", {"demonstrations": [], "agnet": "support"}, "agnet"),
        ("POST", "/v1/learner/cycles", {"agnet": "support"}, "agnet"),
        ("DELETE", "/v1/episodes/ep_1", {"retrian": True}, "retrian"),
        ("POST", "/v1/adapters/rollback", {"agents": "support"}, "agents"),
    ],
)
def test_a_misspelled_field_of_our_own_routes_is_refused(
    server: Served, method: str, path: str, body: dict[str, Any], param: str
) -> None:
    """It was passed over: the key was for all agents, and the server's own agent was taught or rolled back."""
    assert param in refusal(httpx.request(method, f"{server.url}{path}", json=body))


def test_odd_listings_find_nothing(server: Served) -> None:
    for params in ({"after": "\x00"}, {"adapter": "' OR 1=1"}, {"task_prefix": "%"}, {"task_prefix": "\U0010ffff"}):
        response = httpx.get(f"{server.url}/v1/episodes", params=params)
        assert response.json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [{}, {"value": 2}, {"value": -0.1}, {"value": "1"}, {"value": None}, {"value": True}, {"value": 1, "source": "a b"},
     {"value": 1, "note": 3}, {"value": 1, "note": "x" * 20_000}, "[]", '{"value": NaN}', '{"value": 1e999}'],
)  # fmt: skip
def test_a_wrong_outcome_is_refused(server: Served, body: Any) -> None:
    response = post(server, chat())
    episode_id = response.headers["x-episode-id"]
    refusal(post(server, body, f"/v1/episodes/{episode_id}/outcome"))
    assert server.parts.log.outcomes(episode_id) == []


@pytest.mark.parametrize("episode_id", ["a b", "x" * 200, "é", "a/b"])
def test_an_episode_header_that_is_no_id_is_refused(server: Served, episode_id: str) -> None:
    assert "x-episode-id" in refusal(post(server, chat(), headers={"x-episode-id": episode_id.encode()}))


# -------------------------------------------------------------------------------------------- hanging up


@pytest.mark.parametrize("body", [chat(stream=True), chat(), chat(n=3), chat(n=3, stream=True)])
async def test_a_client_that_hangs_up_cancels_the_engines_work_and_leaves_no_trace(
    protocol: ChatProtocol, serve_scripted: ServeScripted, body: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("uvicorn.error").addHandler(caplog.handler)
    num_choices = body.get("n", 1)
    engine = SayingEngine(protocol, *[[65] * 1500] * num_choices, pause_s=0.01)
    running = serve_scripted(engine=engine)
    async with httpx.AsyncClient(timeout=30) as client:

        async def ask() -> None:
            async with client.stream("POST", f"{running.url}/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass

        asking = asyncio.create_task(ask())
        await asyncio.to_thread(wait_until, lambda: sum(said > 3 for said in engine.num_said) == num_choices)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: engine.health().num_running == 0)
    assert max(engine.num_said) < 500
    assert running.parts.log.counts()["episodes"] == running.parts.log.counts()["steps"] == 0
    response = post(running, chat())
    assert response.status_code == 200
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_client_that_hangs_up_before_the_first_token_gives_its_place_back(
    protocol: ChatProtocol, serve_scripted: ServeScripted, is_streamed: bool, path: str
) -> None:
    """A streamed request once kept its place in the queue: only what had begun to stream was watched."""
    engine = SayingEngine(protocol, [65] * 9, pause_s=30.0)
    running = serve_scripted(engine=engine)
    body = chat(stream=is_streamed)
    if path == "responses":
        body = {"model": MODEL, "input": "Hello", "stream": is_streamed}
    async with httpx.AsyncClient(timeout=30) as client:
        asking = asyncio.create_task(client.post(f"{running.url}/v1/{path}", json=body))
        await asyncio.to_thread(wait_until, lambda: engine.health().num_running == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    await asyncio.to_thread(wait_until, lambda: engine.health().num_running == 0)
    assert running.parts.log.counts()["episodes"] == 0


def test_an_engine_that_has_died_is_a_503(protocol: ChatProtocol, serve_scripted: ServeScripted) -> None:
    engine = SayingEngine(protocol)
    running = serve_scripted(engine=engine)
    engine.is_alive = False
    for body in (chat(), chat(stream=True), chat(n=2), chat(n=2, stream=True)):
        response = post(running, body)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "server_error"
    assert running.parts.log.counts()["episodes"] == 0


def test_an_engine_that_dies_in_mid_stream_ends_the_stream_with_an_error(
    protocol: ChatProtocol, serve_scripted: ServeScripted
) -> None:
    engine = SayingEngine(protocol, [65] * 1500, pause_s=0.005)
    running = serve_scripted(engine=engine)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=chat(stream=True), timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        engine.is_alive = False
        rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
    assert running.parts.log.counts()["steps"] == 0
