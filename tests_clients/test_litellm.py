"""litellm and what is built on it, in an environment of its own: it wants another `openai` than the others."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from pydantic import BaseModel

pytest.importorskip("litellm", reason="make test-clients runs this file in the environment that has it")

from tests_clients.conftest import MODEL, Server, call, require_one_chain

LOOK: Any = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {}}}},
}
PROXY_PORT = 41807
PROXY_KEY = f"sk-{secrets.token_hex(32)}"


class Place(BaseModel):
    """Where something is."""

    name: str


FOUND = '{"name": "shelf"}'


def test_litellm(server: Server) -> None:
    import litellm

    server.says(call("look", at="shelf"), "A globe.")
    asked: Any = {"model": f"openai/{MODEL}", "tools": [LOOK], "parallel_tool_calls": False, "drop_params": True}
    messages: Any = [{"role": "user", "content": "What is on the shelf?"}]
    first = litellm.completion(messages=messages, **asked).choices[0].message
    messages += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "A globe."}]
    assert litellm.completion(messages=messages, **asked).choices[0].message.content == "A globe."
    require_one_chain(server.steps, 2)


@pytest.fixture(scope="module")
def proxy(running: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """litellm's proxy in front of the server."""
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "config.yaml").write_text(
        f"model_list:\n  - model_name: ours\n    litellm_params:\n      model: openai/{MODEL}\n"
        f"      api_base: {running.url}/v1\n      api_key: none\n"
    )
    command = [Path(sys.executable).with_name("litellm"), "--config", folder / "config.yaml", "--port", str(PROXY_PORT)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": PROXY_KEY}
    environment.pop("OPENAI_BASE_URL", None)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*map(str, command), "--host", "127.0.0.1"], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{PROXY_PORT}"
    try:
        _wait_for(f"{url}/health/liveliness", process, folder / "log")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urlopen(url, timeout=2).close()
            return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_litellms_proxy(server: Server, proxy: str) -> None:
    from openai import OpenAI

    server.says(call("look", at="shelf"), "A globe.")
    client, messages = OpenAI(base_url=f"{proxy}/v1", api_key=PROXY_KEY), [{"role": "user", "content": "What is it?"}]
    first: Any = client.chat.completions.create(model="ours", messages=messages, tools=[LOOK])
    made = first.choices[0].message
    messages += [made.to_dict(), {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "A globe."}]
    assert client.chat.completions.create(model="ours", messages=messages, tools=[LOOK]).choices[0].message.content
    require_one_chain(server.steps, 2)
    server.says("A globe.")
    assert client.responses.create(model="ours", input="What is it?").output_text == "A globe."


def test_litellms_proxy_as_anthropic(server: Server, proxy: str) -> None:
    """It turns Anthropic's form into OpenAI's before it asks."""
    from httpx import post

    look = {"name": "look", "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}}}
    body: Any = {"model": "ours", "max_tokens": 500, "tools": [look]}
    messages: Any = [{"role": "user", "content": "What is on the shelf?"}]
    server.says(call("look", at="shelf"), "A globe.")
    asked: Any = {"headers": {"x-api-key": PROXY_KEY, "anthropic-version": "2023-06-01"}, "timeout": 60}
    first = post(f"{proxy}/v1/messages", json={**body, "messages": messages}, **asked).raise_for_status().json()
    [made] = [block for block in first["content"] if block["type"] == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": made["id"], "content": "A globe."}
    messages += [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    second = post(f"{proxy}/v1/messages", json={**body, "messages": messages}, **asked).raise_for_status().json()
    assert second["content"][-1]["text"] == "A globe."
    require_one_chain(server.steps, 2)


@pytest.mark.parametrize("mode", ["TOOLS", "JSON", "JSON_SCHEMA", "RESPONSES_TOOLS"])
def test_instructor(server: Server, mode: str) -> None:
    import instructor
    from openai import OpenAI

    server.says(call("Place", name="shelf") if "TOOLS" in mode else FOUND)
    client = instructor.from_openai(OpenAI(), mode=instructor.Mode[mode])
    messages: Any = [{"role": "user", "content": "Where is the globe?"}]
    found = client.chat.completions.create(model=MODEL, messages=messages, response_model=Place, max_retries=0)
    assert found.name == "shelf"


def test_dspy_predicts_and_reacts(server: Server) -> None:
    import dspy

    def look(at: str) -> str:
        """Look at a place."""
        return f"There is a globe on the {at}."

    lm = dspy.LM(f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key="none", cache=False)
    server.says("[[ ## answer ## ]]\nA globe.\n\n[[ ## completed ## ]]")
    with dspy.context(lm=lm):
        assert dspy.Predict("question -> answer")(question="What is it?").answer == "A globe."
    server.says(
        "[[ ## next_thought ## ]]\nI look.\n\n[[ ## next_tool_name ## ]]\nlook\n\n[[ ## next_tool_args ## ]]\n"
        '{"at": "shelf"}\n\n[[ ## completed ## ]]',
        "[[ ## next_thought ## ]]\nDone.\n\n[[ ## next_tool_name ## ]]\nfinish\n\n[[ ## next_tool_args ## ]]\n{}\n\n"
        "[[ ## completed ## ]]",
        "[[ ## reasoning ## ]]\nI saw it.\n\n[[ ## answer ## ]]\nA globe.\n\n[[ ## completed ## ]]",
    )
    with dspy.context(lm=lm):
        assert dspy.ReAct("question -> answer", tools=[look])(question="What is it?").answer == "A globe."
