"""A world that takes its time, or fails, holds up nobody but its own episode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest

from policies.chat.chat_protocol import ChatProtocol
from runtime.agent.tools import Toolbox
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tools.worlds.order_desk import OrderDesk, OrderDeskEpisode
from tools.worlds.world import Task, WorldFailed

SLOW_S = 0.5


class SlowDesk(OrderDesk):
    """The order desk, whose tasks have to be made first; one cannot be."""

    def task(self, split: str, index: int) -> Task:
        time.sleep(SLOW_S)
        return super().task(split, index)

    def open(self, task: Task) -> OrderDeskEpisode:
        time.sleep(SLOW_S)
        if task.index == 13:
            raise WorldFailed("it did not answer within 60 seconds")
        return super().open(task)


@pytest.fixture
def server(protocol: ChatProtocol, tmp_path: Path) -> Iterator[Served]:
    parts = parts_of(SayingEngine(protocol), protocol, tmp_path, toolbox=Toolbox((), SlowDesk()))
    with served(parts) as running:
        yield running


def ask(server: Served, **metadata: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Go on."}], "metadata": metadata}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)


def test_who_names_a_task_waits_for_the_world_and_nobody_else_does(server: Served) -> None:
    ask(server)  # what is made on a first request is made
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(ask, server, task=f"order_desk/train/{index}") for index in range(4)]
        waits = []
        while not all(each.done() for each in waiting):
            began = time.perf_counter()
            assert ask(server).status_code == 200
            waits.append(time.perf_counter() - began)
    assert {each.result().status_code for each in waiting} == {200}
    assert len(waits) > 3
    assert median(waits) < SLOW_S / 2, "the event loop waited along"


def test_a_world_that_fails_is_told_in_words_and_the_server_lives(server: Served) -> None:
    refused = ask(server, task="order_desk/train/13")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "world_error"
    assert "the world could not open the task: it did not answer within 60 seconds" in refused.text
    assert ask(server, task="order_desk/train/1").status_code == 200
