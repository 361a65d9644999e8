"""Hundreds of requests in the three forms, with odd but legal values: each is answered, or refused by name.

tests/client_requests.jsonl has one a line: `path`, `body` beside a model and a question, what the model `says`, and the
words that must stand in a `refused` answer or in its `warning`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from tests.conftest import ServeScripted
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tests.test_client_forms import LOOK_TOOL, USER, call

REQUESTS = [
    json.loads(line) for line in (Path(__file__).parent / "client_requests.jsonl").read_text("utf-8").splitlines()
]
QUESTIONS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [USER]},
    "/v1/responses": {"input": USER["content"]},
    "/v1/messages": {"messages": [USER], "max_tokens": 64},
}


@pytest.fixture(scope="module")
def server(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all of them; it runs no tools."""
    folder = tmp_path_factory.mktemp("requests")
    with served(parts_of(SayingEngine(protocol), protocol, folder, toolbox=Toolbox(), learning=None)) as running:
        yield running


def post(server: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    # Python's own JSON: what a client sends may hold half a character.
    content = json.dumps({"model": MODEL, **QUESTIONS[path], **body})
    return httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60)


@pytest.mark.parametrize("asked", REQUESTS, ids=lambda asked: f"{asked['path'][4:]} {str(asked['body'])[:60]}")
def test_a_legal_request_is_answered_or_refused_by_name(server: Served, asked: dict[str, Any]) -> None:
    engine = server.parts.engine
    assert isinstance(engine, SayingEngine)
    engine.says.clear()
    engine.says.extend([asked.get("says", "On it: a box.")] * 8)
    response = post(server, asked["path"], asked["body"])
    assert response.status_code == (400 if "refused" in asked else 200), response.text
    assert asked.get("refused", "") in response.text.replace('\\"', '"')
    warning = response.headers.get("x-stepagent-warning")
    assert (warning is None) == ("warning" not in asked), warning
    assert asked.get("warning", "") in (warning or "")


def test_a_field_that_nobody_knows_is_named_in_a_warning(server: Served) -> None:
    response = post(server, "/v1/chat/completions", {"guided_json": {"type": "object"}, "top_k": 5, "echo": False})
    assert response.headers["x-stepagent-warning"] == "not known here and without effect: guided_json"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_tells_the_sampling_of_its_agent(
    protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory, stream: bool
) -> None:
    folder = tmp_path_factory.mktemp("sampling")
    agent = ServedAgent("calm", "calm", Toolbox(), sampling={"temperature": 0.25, "top_p": 0.5})
    parts = parts_of(SayingEngine(protocol), protocol, folder, named_agents=(agent,), learning=None)
    with served(parts) as server, server.client() as client:
        if stream:
            with client.responses.stream(model="calm", input="Hello?") as events:
                told = events.until_done().get_final_response()
        else:
            told = client.responses.create(model="calm", input="Hello?")
        assert (told.temperature, told.top_p) == (0.25, 0.5)
        kept = client.responses.retrieve(told.id)
        assert (kept.temperature, kept.top_p) == (0.25, 0.5)
        own = client.responses.create(model="calm", input="Hello?", temperature=1.0)
        assert (own.temperature, own.top_p) == (1.0, 0.5)


def test_a_custom_tools_call_in_the_history_is_told_as_a_function(serve_scripted: ServeScripted) -> None:
    served = serve_scripted("Done.")
    custom = {"id": "call_a", "type": "custom", "custom": {"name": "patch", "input": 'a "b"'}}
    messages = [
        USER,
        {"role": "assistant", "tool_calls": [custom]},
        {"role": "tool", "tool_call_id": "call_a", "content": "x"},
    ]
    assert post(served, "/v1/chat/completions", {"messages": messages, "tools": [LOOK_TOOL]}).status_code == 200
    (step,) = served.parts.log.steps_since(None, 10)
    assert '"arguments": {"input": "a \\"b\\""}' in served.parts.protocol.decode(step.prompt_token_ids)


def test_json_object_takes_a_schema_beside_it(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(call("shelf"), '{"at": "shelf"}')
    schema = {"type": "object", "properties": {"at": {"enum": ["shelf"]}}, "required": ["at"]}
    post(served, "/v1/chat/completions", {"response_format": {"type": "json_object", "schema": schema}})
    engine = served.parts.engine
    assert isinstance(engine, SayingEngine)
    assert "shelf" in str(engine.samplings[0].grammar)
