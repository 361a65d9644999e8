"""Grammars that hold a completion to a JSON schema, to a call of one of the tools on offer, or to no call at all.

They are written in llguidance's Lark dialect, which both engines take. How a turn is spelled is read off the chat
template by rendering one, so nothing here knows any model's marks. Under a grammar a token's logprob is that of the
masked policy: what is sampled so is no sample of the policy itself (`SamplingParams.is_policy`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from policies.chat.chat_protocol import ChatProtocol
from policies.chat.closed_schemas import SchemaMaze, closed, looks_around
from policies.chat.messages import ARGUMENT_KEYS
from policies.types import FinalAnswer, ToolCall, ToolCalls, ToolSchema

_A_THOUGHT, _AN_ANSWER = "A thought.", "An answer."
"""Are written by the template, to see what it writes around them."""

_A_CALL = ToolCall("call00000", "a_tool", {})

_ANY_TEXT = r"/(.|\n)*/"
_THOUGHT = f"THOUGHT: {_ANY_TEXT}"

_JSON_CALL = (
    r'/\s*\{\s*("type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"[^"]*"\s*,\s*"(parameters|arguments)"\s*:(.|\n)*/'
)
"""A turn that is read as a call where calls have no mark of their own: Llama's."""

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


class GrammarError(ValueError):
    """A schema that no grammar can be made of, or a model whose tool calls are not written as JSON."""


def json_grammar(protocol: ChatProtocol, schema: dict[str, Any]) -> str:
    """The answer is one JSON value that fits the schema. Raises GrammarError for an invalid or unsupported schema."""
    turn = _Turn.of(protocol)
    return _checked(f"start: {turn.thinking} {turn.answer_head} answer", f"answer: {_answer_rule(schema)}", _THOUGHT)


def tool_call_grammar(protocol: ChatProtocol, tools: Sequence[ToolSchema]) -> str:
    """The answer is exactly one call of one of the tools, with arguments that fit its parameters.

    Raises GrammarError where the model does not write a call's arguments as a JSON object.
    """
    return _checked(f"start: {_Turn.of(protocol).thinking} call", *_call_rules(protocol, tools), _THOUGHT)


def call_or_answer_grammar(
    protocol: ChatProtocol, tools: Sequence[ToolSchema], schema: dict[str, Any] | None = None
) -> str | None:
    """At most one call of one of the tools, or an answer: one that fits the schema, or any where that is None.

    For `response_format` beside tools, and for `parallel_tool_calls: false`. Before a call the policy may say something
    where the template has a place for it, and no schema is asked for. None: the model cannot do otherwise, for it has
    no words for several calls. Raises GrammarError as the two above.
    """
    turn = _Turn.of(protocol)
    if turn.is_call_a_whole_turn:
        return None if schema is None else _one_json_value(protocol, turn, tools, schema)
    calls = _call_rules(protocol, tools)
    if schema is not None:
        start = f"start: {turn.thinking} (call | {turn.answer_head} answer)"
        return _checked(start, f"answer: {_answer_rule(schema)}", *calls, _THOUGHT)
    says_before = turn.has_marked_calls and not protocol.traits.habits.drops_text
    what = "TEXT call?" if says_before else "(call | TEXT)"
    return _checked(f"start: {turn.optional_thinking} {what}", f"TEXT: {turn.text_without_call}", *calls, _THOUGHT)


def _one_json_value(protocol: ChatProtocol, turn: _Turn, tools: Sequence[ToolSchema], schema: dict[str, Any]) -> str:
    """A call or an answer where both are a JSON object without a mark: one schema for both, as one lexer reads them."""
    key = next((key for key in ARGUMENT_KEYS if f'"{key}"' in protocol.traits.call_middle), None)
    if key is None or protocol.traits.call_opening.strip() != '{"name": "':
        raise GrammarError("this model writes its tool calls in no form that can stand beside an answer in a schema")
    parts = {f"tool_{n}": tool["function"].get("parameters") or _NO_ARGUMENTS for n, tool in enumerate(tools)}
    choices: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {"name": {"const": tool["function"]["name"]}, key: {"$ref": f"#/$defs/tool_{number}"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for number, tool in enumerate(tools)
    ]
    parts = {place: _rerooted(part, f"#/$defs/{place}") for place, part in {**parts, "answer": schema}.items()}
    both = {"anyOf": [*choices, {"$ref": "#/$defs/answer"}], "$defs": parts}
    return _checked(f"start: {turn.thinking} answer", f"answer: {_answer_rule(both)}", _THOUGHT)


def _rerooted(schema: Any, place: str) -> Any:
    """A schema that stands within another: its references to itself lead there."""
    match schema:
        case dict():
            return {
                key: place + value[1:] if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _rerooted(value, place)
                for key, value in schema.items()
            }  # fmt: skip
        case list():
            return [_rerooted(part, place) for part in schema]
    return schema


def no_call_grammar(protocol: ChatProtocol) -> str | None:
    """Any answer that calls no tool, though the prompt tells of tools. None: the model has no words for calls at all.

    Raises GrammarError where calls begin like any text.
    """
    if not protocol.takes_tools:
        return None
    turn = _Turn.of(protocol)
    return _checked(f"start: {turn.optional_thinking} TEXT", f"TEXT: {turn.text_without_call}", _THOUGHT)


@dataclass(frozen=True, slots=True)
class _Turn:
    """How a chat template spells the policy's turn, as grammar terminals."""

    thinking: str
    """From the turn's opening to where an answer or a call begins; empty where no thinking is written."""
    optional_thinking: str
    """The same, where the policy opens its thinking itself and need not think."""
    answer_head: str
    """What stands between that and the answer's text: Mistral's space."""
    has_marked_calls: bool
    """A call begins with a token of its own, which is in no text."""
    is_call_a_whole_turn: bool
    """A call is a JSON object and nothing else: Llama's."""
    text_without_call: str
    """A terminal: any text that is not read as a call, nor holds one."""

    @classmethod
    def of(cls, protocol: ChatProtocol) -> _Turn:
        before_answer, _ = _around(protocol, FinalAnswer(_AN_ANSWER, _A_THOUGHT), _AN_ANSWER)
        before_call = ""
        if protocol.takes_tools:
            before_call, _ = _around(protocol, ToolCalls((_A_CALL,), reasoning=_A_THOUGHT), _A_CALL.name)
        shared = _shared(before_answer, before_call) if protocol.takes_tools else before_answer
        head = _terminals(protocol, shared)
        opening = before_call[len(shared) :].strip()
        is_marked = _terminals(protocol, opening).startswith("<[")
        may_leave_out = head and not shared.startswith(_A_THOUGHT)
        return cls(
            thinking=head,
            optional_thinking=f"({head})?" if may_leave_out else head,
            answer_head=_terminals(protocol, before_answer[len(shared) :]),
            has_marked_calls=is_marked,
            is_call_a_whole_turn=opening.startswith("{"),
            text_without_call=_ANY_TEXT if is_marked or not opening else _text_without(opening),
        )


def _text_without(opening: str) -> str:
    """Text in which no call begins, where a call begins with ordinary letters."""
    if tag := re.match(r"<[^<>\s]+>|\[[^\[\]\s]+\]", opening):
        return rf"{_ANY_TEXT} & ~/(.|\n)*{_escaped(tag.group())}(.|\n)*/"
    if opening.startswith("{"):
        return f"{_ANY_TEXT} & ~{_JSON_CALL}"
    raise GrammarError(f"this model begins its tool calls with {opening!r}, as it may begin any text")


def _escaped(text: str) -> str:
    return re.sub(r"([^\w\s<>])", r"\\\1", text)


def _call_rules(protocol: ChatProtocol, tools: Sequence[ToolSchema]) -> list[str]:
    """Rules for `call`: one call of one of the tools, from its opening to its end."""
    before_answer, _ = _around(protocol, FinalAnswer(_AN_ANSWER, _A_THOUGHT), _AN_ANSWER)
    before, rest = _around(protocol, ToolCalls((_A_CALL,), reasoning=_A_THOUGHT), _A_CALL.name)
    between, found, after = rest.partition("{}")
    if not found:
        raise GrammarError("this model does not write tool calls as JSON objects, so a call cannot be required of it")
    after = after.replace(f', "id": "{_A_CALL.id}"', "")  # its reader numbers the calls
    opening = _terminals(protocol, before[len(_shared(before_answer, before)) :])
    middle, closing = _terminals(protocol, between), _terminals(protocol, after)
    rules = [f"call: {opening} (" + " | ".join(f"call_{number}" for number in range(len(tools))) + ")"]
    for number, tool in enumerate(tools):
        name, parameters = tool["function"]["name"], tool["function"].get("parameters") or _NO_ARGUMENTS
        spelled = json.dumps(name)[1:-1] if before.endswith('"') else name
        rules.append(f"call_{number}: {json.dumps(spelled)} {middle} arguments_{number} {closing}")
        # A rule of its own, so that `#/$defs/...` in the tool's parameters still points into them.
        rules.append(f"arguments_{number}: {_arguments_rule(name, parameters)}")
    return rules


def _answer_rule(schema: dict[str, Any]) -> str:
    rule, problem = _json_rule(schema)
    if problem:
        raise GrammarError(f"no answer can be held to this schema, leave out what is not supported: {problem}")
    return rule


def _arguments_rule(name: str, parameters: dict[str, Any]) -> str:
    """Of what no grammar can hold to, nothing is promised for arguments: where a call is not required, nothing is."""
    rule, problem = _json_rule(parameters, _LENIENT)
    if problem:
        raise GrammarError(f"no call of {name} can be held to its parameters: {problem}")
    return rule


_LENIENT = {"lenient": True}
"""llguidance's: keywords that it does not know are left out."""


def _json_rule(schema: dict[str, Any], leniency: dict[str, Any] | None = None) -> tuple[str, str]:
    """(rule, what is wrong with it): as the schema is meant, else as it stands, else with `leniency`."""
    # One spelling of white space, the one that chat templates' `tojson` writes and the policy has learned.
    spelling = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    try:
        as_meant = closed(schema)
    except (SchemaMaze, RecursionError) as error:
        raise GrammarError("the schema's parts refer to each other over and over") from error
    rule = problem = ""
    attempts = [(as_meant, {}), (schema, {})]  # as it is, where it cannot be closed: by llguidance's bounds, say
    if leniency is not None:
        attempts += [(as_meant, leniency), (_without_look_around(as_meant), leniency)]
    for held, options in attempts:
        rule = "%json " + json.dumps({**held, "x-guidance": {**spelling, **options}})
        problem = LLMatcher.validate_grammar(f"start: {rule}")
        if not problem:
            return rule, ""
    return rule, _in_words(problem)


def _in_words(problem: str) -> str:
    """What llguidance says of a schema, without the grammar that it stood in."""
    _, _, said = problem.partition("failed to compile JSON schema: ")
    return " ".join((said or problem).partition("\n   1 |")[0].split())


def _without_look_around(schema: Any) -> Any:
    match schema:
        case dict():
            kept = {key: value for key, value in schema.items() if key != "pattern" or not looks_around(value)}
            return {key: _without_look_around(value) for key, value in kept.items()}
        case list():
            return [_without_look_around(part) for part in schema]
    return schema


def _checked(*rules: str) -> str:
    grammar = "\n".join(rules)
    if problem := LLMatcher.validate_grammar(grammar):
        raise GrammarError(problem.splitlines()[0])
    return grammar


def _around(protocol: ChatProtocol, action: ToolCalls | FinalAnswer, part: str) -> tuple[str, str]:
    """What the template writes before and after a part of an action, up to the turn's end."""
    written = protocol.written([{"role": "user", "content": "?"}], action).removesuffix(protocol.turn_end)
    before, _, after = written.partition(part)
    return before, after


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _terminals(protocol: ChatProtocol, text: str) -> str:
    """Text as Lark terminals: special tokens by id, since their text would be matched as plain bytes.

    Where the text holds the thought, any text may stand, up to the special token that ends thinking.
    llguidance takes an added token in angle brackets for special even where the tokenizer does not: Qwen's <tool_call>.
    """
    added = protocol.tokenizer.added_tokens_decoder.items()
    special = {t.content: id for id, t in added if t.special or (t.content[0], t.content[-1]) == ("<", ">")}
    pieces = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text)
    return " ".join(_terminal(piece, special) for piece in pieces if piece)


def _terminal(piece: str, special: dict[str, int]) -> str:
    if piece in special:
        return f"<[{special[piece]}]>"
    return "THOUGHT" if _A_THOUGHT in piece else json.dumps(piece)
