"""Messages to tokens and back: nothing is lost, nothing is re-spelled, and bad writing is an action too."""

from __future__ import annotations

import json
from functools import partial
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.chat.chat_protocol import (
    ChatProtocol,
    ChatProtocolError,
    action_message,
    message_action,
)
from policies.novice.tokenizer import build_tokenizer
from policies.types import Action, FinalAnswer, FinishReason, MalformedAction, Message, ToolCall, ToolCalls

FEW = settings(max_examples=60, deadline=None)

QUESTION: list[Message] = [{"role": "user", "content": "What is it?"}]
OPENING, CLOSING, TURN_END = "<tool_call>\n", "\n</tool_call>", "<|im_end|>"


# The novice's own marks are no text that a message could carry through its template unharmed; see the test on them.
def _is_plain(text: str) -> bool:
    return not any(mark in text for mark in ("<|", "|>", "<tool_call>", "</tool_call>"))


# In Unicode's composed form: transformers' tokenizer of the Qwen family composes what it reads.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(partial(normalize, "NFC")).filter(_is_plain)
spoken = texts.map(str.strip)
names = st.from_regex(r"[A-Za-z0-9_.-]{1,20}", fullmatch=True)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | texts
    | st.sampled_from(['"', "\\", "\n", "}", "</tool_call>", " ", "é\u2028"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
calls = st.builds(ToolCall, id=names, name=names, arguments=st.dictionaries(texts, json_values, max_size=4))
tool_calls = st.builds(ToolCalls, calls=st.lists(calls, min_size=1, max_size=3).map(tuple), text=spoken)
actions = tool_calls | st.builds(FinalAnswer, text=spoken)


def without_ids(action: Action) -> Action:
    """An action without the ids of its calls, which the novice does not write."""
    if not isinstance(action, ToolCalls):
        return action
    return ToolCalls(tuple(ToolCall("", c.name, c.arguments) for c in action.calls), action.text, action.reasoning)


# ------------------------------------------------------------------------------------------------ round trips


@FEW
@given(action=actions)
def test_what_the_template_writes_is_read_back_as_the_same_action(protocol: ChatProtocol, action: Action) -> None:
    _, completion = protocol.completion_of(QUESTION, action)
    assert without_ids(protocol.parse(completion)) == without_ids(action)


@FEW
@given(action=actions)
def test_an_action_survives_the_way_through_its_message(action: ToolCalls | FinalAnswer) -> None:
    message = json.loads(json.dumps(action_message(action)))
    assert message_action(message) == action


@FEW
@given(action=actions)
def test_read_token_by_token_an_action_is_the_same_as_read_whole(protocol: ChatProtocol, action: Action) -> None:
    _, completion = protocol.completion_of(QUESTION, action)
    reader = protocol.reader()
    shown = [delta for token_id in completion for delta in reader.feed(token_id)]
    streamed, unshown = reader.finish(FinishReason.STOP)
    assert without_ids(streamed) == without_ids(protocol.parse(completion))
    assert isinstance(streamed, ToolCalls | FinalAnswer)
    assert "".join(delta.text for delta in [*shown, *unshown] if delta.kind == "text") == streamed.text


@pytest.mark.parametrize(
    "text",
    ["Hm.", f"Hm. {OPENING}no call{CLOSING} Oh.", f'Hm. {OPENING}{{"name": "look", "arguments": {{}}}}{CLOSING}'],
)
@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_read_in_bursts_it_shows_what_it_shows_token_by_token(protocol: ChatProtocol, text: str, size: int) -> None:
    """A parser that raises forgets what it was fed together with the bad writing."""
    completion = protocol.encode(text + TURN_END)
    one_by_one, in_bursts = protocol.reader(), protocol.reader()
    shown = [
        [delta for token_id in completion for delta in one_by_one.feed(token_id)],
        [delta for at in range(0, len(completion), size) for delta in in_bursts.feed(*completion[at : at + size])],
    ]
    (action, unshown), (same_action, more_unshown) = (
        reader.finish(FinishReason.STOP) for reader in (one_by_one, in_bursts)
    )
    assert without_ids(action) == without_ids(same_action)
    texts_shown = ["".join(delta.text for delta in deltas) for deltas in (shown[0] + unshown, shown[1] + more_unshown)]
    assert texts_shown[0] == texts_shown[1] != ""


@FEW
@given(text=texts)
def test_text_becomes_tokens_and_comes_back_unharmed(protocol: ChatProtocol, text: str) -> None:
    assert protocol.decode(protocol.encode(text)) == text


def test_every_call_gets_an_id_of_its_own_where_the_policy_writes_none(protocol: ChatProtocol) -> None:
    call = f'{OPENING}{{"name": "look", "arguments": {{}}}}{CLOSING}'
    action = protocol.parse(protocol.encode(f"{call}\n{call}{TURN_END}"))
    assert isinstance(action, ToolCalls)
    assert len({call.id for call in action.calls}) == 2
    assert all(call.id.startswith("call_") for call in action.calls)


def test_content_parts_are_rendered_as_the_text_they_hold(protocol: ChatProtocol) -> None:
    parts = [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]
    assert protocol.render([{"role": "user", "content": parts}]) == protocol.render(QUESTION)


# --------------------------------------------------------------------------------------------- bad writing


@settings(max_examples=150, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 429) | st.sampled_from([258, 259, 260]), max_size=60),
    finish_reason=st.sampled_from(FinishReason),
)
def test_no_sequence_of_tokens_is_an_exception(
    protocol: ChatProtocol, token_ids: list[int], finish_reason: FinishReason
) -> None:
    action = protocol.parse(token_ids, finish_reason)
    assert isinstance(action, ToolCalls | FinalAnswer | MalformedAction)
    if isinstance(action, MalformedAction):
        assert action.problem


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                OPENING,
                CLOSING,
                '{"name": "look"',
                ', "arguments": ',
                "{}",
                "}",
                "[",
                "null",
                '"a"',
                "1e999",
                "\n",
                "x",
                "<",
            ]
        ),
        max_size=12,
    )
)
def test_no_jumble_of_call_pieces_is_an_exception(protocol: ChatProtocol, pieces: list[str]) -> None:
    action = protocol.parse(protocol.encode("".join(pieces) + TURN_END))
    if isinstance(action, MalformedAction):
        assert action.problem
        assert action.text == "".join(pieces)


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("not JSON", "JSON"),
        ('{"name": "look", "arguments": {}', "JSON"),
        ('{"arguments": {}}', "has no name"),
        ('{"name": 3, "arguments": {}}', "has no name"),
        ('{"name": "", "arguments": {}}', "has no name"),
        ('["look"]', "has no name"),
        ("null", "has no name"),
        ('{"name": "look", "arguments": [1]}', "the arguments of look must be a JSON object, not list"),
        ('{"name": "look", "arguments": null}', "the arguments of look must be a JSON object, not NoneType"),
        ('{"name": "look", "arguments": "{not json"}', "the arguments of look are not JSON"),
        ("[" * 1500 + "]" * 1500, "recursion"),
        ('{"name": "look", "arguments": {"at": NaN}}', "the arguments of look hold NaN"),
        ('{"name": "look", "arguments": {"at": -1e999}}', "the arguments of look hold NaN, infinity"),
        ('{"name": "look", "arguments": {"at": "\\ud83d"}}', "half a character"),
        ('{"name": "l\\ud83dk", "arguments": {}}', "has no name"),
    ],
)
def test_a_call_that_cannot_be_read_says_what_is_wrong_with_it(
    protocol: ChatProtocol, written: str, complaint: str
) -> None:
    action = protocol.parse(protocol.encode(f"{OPENING}{written}{CLOSING}{TURN_END}"))
    assert isinstance(action, MalformedAction)
    assert complaint in action.problem
    assert action.text == f"{OPENING}{written}{CLOSING}"


def test_one_bad_call_among_good_ones_spoils_the_action_and_is_named(protocol: ChatProtocol) -> None:
    good = f'{OPENING}{{"name": "look", "arguments": {{}}}}{CLOSING}'
    bad = f'{OPENING}{{"arguments": {{}}}}{CLOSING}'
    action = protocol.parse(protocol.encode(f"{good}\n{bad}{TURN_END}"))
    assert isinstance(action, MalformedAction)
    assert "tool call 2 has no name" in action.problem


# --------------------------------------------------------------------------------------- cut off, stop tokens


def test_an_answer_cut_at_the_token_limit_is_still_an_answer(protocol: ChatProtocol) -> None:
    assert protocol.parse(protocol.encode("The globe is"), FinishReason.LENGTH) == FinalAnswer("The globe is")


def test_a_call_cut_at_the_token_limit_is_malformed_and_says_that_it_was_cut(protocol: ChatProtocol) -> None:
    action = protocol.parse(protocol.encode(f'{OPENING}{{"name": "look", "argu'), FinishReason.LENGTH)
    assert isinstance(action, MalformedAction)
    assert "cut off at the token limit" in action.problem


def test_a_text_cut_within_a_character_loses_no_more_than_that_character(protocol: ChatProtocol) -> None:
    token_ids = protocol.encode("né")[:-1]
    action = protocol.parse(token_ids, FinishReason.LENGTH)
    assert isinstance(action, FinalAnswer)
    assert action.text.startswith("n")


def test_the_stop_token_ends_the_completion_and_is_no_part_of_the_text(protocol: ChatProtocol) -> None:
    _, completion = protocol.completion_of(QUESTION, FinalAnswer("A globe."))
    assert completion[-1] in protocol.stop_token_ids
    assert protocol.decode(completion[:-1]) == "A globe."


# ------------------------------------------------------------------------------------------------- extending


def conversation(action: ToolCalls | FinalAnswer) -> tuple[list[Message], list[Message]]:
    """A history that ends with an action, and what comes after it."""
    history = [*QUESTION, action_message(action)]
    if isinstance(action, ToolCalls):
        return history, [{"role": "tool", "tool_call_id": call.id, "content": "seen"} for call in action.calls]
    return history, [{"role": "user", "content": "And now?"}]


@FEW
@given(action=actions)
def test_a_conversation_extended_on_canonical_tokens_equals_the_whole_rendered(
    protocol: ChatProtocol, action: ToolCalls | FinalAnswer
) -> None:
    prompt, completion = protocol.completion_of(QUESTION, action)
    history, new = conversation(action)
    assert protocol.extend(prompt + completion, history, new) == protocol.render([*history, *new])


def test_what_was_sampled_is_continued_as_it_was_sampled(protocol: ChatProtocol) -> None:
    """The policy spaced its call its own way: rendering it anew would give other tokens than those it was made of."""
    spaced = protocol.encode(f'{OPENING}{{ "name":"look","arguments":{{"at":1}} }}{CLOSING}{TURN_END}')
    action = protocol.parse(spaced)
    assert isinstance(action, ToolCalls)
    told = protocol.render(QUESTION) + spaced
    history, new = conversation(action)
    prompt = protocol.extend(told, history, new)
    assert prompt[: len(told)] == told
    assert prompt != protocol.render([*history, *new])
    assert protocol.decode(prompt[len(told) :]).endswith("<|im_start|>assistant\n")


def test_an_answer_that_was_cut_off_is_closed_before_the_next_turn(protocol: ChatProtocol) -> None:
    cut = protocol.encode("The globe is")
    told = protocol.render(QUESTION) + cut
    history, new = conversation(FinalAnswer("The globe is"))
    assert protocol.extend(told, history, new) == protocol.render([*history, *new])


def test_bytes_split_over_two_tokens_stay_the_bytes_that_were_sampled(protocol: ChatProtocol) -> None:
    """Byte tokens that spell a word which has a token of its own are not the canonical ids, and are kept."""
    spelled = tuple(protocol.encode(letter)[0] for letter in "Ada") + protocol.encode(TURN_END)
    told = protocol.render(QUESTION) + spelled
    history, new = conversation(FinalAnswer("Ada"))
    assert protocol.extend(told, history, new)[: len(told)] == told


# ------------------------------------------------------------------------- a template that rewrites its history

THINKING_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' and message.reasoning_content and loop.last -%}
    {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
  {%- endif -%}
  {{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
THINKING_RESPONSE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>\n", "close": "\n</think>\n\n", "content": "text"},
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


@pytest.fixture(scope="module")
def thinking_protocol() -> ChatProtocol:
    """A model that thinks aloud, and whose template drops old thinking, as Qwen3's does."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.response_template = THINKING_RESPONSE
    return ChatProtocol(tokenizer)


def test_thinking_is_read_apart_from_the_answer(thinking_protocol: ChatProtocol) -> None:
    reader = thinking_protocol.reader()
    deltas = []
    for token_id in thinking_protocol.encode(f"<think>\nIs it round?\n</think>\n\nA globe.{TURN_END}"):
        deltas += reader.feed(token_id)
    action, rest = reader.finish(FinishReason.STOP)
    assert action == FinalAnswer("A globe.", "Is it round?")
    by_kind = {kind: "".join(d.text for d in [*deltas, *rest] if d.kind == kind) for kind in ("text", "reasoning")}
    assert by_kind == {"text": "A globe.", "reasoning": "Is it round?"}


def test_where_the_template_drops_old_thinking_the_conversation_is_rendered_afresh(
    thinking_protocol: ChatProtocol,
) -> None:
    action = FinalAnswer("A globe.", "Is it round?")
    prompt, completion = thinking_protocol.completion_of(QUESTION, action)
    history, new = conversation(action)
    extended = thinking_protocol.extend(prompt + completion, history, new)
    assert extended == thinking_protocol.render([*history, *new])
    assert "round" not in thinking_protocol.decode(extended)


# ------------------------------------------------------------------------------------- what cannot be rendered


def test_a_model_without_a_chat_template_is_refused_with_what_to_add() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ChatProtocolError, match="add `chat_template`"):
        ChatProtocol(tokenizer)


def test_messages_that_the_template_refuses_are_a_chat_protocol_error() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{%- if messages | length > 1 -%}{{ raise_exception('one at a time') }}{%- endif -%}"
    with pytest.raises(ChatProtocolError, match="one at a time"):
        ChatProtocol(tokenizer).render([*QUESTION, *QUESTION])


@pytest.mark.parametrize("arguments", ["{not json", "[1]", '"text"'])
def test_a_clients_message_with_unreadable_arguments_is_a_chat_protocol_error(
    protocol: ChatProtocol, arguments: str
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    with pytest.raises(ChatProtocolError, match="the arguments of look"):
        protocol.render([*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}])
