"""A server without keys does nothing for web pages that its user happens to have open."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from runtime.privacy.redaction import Redactor
from runtime.store.keys import KeyRing
from tests.conftest import ServeScripted
from tests.serving import MODEL

CHANGES = ("/v1/adapters/rollback", "/v1/adapters/agent-v0001/promote", "/v1/learner/cycles", "/v1/episodes/e/promote")
FROM_A_PAGE: tuple[dict[str, str], ...] = (
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "multipart/form-data; boundary=x"},
    {"content-type": "text/plain;charset=UTF-8"},
    {"origin": "http://evil.example", "content-type": "application/json"},
    {"origin": "null"},
    {"origin": "http://localhost:3000"},
    {"sec-fetch-site": "cross-site", "content-type": "application/json"},
    {"sec-fetch-site": "same-site"},
)


@pytest.mark.parametrize("headers", FROM_A_PAGE, ids=str)
def test_a_strange_page_changes_nothing(serve_scripted: ServeScripted, headers: dict[str, str]) -> None:
    served = serve_scripted(learning=None)
    for path in CHANGES:
        refused = httpx.post(f"{served.url}{path}", headers=headers)
        assert refused.status_code in (400, 403), (path, refused.text)
        assert refused.json()["error"]["message"]
    for path in CHANGES:  # as curl sends it, and a client of ours: whatever is said, it is not this refusal
        for own in (
            {},
            {"content-type": "application/json"},
            {"origin": served.url},
            {"sec-fetch-site": "same-origin"},
        ):
            assert httpx.post(f"{served.url}{path}", headers=own).status_code not in (400, 403), (path, own)


def test_a_body_that_does_not_say_it_is_json_is_refused(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    assert httpx.post(f"{served.url}/v1/adapters/rollback", content=b"{}").status_code == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "192.168.0.7", "", "["]
)
def test_a_page_whose_name_was_pointed_here_reads_nothing(serve_scripted: ServeScripted, host: str) -> None:
    served = serve_scripted()
    refused = httpx.get(f"{served.url}/v1/episodes", headers={"host": host})
    assert refused.status_code == 403
    assert "names of its own machine" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "127.8.8.8", "[::1]:8000", "localhost."]
)
def test_every_name_of_this_machine_is_answered(serve_scripted: ServeScripted, host: str) -> None:
    assert httpx.get(f"{serve_scripted().url}/v1/episodes", headers={"host": host}).status_code == 200


def test_pages_of_listed_origins_may_ask_read_and_change_and_no_others(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(cors_origins=("https://chat.example",), learning=None)

    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        headers["access-control-request-headers"] = "content-type, authorization"
        return httpx.options(f"{served.url}/v1/chat/completions", headers=headers)

    allowed = preflight("https://chat.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
    assert "access-control-allow-origin" not in preflight("https://evil.example").headers
    for origin, is_listed in (("https://chat.example", True), ("https://evil.example", False)):
        headers = {"origin": origin, "sec-fetch-site": "cross-site", "content-type": "application/json"}
        listed = httpx.get(f"{served.url}/v1/episodes", headers=headers)
        assert ("access-control-allow-origin" in listed.headers) is is_listed
        rollback = httpx.post(f"{served.url}/v1/adapters/rollback", headers=headers, content=b"{}")
        assert (rollback.status_code != 403) is is_listed


def test_a_server_with_keys_answers_whoever_knows_one_under_any_name(serve_scripted: ServeScripted) -> None:
    served = serve_scripted(keys=KeyRing(operator_secret="s3cret"))
    headers: dict[str, Any] = {"authorization": "Bearer s3cret", "host": "agent.example", "origin": "https://a.example"}
    answer = httpx.post(f"{served.url}/v1/adapters/rollback", headers=headers)
    assert answer.json()["error"]["code"] == "adapter_conflict" or "nothing to roll back" in answer.text


def test_a_page_may_read_every_header_that_an_answer_tells_something_in(serve_scripted: ServeScripted) -> None:
    """What had no effect, and what was replaced, no page could find out."""
    page = "https://chat.example"
    served = serve_scripted(cors_origins=(page,), redactor=Redactor())
    secret = "sk-proj-" + "a1B2c3D4e5F6g7H8" * 3
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"My key is {secret}"}], "frobnicate": 1}
    answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, headers={"origin": page}, timeout=60)
    told = {name for name in answer.headers if name.startswith("x-")}
    assert {"x-stepagent-warning", "x-stepagent-redacted"} <= told
    assert told <= set(answer.headers["access-control-expose-headers"].split(", "))
