"""No request holds up the others: a watchdog on the event loop, while requests come that used to block it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.store.episodes import Episode, new_id
from tests.conftest import ServeScripted
from tests.serving import MODEL, Served
from tests.test_step_log import make_episode, make_step

MOST_CPU_S = 0.02
"""That the loop's thread may work between two beats."""
MOST_WAIT_S = 0.5
"""Of the loop between two beats, more than a thread beside it: what waits on the loop shows here."""
MOST_LOCKED_S = 0.5
"""That the process may work between two beats: a library that keeps the interpreter's lock shows here."""


@dataclass
class Watchdog:
    """What lay between two beats at most, in seconds."""

    cpu_s: float = 0.0
    process_s: float = 0.0
    loop_s: float = 0.0
    thread_s: float = 0.0
    """Of a thread that only sleeps: longer where the machine stands still, or somebody keeps the interpreter's lock."""


@contextmanager
def watched(served: Served) -> Iterator[Watchdog]:
    """How long the loop's thread works, the process works beside it, and the loop waits, between two beats at most."""
    loop = served.server.servers[0].get_loop()
    dog, beating = Watchdog(), [True]

    async def beat() -> None:
        cpu, process, wall = time.thread_time(), time.process_time(), time.monotonic()
        while beating[0]:
            await asyncio.sleep(0.002)
            now_cpu, now_process, now = time.thread_time(), time.process_time(), time.monotonic()
            dog.cpu_s, dog.process_s = max(dog.cpu_s, now_cpu - cpu), max(dog.process_s, now_process - process)
            dog.loop_s = max(dog.loop_s, now - wall)
            cpu, process, wall = now_cpu, now_process, now

    def beat_beside() -> None:
        wall = time.monotonic()
        while beating[0]:
            time.sleep(0.002)
            now = time.monotonic()
            dog.thread_s, wall = max(dog.thread_s, now - wall), now

    httpx.get(f"{served.url}/health")  # what is imported at the first request is not meant
    done = asyncio.run_coroutine_threadsafe(beat(), loop)
    beside = threading.Thread(target=beat_beside)
    beside.start()
    try:
        yield dog
    finally:
        beating[0] = False
        done.result(10)
        beside.join()


def chat(served: Served, messages: list[Any], **more: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": messages, "tools": [], **more}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=60)


def said(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


LARGE: dict[str, Callable[[], dict[str, Any]]] = {
    "letters": lambda: {"messages": said("x" * 3_800_000)},
    "words": lambda: {"messages": said("Hello there, " * 290_000)},
    "100 KB": lambda: {"messages": said("y " * 50_000)},
    "messages": lambda: {"messages": said("Hi") * 19_000},
    "parts": lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}]},
    "answers": lambda: {"messages": [*said("a"), {"role": "assistant", "content": "b " * 500_000}, *said("c")]},
    "tools": lambda: {"tools": [
        {"type": "function", "function": {"name": f"f{n}", "description": "d" * 3000}} for n in range(1000)
    ]},
    "few tools": lambda: {"tools": [
        {"type": "function", "function": {"name": f"f{n}", "description": "d" * 300_000}} for n in range(10)
    ]},
    "schema": lambda: {"response_format": {"type": "json_schema", "json_schema": {
        "schema": {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(20_000)}}
    }}},
}  # fmt: skip


def test_the_watchdog_sees_what_waits_on_the_loop(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    with watched(served) as dog:
        served.server.servers[0].get_loop().call_soon_threadsafe(time.sleep, 0.7)
        httpx.get(f"{served.url}/health", timeout=30)
    assert dog.loop_s - dog.thread_s > MOST_WAIT_S


@pytest.mark.parametrize("what", LARGE)
def test_a_large_request_is_refused_or_answered_and_stalls_nobody(serve_scripted: ServeScripted, what: str) -> None:
    served = serve_scripted()
    chat(served, said("Warm up."))
    with watched(served) as dog:
        answer = chat(served, **{"messages": said("Hello"), **LARGE[what]()})
    assert answer.status_code in (200, 400), answer.text[:300]
    assert dog.cpu_s < MOST_CPU_S, f"{dog.cpu_s * 1000:.0f} ms of work on the loop"
    assert dog.process_s < MOST_LOCKED_S, f"the loop stood still for {dog.process_s * 1000:.0f} ms of work elsewhere"
    assert dog.loop_s - dog.thread_s < MOST_WAIT_S, f"the loop waited for {dog.loop_s * 1000:.0f} ms"


def function(number: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{number}"}}


def call_item(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


OF_MANY: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "answers": ("chat/completions", lambda: {
        "messages": [*({"role": ("user", "assistant")[n % 2], "content": "a"} for n in range(19_000)), *said("b")]
    }),
    "tools of other types": ("chat/completions", lambda: {
        "messages": said("a"), "tools": [{"type": f"x{n}"} for n in range(60_000)]
    }),
    "allowed tools": ("chat/completions", lambda: {
        "messages": said("a"),
        "tools": [function(n) for n in range(20_000)],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [function(n) for n in range(20_000)]
        }},
    }),
    "calls": ("responses", lambda: {"input": [*said("a"), *(call_item(n) for n in range(40_000))]}),
}  # fmt: skip


IN_OTHER_FORMS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "messages": ("messages", lambda: {"max_tokens": 5, "messages": said("Hi") * 19_000}),
    "messages counted": ("messages/count_tokens", lambda: {"messages": said("Hi") * 19_000}),
    "tools of a message": ("messages", lambda: {
        "max_tokens": 5, "messages": said("Hi"), "tools": [{"name": f"f{n}"} for n in range(20_000)]
    }),
    "tools of a response": ("responses", lambda: {
        "input": "Hi", "tools": [{"type": "function", "name": f"f{n}"} for n in range(5000)]
    }),
    "tools counted": ("responses/input_tokens", lambda: {
        "input": "Hi", "tools": [{"type": "function", "name": f"f{n}"} for n in range(20_000)]
    }),
}  # fmt: skip


@pytest.mark.parametrize("what", IN_OTHER_FORMS)
def test_a_large_request_in_another_form_stalls_nobody(serve_scripted: ServeScripted, what: str) -> None:
    """It was made a chat request of, and checked again, on the loop."""
    served = serve_scripted()
    chat(served, said("Warm up."))
    path, more = IN_OTHER_FORMS[what]
    with watched(served) as dog:
        answer = httpx.post(f"{served.url}/v1/{path}", json={"model": MODEL, **more()}, timeout=60)
    assert answer.status_code in (200, 400), answer.text[:300]
    assert dog.cpu_s < MOST_CPU_S, f"{dog.cpu_s * 1000:.0f} ms of work on the loop"


@pytest.mark.parametrize("what", OF_MANY)
def test_what_a_request_takes_grows_with_its_size_and_not_with_its_square(
    serve_scripted: ServeScripted, what: str
) -> None:
    """Each held one of the two threads of large requests for a minute and more, also when its client had gone."""
    served = serve_scripted()
    path, more = OF_MANY[what]
    began = time.monotonic()
    answer = httpx.post(f"{served.url}/v1/{path}", json={"model": MODEL, **more()}, timeout=120)
    assert answer.status_code in (200, 400), answer.text[:300]
    assert time.monotonic() - began < 20


def test_a_large_body_is_checked_once(serve_scripted: ServeScripted) -> None:
    """Its thread has made a model of it: checked again, `functions` were refused beside the tools made of them."""
    functions = [{"name": f"f{n}", "description": "d" * 400} for n in range(100)]
    answer = chat(serve_scripted(), said("Hello"), tools=None, functions=functions)
    assert "two forms of one thing" not in answer.text


def test_what_is_far_too_long_is_refused_with_its_reason_before_all_of_it_is_read(
    serve_scripted: ServeScripted,
) -> None:
    served = serve_scripted()
    began = time.monotonic()
    refused = chat(served, said("x" * 3_800_000))
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "holds 2048" in refused.json()["error"]["message"]
    assert time.monotonic() - began < 5


def test_what_just_fits_is_not_refused_early(serve_scripted: ServeScripted, protocol: ChatProtocol) -> None:
    """However many letters its tokens have."""
    served = serve_scripted()
    vocabulary = protocol.tokenizer.get_vocab()
    word = max((text for text in vocabulary if text.isalpha()), key=len)
    text = word * (1900 // len(protocol.encode(word * 100)) * 100)
    assert len(text) > 2 * 2048
    assert chat(served, said(text)).status_code == 200


def test_an_episode_of_many_steps_is_read_page_by_page_and_stalls_nobody(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    episode = make_episode()
    log = served.parts.log
    log.append(episode).result()
    steps = [make_step(episode) for _ in range(3000)]
    for start in range(0, len(steps), 500):
        log.append(*steps[start : start + 500]).result()
    ids: list[str] = []
    with watched(served) as dog:
        after: dict[str, str] = {}
        while True:
            page = httpx.get(
                f"{served.url}/v1/episodes/{episode.id}", params={"with_tokens": True, **after}, timeout=60
            )
            ids += [step["id"] for step in page.json()["steps"]]
            if not page.json()["has_more"]:
                break
            after = {"after_step": page.json()["last_step_id"]}
        assert chat(served, said("Hello"), metadata={"episode_id": episode.id}).status_code == 200
    assert ids == [step.id for step in log.steps(episode.id)][:3000]
    assert dog.cpu_s < MOST_CPU_S, f"{dog.cpu_s * 1000:.0f} ms of work on the loop"


def test_a_page_is_bounded_in_bytes_and_none_is_lost(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    episodes = [Episode(**{**vars_of(make_episode()), "metadata": {"text": "m" * 1_000_000}}) for _ in range(10)]
    served.parts.log.append(*episodes).result()
    ids: list[str] = []
    after: dict[str, str] = {}
    with watched(served) as dog:
        while True:
            page = httpx.get(f"{served.url}/v1/episodes", params={"limit": 1000, **after}, timeout=60)
            assert len(page.content) < 5 * 2**20
            ids += [each["id"] for each in page.json()["data"]]
            if not page.json()["has_more"]:
                break
            after = {"after": page.json()["last_id"]}
    assert ids == sorted((each.id for each in episodes), reverse=True)
    assert dog.cpu_s < MOST_CPU_S


def vars_of(episode: Episode) -> dict[str, Any]:
    return {name: getattr(episode, name) for name in episode.__slots__} | {"id": new_id("ep")}


def test_metadata_and_provenance_are_bounded(serve_scripted: ServeScripted) -> None:
    served = serve_scripted()
    refused = chat(served, said("Hello"), metadata={"text": "m" * 70_000})
    assert refused.status_code == 400
    assert "metadata may have 65536 bytes" in refused.json()["error"]["message"]
    demonstration = {"messages": [*said("a"), {"role": "assistant", "content": "b"}], "provenance": {"t": "m" * 70_000}}
    imported = httpx.post(f"{served.url}/v1/demonstrations", json={"demonstrations": [demonstration]})
    assert imported.status_code == 400


def test_the_same_is_said_of_a_large_body_as_of_a_small_one(serve_scripted: ServeScripted) -> None:
    """Large ones are checked elsewhere."""
    served = serve_scripted()
    answers = []
    for filler in ("a", "a" * 100_000):
        wrong = {"model": MODEL, "messages": [{"role": "cat", "content": "x"}], "user": filler}
        broken = json.dumps({"user": filler})[:-1]
        post = httpx.post(f"{served.url}/v1/chat/completions", json=wrong)
        cut = httpx.post(
            f"{served.url}/v1/chat/completions", content=broken, headers={"content-type": "application/json"}
        )
        answers.append((post.status_code, post.json(), cut.status_code, cut.json()["error"]["message"][:30]))
    assert answers[0] == answers[1]


def test_the_description_of_all_routes_holds_up_nobody(serve_scripted: ServeScripted) -> None:
    """It took a second of the event loop, once in a server's life, for whoever has the least of keys."""
    server = serve_scripted()
    with watched(server) as dog:
        described = httpx.get(f"{server.url}/openapi.json", timeout=60)
    assert "/v1/chat/completions" in described.json()["paths"]
    assert dog.cpu_s < MOST_CPU_S
