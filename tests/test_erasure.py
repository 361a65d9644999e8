"""What is erased is gone from every table and from the bytes of the files; what was made of it is named."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from policies.adapters.probe import read_probe
from policies.chat.chat_protocol import ChatProtocol
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.erasure import Eraser, Scope
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole
from runtime.store.lineage import Lineage
from runtime.store.step_log import StepLog
from runtime.store.step_rows import tokens_to_blob
from tests.conftest import ServeScripted
from tests.serving import MODEL, Served

SECRET = "Rumpelstiltskin"
TOOL = {"type": "function", "function": {"name": "look", "description": f"Looks at {SECRET}", "parameters": {}}}
OTHER = "the weather in Lisbon"


def chat(served: Served, text: str, **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [], **more}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)


def episode_of(served: Served, text: str, **more: Any) -> str:
    return chat(served, text, **more).raise_for_status().headers["x-episode-id"]


def ask(served: Served, method: str, path: str, **more: Any) -> httpx.Response:
    return httpx.request(method, f"{served.url}/v1{path}", timeout=60, **more)


def files_with(state: Path, word: str) -> list[str]:
    """The files of a state folder in whose bytes a word stands."""
    return [
        str(path.relative_to(state))
        for path in state.rglob("*")
        if path.is_file() and word.encode() in path.read_bytes()
    ]


def say_everything_about(served: Served) -> tuple[str, str]:
    """An episode with the secret in every table that can hold one; returns it and the demonstration made of it."""
    first = ask(
        served,
        "POST",
        "/responses",
        json={
            "model": MODEL, "input": f"I am {SECRET}.", "tools": [{**TOOL["function"], "type": "function"}],
            "metadata": {"note": SECRET}, "user": f"user {SECRET}",
        },
    )  # fmt: skip
    episode = first.raise_for_status().headers["x-episode-id"]
    (step,) = ask(served, "GET", f"/episodes/{episode}").json()["steps"]
    outcome = ask(served, "POST", f"/episodes/{episode}/outcome", json={"value": 1, "note": f"{SECRET} was content"})
    ask(
        served, "DELETE", f"/episodes/{episode}/outcomes/{outcome.json()['id']}", json={"reason": f"no, {SECRET}"}
    ).raise_for_status()
    message = {"role": "assistant", "content": f"Good day, {SECRET}."}
    corrected = ask(
        served, "POST", f"/episodes/{episode}/corrections", json={"step_id": step["id"], "message": message}
    )
    corrected.raise_for_status()
    promoted = ask(served, "POST", f"/episodes/{episode}/promote").raise_for_status().json()["id"]
    ask(served, "DELETE", f"/responses/{first.json()['id']}").raise_for_status()
    return episode, promoted


def test_an_erased_episode_is_gone_from_every_table_and_from_the_bytes_of_the_files(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    served = serve_scripted(f"Hello {SECRET}!", "Sunny.")
    episode, demonstration = say_everything_about(served)
    other = episode_of(served, OTHER)
    assert files_with(tmp_path, SECRET)
    (step,) = served.parts.log.steps(episode)
    said = tokens_to_blob(step.completion_token_ids)
    assert said in (tmp_path / "agent.db-wal").read_bytes()
    erased = ask(served, "DELETE", f"/episodes/{episode}", json={"reason": "asked by letter"}).raise_for_status().json()
    assert files_with(tmp_path, SECRET) == []
    assert said not in (tmp_path / "agent.db").read_bytes() + (tmp_path / "agent.db-wal").read_bytes()
    assert erased["state"] == "finished"
    assert [each["id"] for each in erased["episodes"]] == sorted([episode, demonstration])
    assert erased["demonstrations"] == [demonstration]
    assert (erased["reason"], erased["num_episodes"]) == ("asked by letter", 2)
    assert erased["report"]["rows"]["steps"] == 2
    assert files_with(tmp_path, OTHER)
    assert "Sunny." in ask(served, "GET", f"/episodes/{other}").text
    assert served.parts.log.verify() == []


def test_an_erased_episode_answers_gone_and_takes_nothing_more(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    episode = episode_of(served, SECRET, metadata={"episode_id": "mine"})
    first = ask(served, "DELETE", f"/episodes/{episode}").raise_for_status().json()
    assert ask(served, "DELETE", f"/episodes/{episode}").json()["id"] == first["id"]
    for method, path in (("GET", ""), ("POST", "/promote")):
        gone = ask(served, method, f"/episodes/{episode}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "episode_erased")
    assert chat(served, "Again", metadata={"episode_id": "mine"}).status_code == 410
    assert ask(served, "DELETE", "/episodes/never_was").status_code == 404
    assert ask(served, "GET", "/episodes").json()["data"] == []
    listed = ask(served, "GET", "/erasures").json()["data"]
    assert [each["id"] for each in listed] == [first["id"]]
    assert ask(served, "GET", f"/erasures/{first['id']}").json()["episodes"][0]["num_steps"] == 1


def test_all_episodes_for_a_user_go_and_those_of_others_stay(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    served = serve_scripted()
    for number in range(5):
        episode_of(served, f"{SECRET} number {number}", user="rumpel")
    other = episode_of(served, OTHER, user="bob")
    assert ask(served, "DELETE", "/episodes").status_code == 400
    erased = ask(served, "DELETE", "/episodes", params={"user": "rumpel", "reason": "left"}).raise_for_status().json()
    assert (erased["num_episodes"], erased["scope"]) == (5, "user")
    assert files_with(tmp_path, SECRET) == files_with(tmp_path, "rumpel") == []
    assert [each["id"] for each in ask(served, "GET", "/episodes").json()["data"]] == [other]
    assert ask(served, "DELETE", "/episodes?user=nobody").json()["num_episodes"] == 0
