"""A user's own world that misbehaves: the server goes on, nothing that was done is lost, and the world is named."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from learner import practice
from learner.practice import Attempt, PracticeOptions, practise
from policies.chat.chat_protocol import ChatProtocol
from policies.types import ToolCalls
from runtime.agent.budget import RunLimits
from runtime.agent.tools import Toolbox
from tests.faulty_worlds import COUNT, NUMBERS, Numbers, NumbersEpisode, numbers, raising
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tools.worlds.calls import answering, calling
from tools.worlds.threads import MAX_LEFT_BEHIND, MAX_RUNNING
from tools.worlds.world import Task

CALL = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'
TWO_CALLS = f"{CALL}\n{CALL}"
LIMITS = RunLimits(deadline_s=1.5, tool_timeout_s=0.3)

Serve = Callable[..., Served]


@pytest.fixture
def serve(protocol: ChatProtocol, tmp_path: Path) -> Iterator[Serve]:
    """Starts a server with a world, whose policy says what it is told to."""
    open_servers = []

    def start(world: Any, *says: str, limits: RunLimits = LIMITS) -> Served:
        parts = parts_of(SayingEngine(protocol, *says), protocol, tmp_path, toolbox=Toolbox((), world), limits=limits)
        running = served(parts)
        open_servers.append(running)
        return running.__enter__()

    yield start
    for running in open_servers:
        running.__exit__(None, None, None)


def ask(server: Served, index: int | None = 0, episode_id: str = "") -> httpx.Response:
    metadata = {"task": f"numbers/train/{index}"} if index is not None else {}
    said = "And now?" if episode_id else "Go on."  # what was not said before continues the episode, and is replayed
    body = {"model": MODEL, "messages": [{"role": "user", "content": said}], "metadata": metadata}
    headers = {"x-episode-id": episode_id} if episode_id else {}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20, headers=headers)


def told(response: httpx.Response) -> str:
    assert response.status_code == 503, response.text
    error = response.json()["error"]
    assert error["code"] == "world_error"
    return error["message"]


def outcomes(server: Served, response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return [outcome.value for outcome in server.parts.log.outcomes(response.headers["x-episode-id"])]


def observations(server: Served, response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    steps = server.parts.log.steps(response.headers["x-episode-id"])
    return [result.content for step in steps for result in step.tool_results]


def is_up(server: Served) -> bool:
    return httpx.get(f"{server.url}/health", timeout=5).status_code == 200


# ------------------------------------------------------------------------------------------ what it raises


class Ends(BaseException):
    """No Exception: it would end the thread it is raised in."""


@pytest.mark.parametrize("error", [SystemExit(3), Ends("kaput"), RuntimeError("kaput"), ValueError("kaput")])
@pytest.mark.parametrize("method", ["open_item", "schemas"])
def test_what_a_task_is_opened_with_may_raise_anything(serve: Serve, method: str, error: BaseException) -> None:
    server = serve(numbers(**{method: raising(error)}))
    message = told(ask(server))
    assert "of the world numbers" in message
    assert f"raised {type(error).__name__}" in message
    assert "faulty_worlds.py" in message
    assert "the fault is the world's" in message
    assert is_up(server)


@pytest.mark.parametrize("error", [SystemExit(3), Ends("kaput"), RuntimeError("kaput"), StopIteration()])
@pytest.mark.parametrize("method", ["outcome", "answer"])
def test_a_step_is_logged_though_its_end_cannot_be_judged(serve: Serve, method: str, error: BaseException) -> None:
    server = serve(numbers(**{method: raising(error)}), "Done.")
    response = ask(server)
    assert outcomes(server, response) == []
    assert len(server.parts.log.steps(response.headers["x-episode-id"])) == 1
    assert 'stepagent_unjudged_episodes_total{agent=""} 1.0' in httpx.get(f"{server.url}/metrics").text
    assert is_up(server)


@pytest.mark.parametrize("error", [SystemExit(3), Ends("kaput")])
def test_a_call_that_would_end_the_thread_is_an_observation_and_can_be_replayed(
    serve: Serve, error: BaseException
) -> None:
    server = serve(numbers(run=raising(error)), CALL, "Done.")
    response = ask(server)
    assert observations(server, response) == [f"Error: {type(error).__name__} {error}"]
    again = ask(server, None, response.headers["x-episode-id"])
    assert outcomes(server, again) == [1.0, 1.0]
    assert [step.index for step in server.parts.log.steps(response.headers["x-episode-id"])] == [0, 1, 2]


# --------------------------------------------------------------------------------------- what it gives back


@pytest.mark.parametrize("value", [None, "yes", float("nan"), float("inf"), 7, -1.0, [1.0]])
def test_an_outcome_that_is_no_number_from_0_to_1_is_none(serve: Serve, value: object) -> None:
    server = serve(numbers(outcome=lambda _: value), "Done.")
    response = ask(server)
    assert outcomes(server, response) == []
    assert len(server.parts.log.steps(response.headers["x-episode-id"])) == 1


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        (True, 1.0), (0, 0.0), (0.25, 0.25), (Decimal("0.5"), 0.5),
        (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array(1.0), 1.0),
    ],
)  # fmt: skip
def test_other_numbers_are_outcomes(serve: Serve, value: object, logged: float) -> None:
    server = serve(numbers(outcome=lambda _: value), "Done.")
    assert outcomes(server, ask(server)) == [logged]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"a": 1}, '{"a": 1}'),
        (["ä"], '["ä"]'),
        (("ä", 1), '["ä", 1]'),
        (42, "42"),
        ({(1, 2): 3}, "`run` of the world must return text, not dict that is no JSON"),
        (None, "`run` of the world must return text, not NoneType"),
        (b"xx", "`run` of the world must return text, not bytes"),
    ],
)
def test_what_run_gives_back_is_shown_or_told(serve: Serve, given: object, shown: str) -> None:
    server = serve(numbers(run=lambda *_: given), CALL, "Done.")
    (observation,) = observations(server, ask(server))
    assert shown in observation


@pytest.mark.parametrize(
    ("schemas", "words"),
    [
        ([{"name": "count", "parameters": {}}], "the tool 'count' of schemas() needs 'description'"),
        ([{"name": "count", "description": "Counts."}], "the tool 'count' of schemas() needs 'parameters'"),
        ([{"description": "Counts.", "parameters": {}}], "needs 'name'"),
        (["count"], "schemas() must give a mapping"),
        (None, "schemas() must give a list of tools, perhaps an empty one; not None"),
        ([{"type": "function", "function": COUNT}], "is what OpenAI's form has under 'function'"),
        (2 * [{"name": "count", "description": "Counts.", "parameters": {}}], "two tools with the name 'count'"),
        ([{**COUNT, "name": "count it"}], "a tool with the name 'count it'; it may have letters from a to z"),
        ([{**COUNT, "name": "zähle"}], "a tool with the name 'zähle'"),
        ([{**COUNT, "description": "\ud800"}], "the schema of the tool 'count' cannot be written as JSON"),
        ([{**COUNT, "parameters": {"properties": {"a": {"enum": {1, 2}}}}}], "cannot be written as JSON"),
        ([{**COUNT, "parameters": {"properties": {"a": {"maximum": float("nan")}}}}], "cannot be written as JSON"),
        ([{**COUNT, "parameters": {"properties": {(1, 2): {}}}}], "keys must be str"),
    ],
)
def test_a_tool_that_does_not_say_what_it_is_is_told(serve: Serve, schemas: Any, words: str) -> None:
    server = serve(numbers(schemas=lambda _: schemas))
    message = told(ask(server))
    assert words in message
    assert "the world numbers" in message
    (attempt,) = practised(server, numbers(schemas=lambda _: schemas), 1)
    assert words in attempt.error


def test_what_is_opened_must_be_an_episode(serve: Serve) -> None:
    server = serve(numbers(open_item=lambda *_: None))
    assert "`open` of the world numbers gave None, which is no episode" in told(ask(server))


def test_a_tool_without_arguments_needs_no_properties() -> None:
    schemas = [{"name": "count", "description": "Counts.", "parameters": {}}]
    offered, _ = Toolbox((), numbers(schemas=lambda _: schemas)).open("numbers/train/0", ())
    assert offered[0]["function"]["parameters"] == {"type": "object", "properties": {}}


# ------------------------------------------------------------------------------------------- tools by task


def test_each_task_offers_the_schemas_of_its_own() -> None:
    def schemas(episode: NumbersEpisode) -> list[dict[str, Any]]:
        look = {"type": "object", "properties": {"of": {"type": "string", "enum": [f"item {episode.item}"]}}}
        return [{"name": "look", "description": "Looks.", "parameters": look}]

    toolbox = Toolbox((), numbers(schemas=schemas))
    for index in (0, 1, 0):
        offered, _ = toolbox.open(f"numbers/train/{index}", ())
        item = NUMBERS["train"][index]
        assert offered[0]["function"]["parameters"]["properties"]["of"]["enum"] == [f"item {item}"]


WORDS = {"type": "object", "properties": {"words": {"type": "array", "items": {"type": "string"}}}}
CALL_WITH_WORDS = '<tool_call>\n{"name": "count", "arguments": {"words": ["a", "b"]}}\n</tool_call>'


def consuming(episode: NumbersEpisode, _: str, arguments: dict[str, Any]) -> str:
    words = arguments.pop("words")
    while words:
        episode.num_calls += len(words.pop())
    return str(episode.num_calls)


def test_what_a_call_does_with_its_arguments_changes_neither_the_log_nor_a_replay(serve: Serve) -> None:
    """The step was logged, answered and replayed with the empty list that the world had left of it."""
    server = serve(numbers(run=consuming, schemas=lambda _: [{**COUNT, "parameters": WORDS}]), CALL_WITH_WORDS, "Done.")
    response = ask(server)
    assert observations(server, response) == ["2"]
    first = server.parts.log.steps(response.headers["x-episode-id"])[0]
    assert isinstance(first.action, ToolCalls)
    assert first.action.calls[0].arguments == {"words": ["a", "b"]}


def test_a_copy_is_led_to_where_calls_led_that_used_up_their_arguments() -> None:
    world = numbers(run=consuming, schemas=lambda _: [{**COUNT, "parameters": WORDS}])
    episode = world.open(world.task("train", 0))
    assert isinstance(episode, NumbersEpisode)
    episode.play(calling("count", {"words": ["ab", "c"]}, 0))
    assert episode.num_calls == 3
    assert episode.copy().is_where(episode)


@pytest.mark.parametrize("reopened", [lambda episode: episode, deepcopy])
def test_an_attempt_that_is_not_reopened_afresh_is_told(reopened: Any) -> None:
    """One that gave itself was replayed for ever; a copy was where the calls lead when they are made twice."""
    world = numbers(reopened=reopened)
    episode = world.open(world.task("train", 0))
    episode.play(calling("count", {}, 0))
    with pytest.raises(ValueError, match="`reopened` must give a fresh attempt"):
        episode.same_effect(calling("count", {}, 1), calling("count", {}, 2))


def test_an_argument_may_be_called_self(serve: Serve) -> None:
    call = '<tool_call>\n{"name": "count", "arguments": {"self": "me"}}\n</tool_call>'
    parameters = {"type": "object", "properties": {"self": {"type": "string"}}}
    world = numbers(run=lambda *given: given[2], schemas=lambda _: [{**COUNT, "parameters": parameters}])
    server = serve(world, call, "Done.")
    assert observations(server, ask(server)) == ['{"self": "me"}']


async def run_async(*_: Any) -> str:
    await asyncio.sleep(0)
    return "seen"


@pytest.mark.parametrize("run", [run_async, lambda *_: asyncio.run(run_async())])
def test_a_tool_may_be_async_or_run_an_event_loop(serve: Serve, run: Any) -> None:
    server = serve(numbers(run=run), CALL, "Done.")
    assert observations(server, ask(server)) == ["seen"]


@pytest.mark.parametrize("said", [["And now?"], {"role": "user", "content": "And now?"}, 5])
def test_what_the_user_says_next_is_text(serve: Serve, said: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(numbers(answer=lambda *_: said), "Done.")
    assert outcomes(server, ask(server)) == []
    assert "`answer` must return the user's next message as text, or None" in caplog.text


@dataclass(eq=False)
class DataclassEpisode(NumbersEpisode):
    """Its constructor calls no other."""

    item: int
    num_calls: int = 0
    is_answered: bool = False


def test_an_episode_may_be_a_dataclass(serve: Serve) -> None:
    server = serve(numbers(open_item=lambda _, item: DataclassEpisode(item)), CALL, "Done.")
    response = ask(server)
    assert observations(server, response) == ["1"]
    assert outcomes(server, response) == [1.0]


def test_a_world_without_tools_is_judged(serve: Serve) -> None:
    server = serve(numbers(schemas=lambda _: []), "It is five.")
    assert outcomes(server, ask(server)) == [1.0]


# ------------------------------------------------------------------------------------------------- hanging


class Gate:
    """Holds threads until it is opened."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def wait(self, *_: Any) -> Any:
        self._event.wait(60)
        return "late"

    def open(self) -> None:
        self._event.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def test_a_world_that_hangs_in_open_is_given_up_and_then_asked_no_more(serve: Serve, gate: Gate) -> None:
    opened = list[int]()

    def open_item(world: Any, item: int) -> NumbersEpisode:
        opened.append(item)
        return gate.wait() if item == NUMBERS["train"][0] else NumbersEpisode(item)

    server = serve(numbers(open_item=open_item), limits=RunLimits(deadline_s=0.5, tool_timeout_s=0.3))
    assert "the world numbers did not answer within 0.5 seconds" in told(ask(server))
    with ThreadPoolExecutor(MAX_RUNNING) as threads:
        hanging = [threads.submit(ask, server) for _ in range(MAX_LEFT_BEHIND - 1)]
        assert ask(server, None).status_code == 200  # without a task, no thread of the world's is needed
    assert {each.result().status_code for each in hanging} == {503}
    num_opened = len(opened)
    message = told(ask(server, 1))
    assert f"the world numbers hangs: {MAX_LEFT_BEHIND} earlier requests of it have not ended" in message
    assert len(opened) == num_opened == MAX_LEFT_BEHIND
    gate.open()
    deadline = time.perf_counter() + 10
    while (again := ask(server, 1)).status_code != 200 and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert again.status_code == 200


def test_a_world_that_hangs_where_it_looks_for_a_task_holds_up_nothing_else(serve: Serve, gate: Gate) -> None:
    begun = threading.Event()

    def find_task(*_: Any) -> None:
        begun.set()
        gate.wait()

    server = serve(numbers(find_task=find_task), "Hello.", limits=RunLimits(deadline_s=3, tool_timeout_s=0.3))
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(ask, server, None)
        assert begun.wait(5)
        assert is_up(server)
        assert not hanging.done(), "they wait for each other"
        assert "the world numbers did not answer within 3 seconds" in told(hanging.result())
    gate.open()
    assert ask(server, None).status_code == 200


@pytest.mark.parametrize("method", ["find_task", "open_item"])
def test_counting_tokens_gives_up_a_world_that_hangs(serve: Serve, gate: Gate, method: str) -> None:
    server = serve(numbers(**{method: lambda *_: gate.wait()}), limits=RunLimits(deadline_s=0.5, tool_timeout_s=0.3))
    body = {"model": MODEL, "messages": [{"role": "user", "content": f"Count to {NUMBERS['train'][0]}."}]}
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=body, timeout=20)
    assert counted.status_code == 503, counted.text
    assert "the world numbers did not answer within 0.5 seconds" in counted.text
    assert is_up(server)


def test_an_outcome_that_hangs_ends_the_episode_without_one(serve: Serve, gate: Gate) -> None:
    server = serve(numbers(outcome=gate.wait), "Done.")
    began = time.perf_counter()
    assert outcomes(server, ask(server)) == []
    assert time.perf_counter() - began < 5
    assert is_up(server)


def test_a_replay_that_hangs_is_given_up(serve: Serve, gate: Gate) -> None:
    server = serve(numbers(run=gate.wait), CALL, "Done.")
    response = ask(server)
    assert observations(server, response) == ["error: count took longer than 0.3 seconds"]
    message = told(ask(server, None, response.headers["x-episode-id"]))
    assert "the world numbers did not answer within 1.5 seconds" in message


def test_after_a_call_that_hangs_an_episode_takes_no_other_and_has_no_outcome(serve: Serve, gate: Gate) -> None:
    server = serve(numbers(run=gate.wait), TWO_CALLS, "Done.")
    response = ask(server)
    assert observations(server, response) == [
        "error: count took longer than 0.3 seconds",
        "error: an earlier call of this episode of the world numbers has not ended",
    ]
    assert outcomes(server, response) == []


def test_a_call_that_hangs_holds_up_no_other_episode(serve: Serve, gate: Gate) -> None:
    begun = threading.Event()

    def run(episode: NumbersEpisode, *_: Any) -> str:
        if episode.item == NUMBERS["train"][0]:
            begun.set()
            return gate.wait()
        return "quick"

    server = serve(numbers(run=run), CALL, limits=RunLimits(deadline_s=10, tool_timeout_s=2))
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(ask, server)
        assert begun.wait(10)
        server.parts.engine.says.append(CALL)  # type: ignore[attr-defined]
        assert observations(server, ask(server, 1)) == ["quick"]
        assert not hanging.done()
        gate.open()
    assert observations(server, hanging.result()) == ["late"]


def test_calls_that_hang_in_one_world_close_no_tool_of_anothers(serve: Serve, gate: Gate) -> None:
    limits = RunLimits(deadline_s=1, tool_timeout_s=0.1)
    hanging = serve(numbers(run=gate.wait), *[CALL, "Done."] * 9, limits=limits)
    for _ in range(8):
        assert observations(hanging, ask(hanging)) == ["error: count took longer than 0.1 seconds"]
    assert observations(hanging, ask(hanging)) == ["error: count hangs: 8 earlier calls of it have not ended yet"]
    other = numbers()
    other.name = "others"
    server = serve(other, CALL, "Done.")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Go."}], "metadata": {"task": "others/train/0"}}
    assert observations(server, httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)) == ["1"]


def test_calls_of_one_step_are_run_in_their_order(serve: Serve) -> None:
    def run(episode: NumbersEpisode, *_: Any) -> str:
        episode.num_calls += 1
        number = episode.num_calls
        time.sleep(0.05 / number)  # a later call would overtake an earlier one
        return f"{number} then {episode.num_calls}"

    server = serve(numbers(run=run), "\n".join([CALL] * 4), "Done.")
    assert observations(server, ask(server)) == [f"{number} then {number}" for number in range(1, 5)]


# ------------------------------------------------------------------------------------------------ practice


def practised(server: Served, world: Any, num_tasks: int = 2) -> list[Attempt]:
    tasks = [world.task("train", index) for index in range(num_tasks)]
    return asyncio.run(practise(server.async_client(), world, tasks, PracticeOptions(MODEL, concurrency=num_tasks)))


@pytest.mark.parametrize("error", [SystemExit(3), Ends("kaput"), RuntimeError("kaput")])
@pytest.mark.parametrize("method", ["open_item", "schemas", "answer", "outcome"])
def test_in_practice_a_world_that_raises_ends_its_own_attempt(serve: Serve, method: str, error: BaseException) -> None:
    def once(given: Any, *arguments: Any) -> Any:
        item = arguments[0] if method == "open_item" else given.item
        if item == NUMBERS["train"][0]:
            raise error
        return getattr(super(type(given), given), method)(*arguments)

    world = numbers(**{method: once})
    failed, done = practised(serve(world), world)
    assert f"of the world numbers raised {type(error).__name__}" in failed.error
    assert (done.error, done.outcome) == ("", 1.0)


@pytest.mark.parametrize("value", [None, "yes", float("nan"), 7])
def test_in_practice_an_outcome_that_is_none_is_told(serve: Serve, value: object) -> None:
    world = numbers(outcome=lambda _: value)
    (attempt,) = practised(serve(world), world, 1)
    assert f"`outcome` of the world numbers gave {value!r}; it must be a number from 0 to 1" in attempt.error


@pytest.mark.parametrize(
    "told",
    [None, "text", {"role": "tool", "content": "x"}, [{"content": "x"}], ["text"], (each for each in [COUNT]), [None],
     [{"role": "user", "content": None}], [{"role": "user", "content": "\ud800"}],
     [{"role": "assistant", "content": "Me too."}]],
)  # fmt: skip
def test_in_practice_what_a_world_says_must_be_messages(serve: Serve, told: Any) -> None:
    """The first of them ended the whole run, or a learner's cycle."""
    world = numbers(play=lambda *_: told)
    failed, also_failed = practised(serve(world), world)
    for attempt in (failed, also_failed):
        assert "`play` of the world numbers raised ValueError: a world says a list of messages" in attempt.error


def test_in_practice_a_task_whose_messages_cannot_be_sent_ends_its_own_attempt(serve: Serve) -> None:
    class Numbered(Numbers):
        def task(self, split: str, index: int) -> Task:
            said: Any = "\ud800" if index == 0 else "Count."
            return Task(self.name, split, index, ({"role": "user", "content": said},))

    failed, done = practised(serve(Numbered(), "Done."), Numbered())
    assert "cannot be written as JSON" in failed.error
    assert (done.error, done.outcome) == ("", 1.0)


def test_a_user_is_cut_as_an_observation_is() -> None:
    episode = numbers(answer=lambda *_: "\ud800" + "x" * 1_000_000).open_item(0)
    (said,) = episode.play(answering("Done."))
    assert said["content"].startswith("?x")
    assert said["content"].endswith("[cut here: the whole observation has 1000001 characters]")


def test_in_practice_a_world_that_hangs_does_not_hold_up_the_end(
    serve: Serve, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(practice, "WORLD_TIMEOUT_S", 0.3)
    world = numbers(outcome=gate.wait)
    began = time.perf_counter()
    (attempt,) = practised(serve(world), world, 1)
    assert attempt.error == "the world numbers did not answer within 0.3 seconds"
    assert time.perf_counter() - began < 10
