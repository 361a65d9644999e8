"""Stitching: which logged step a request continues, whatever its client kept of the conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.chat.chat_protocol import action_message
from policies.chat.messages import MAX_DEPTH, message_action
from policies.types import (
    BASE_ADAPTER,
    Action,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    SamplingParams,
    ToolCall,
    ToolCalls,
)
from runtime.agent.conversation import Digests, digests_of, locate, messages_after
from runtime.store.episodes import Actor, Episode, Purpose, Step, StopReason, ToolResult, new_id
from runtime.store.step_log import StepLog, Whose

ANYBODYS = Whose()
LOOK = ToolCalls((ToolCall("call_1", "look", {"at": "shelf", "times": 2}),))


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


class Scribe:
    """Logs conversations as a server would."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def episode(self) -> Episode:
        episode = Episode(new_id("ep"), Actor.POLICY, Purpose.SERVE, BASE_ADAPTER)
        self.log.append(episode).result()
        return episode

    def step(
        self,
        episode: Episode,
        new: Sequence[Message],
        action: Action,
        parent: Step | None = None,
        seen: Sequence[Message] | None = None,
        results: tuple[ToolResult, ...] = (),
    ) -> Step:
        """A logged step; `seen` is the conversation as its client has it, answer included."""
        before = [] if parent is None else list(self.log.path_to(parent.id))
        whole = [message for step in before for message in (*step.new_messages, action_message(step.action))]
        seen = seen if seen is not None else [*whole, *new, action_message(action)]
        digests = Digests.of(seen)
        step = Step(
            id=new_id("step"), episode_id=episode.id, parent_id=parent.id if parent else None,
            index=parent.index + 1 if parent else 0, new_messages=tuple(new), tools=(), prompt_token_ids=(1, 2),
            completion_token_ids=(3,), behavior_logprobs=(-0.5,), sampling=SamplingParams(), adapter=BASE_ADAPTER,
            action=action, finish_reason=FinishReason.STOP, stop_reason=StopReason.FINAL_ANSWER, tool_results=results,
            conversation_digest=digests.conversation, created_at=1.0, first_token_ms=1.0, latency_ms=1.0,
            thread_digest=digests.thread, tail_digest=digests.tail,
        )  # fmt: skip
        self.log.append(step).result()
        return step


@pytest.fixture
def scribe(tmp_path: Path) -> Iterator[Scribe]:
    log = StepLog(tmp_path / "agent.db")
    yield Scribe(log)
    log.close()


# ------------------------------------------------------------------------------------------- longest prefix


def test_an_unknown_conversation_begins_anew(scribe: Scribe) -> None:
    place = locate(scribe.log, [user("Hello"), assistant("Hi."), user("And?")], ANYBODYS)
    assert place.path == ()
    assert place.history == ()
    assert len(place.new_messages) == 3


def test_a_follow_up_stands_on_the_longest_logged_beginning(scribe: Scribe) -> None:
    episode = scribe.episode()
    first = scribe.step(episode, [user("Hello")], FinalAnswer("Hi."))
    second = scribe.step(episode, [user("Who?")], FinalAnswer("Me."), first)
    told = [user("Hello"), assistant("Hi."), user("Who?"), assistant("Me."), user("Why?")]
    place = locate(scribe.log, told, ANYBODYS)
    assert [step.id for step in place.path] == [first.id, second.id]
    assert place.history == tuple(told[:4])
    assert place.new_messages == (user("Why?"),)


def test_an_answer_that_its_client_changed_is_where_stitching_ends(scribe: Scribe) -> None:
    episode = scribe.episode()
    first = scribe.step(episode, [user("Hello")], FinalAnswer("Hi."))
    scribe.step(episode, [user("Who?")], FinalAnswer("Me."), first)
    told = [user("Hello"), assistant("Hi."), user("Who?"), assistant("You."), user("Why?")]
    place = locate(scribe.log, told, ANYBODYS)
    assert [step.id for step in place.path] == [first.id]
    assert place.new_messages == tuple(told[2:])


def test_two_answers_to_one_question_are_two_branches(scribe: Scribe) -> None:
    episode = scribe.episode()
    scribe.step(episode, [user("Hello")], FinalAnswer("Hi."))
    other = scribe.step(episode, [user("Hello")], FinalAnswer("Good day."))
    place = locate(scribe.log, [user("Hello"), assistant("Good day."), user("Why?")], ANYBODYS)
    assert [step.id for step in place.path] == [other.id]


def test_a_conversation_sent_again_without_its_answer_is_a_branch_of_its_parent(scribe: Scribe) -> None:
    episode = scribe.episode()
    first = scribe.step(episode, [user("Hello")], FinalAnswer("Hi."))
    scribe.step(episode, [user("Who?")], FinalAnswer("Me."), first)
    place = locate(scribe.log, [user("Hello"), assistant("Hi."), user("Who?")], ANYBODYS)
    assert [step.id for step in place.path] == [first.id]
    assert place.new_messages == (user("Who?"),)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(words=st.lists(st.sampled_from("abc"), min_size=1, max_size=4), cut=st.integers(0, 8))
def test_any_beginning_of_a_logged_conversation_is_found_at_its_own_step(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], cut: int
) -> None:
    log = StepLog(tmp_path_factory.mktemp("log") / "agent.db")
    scribe = Scribe(log)
    episode, steps, told = scribe.episode(), list[Step](), list[Message]()
    for number, word in enumerate(words):
        steps.append(scribe.step(episode, [user(word)], FinalAnswer(f"{number}"), steps[-1] if steps else None))
        told += [user(word), assistant(f"{number}")]
    place = locate(log, told[:cut] or [user("?")], ANYBODYS)
    assert [step.id for step in place.path] == [step.id for step in steps[: cut // 2]]
    log.close()


# ----------------------------------------------------------------------------------- what counts as the same


def called(arguments: Any, call_id: str = "call_1", content: str | None = None) -> Message:
    function = {"name": "look", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


RESULT: Message = {"role": "tool", "tool_call_id": "call_1", "content": "A globe."}


@pytest.mark.parametrize(
    "sent_back",
    [
        called('{"at": "shelf", "times": 2}'),
        called('{"times":2,"at":"shelf"}'),
        called('{"at": "shelf", "times": 2}', content=""),
        {**called('{"at": "shelf", "times": 2}'), "refusal": None, "annotations": [], "name": "agent"},
    ],
    ids=["as it was", "spaced and ordered otherwise", "empty content", "with a client's own fields"],
)
def test_a_call_sent_back_in_another_spelling_is_the_same_call(scribe: Scribe, sent_back: Message) -> None:
    step = scribe.step(scribe.episode(), [user("Look!")], LOOK)
    place = locate(scribe.log, [user("Look!"), sent_back, RESULT], ANYBODYS)
    assert [found.id for found in place.path] == [step.id]
    assert place.new_messages == (RESULT,)


@pytest.mark.parametrize(
    "sent_back",
    [
        called('{"at": "desk", "times": 2}'),
        called('{"at": "shelf", "times": 2}', call_id="call_2"),
        called('{"at": "shelf", "times": 2}', content="Looking."),
        assistant(""),
    ],
    ids=["other arguments", "another call's id", "another text", "no call"],
)
def test_another_call_is_not_the_same(scribe: Scribe, sent_back: Message) -> None:
    scribe.step(scribe.episode(), [user("Look!")], LOOK)
    assert locate(scribe.log, [user("Look!"), sent_back, RESULT], ANYBODYS).path == ()


def test_the_tool_call_id_tells_two_results_apart() -> None:
    one, other = ({"role": "tool", "tool_call_id": name, "content": "x"} for name in ("a", "b"))
    assert digests_of([one]) != digests_of([other])


def test_content_parts_are_the_text_they_hold(scribe: Scribe) -> None:
    step = scribe.step(scribe.episode(), [user("Hello there")], FinalAnswer("Hi."))
    parts: Message = {
        "role": "user",
        "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}],
    }
    answer: Message = {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]}
    place = locate(scribe.log, [parts, answer, user("Why?")], ANYBODYS)
    assert [found.id for found in place.path] == [step.id]


messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=5)})


@given(left=st.lists(messages, max_size=4), right=st.lists(messages, max_size=4))
def test_different_conversations_have_different_digests(left: list[Message], right: list[Message]) -> None:
    def as_said(conversation: list[Message]) -> list[Message]:
        return [{**message, "content": message["content"].strip()} for message in conversation]

    assert (digests_of(left)[-1:] == digests_of(right)[-1:]) == (as_said(left) == as_said(right))


@settings(max_examples=50, deadline=None)
@given(arguments=st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.text(), inner)))
def test_any_arguments_have_a_digest(arguments: Any) -> None:
    assert digests_of([called(json.dumps({"value": arguments}))])


@pytest.mark.parametrize(
    "arguments", ["", "{not json", '{"a": NaN}', '{"a": 1e999}', "[" * 2000, '{"a": ' + "9" * 400 + "}"]
)
def test_arguments_that_are_no_json_are_compared_as_they_stand(arguments: str) -> None:
    assert digests_of([called(arguments)]) == digests_of([called(arguments)])
    assert digests_of([called(arguments)]) != digests_of([called("{}")])


# ------------------------------------------------------------------------------------------- named episodes


def test_a_named_episode_is_searched_and_no_other(scribe: Scribe) -> None:
    mine, other = scribe.episode(), scribe.episode()
    my_step = scribe.step(mine, [user("Hello")], FinalAnswer("Hi."))
    scribe.step(other, [user("Hello")], FinalAnswer("Hi."))
    place = locate(scribe.log, [user("Hello"), assistant("Hi."), user("Why?")], Whose(episode_id=mine.id))
    assert [step.id for step in place.path] == [my_step.id]


def test_without_a_name_the_newest_of_equal_conversations_goes_on(scribe: Scribe) -> None:
    scribe.step(scribe.episode(), [user("Hello")], FinalAnswer("Hi."))
    newer = scribe.step(scribe.episode(), [user("Hello")], FinalAnswer("Hi."))
    place = locate(scribe.log, [user("Hello"), assistant("Hi."), user("Why?")], ANYBODYS)
    assert [step.id for step in place.path] == [newer.id]


def test_an_episode_that_is_named_but_new_takes_nothing_from_others(scribe: Scribe) -> None:
    scribe.step(scribe.episode(), [user("Hello")], FinalAnswer("Hi."))
    assert locate(scribe.log, [user("Hello"), assistant("Hi."), user("Why?")], Whose(episode_id="ep_new")).path == ()


# ------------------------------------------------------------------------------------------- server-run tools


def test_a_client_who_saw_only_the_last_answer_is_told_to_the_log_with_all_calls(scribe: Scribe) -> None:
    """Server-run tools are hidden from the client; the history that the policy goes on from is the log's."""
    episode = scribe.episode()
    results = (ToolResult("call_1", "look", "A globe."),)
    first = scribe.step(episode, [user("Look!")], LOOK, results=results)
    seen = [user("Look!"), assistant("I see a globe.")]
    last = scribe.step(
        episode, messages_after(first.action, first.tool_results), FinalAnswer("I see a globe."), first, seen=seen
    )
    place = locate(scribe.log, [*seen, user("Which?")], ANYBODYS)
    assert [step.id for step in place.path] == [first.id, last.id]
    assert [message["role"] for message in place.history] == ["user", "assistant", "tool", "assistant"]
    assert place.history[1]["tool_calls"][0]["id"] == "call_1"
    assert place.history[2] == RESULT
    assert place.new_messages == (user("Which?"),)


def test_a_malformed_action_is_answered_with_what_is_wrong_with_it(scribe: Scribe) -> None:
    step = scribe.step(scribe.episode(), [user("Look!")], MalformedAction("<tool_call>", "it has no name"))
    (advice,) = messages_after(step.action, step.tool_results)
    assert advice["role"] == "user"
    assert "it has no name" in advice["content"]


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 300])
def test_what_is_an_action_can_be_recognised_later(depth: int) -> None:
    """A call that was nested 300 deep was read as one, and then could not be held against the log."""
    arguments = '{"a":' * depth + "1" + "}" * depth
    call = {"id": "call_1", "function": {"name": "look", "arguments": arguments}}
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    if depth > MAX_DEPTH:
        with pytest.raises(ValueError, match="nested too deeply"):
            message_action(message)
    else:
        assert digests_of([action_message(message_action(message))])
