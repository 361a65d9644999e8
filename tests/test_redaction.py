"""Secrets do not reach the model, the log or the training: a placeholder does, the same each time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from langchain_core.tools import tool

from runtime.agent.tools import Toolbox
from runtime.config import parse_settings
from runtime.privacy.presidio import replaced
from runtime.privacy.redaction import Redactor, UnknownHook, load_hook
from tests.conftest import ServeScripted
from tests.demonstrations import post
from tests.serving import MODEL, SayingEngine, Served
from tests.test_erasure import files_with

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq\nabc-def+/=\n-----END RSA PRIVATE KEY-----"
KEY = "sk-proj-abcdefghijklmnop0123456789"


def joined(*parts: str) -> str:
    """A secret in pieces here, so that scanners of this repository do not take it for one."""
    return "".join(parts)


SECRETS = {
    "private-key": [
        PEM,
        PEM.replace("\n", "\\n"),
        "-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v1\n\nlQOY\n=abcd\n-----END PGP PRIVATE KEY BLOCK-----",
        "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwgg",
    ],
    "api-key": [KEY, joined("sk-ant-", "api03-AbCdEf0123456789-_AbCd"), joined("sk_", "live_4eC39HqLyjWDarjtT1zdp7dc")],
    "aws-key-id": [joined("AKIA", "IOSFODNN7EXAMPLE"), joined("ASIA", "IOSFODNN7EXAMPLE")],
    "aws-secret-key": [joined("aws_secret_access_key = ", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")],
    "github-token": [
        joined("ghp_", "16C7e42F292c6912E7710c838347Ae178B4a"),
        joined("github_pat_", "11ABCDEFG0abcdefghijkl_x"),
    ],
    "gitlab-token": [joined("glpat-", "abcdefghij0123456789")],
    "slack-token": [joined("xoxb-", "123456789012-abcdefABCDEF")],
    "google-key": [joined("AIza", "SyA-1234567890abcdefghijklmnopqrstu")],
    "huggingface-token": [joined("hf_", "abcdefghijklmnopqrstuvwxyzABCDEFGH")],
    "jwt": ["eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"],
    "bearer-token": ["Bearer 0123456789abcdefABCDEF", "authorization: bearer abc.def.012345678901"],
    "authorization": ["Authorization: Basic dXNlcjpwYXNzd29yZA=="],
    "password": ["postgres://app:s3cr3t@db.example.org/app", "https://me:p@ss:w0rd@example.org/x?y=1"],
    "secret": ["DB_PASSWORD=Tr0ub4dor&3x", '{"api_key": "0123456789abcdef"}', '{\\"client_secret\\": \\"abc12345\\"}'],
}  # fmt: skip

HARMLESS = [
    "My password is required, and the secret of a good soup is time.",
    "call_0123456789abcdef01234567 step_18ebcab8ddd66fa48ca16ad6 demo_a820dacea551209466f0a99e0d8fd461",
    "a task-list for risk-management-and-more-0123456789",
    "https://example.org:8080/path?x=1@home and http://localhost:8000/v1",
    "the bearer of this letter; authorization: granted; token: str = ''",
    "sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "def f(password: str, api_key: str | None = None) -> None: ...",
    "-----BEGIN CERTIFICATE-----\nMIIC\n-----END CERTIFICATE-----",
    "",
]


@pytest.mark.parametrize(("name", "secret"), [(name, each) for name, of in SECRETS.items() for each in of])
def test_a_secret_of_a_known_shape_is_replaced_and_what_stands_around_it_stays(name: str, secret: str) -> None:
    kept, number = Redactor().text(f"Look at this: {secret} and tell me.")
    assert number == 1
    assert f"[redacted {name}]" in kept
    assert kept.startswith("Look at this: ")
    assert kept.endswith(" and tell me.") or "END" not in secret
    value = secret.split("=")[-1].strip() if name in ("secret", "aws-secret-key") else secret
    assert value not in kept
    assert Redactor().text(kept) == (kept, 0), "what was redacted once stays as it is"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_a_secret_stays(text: str) -> None:
    assert Redactor().text(text) == (text, 0)


def test_secrets_are_found_wherever_they_stand_in_a_long_text_and_none_holds_up_the_others() -> None:
    """One search of a library's holds the interpreter: in windows, others get their turn between two."""
    filler = "All work and no play makes Jack a dull boy: password, secret, bearer, ://. " * 60
    text = "".join(f"{filler}{KEY}{number} {PEM} " for number in range(200))
    kept, number = Redactor().text(text)
    assert number == 400
    assert KEY not in kept
    assert "MIIE" not in kept
    for hostile in ("-----BEGIN PRIVATE KEY-----" * 40_000, "sk-" * 300_000, "://a:" * 200_000, "eyJ" * 300_000):
        began = time.process_time()
        Redactor().text(hostile)
        assert time.process_time() - began < 5, "it takes no longer than its length"


def test_every_text_of_a_body_is_redacted_and_no_name() -> None:
    call = {"name": KEY, "arguments": f'{{"k": "{KEY}"}}'}
    parameters = {"properties": {"name": {"default": KEY}}}
    body = {
        "model": KEY,
        "user": KEY,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": KEY}]},
            {"role": "assistant", "tool_calls": [{"id": KEY, "function": call}]},
        ],
        "metadata": {"episode_id": KEY, "name": KEY, "deep": {"er": [KEY]}},
        "tools": [{"function": {"name": "f", "description": KEY, "parameters": parameters}}],
        "n": 1,
    }  # fmt: skip
    kept, number = Redactor().body(body)
    assert number == 6
    assert json.dumps(kept).count(KEY) == 5  # model, user, two names of the call, the episode's id


def ask(served: Served, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/v1{path}", json={"model": MODEL, "tools": [], **body}, timeout=30)


def say(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_secret_reaches_neither_the_model_nor_the_disk_and_the_client_is_told(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    served = serve_scripted(redactor=Redactor())
    engine = served.parts.engine
    assert isinstance(engine, SayingEngine)
    shown = [say(KEY), {"role": "assistant", "content": KEY}]
    answers = [
        ask(served, "/chat/completions", messages=[say(f"My key is {KEY}")], metadata={"note": KEY}),
        ask(served, "/chat/completions", messages=[say(f"My key is {KEY}, again")], stream=True),
        ask(served, "/responses", input=f"My key is {KEY}", instructions=PEM),
        ask(served, "/messages", messages=[say(f"My key is {KEY}")], max_tokens=10, tools=None),
        post(served, {"messages": shown}),
    ]  # fmt: skip
    assert [answer.status_code for answer in answers] == [200] * 5
    assert [answer.headers.get("x-stepagent-redacted") for answer in answers] == ["2", "1", "2", "1", "2"]
    episode = answers[0].headers["x-episode-id"]
    outcome = {"value": 1.0, "note": f"it knows {KEY}"}
    assert ask(served, f"/episodes/{episode}/outcome", **outcome).headers["x-stepagent-redacted"] == "1"
    assert "x-stepagent-redacted" not in ask(served, "/chat/completions", messages=[say("Hi")]).headers
    assert files_with(tmp_path, KEY) == files_with(tmp_path, "MIIEpA") == []
    (step,) = served.parts.log.steps(episode)
    assert step.new_messages[0]["content"] == "My key is [redacted api-key]"
    assert step.prompt_token_ids == engine.prompts[0]
    assert served.parts.protocol.render(step.new_messages) == step.prompt_token_ids


def test_a_redacted_conversation_is_recognised_when_it_goes_on(serve_scripted: ServeScripted) -> None:
    """Also where the policy wrote what looks like a secret: it is logged as it was sampled, and comes back redacted."""
    served = serve_scripted(f"Is it {KEY}?", "So be it.", redactor=Redactor())
    messages = [say(f"My key is {KEY}9")]
    first = ask(served, "/chat/completions", messages=messages)
    assert first.json()["choices"][0]["message"]["content"] == f"Is it {KEY}?"
    messages += [first.json()["choices"][0]["message"], say("No.")]
    second = ask(served, "/chat/completions", messages=messages)
    assert second.headers["x-episode-id"] == first.headers["x-episode-id"]
    before, after = served.parts.log.steps(first.headers["x-episode-id"])
    assert (after.parent_id, after.prompt_change) == (before.id, None)
    seen = before.prompt_token_ids + before.completion_token_ids
    assert after.prompt_token_ids[: len(seen)] == seen


def hide_names(text: str) -> str:
    return text.replace("Bruno", "[a name]")


def break_on_bruno(text: str) -> str:
    if "Bruno" in text:
        raise ValueError(text)
    return text


def test_a_hook_of_the_users_redacts_too_and_one_that_fails_lets_nothing_through(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    served = serve_scripted(redactor=Redactor(hooks=[load_hook("tests.test_redaction:hide_names")]))
    told = ask(served, "/chat/completions", messages=[say(f"Bruno has {KEY}")])
    assert told.headers["x-stepagent-redacted"] == "2"
    assert files_with(tmp_path, "Bruno") == []


def test_a_hook_that_fails_lets_nothing_through(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    served = serve_scripted(redactor=Redactor(hooks=[break_on_bruno]))
    failed = ask(served, "/chat/completions", messages=[say("Bruno")])
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "redaction_failed")
    assert "break_on_bruno failed with ValueError" in failed.json()["error"]["message"]
    assert "Bruno" not in failed.text
    assert files_with(tmp_path, "Bruno") == []
    assert ask(served, "/chat/completions", messages=[say("Anna")]).status_code == 200


@pytest.mark.parametrize(
    "path", ["nothing", "no.such.module:f", "tests.test_redaction:nobody", "tests.test_redaction:PEM"]
)
def test_a_hook_that_cannot_be_had_is_told_at_the_start(path: str) -> None:
    with pytest.raises(UnknownHook, match=path):
        load_hook(path)


def test_redaction_is_on_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_settings([]).redact_secrets == "on"
    monkeypatch.setenv("STEPAGENT_REDACT_SECRETS", "off")
    monkeypatch.setenv("STEPAGENT_REDACT", "a.b:c,d.e:f")
    settings = parse_settings([])
    assert (settings.redact_secrets, settings.redact) == ("off", ["a.b:c", "d.e:f"])


def test_findings_of_presidio_become_placeholders() -> None:
    text = "Anna Berg, anna@example.org"
    found = [(11, 27, "EMAIL_ADDRESS"), (0, 9, "PERSON"), (0, 4, "PERSON"), (16, 27, "URL")]
    assert replaced(text, found) == "[redacted PERSON], [redacted EMAIL_ADDRESS]"


def test_what_a_tool_of_the_servers_brings_is_redacted_too(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    @tool
    def read_file(path: str) -> str:
        """Reads a file."""
        return f"{path}: API_KEY={KEY}"

    call = '<tool_call>\n{"name": "read_file", "arguments": {"path": ".env"}}\n</tool_call>'
    served = serve_scripted(call, "Done.", redactor=Redactor(), toolbox=Toolbox((read_file,), None))
    answer = ask(served, "/chat/completions", messages=[say("Read it.")], tools=None)
    first, second = served.parts.log.steps(answer.headers["x-episode-id"])
    assert first.tool_results[0].content == ".env: API_KEY=[redacted api-key]"
    assert second.new_messages[0]["content"] == first.tool_results[0].content
    assert files_with(tmp_path, KEY) == []
