"""Reads one completion as it is sampled: text, thinking and calls out of tokens, with the model's response template."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate as LoadedTemplate

from policies.chat.argument_types import typed_arguments
from policies.chat.call_stream import CallStream, WrittenCall
from policies.chat.control_marks import ControlMarks, Mender, mended, mended_value
from policies.chat.messages import tool_call_of
from policies.types import (
    Action,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    TokenIds,
    ToolCall,
    ToolCalls,
    ToolSchema,
)


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of what the policy says, as it says it: `kind` is `text` or `reasoning`."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a tool call, as it is written: first its name, then its arguments' JSON text."""

    index: int
    """Of the call in its turn, from 0."""
    name: str
    """The whole name, in the call's first delta; empty in the others."""
    arguments_piece: str
    id: str
    """The call's id in every delta, and in the action."""


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(frozen=True, slots=True)
class ReadingRules:
    """All that reading a model's turns needs to know of the model."""

    tokenizer: Any
    marks: ControlMarks
    template: LoadedTemplate
    turn_opening: str
    turn_end: str
    stop_token_ids: TokenIds


_KINDS = {"content": "text", "thinking": "reasoning", "reasoning": "reasoning", "reasoning_content": "reasoning"}
"""Fields of response templates that are shown as they come; makers of models agree on the names only in part."""

_CALLS = "tool_calls"

_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""What the response parser raises for bad writing; the last one for JSON that is nested a thousand deep."""


class ActionReader:
    """Reads one completion as it is sampled. Never raises for what a policy writes: bad writing is an action too."""

    def __init__(self, rules: ReadingRules, tools: Sequence[ToolSchema] = (), streams_calls: bool = False) -> None:
        """With `streams_calls`, calls are told as they are written too; else text and thinking alone."""
        self._rules = rules
        self._tools = tools
        self._parser = ResponseParser(rules.template, prefix=rules.turn_opening)
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._token_ids: list[int] = []
        self._written = ""
        self._held = ""
        """The end of what was written in ordinary tokens: perhaps the beginning of a mark, which it must not become."""
        self._has_ended = False
        """A stop token came; nothing is read after it."""
        self._stop_text = ""
        self._said = {"text": _Said(), "reasoning": _Said()}
        self._calls = _CallReader(rules.template, tools, streams_calls)
        self._problem = ""
        self._take(self._parser.initial_events)

    def feed(self, *token_ids: int) -> list[Any]:
        """Take the next tokens; returns what can be shown of them. Many at once are cheaper than one by one."""
        deltas: list[Any] = []
        ready = ""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            piece = self._decoder.step(self._rules.tokenizer.backend_tokenizer, token_id) or ""
            self._written += piece
            if self._has_ended:
                continue
            if token_id not in self._rules.stop_token_ids:
                ready += self._spelled(token_id, piece)
                continue
            stop_text = self._rules.tokenizer.decode([token_id])
            deltas += self._parse(ready + self._ordinary(piece.removesuffix(stop_text), is_last=True))
            self._has_ended, self._stop_text, ready = True, stop_text, stop_text
        return deltas + self._parse(ready)

    def finish(self, finish_reason: FinishReason) -> tuple[Action, list[Any]]:
        """The whole action, and what was still held back of its text."""
        unwritten = self._rules.tokenizer.decode(
            self._token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )[len(self._written) :]
        self._written += unwritten
        ending = "" if self._has_ended else self._ordinary(unwritten, is_last=True)
        deltas = self._parse(ending) + self._finalize()
        if self._problem:
            deltas += self._said_before_problem()
        return self._action(finish_reason), deltas

    @property
    def written(self) -> str:
        """The completion so far as it was written, without the end of the turn."""
        return self._written.removesuffix(self._rules.turn_end)

    @property
    def num_calls(self) -> int:
        """How many calls are complete."""
        return self._calls.num_complete

    @property
    def call_being_written(self) -> WrittenCall | None:
        """The call that is not complete yet; None where there is none, or it is not followed."""
        return self._calls.being_written

    # ---------------------------------------------------------------------------------------- tokens to text

    def _spelled(self, token_id: int, piece: str) -> str:
        """A token's text as the parser may see it: marks in it are marks only where they are tokens."""
        if token_id not in self._rules.marks.ids:
            return self._ordinary(piece)
        return self._ordinary("", is_last=True) + piece

    def _ordinary(self, piece: str, is_last: bool = False) -> str:
        ready, self._held = self._rules.marks.split_off_beginning(self._held + piece)
        if is_last:
            ready, self._held = ready + self._held, ""
        return ready

    # ---------------------------------------------------------------------------------------- text to events

    def _parse(self, piece: str) -> list[Any]:
        return self._guarded(lambda: self._parser.feed(piece)) if piece else []

    def _finalize(self) -> list[Any]:
        return self._guarded(lambda: self._parser.finalize()[1])

    def _guarded(self, events: Callable[[], list[dict[str, Any]]]) -> list[Any]:
        if self._problem:
            return []
        try:
            return self._take(events())
        except _UNREADABLE as error:
            self._problem = str(error).splitlines()[0] or type(error).__name__
            return []

    def _take(self, events: list[dict[str, Any]]) -> list[Any]:
        deltas: list[Any] = []
        opened = [number for number, event in enumerate(events) if event["type"] == "region_open"]
        for number, event in enumerate(events):
            kind = _KINDS.get(event["field"])
            if event["field"] == _CALLS:
                # What a region's opening mark captured is known of the last one alone: of one that is open still.
                captures = self._parser._captures if opened and number == opened[-1] else None
                deltas += self._calls.take(event, captures)
            elif event["type"] == "region_chunk" and kind:
                # A turn that ends within its thinking has the end's mark there, as if it were a thought.
                text = event["text"].removesuffix(self._stop_text)
                if shown := self._said[kind].add(text):
                    deltas.append(TextDelta(kind, shown))
                self._calls.take_text(text)
        return deltas

    def _said_before_problem(self) -> list[TextDelta]:
        """What was fed together with bad writing, and stood before it: the parser forgets that where it raises."""
        one_by_one = ActionReader(self._rules, self._tools)
        for token_id in self._token_ids:
            one_by_one.feed(token_id)
        whole = {kind: said.shown for kind, said in one_by_one._said.items()}
        rest = {kind: text[len(self._said[kind].shown) :] for kind, text in whole.items()}
        return [TextDelta(kind, text) for kind, text in rest.items() if text]

    # ---------------------------------------------------------------------------------------------- the action

    def _action(self, finish_reason: FinishReason) -> Action:
        if self._problem:
            return self._malformed(self._problem, finish_reason)
        text, reasoning = self._said["text"].shown, self._said["reasoning"].shown
        try:
            calls = self._calls.all()
        except ValueError as error:
            return self._malformed(str(error), finish_reason)
        return ToolCalls(calls, text, reasoning) if calls else FinalAnswer(text, reasoning)

    def _malformed(self, problem: str, finish_reason: FinishReason) -> MalformedAction:
        if finish_reason is FinishReason.LENGTH:
            problem = f"it was cut off at the token limit ({problem})"
        return MalformedAction(self.written, problem)


class _CallReader:
    """The calls of one completion, out of the response parser's events."""

    def __init__(self, template: LoadedTemplate, tools: Sequence[ToolSchema], streams: bool) -> None:
        self._field: Any = template.fields.get(_CALLS)
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._needs_arguments = {name: bool(schema.get("required")) for name, schema in self._parameters.items()}
        self._streams = streams
        self._entries: list[Any] = []
        self._ids: dict[int, str] = {}
        self._stream = CallStream()
        self._mender = Mender()
        self._body = ""
        self._text_behind = ""
        """What was said after the first call, where a call may have ended too early."""
        self._problem = ""

    @property
    def _is_bare_text(self) -> bool:
        """Arguments are written without their types: `<parameter=times>2</parameter>`."""
        return self._field is not None and self._field.content in ("xml-inline", "kv-lines")

    def take(self, event: dict[str, Any], captures: dict[str, str] | None) -> list[CallDelta]:
        """One event of the region of calls; `captures` is what its opening mark captured, None where not known."""
        if event["type"] == "region_open":
            self._body, self._mender = "", Mender()
            self._stream = self._new_stream(captures)
            return []
        if event["type"] == "region_chunk":
            self._body += event["text"]
            if not self._streams or self._stream is None:
                return []
            self._stream.feed(self._mender.add(event["text"]))
            return self._new_pieces()
        return self._close(event["value"])

    def _new_stream(self, captures: dict[str, str] | None) -> CallStream | None:
        """Follows a call while it is written; None where that cannot be: it is told whole when it is complete."""
        if self._is_bare_text:
            return None
        if "name" not in self._field.open_re.groupindex:
            return CallStream()
        return CallStream.of_arguments(mended(captures["name"])) if captures and "name" in captures else None

    def take_text(self, text: str) -> None:
        """Text beside the calls."""
        if self._entries and self._is_bare_text:
            self._text_behind += text

    @property
    def num_complete(self) -> int:
        return len(self._entries)

    def all(self) -> tuple[ToolCall, ...]:
        """Every call. Raises ValueError, in words that the policy can act on, where one cannot be read."""
        if self._problem:
            raise ValueError(self._problem)
        if tag := self._closing_tag_in(self._text_behind):
            raise ValueError(f"{tag} stands behind a call: within an argument it ends the call")
        return tuple(self._call(number) for number in range(len(self._entries)))

    def _call(self, number: int) -> ToolCall:
        call = tool_call_of(self._entries[number], number, self._needs_arguments)
        if self._is_bare_text:
            schema = self._parameters.get(call.name, {})
            call = replace(call, arguments=typed_arguments(call.arguments, schema))
        return replace(call, id=self._ids.get(number) or call.id or self._id(number))

    def _id(self, number: int) -> str:
        return self._ids.setdefault(number, new_call_id())

    @property
    def being_written(self) -> WrittenCall | None:
        calls = self._stream.calls if self._stream else ()
        return calls[-1] if calls else None

    def _close(self, value: Any) -> list[CallDelta]:
        if self._is_bare_text:
            self._check_body(value)
        first = len(self._entries)
        entries = value if isinstance(value, list) else [value]
        self._entries += [_entry(mended_value(entry)) for entry in entries]
        return self._untold(first) if self._streams else []

    def _check_body(self, value: Any) -> None:
        """Nothing but arguments may stand in a call: what is no argument is the rest of one that ended too early."""
        pattern = self._field.content_args.get("tag_pattern")
        if pattern is None:
            return
        found = list(re.finditer(pattern, self._body, re.DOTALL))
        rest = re.sub(pattern, "", self._body, flags=re.DOTALL).strip()
        arguments = value.get("function", {}).get("arguments") if isinstance(value, dict) else None
        if rest:
            self._problem = self._problem or f"what is written in a call is no argument: {mended(rest)[:80]!r}"
        elif isinstance(arguments, dict) and len(arguments) < len(found):
            self._problem = self._problem or "an argument is written twice"

    def _closing_tag_in(self, text: str) -> str | None:
        if not text:
            return None
        patterns = f"{self._field.close_re.pattern if self._field.close_re else ''}{self._field.content_args}"
        return next((tag for tag in re.findall(r"</\w+>", patterns) if tag in text), None)

    # --------------------------------------------------------------------------------------- while it is written

    def _new_pieces(self) -> list[CallDelta]:
        deltas = []
        for number, call in enumerate(self._stream.calls if self._stream else (), len(self._entries)):
            name, piece = call.take()
            if name or piece:
                deltas.append(CallDelta(number, name, piece, self._id(number)))
        return deltas

    def _untold(self, first: int) -> list[CallDelta]:
        """Of calls that are complete, the arguments of which nothing was told."""
        deltas = []
        followed = dict(enumerate(self._stream.calls if self._stream else (), first))
        for number in range(first, len(self._entries)):
            told = followed.get(number)
            if told is not None and told.num_taken:
                continue
            try:
                call = self._call(number)
            except ValueError:  # told when the turn is over, as the problem of a malformed action
                continue
            name = "" if told is not None and told.is_name_taken else call.name
            deltas.append(CallDelta(number, name, json.dumps(call.arguments, ensure_ascii=False), self._id(number)))
        return deltas


def _entry(value: Any) -> Any:
    """A call in OpenAI's form. Mistral's lists hold the functions themselves."""
    if isinstance(value, dict) and "function" not in value:
        return {"function": value, "id": value.get("id")}
    return value


class _Said:
    """Text without outer white space, given out as early as that can be known."""

    def __init__(self) -> None:
        self.shown = ""
        self._mender = Mender()
        self._held = ""

    def add(self, piece: str) -> str:
        piece = self._mender.add(piece)
        whole = self._held + piece if self.shown else (self._held + piece).lstrip()
        ready = whole.rstrip()
        self._held = whole[len(ready) :]
        self.shown += ready
        return ready
