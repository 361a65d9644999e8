"""Experts at the policy's own states: people's corrections, the world, and a stronger model over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from learner.data.collect import LoggedEpisode, LoggedState, main_line
from learner.data.experts import Corrections, ModelExpert, WorldExpert, ask, open_at, same_effect_at
from learner.data.inspection import inspect
from learner.practice import PracticeOptions, practise
from policies.chat.chat_protocol import ChatProtocol, action_message
from policies.types import FinalAnswer, ToolCalls
from runtime.agent.tools import Toolbox
from runtime.store.episodes import Step
from runtime.store.step_log import StepLog
from tests.conftest import ServeScripted
from tests.demonstrations import expert_demonstration
from tests.faulty_worlds import numbers, raising
from tests.records import make_chain, make_episode
from tests.serving import MODEL, SayingEngine, Served, parts_of, served
from tools.worlds import threads
from tools.worlds.calls import answering
from tools.worlds.order_desk import OrderDesk
from tools.worlds.threads import MAX_LEFT_BEHIND
from tools.worlds.world import World

WORLD = OrderDesk()


def practised(server: Served, index: int = 5) -> list[LoggedState]:
    """The states of one practised task, tools run by the client."""
    options = PracticeOptions(MODEL, temperature=1.0, seed=1)
    (attempt,) = asyncio.run(practise(server.async_client(), WORLD, [WORLD.task("train", index)], options))
    path = main_line(server.parts.log.steps(attempt.episode_id))
    return [LoggedState(WORLD.task("train", index).id, path[: number + 1]) for number in range(len(path))]


def test_the_world_knows_the_way_from_every_state_that_the_policy_got_into(novice_server: Served) -> None:
    states = practised(novice_server)
    answers = [asyncio.run(WorldExpert(WORLD).answer(state)) for state in states]
    assert all(answer is not None and answer.source == "world" for answer in answers)
    assert answers[0] is not None
    assert isinstance(answers[0].action, ToolCalls)
    assert answers[0].action.calls[0].name == "look_up_customer"


def test_a_world_that_tells_another_story_than_was_lived_says_nothing(novice_server: Served) -> None:
    told_of = WORLD.task("train", 6).id
    (first, *later) = practised(novice_server, index=5)
    elsewhere = [LoggedState(told_of, state.path) for state in later]
    assert all(open_at(WORLD, state) is None for state in elsewhere if len(state.path) > 2)
    assert open_at(WORLD, LoggedState("another_world/train/1", first.path)) is None
    assert open_at(WORLD, LoggedState("order_desk/train/999999", first.path)) is None
    assert open_at(WORLD, LoggedState(None, first.path)) is None
    assert same_effect_at(None, first) is None


def test_a_correction_comes_before_the_world(serve_scripted: ServeScripted) -> None:
    server = serve_scripted('<tool_call> {"name" : "check_item"} </tool_call>', "I do not know.")
    task = WORLD.task("train", 3)
    answer = server.client().chat.completions.with_raw_response.create(
        model=MODEL,
        messages=list(task.messages),
        tools=[],
        metadata={"task": task.id},  # type: ignore[arg-type]
    )
    episode_id, step_id = answer.headers["x-episode-id"], answer.headers["x-step-id"]
    message = {"role": "assistant", "content": "I shall ask."}
    reply = httpx.post(
        f"{server.url}/v1/episodes/{episode_id}/corrections", json={"step_id": step_id, "message": message}
    )
    assert reply.status_code == 201, reply.text
    state = LoggedState(task.id, main_line(server.parts.log.steps(episode_id)))
    found = asyncio.run(ask([Corrections(server.parts.log), WorldExpert(WORLD)], state))
    assert found is not None
    assert (found.source, found.action) == ("correction", FinalAnswer("I shall ask."))
    assert asyncio.run(ask([], state)) is None


def test_a_stronger_model_answers_over_http_and_its_failures_are_counted(
    protocol: ChatProtocol, tmp_path: Path, novice_server: Served
) -> None:
    state = practised(novice_server)[0]
    with served(parts_of(SayingEngine(protocol, "Ask the customer."), protocol, tmp_path)) as stronger:
        expert = ModelExpert(stronger.async_client(), MODEL)
        answer = asyncio.run(expert.answer(state))
        assert answer is not None
        assert (answer.source, answer.action) == (MODEL, FinalAnswer("Ask the customer."))
        seen = stronger.parts.log.steps(stronger.parts.log.episodes()[0].id)[0]
        assert list(seen.new_messages) == state.messages
    gone = ModelExpert(stronger.async_client(timeout=2), MODEL)
    assert asyncio.run(gone.answer(state)) is None
    assert sum(gone.problems.values()) == 1


def test_a_promoted_episode_is_a_demonstration_once(novice_server: Served) -> None:
    state = practised(novice_server, index=9)[-1]
    url = f"{novice_server.url}/v1/episodes/{state.step.episode_id}/promote"
    first, second = (httpx.post(url, json={"expert": "ada"}, timeout=30) for _ in range(2))
    assert (first.status_code, first.json()["is_new"], second.json()["is_new"]) == (201, True, False)
    assert first.json()["id"] == second.json()["id"]
    log: StepLog = novice_server.parts.log
    episode = log.episode(first.json()["id"])
    assert episode is not None
    assert (episode.adapter, episode.task) == ("ada", state.task)
    assert episode.metadata["promoted_from"] == state.step.episode_id
    learned: list[Step] = log.steps(episode.id)
    assert [action_message(step.action)["content"] for step in learned] == [
        action_message(step.action)["content"] for step in state.path
    ]
    assert [step.completion_token_ids for step in learned] == [step.completion_token_ids for step in state.path]


def lived(server: Served) -> tuple[str, list[Step]]:
    """An episode of three steps that the client went on with."""
    question = {"role": "user", "content": "What is there?"}
    messages: list[Any] = [question]
    headers: dict[str, str] = {}
    for _ in range(3):
        answer = server.client().chat.completions.with_raw_response.create(
            model=MODEL,
            messages=messages,
            tools=[TOOL],  # type: ignore[list-item]
            extra_headers=headers,
        )
        headers = {"x-episode-id": answer.headers["x-episode-id"]}
        said = answer.parse().choices[0].message.model_dump(exclude_none=True)
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "A cat."} for c in said.get("tool_calls", ())]
        messages += [said, *results]
    episode_id = headers["x-episode-id"]
    return episode_id, list(main_line(server.parts.log.steps(episode_id)))


def told(where: str) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {{"where": "{where}"}}}}\n</tool_call>'


def correct(server: Served, step: Step, message: dict[str, Any]) -> None:
    url = f"{server.url}/v1/episodes/{step.episode_id}/corrections"
    httpx.post(url, json={"step_id": step.id, "message": message}).raise_for_status()


def promote(server: Served, episode_id: str) -> dict[str, Any]:
    return httpx.post(f"{server.url}/v1/episodes/{episode_id}/promote").raise_for_status().json()


def test_a_promoted_episode_ends_with_its_first_corrected_step_as_it_was_corrected(
    serve_scripted: ServeScripted,
) -> None:
    server = serve_scripted(told("here"), told("here"), "A cat.")
    episode_id, steps = lived(server)
    correct(server, steps[0], calling("look", '{"where": "here"}'))  # it says what was done
    correct(server, steps[1], calling("look", '{"where": "there"}'))
    learned = server.parts.log.steps(promote(server, episode_id)["id"])
    assert [step.action.calls[0].arguments for step in learned if isinstance(step.action, ToolCalls)] == [
        {"where": "here"}, {"where": "there"},
    ]  # fmt: skip
    assert len(learned) == 2


def test_of_a_promoted_episode_calls_that_its_tools_do_not_take_are_not_learned(serve_scripted: ServeScripted) -> None:
    server = serve_scripted(told("nowhere"), told("there"), "A cat.")
    episode_id, _ = lived(server)
    learned = server.parts.log.steps(promote(server, episode_id)["id"])
    assert [type(step.action) for step in learned] == [ToolCalls, FinalAnswer]
    assert isinstance(learned[0].action, ToolCalls)
    assert learned[0].action.calls[0].arguments == {"where": "there"}


def test_to_promote_what_is_said_to_have_failed_is_a_persons_word_and_warned_of(serve_scripted: ServeScripted) -> None:
    server = serve_scripted(told("here"), told("there"), "A cat.")
    episode_id, _ = lived(server)
    assert promote(server, episode_id)["warnings"] == []
    httpx.post(f"{server.url}/v1/episodes/{episode_id}/outcome", json={"value": 0.0}).raise_for_status()
    (warning,) = promote(server, episode_id)["warnings"]
    assert "ended with outcome 0" in warning


A_CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
"""In the letters that the novice writes its own calls with."""


def test_a_correction_that_cannot_be_is_refused_in_words(serve_scripted: ServeScripted) -> None:
    server = serve_scripted("Hello.")
    answer = server.client().chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}]
    )
    episode_id, step_id = answer.headers["x-episode-id"], answer.headers["x-step-id"]
    good = {"role": "assistant", "content": "Good day."}
    for body, status, words in (
        ({"step_id": "step_none", "message": good}, 404, "has no step"),
        ({"step_id": step_id, "message": {"role": "user", "content": "?"}}, 400, "assistant's message"),
        ({"step_id": step_id, "message": {"role": "assistant", "content": A_CALL}}, 400, "another action"),
        ({"message": good}, 400, "step_id"),
    ):
        reply = httpx.post(f"{server.url}/v1/episodes/{episode_id}/corrections", json=body)
        assert (reply.status_code, words in reply.json()["error"]["message"]) == (status, True), reply.text
    assert server.parts.log.corrections(step_id) == []
    assert httpx.post(f"{server.url}/v1/episodes/ep_none/promote").status_code == 404


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"where": {"enum": ["here", "there"]}, "times": {"type": "integer"}},
            "required": ["where"],
        },
    },
}


def calling(name: str, arguments: str) -> dict[str, Any]:
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (calling("listen", "{}"), "the correction calls 'listen', which is not among its tools: look"),
        (calling("look", "{}"), "the correction calls look wrongly: argument 'where' is missing"),
        (calling("look", '{"where": "nowhere"}'), "must be 'here' or 'there', not 'nowhere'"),
        (calling("look", '{"where": "here", "times": "two"}'), "argument 'times' must be integer, not string"),
        (calling("look", '{"where": "here", "colour": "red"}'), "argument 'colour' is not taken"),
        ({"role": "assistant", "content": " "}, "the correction says nothing and calls nothing"),
        ({"role": "assistant", "content": "word " * 4000}, "but the model's context holds 2048"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "the correction is a refusal"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "the correction is a refusal"),
    ],
)
def test_a_correction_that_nobody_should_learn_is_refused_with_the_reason(
    serve_scripted: ServeScripted, message: dict[str, Any], words: str
) -> None:
    server = serve_scripted("Hello.")
    answer = server.client().chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[TOOL],  # type: ignore[list-item]
    )
    url = f"{server.url}/v1/episodes/{answer.headers['x-episode-id']}/corrections"
    step_id = answer.headers["x-step-id"]
    reply = httpx.post(url, json={"step_id": step_id, "message": message})
    assert (reply.status_code, words in reply.json()["error"]["message"]) == (400, True), reply.text
    assert server.parts.log.corrections(step_id) == []
    good = {"step_id": step_id, "message": calling("look", '{"where": "there", "times": 2}')}
    assert httpx.post(url, json=good).status_code == 201


def test_a_correction_may_not_call_where_no_tools_were_offered(serve_scripted: ServeScripted) -> None:
    server = serve_scripted("Hello.")
    answer = server.client().chat.completions.with_raw_response.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}]
    )
    body = {"step_id": answer.headers["x-step-id"], "message": calling("look", "{}")}
    reply = httpx.post(f"{server.url}/v1/episodes/{answer.headers['x-episode-id']}/corrections", json=body)
    assert (reply.status_code, "was offered no tools" in reply.text) == (400, True), reply.text


def test_the_worlds_judgement_counts_at_a_demonstrations_states(novice_server: Served) -> None:
    demonstration = expert_demonstration(11)
    body = {"demonstrations": [demonstration]}
    httpx.post(f"{novice_server.url}/v1/demonstrations", json=body, timeout=30).raise_for_status()
    log = novice_server.parts.log
    (episode,) = log.episodes(task_prefix=demonstration["task"])
    path = main_line(log.steps(episode.id))
    judge = same_effect_at(WORLD, LoggedState(episode.task, path[:1]))
    assert judge is not None
    own = action_message(path[0].action)
    assert judge(own, {**own, "content": "Let me look that up."})
    assert not judge(own, {"role": "assistant", "content": "Done."})


COUNTING = '<tool_call>\n{"name": "count", "arguments": {}}\n</tool_call>'


@pytest.fixture
def counted(protocol: ChatProtocol, tmp_path: Path) -> Iterator[Callable[..., LoggedState]]:
    """The last state of an episode in a world of numbers: the policy has called its tool and answered."""
    messages, metadata = [{"role": "user", "content": "Go."}], {"task": "numbers/train/0"}
    with ExitStack() as running:

        def live(world: World) -> LoggedState:
            parts = parts_of(SayingEngine(protocol, COUNTING, "Done."), protocol, tmp_path, toolbox=Toolbox((), world))
            server = running.enter_context(served(parts))
            body = {"model": MODEL, "messages": messages, "metadata": metadata}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=20)
            assert answer.status_code == 200, answer.text
            return LoggedState(metadata["task"], main_line(server.parts.log.steps(answer.headers["x-episode-id"])))

        yield live


def test_a_worlds_tools_may_run_an_event_loop_where_the_learner_has_one(counted: Callable[..., LoggedState]) -> None:
    async def seen() -> str:
        return "seen"

    world = numbers(run=lambda *_: asyncio.run(seen()), expert_action=lambda _: answering("five"))
    state = counted(world)
    answer = asyncio.run(WorldExpert(world).answer(state))
    assert answer is not None
    assert answer.action == FinalAnswer("five")


def test_a_worlds_expert_that_hangs_is_given_up_and_soon_asked_no_more(
    counted: Callable[..., LoggedState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "PATIENCE_S", 0.05)
    is_over = threading.Event()
    asked = []

    def hanging(episode: Any) -> None:
        asked.append(episode)
        is_over.wait(30)

    expert = WorldExpert(numbers(expert_action=hanging))
    state = counted(expert.world)
    try:
        for _ in range(MAX_LEFT_BEHIND + 3):
            assert asyncio.run(expert.answer(state)) is None
    finally:
        is_over.set()
    assert len(asked) == MAX_LEFT_BEHIND
    assert sorted(expert.problems.values()) == [3, MAX_LEFT_BEHIND]


@pytest.mark.parametrize(
    "expert_action",
    [
        raising(KeyError("x")),
        raising(SystemExit(2)),
        lambda _: "five",
        lambda _: {"role": "assistant", "content": 5},
        lambda _: {"role": "user", "content": "five"},
        lambda _: {"role": "assistant", "content": None},
        lambda _: answering("\ud800"),
        lambda _: {"role": "assistant", "content": "", "tool_calls": "count"},
        lambda _: {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 5, "arguments": "{}"}}]},
        lambda _: calling("count", '{"of": NaN}'),
        lambda _: calling("count", '{"of": "\ud800"}'),
    ],
)
def test_a_worlds_expert_that_fails_at_a_state_is_counted_and_says_nothing(
    counted: Callable[..., LoggedState], expert_action: Any
) -> None:
    world = numbers(expert_action=expert_action)
    expert = WorldExpert(world)
    assert asyncio.run(expert.answer(counted(world))) is None
    [(problem, times)] = expert.problems.items()
    assert times == 1
    assert "`expert_action` of the world numbers raised" in problem


def test_a_world_that_cannot_judge_finds_actions_different(counted: Callable[..., LoggedState]) -> None:
    world = numbers(is_where=raising(RuntimeError("kaput")))
    judge = same_effect_at(world, counted(world))
    assert judge is not None
    assert not judge(answering("four"), answering("five"))


def test_a_world_that_opens_no_task_any_more_judges_nothing(counted: Callable[..., LoggedState]) -> None:
    state = counted(numbers())
    assert same_effect_at(numbers(open_item=raising(RuntimeError("kaput"))), state) is None


async def test_each_answer_is_counted_when_it_comes() -> None:
    """While an expert was slow or silent, a cycle's status stood still for minutes, at the demonstrations' states."""
    counted, another = list[str](), asyncio.Event()

    class Slow:
        num_asked = 0

        async def answer(self, state: LoggedState) -> None:
            self.num_asked += 1
            if self.num_asked == 1:
                await another.wait()

    def count() -> None:
        counted.append("state")
        another.set()

    async def no_samples(*_: Any) -> list[Any]:
        return []

    who: Any = SimpleNamespace(experts=[Slow()], world=None, protocol=None, endpoint=SimpleNamespace(sample=no_samples))
    own = [LoggedEpisode(each, tuple(make_chain(each, 2)), None) for each in (make_episode(), make_episode())]
    collected: Any = SimpleNamespace(
        demonstrations=(), policy_episodes=own, held_out=(), own_held_out=(), rewarded_alone=(), anchors=()
    )
    await asyncio.wait_for(inspect(who, collected, "base", 0, count), 10)
    assert len(counted) == 4
