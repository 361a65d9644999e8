"""Reading what a model wrote, in every known way of writing turns: whole text, no marks, nothing lost in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.chat.chat_protocol import CallDelta, ChatProtocol, TextDelta
from policies.types import Action, FinalAnswer, FinishReason, MalformedAction, Message, ToolCall, ToolCalls, ToolSchema
from tests.families import FAMILIES, WITH_JSON_CALLS, WITH_TOOLS, protocol_of

FEW = settings(max_examples=40, deadline=None)
QUESTION: list[Message] = [{"role": "user", "content": "?"}]
families = pytest.mark.parametrize("name", FAMILIES)
with_tools = pytest.mark.parametrize("name", WITH_TOOLS)
with_json_calls = pytest.mark.parametrize("name", WITH_JSON_CALLS)


def tool(name: str, properties: dict[str, Any], required: list[str] | None = None, **more: Any) -> ToolSchema:
    parameters = {"type": "object", "properties": properties, "required": required or [], **more}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK = tool("look", {"at": {"type": "string"}, "times": {"type": "integer"}}, ["at"])
WAIT = tool("wait", {})
TOOLS = (LOOK, WAIT)


def in_tokens(protocol: ChatProtocol, text: str) -> tuple[int, ...]:
    """The policy's turn up to the text, as its chat template opens it: a template may open the thinking itself."""
    opening = protocol.traits.turn_opening
    close = "\n</think>\n\n" if "<think>" in opening else ""
    return protocol.encode(close + text)


def shown(protocol: ChatProtocol, completion: tuple[int, ...], kind: str = "text", size: int = 1) -> str:
    reader = protocol.reader(TOOLS)
    deltas = [d for at in range(0, len(completion), size) for d in reader.feed(*completion[at : at + size])]
    deltas += reader.finish(FinishReason.STOP)[1]
    return "".join(delta.text for delta in deltas if delta.kind == kind)


# ---------------------------------------------------------------------------------------- text and thinking


@families
@pytest.mark.parametrize("tag", ["<think>", "</think>", "[THINK]", "<think>\n"])
def test_a_thinking_tag_within_an_answer_is_a_word_of_it(name: str, tag: str) -> None:
    protocol = protocol_of(name)
    text = f"The tag {tag} opens thoughts, and so on.".replace("\n ", "\n")
    completion = (*in_tokens(protocol, text), protocol.encode(protocol.turn_end)[0])
    action = protocol.parse(completion, tools=TOOLS)
    assert isinstance(action, FinalAnswer)
    assert action.text == text
    assert shown(protocol, completion) == text


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thinks])
def test_thinking_begins_a_turn_and_is_read_apart(name: str) -> None:
    protocol = protocol_of(name)
    opening = "" if "<think>" in protocol.traits.turn_opening else "<think>\n"
    completion = protocol.encode(f"{opening}Hm, <think> again?\n</think>\n\nThe tag <think>.{protocol.turn_end}")
    assert protocol.parse(completion) == FinalAnswer("The tag <think>.", "Hm, <think> again?")


@families
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_turn_that_ends_within_its_thinking_shows_no_mark(name: str, size: int) -> None:
    protocol = protocol_of(name)
    opening = "" if "<think>" in protocol.traits.turn_opening else "<think>\n"
    for stop in protocol.stop_token_ids:
        completion = (*protocol.encode(f"{opening}Is it round"), stop)
        action = protocol.parse(completion)
        assert isinstance(action, FinalAnswer)
        mark = protocol.decode([stop])
        for kind, whole in (("text", action.text), ("reasoning", action.reasoning)):
            assert mark not in whole
            assert shown(protocol, completion, kind, size) == whole
        assert (action.text + action.reasoning).endswith("Is it round")


@families
def test_what_ends_an_answer_for_its_reader_ends_the_completion_too(name: str) -> None:
    """<|endoftext|>, where the checkpoint names <|im_end|> alone: the turn would go on, and be read as one text."""
    protocol = protocol_of(name)
    for stop in protocol.stop_token_ids:
        completion = (*in_tokens(protocol, "A globe."), stop, *protocol.encode("More."), stop)
        assert protocol.parse(completion) == FinalAnswer("A globe.")
        assert protocol.decode([stop]) not in shown(protocol, completion)


@families
def test_a_mark_spelled_in_letters_is_text_and_shown_whole(name: str) -> None:
    protocol = protocol_of(name)
    text = f"A turn ends with {protocol.turn_end} here. Really."
    head = in_tokens(protocol, "")
    completion = (*head, *protocol.encode_plain(text), protocol.encode(protocol.turn_end)[0])
    assert protocol.parse(completion) == FinalAnswer(text)
    assert shown(protocol, completion) == text


# ---------------------------------------------------------------------------------------------------- calls


def spelled(protocol: ChatProtocol, call: str) -> tuple[int, ...]:
    """A turn with one JSON call, whose object is given as the model wrote it."""
    template = protocol.written(QUESTION, ToolCalls((ToolCall("abcdefghi", "look", {}),)))
    begins, ends = template.index('{"name"'), template.rindex("}") + 1
    return protocol.encode(template[:begins] + call + template[ends:])


JSON_OBJECT_CALLS = [name for name in WITH_JSON_CALLS if name != "mistral-args"]


@pytest.mark.parametrize("name", JSON_OBJECT_CALLS)
@pytest.mark.parametrize(
    "call",
    [
        '{"name": "look", "parameters": {"at": "x"}}',
        '{"name": "look", "arguments": {"at": "x"}}',
        '{"name": "look", "arguments": "{\\"at\\": \\"x\\"}"}',
        '{"name": "look", "parameters": "{\\"at\\": \\"x\\"}"}',
        '{ "name" : "look" ,\n "arguments" : {"at":"x"} }',
    ],
)
def test_arguments_under_either_name_and_as_json_text_are_read(name: str, call: str) -> None:
    action = protocol_of(name).parse(spelled(protocol_of(name), call), tools=TOOLS)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {"at": "x"}


@pytest.mark.parametrize("name", [name for name in JSON_OBJECT_CALLS if name != "llama"])
@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ('{"name": "look"}', "the call of look has no arguments"),
        ('{"name": "look", "arguments": ""}', "the call of look has no arguments"),
        ('{"name": "look", "args": {"at": "x"}}', "has no `arguments`, but `args`"),
        ('{"name": "look", "input": {"at": "x"}}', "has no `arguments`, but `input`"),
        ('{"name": "look", "arguments": {"at": "x"}, "parameters": {"at": "y"}}', "one of them is enough"),
        ('{"name": "look", "arguments": null}', "must be a JSON object, not NoneType"),
        ('{"name": "look", "arguments": "at the shelf"}', "are not JSON"),
        ('{"name": "nothing_known"}', "the call of nothing_known has no arguments"),
    ],
)
def test_arguments_that_are_missing_are_missed(name: str, call: str, complaint: str) -> None:
    action = protocol_of(name).parse(spelled(protocol_of(name), call), tools=TOOLS)
    assert isinstance(action, MalformedAction)
    assert complaint in action.problem


@pytest.mark.parametrize("name", [name for name in JSON_OBJECT_CALLS if name != "llama"])
@pytest.mark.parametrize("call", ['{"name": "wait"}', '{"name": "wait", "arguments": ""}'])
def test_a_tool_that_needs_no_arguments_is_called_without(name: str, call: str) -> None:
    action = protocol_of(name).parse(spelled(protocol_of(name), call), tools=TOOLS)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {}


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"type": "function", "name": "look", "parameters": {"at": "x"}}', {"at": "x"}),
        ('<|python_tag|>{"name": "look", "parameters": {"at": "x"}}', {"at": "x"}),
        ('<|python_tag|>{"type": "function", "name": "look", "parameters": {"at": "x"}}', {"at": "x"}),
        ('{"name":"look","arguments":{"at":"}<|python_tag|>"}}', {"at": "}<|python_tag|>"}),
    ],
)
def test_llamas_calls_are_read_as_llamas_write_them(written: str, arguments: dict[str, Any]) -> None:
    protocol = protocol_of("llama")
    action = protocol.parse(protocol.encode(f"{written}<|eot_id|>"), tools=TOOLS)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == arguments


@pytest.mark.parametrize("text", ['{"name": "Bob", "age": 3}', '{"type": "cat", "name": "Tom"}', '{"name": "Bob"}'])
def test_llamas_answer_in_json_is_no_call(text: str) -> None:
    protocol = protocol_of("llama")
    assert protocol.parse(protocol.encode(f"{text}<|eot_id|>"), tools=TOOLS) == FinalAnswer(text)


@pytest.mark.parametrize("name", [name for name in JSON_OBJECT_CALLS if FAMILIES[name].has_call_tokens])
def test_a_text_argument_is_not_made_a_number(name: str) -> None:
    """A postcode: transformers turned it into 2134 where the schema allows both."""
    protocol = protocol_of(name)
    to = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    post = tool("post", {"zip": {"type": ["string", "integer"]}, "to": to})
    call = ToolCall("abcdefghi", "post", {"zip": "02134", "to": "7"})
    _, completion = protocol.completion_of(QUESTION, ToolCalls((call,)), (post,))
    action = protocol.parse(completion, tools=(post,))
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {"zip": "02134", "to": "7"}


# ---------------------------------------------------------------------------------------------- calls in XML

CODER = "qwen3-coder"


def xml(name: str, *arguments: tuple[str, str]) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def read_xml(text: str, *tools: ToolSchema) -> Action:
    protocol = protocol_of(CODER)
    return protocol.parse(protocol.encode(f"{text}<|im_end|>"), tools=tools or TOOLS)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "2", 2),
        ({"$ref": "#/$defs/count"}, "2", 2),
        ({"$ref": "#/$defs/alias"}, "2", 2),
        ({"allOf": [{"$ref": "#/$defs/count"}]}, "2", 2),
        ({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}, "2", 2),
        ({"anyOf": [{"$ref": "#/$defs/count"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "2", "2"),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "2", 2),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "two", "two"),
        ({"type": ["number", "null"]}, "2.50", 2.5),
        ({"type": "string"}, "2", "2"),
        ({"type": "string"}, "true", "true"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "integer"}, "true", "true"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": 2}, "2", 2),
        ({"$ref": "#/$defs/place"}, '{"x": 1}', {"x": 1}),
        ({"type": "array", "items": {"type": "string"}}, '["a", "b"]', ["a", "b"]),
        ({"$ref": "#/$defs/colour"}, "red", "red"),
        ({"$ref": "#/$defs/circle"}, "2", 2),
        ({"type": "integer"}, "123456789012345678901234", 123456789012345678901234),
        ({}, '{"x": 1}', {"x": 1}),
        ({}, "plain", "plain"),
    ],
)
def test_an_arguments_type_is_found_wherever_the_schema_has_it(schema: dict[str, Any], text: str, value: Any) -> None:
    definitions = {
        "count": {"type": "integer"},
        "alias": {"$ref": "#/$defs/count"},
        "place": {"type": "object", "properties": {"x": {"type": "integer"}}},
        "colour": {"enum": ["red", "green"], "type": "string"},
        "circle": {"$ref": "#/$defs/circle"},
    }
    go = tool("go", {"to": schema}, **{"$defs": definitions})
    action = read_xml(xml("go", ("to", text)), go)
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {"to": value}
    assert type(action.calls[0].arguments["to"]) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "print('</function></tool_call>')",
        "</function>\n</tool_call>",
        "a </parameter> b",
        "</parameter>",
        "x\n</parameter>\ny",
        "<function=wait>\n</function>\n",
        "",
        "\n",
        "two\nlines\n",
    ],
)
def test_closing_tags_in_a_string_do_not_end_it(value: str) -> None:
    """Written as letters, as the template's own encoding has them: even `</tool_call>`, which else is a token."""
    protocol = protocol_of(CODER)
    call = ToolCall("c", "look", {"at": value, "times": 2})
    _, completion = protocol.completion_of(QUESTION, ToolCalls((call,)), TOOLS)
    for tokens in (completion, protocol.encode(protocol.decode(completion))):
        action = protocol.parse(tokens, tools=TOOLS)
        assert isinstance(action, ToolCalls)
        assert action.calls[0].arguments == call.arguments


@pytest.mark.parametrize(
    "text",
    [
        xml("look", ("at", "a</parameter></function></tool_call> b")),
        "<tool_call>\n<function=look>\n<parameter=at>\nx\n</function>\n</tool_call>",
        '<tool_call>\n<function=look>\n{"at": "x"}\n</function>\n</tool_call>',
        "<tool_call>\n<function=look>\nat = x\n<parameter=times>\n2\n</parameter>\n</function>\n</tool_call>",
        xml("look", ("at", "x"), ("at", "y")),
        xml("look", ("at", "x\n</parameter>\n<parameter=at>\ny")),
    ],
)
def test_what_cannot_be_read_right_is_malformed_and_never_less_than_it_was(text: str) -> None:
    action = read_xml(text)
    assert isinstance(action, MalformedAction)
    assert action.text == text
    assert action.problem
    reader = protocol_of(CODER).reader(TOOLS)
    for token_id in protocol_of(CODER).encode(f"{text}<|im_end|>"):
        reader.feed(token_id)
    assert reader.finish(FinishReason.STOP)[0] == action, "the same as it is sampled"


def test_a_call_in_xml_without_arguments_is_none_of_a_tool_that_needs_some() -> None:
    action = read_xml(xml("wait"))
    assert isinstance(action, ToolCalls)
    assert action.calls[0].arguments == {}


pieces_of_xml = ["a", "\n", "<", ">", "/", "</parameter>", "</function>", "</tool_call>", "<parameter=at>"]
texts = st.lists(st.sampled_from(pieces_of_xml), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(value=texts)
def test_a_string_in_xml_is_read_as_it_was_or_not_at_all(value: str) -> None:
    protocol = protocol_of(CODER)
    call = ToolCall("c", "look", {"at": value})
    _, completion = protocol.completion_of(QUESTION, ToolCalls((call,)), TOOLS)
    action = protocol.parse(completion, tools=TOOLS)
    assert isinstance(action, MalformedAction) or (
        isinstance(action, ToolCalls) and action.calls[0].arguments == call.arguments
    )


# ------------------------------------------------------------------------------------------ calls as they come

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from(list('a"\\{}[],: \n<é')), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b c", "arguments"]), inner),
    max_leaves=6,
)
arguments = st.dictionaries(st.sampled_from(["at", "times", "name", "arguments"]), values, max_size=3)


def streamed(protocol: ChatProtocol, completion: tuple[int, ...], size: int) -> tuple[Action, list[Any]]:
    reader = protocol.reader(TOOLS, streams_calls=True)
    deltas = [d for at in range(0, len(completion), size) for d in reader.feed(*completion[at : at + size])]
    action, rest = reader.finish(FinishReason.STOP)
    return action, [*deltas, *rest]


@with_tools
@FEW
@given(first=arguments, second=arguments, size=st.sampled_from([1, 2, 7, 1000]))
def test_calls_are_told_as_they_are_written(
    name: str, first: dict[str, Any], second: dict[str, Any], size: int
) -> None:
    protocol = protocol_of(name)
    calls = [ToolCall("abcdefghi", "look", first), ToolCall("bcdefghij", "wait", second)][: FAMILIES[name].max_calls]
    _, completion = protocol.completion_of(QUESTION, ToolCalls(tuple(calls)), TOOLS)
    action, deltas = streamed(protocol, completion, size)
    if not isinstance(action, ToolCalls):
        assert not FAMILIES[name].has_call_tokens or not FAMILIES[name].writes_json_calls
        return
    told = [delta for delta in deltas if isinstance(delta, CallDelta)]
    for index, call in enumerate(action.calls):
        pieces = [delta for delta in told if delta.index == index]
        assert [piece.name for piece in pieces] == [call.name, *[""] * (len(pieces) - 1)]
        assert {piece.id for piece in pieces} == {call.id}
        assert json.loads("".join(piece.arguments_piece for piece in pieces)) == call.arguments
    assert [delta.index for delta in told] == sorted(delta.index for delta in told)


@with_json_calls
def test_arguments_come_in_pieces_and_the_name_before_them(name: str) -> None:
    protocol = protocol_of(name)
    call = ToolCall("abcdefghi", "look", {"at": "the shelf, and then the desk", "times": 2})
    _, completion = protocol.completion_of(QUESTION, ToolCalls((call,)), TOOLS)
    action, deltas = streamed(protocol, completion, 1)
    told = [delta for delta in deltas if isinstance(delta, CallDelta)]
    assert len(told) > 5
    assert told[0].name == "look"
    assert isinstance(action, ToolCalls)


@with_tools
def test_who_does_not_ask_for_calls_is_told_text_alone(name: str) -> None:
    protocol = protocol_of(name)
    _, completion = protocol.completion_of(QUESTION, ToolCalls((ToolCall("abcdefghi", "look", {"at": "x"}),)), TOOLS)
    reader = protocol.reader(TOOLS)
    deltas = [*reader.feed(*completion), *reader.finish(FinishReason.STOP)[1]]
    assert all(isinstance(delta, TextDelta) for delta in deltas)


# --------------------------------------------------------------------------------------------- calls cut off


@with_json_calls
def test_a_call_that_was_cut_off_is_told_as_far_as_it_got(name: str) -> None:
    protocol = protocol_of(name)
    call = ToolCall("abcdefghi", "look", {"at": "the shelf", "times": 2})
    thought = "Hm." if FAMILIES[name].thinks else ""
    _, completion = protocol.completion_of(QUESTION, ToolCalls((call,), "", thought), TOOLS)
    whole = json.dumps(call.arguments)
    got = []
    for cut in range(len(completion)):
        partial = protocol.partial_call(completion[:cut], TOOLS)
        if partial is None:
            assert not got, "what had begun is not forgotten"
            continue
        assert "look".startswith(partial.name)
        assert whole.startswith(partial.arguments.rstrip())
        got.append((partial.name, partial.arguments))
    assert ("look", "") in got
    assert any(arguments.startswith('{"at": "the sh') for _, arguments in got)
    assert got == sorted(got)


@families
def test_a_text_that_was_cut_off_is_no_call(name: str) -> None:
    protocol = protocol_of(name)
    for text in ("The globe", 'A call is {"name": "look"', "", "Hm <"):
        assert protocol.partial_call(in_tokens(protocol, text), TOOLS) is None
