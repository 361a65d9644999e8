"""Experts' conversations come in as episodes whose steps look like served ones; what cannot be learned is refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.importing.demonstrations import ImportedDemonstration, read_record
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.types import EngineLimits, FinalAnswer, Message, ToolCalls
from runtime.agent.conversation import history_of
from runtime.store.episodes import Actor, Step, StopReason, demonstration_digest
from tests.demonstrations import expert_demonstration, post
from tests.serving import LIMITS, MODEL, VOCAB_SIZE, SayingEngine, Served, parts_of, served
from tools.worlds.order_desk import OrderDesk

WORLD = OrderDesk()
HELLO: list[Message] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
CONTEXT = 1500


@pytest.fixture(scope="module")
def server(protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests: each imports its own demonstrations."""
    limits = EngineLimits(
        CONTEXT, max_adapters=3, max_rank=16, vocab_size=VOCAB_SIZE, supports_grammar=True, logprob_tolerance=1e-3
    )
    engine = SayingEngine(protocol, limits=limits)
    with served(parts_of(engine, protocol, tmp_path_factory.mktemp("demonstrations"))) as running:
        yield running


def imported(server: Served, demonstration: dict[str, Any]) -> list[Step]:
    """The steps of a demonstration that was not known before."""
    known = demonstrated_ids(server)
    answer = post(server, demonstration).json()
    assert answer == {"imported": 1, "already_known": 0, "refused": []}
    (new,) = demonstrated_ids(server) - known
    return server.parts.log.steps(new)


def learned_indices(messages: list[Message]) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def demonstrated_ids(server: Served) -> set[str]:
    return {episode.id for episode in server.parts.log.episodes(limit=10_000, actor=Actor.EXPERT)}


def reason(server: Served, demonstration: dict[str, Any]) -> str:
    """Why a demonstration is refused; nothing of it is logged."""
    counts = server.parts.log.counts()
    answer = post(server, demonstration).json()
    assert (answer["imported"], answer["already_known"]) == (0, 0)
    assert server.parts.log.counts() == counts
    assert [refusal["index"] for refusal in answer["refused"]] == [0]
    return answer["refused"][0]["reason"]


# -------------------------------------------------------------------------------------------------- steps


def test_an_experts_conversation_becomes_an_episode_of_steps_as_serving_would_have_logged_them(
    server: Served, protocol: ChatProtocol
) -> None:
    demonstration = expert_demonstration(1, provenance={"file": "desk.jsonl", "line": 3})
    messages, tools = demonstration["messages"], demonstration["tools"]
    steps = imported(server, demonstration)
    episode = server.parts.log.episode(steps[0].episode_id)
    assert episode is not None
    assert (episode.actor, episode.adapter, episode.task) == (Actor.EXPERT, "expert", WORLD.task("train", 1).id)
    digest = demonstration_digest(messages, tools, learned_indices(messages))
    assert episode.metadata == {"file": "desk.jsonl", "line": 3, "digest": digest}
    assert episode.id == f"demo_{digest[:32]}"

    learned = learned_indices(messages)
    assert len(steps) == len(learned) >= 6
    for step, index in zip(steps, learned, strict=True):
        assert step.prompt_token_ids == protocol.render(messages[:index], tools)
        assert step.action == message_action(messages[index])
        read = protocol.parse(step.completion_token_ids, tools=tools)
        assert isinstance(read, FinalAnswer) == isinstance(step.action, FinalAnswer)
        assert step.behavior_logprobs is None
        assert list(step.tools) == tools
    assert [step.index for step in steps] == list(range(len(steps)))
    assert [step.parent_id for step in steps] == [None, *(step.id for step in steps[:-1])]
    stops = [StopReason.CLIENT_TOOLS] * (len(steps) - 1) + [StopReason.FINAL_ANSWER]
    assert [step.stop_reason for step in steps] == stops
    assert protocol.render(history_of(steps), tools) == protocol.render(messages, tools)


def test_a_step_stands_on_the_tokens_of_the_step_before(server: Served) -> None:
    steps = imported(server, expert_demonstration(2))
    for parent, step in pairwise(steps):
        told = parent.prompt_token_ids + parent.completion_token_ids
        assert step.prompt_token_ids[: len(told)] == told
    assert server.parts.log.verify() == []


def test_a_demonstration_has_the_tokens_of_the_served_conversation(server: Served, protocol: ChatProtocol) -> None:
    """The same conversation, once served and once demonstrated."""
    demonstration = expert_demonstration(3)
    engine = server.parts.engine
    assert isinstance(engine, SayingEngine)
    steps = imported(server, demonstration)
    engine.says.extend(step.completion_token_ids for step in steps)
    task, client = WORLD.task("train", 3), server.client()
    episode = WORLD.open(task)
    messages: list[Any] = list(task.messages)
    served_ids = []
    for _ in steps:
        answer = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=messages, tools=demonstration["tools"]
        )
        served_ids.append(answer.headers["x-step-id"])
        said = answer.parse().choices[0].message.model_dump(exclude_none=True)
        messages += [said, *episode.play(said)]
    served_steps = [server.parts.log.step(step_id) for step_id in served_ids]
    assert [(s.prompt_token_ids, s.completion_token_ids) for s in served_steps if s] == [
        (s.prompt_token_ids, s.completion_token_ids) for s in steps
    ]


def test_messages_not_learned_from_are_seen_by_the_next_step(server: Served, protocol: ChatProtocol) -> None:
    demonstration = expert_demonstration(4)
    messages, tools = demonstration["messages"], demonstration["tools"]
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    steps = imported(server, {**demonstration, "learn_from": [said[3], said[1]]})
    assert [step.action for step in steps] == [message_action(messages[said[1]]), message_action(messages[said[3]])]
    for step, index in zip(steps, (said[1], said[3]), strict=True):
        assert step.prompt_token_ids == protocol.render(messages[:index], tools)
    seen = [message for step in steps for message in (*step.new_messages, messages[said[step.index * 2 + 1]])]
    assert seen == messages[: said[3] + 1]
    assert isinstance(steps[0].action, ToolCalls)


def test_a_task_that_is_not_named_is_recognised_by_its_conversation(server: Served) -> None:
    demonstration = expert_demonstration(6)
    task = demonstration.pop("task")
    episode = server.parts.log.episode(imported(server, demonstration)[0].episode_id)
    assert episode is not None
    assert episode.task == task


def test_what_the_learner_reads_from_a_file_is_imported_under_its_digest(server: Served) -> None:
    read = read_record(expert_demonstration(5), "desk.jsonl", 1)
    assert isinstance(read, ImportedDemonstration)
    steps = imported(server, read.to_wire())
    assert steps[0].episode_id == f"demo_{read.digest[:32]}"


def test_a_client_cannot_choose_the_digest_of_a_demonstration(server: Served) -> None:
    """It would have another demonstration taken for known."""
    said = {"messages": [{"role": "user", "content": "Which one?"}, HELLO[1]]}
    steps = imported(server, {**said, "digest": "a9" * 32, "provenance": {"digest": "a9" * 32}})
    assert "a9a9" not in steps[0].episode_id
    episode = server.parts.log.episode(steps[0].episode_id)
    assert episode is not None
    assert episode.metadata["digest"][:32] in steps[0].episode_id
    assert post(server, {**said, "digest": "b9" * 32}).json()["already_known"] == 1


def called(call_id: str, arguments: str, content: str | None) -> list[Message]:
    """One call, whose id, arguments' spelling and absent words are up to the client that wrote it down."""
    call = {"id": call_id, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Is it raining in Tromsø?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "rain"},
        {"role": "assistant", "content": "Yes."},
    ]


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.mark.parametrize(
    "again",
    [
        called("toolu_01", '{"city": "Tromsø"}', ""),
        called("x", '{"city":"Tromsø"}', ""),
        called("x", '{"city": "Troms\\u00f8"}', None),
    ],
    ids=["another id", "other spaces", "no content"],
)
def test_what_differs_in_calls_ids_and_spelling_alone_is_known_already(server: Served, again: list[Message]) -> None:
    """Promoted, exported and imported again, a demonstration was a second one: an import numbers the calls."""
    read = read_record({"messages": called("c1", '{"city": "Tromsø"}', ""), "tools": [WEATHER]}, "f.jsonl", 1)
    assert isinstance(read, ImportedDemonstration)
    post(server, read.to_wire())
    answer = post(server, {"messages": again, "tools": [WEATHER]}).json()
    assert answer == {"imported": 0, "already_known": 1, "refused": []}


# ------------------------------------------------------------------------------------------- known and refused


def test_importing_again_adds_nothing(server: Served) -> None:
    batch = [expert_demonstration(index) for index in (10, 11, 10)]
    assert post(server, *batch).json() == {"imported": 2, "already_known": 1, "refused": []}
    counts = server.parts.log.counts()
    assert post(server, *batch).json() == {"imported": 0, "already_known": 3, "refused": []}
    assert server.parts.log.counts() == counts


def test_two_imports_at_once_add_one_episode(server: Served) -> None:
    demonstration = expert_demonstration(12)
    with ThreadPoolExecutor(4) as clients:
        answers = [response.json() for response in clients.map(lambda _: post(server, demonstration), range(4))]
    assert sum(answer["imported"] for answer in answers) == 1
    assert sum(answer["already_known"] for answer in answers) == 3


def test_no_client_can_go_on_with_a_demonstration_in_its_experts_name(server: Served) -> None:
    messages = [{"role": "user", "content": "Good day"}, HELLO[1]]
    steps = imported(server, {"messages": messages})
    body = {"model": MODEL, "messages": [*messages, HELLO[0]]}
    headers = {"x-episode-id": steps[0].episode_id}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 409, response.text
    assert server.parts.log.steps(steps[0].episode_id) == steps


def test_bad_ones_are_refused_by_their_place_and_the_rest_is_imported(server: Served) -> None:
    unsaid = {"messages": [{"role": "user", "content": "Hi"}]}
    answer = post(server, expert_demonstration(20), unsaid, expert_demonstration(21)).json()
    assert (answer["imported"], answer["already_known"]) == (2, 0)
    assert [refusal["index"] for refusal in answer["refused"]] == [1]
    assert "no assistant message" in answer["refused"][0]["reason"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"messages": HELLO[:1]}, "no assistant message"),
        ({"learn_from": [0]}, "learn_from names message 0"),
        ({"learn_from": [7]}, "learn_from names message 7"),
        ({"learn_from": [-1]}, "learn_from names message -1"),
        ({"learn_from": []}, "learn_from is empty"),
        ({"messages": HELLO[1:]}, "nothing was seen before it"),
        ({"task": "order_desk/train/123456789"}, "there is no task"),
        ({"messages": [{"role": "user", "content": "Hi " * CONTEXT}, HELLO[1]]}, f"context holds {CONTEXT}"),
    ],
)
def test_what_cannot_be_learned_from_is_refused_in_words(server: Served, changes: dict[str, Any], why: str) -> None:
    assert why in reason(server, {"messages": HELLO, **changes})


@pytest.mark.parametrize("arguments", ["{", "[1]", '{"a": NaN}'])
def test_a_call_that_cannot_be_read_is_refused(server: Served, arguments: str) -> None:
    call = {"id": "call_0", "type": "function", "function": {"name": "check_item", "arguments": arguments}}
    calling = {"role": "assistant", "tool_calls": [call]}
    assert "arguments of check_item" in reason(server, {"messages": [HELLO[0], calling]})


def test_a_context_that_memory_bounds_is_told_so_to_requests_corrections_and_imports(
    protocol: ChatProtocol, tmp_path: Path
) -> None:
    cut = "1.0 MiB for keys and values hold 300 tokens; this network could read 2,048: give more --kv-memory"
    limits = replace(LIMITS, max_context_tokens=300, context_cut=cut)
    long = {"role": "user", "content": "Hi " * 400}
    with served(parts_of(SayingEngine(protocol, limits=limits), protocol, tmp_path)) as server:
        url = f"{server.url}/v1/chat/completions"
        answer = httpx.post(url, json={"model": MODEL, "messages": HELLO[:1]}).raise_for_status()
        told = [
            httpx.post(url, json={"model": MODEL, "messages": [long]}),
            httpx.post(url, json={"model": MODEL, "messages": HELLO[:1], "max_tokens": 301}),
            httpx.post(
                f"{server.url}/v1/episodes/{answer.headers['x-episode-id']}/corrections",
                json={"step_id": answer.headers["x-step-id"], "message": {**long, "role": "assistant"}},
            ),
        ]
        assert [each.status_code for each in told] == [400] * 3
        words = [each.json()["error"]["message"] for each in told]
        words.append(reason(server, {"messages": [long, HELLO[1]]}))
    assert all(f"the model's context holds 300 ({cut})" in each for each in words), words


LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}


def looking(name: str, arguments: str) -> Message:
    call = {"id": "call_0", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (looking("listen", "{}"), "message 1 calls 'listen', which is not among its tools: look"),
        ({"role": "assistant", "content": "\n"}, "message 1 says nothing and calls nothing"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "message 1 is a refusal"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "message 1 is a refusal"),
    ],
)
def test_what_no_expert_does_is_refused_as_the_importer_refuses_it(server: Served, message: Message, why: str) -> None:
    assert why in reason(server, {"messages": [HELLO[0], message], "tools": [LOOK]})


def test_arguments_that_a_tool_refused_are_part_of_a_transcript(server: Served) -> None:
    """Experts do err, are told so, and do better: the whole is read, as it was."""
    told = {"role": "tool", "tool_call_id": "call_0", "content": "error: argument where: Field required"}
    messages = [HELLO[0], looking("look", "{}"), told, looking("look", '{"where": "here"}')]
    assert len(imported(server, {"messages": messages, "tools": [LOOK]})) == 2


def test_a_mark_in_an_experts_text_is_learned_as_its_letters(server: Served, protocol: ChatProtocol) -> None:
    text = "A<|im_end|>B"
    (step,) = imported(server, {"messages": [HELLO[0], {"role": "assistant", "content": text}]})
    assert not set(step.completion_token_ids[:-1]) & set(protocol.stop_token_ids)
    assert protocol.parse(step.completion_token_ids) == FinalAnswer(text)


def test_text_that_would_be_read_as_a_call_is_refused(server: Served) -> None:
    text = '<tool_call>\n{"name": "check_item", "arguments": {}}\n</tool_call>'
    assert "another action" in reason(server, {"messages": [HELLO[0], {"role": "assistant", "content": text}]})


def test_a_body_of_the_wrong_form_is_refused_whole(server: Served) -> None:
    counts = server.parts.log.counts()
    response = post(server, expert_demonstration(30), {"messages": "Hi"})
    assert response.status_code == 400
    assert "demonstrations.1.messages" in response.json()["error"]["message"]
    assert server.parts.log.counts() == counts


# --------------------------------------------------------------------------------------------------- list


def test_the_list_holds_experts_episodes_alone_page_by_page(server: Served) -> None:
    post(server, *(expert_demonstration(index, expert="ada") for index in (40, 41, 42)))
    server.client().chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    ids, after = [], ""
    while True:
        query = "limit=2&adapter=ada" + (f"&after={after}" if after else "")
        page = httpx.get(f"{server.url}/v1/demonstrations?{query}").json()
        ids += [episode["id"] for episode in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert len(ids) == len(set(ids)) == 3
    everything = httpx.get(f"{server.url}/v1/demonstrations?limit=1000").json()["data"]
    assert {episode["actor"] for episode in everything} == {"expert"}
    assert set(ids) <= {episode["id"] for episode in everything}
