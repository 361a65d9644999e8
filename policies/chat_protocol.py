"""Messages to tokens and tokens to actions, with the model's own chat template and response template.

Both templates come from the model's files and are run by transformers; there is no tool-call parser here. What was
sampled stays as it was sampled: a conversation that goes on is continued on its token ids, and only its new messages
are rendered. Re-rendering everything would be simpler, but a tool call that the model spaced its own way would come
back as other tokens than it was logged and trained with.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from policies.types import (
    Action,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    TokenIds,
    ToolCall,
    ToolCalls,
    ToolSchema,
)


class ChatProtocolError(ValueError):
    """Messages that the model's chat template cannot render, or a model without the templates that are needed."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of what the policy says, as it says it: `kind` is `text` or `reasoning`."""

    kind: str
    text: str


class ChatProtocol:
    """One model's way of writing conversations. Holds no state of any conversation."""

    def __init__(self, tokenizer: Any, stop_token_ids: Iterable[int] | None = None) -> None:
        if tokenizer.chat_template is None:
            raise ChatProtocolError("the tokenizer has no chat template; add `chat_template` to its files")
        if getattr(tokenizer, "response_template", None) is None:
            raise ChatProtocolError(
                "the tokenizer has no response template, so tool calls cannot be read from its output; "
                "add `response_template` to its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.stop_token_ids: TokenIds = tuple(stop_token_ids or (tokenizer.eos_token_id,))
        self._stop_text: str = tokenizer.decode([tokenizer.eos_token_id])
        self._template = load_response_template(tokenizer.response_template)
        self._turn_opening = self._find_turn_opening()

    @classmethod
    def load(cls, model_path: str | Path) -> ChatProtocol:
        """Read tokenizer, templates and stop tokens from a model's folder (or hub name)."""
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        try:
            stops = GenerationConfig.from_pretrained(model_path).eos_token_id
        except OSError:  # the file is optional; the tokenizer's own end of text remains
            stops = None
        ids = [stops] if isinstance(stops, int) else list(stops or [])
        return cls(tokenizer, dict.fromkeys([*ids, tokenizer.eos_token_id]))

    # ------------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> TokenIds:
        """The prompt, up to and including the opening of the policy's own turn."""
        return self.encode(self._text(messages, tools, is_open=True))

    def extend(
        self, told: TokenIds, history: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSchema] = ()
    ) -> TokenIds:
        """The prompt for `history + new`, standing on `told`: the token ids of `history` as they were served.

        `history` ends with the policy's message, `told` with that message's completion. Where the template writes
        the longer conversation otherwise than the shorter one (it drops old thinking, say), all is rendered afresh.
        """
        before = self._text(history[:-1], tools, is_open=True)
        shorter = self._text(history, tools, is_open=False)
        longer = self._text([*history, *new], tools, is_open=True)
        turn_end = shorter.rfind(self._stop_text)
        if not (shorter.startswith(before) and longer.startswith(shorter)) or turn_end < len(before):
            return self.encode(longer)
        if told and told[-1] in self.stop_token_ids:
            turn_end += len(self._stop_text)
        return told + self.encode(longer[turn_end:])

    def completion_of(
        self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema] = ()
    ) -> tuple[TokenIds, TokenIds]:
        """(prompt, completion) token ids of an action as the template writes it: an expert's step in tokens."""
        prompt = self._text(messages, tools, is_open=True)
        whole = self._text([*messages, action_message(action)], tools, is_open=False)
        turn_end = whole.rfind(self._stop_text)
        if not whole.startswith(prompt) or turn_end < len(prompt):
            raise ChatProtocolError("the chat template does not write the policy's turn after its own opening")
        return self.encode(prompt), self.encode(whole[len(prompt) : turn_end + len(self._stop_text)])

    def encode(self, text: str) -> TokenIds:
        return tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text(self, messages: Sequence[Message], tools: Sequence[ToolSchema], is_open: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=is_open,
            )
        except Exception as error:  # a template is a program of the model's maker: it may raise anything
            raise ChatProtocolError(f"the model's chat template refuses these messages: {error}") from error

    def _find_turn_opening(self) -> str:
        """What the template writes to open the policy's turn: `<|im_start|>assistant`, perhaps a thinking mark."""
        question: list[Message] = [{"role": "user", "content": "?"}]
        closed, opened = (self._text(question, (), is_open) for is_open in (False, True))
        return opened[len(closed) :]

    # -------------------------------------------------------------------------------------------- parsing

    def reader(self, tools: Sequence[ToolSchema] = ()) -> ActionReader:
        """A reader for one completion, fed token by token."""
        return ActionReader(self, ResponseParser(self._template, prefix=self._turn_opening, tools=list(tools)))

    def parse(
        self,
        completion: Sequence[int],
        finish_reason: FinishReason = FinishReason.STOP,
        tools: Sequence[ToolSchema] = (),
    ) -> Action:
        """The action that a whole completion is."""
        reader = self.reader(tools)
        for token_id in completion:
            reader.feed(token_id)
        return reader.finish(finish_reason)[0]


_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""What the response parser raises for bad writing; the last one for JSON that is nested a thousand deep."""


class ActionReader:
    """Reads one completion as it is sampled. Never raises for what a policy writes: bad writing is an action too."""

    def __init__(self, protocol: ChatProtocol, parser: ResponseParser) -> None:
        self._protocol = protocol
        self._parser = parser
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._token_ids: list[int] = []
        self._written = ""
        self._calls: list[Any] = []
        self._said = {"text": _Trimmed(), "reasoning": _Trimmed()}
        self._problem = ""
        self._take(parser.initial_events)

    def feed(self, token_id: int) -> list[TextDelta]:
        """Take the next token; returns what can be shown of it."""
        self._token_ids.append(token_id)
        piece = self._decoder.step(self._protocol.tokenizer.backend_tokenizer, token_id) or ""
        return self._parse(piece)

    def finish(self, finish_reason: FinishReason) -> tuple[Action, list[TextDelta]]:
        """The whole action, and what was still held back of its text."""
        unshown = self._protocol.decode(self._token_ids)[len(self._written) :]
        deltas = self._parse(unshown) + self._finalize()
        return self._action(finish_reason), deltas

    def _parse(self, piece: str) -> list[TextDelta]:
        self._written += piece
        if self._problem:
            return []
        try:
            return self._take(self._parser.feed(piece))
        except _UNREADABLE as error:
            return self._fail(error)

    def _finalize(self) -> list[TextDelta]:
        if self._problem:
            return []
        try:
            return self._take(self._parser.finalize()[1])
        except _UNREADABLE as error:
            return self._fail(error)

    def _fail(self, error: Exception) -> list[TextDelta]:
        self._problem = str(error).splitlines()[0] or type(error).__name__
        return []

    def _take(self, events: list[dict[str, Any]]) -> list[TextDelta]:
        deltas = []
        for event in events:
            kind = {"content": "text", "thinking": "reasoning"}.get(event["field"])
            if event["type"] == "region_close" and event["field"] == "tool_calls":
                self._calls.extend(event["value"] if isinstance(event["value"], list) else [event["value"]])
            elif event["type"] == "region_chunk" and kind and (shown := self._said[kind].add(event["text"])):
                deltas.append(TextDelta(kind, shown))
        return deltas

    def _action(self, finish_reason: FinishReason) -> Action:
        if self._problem:
            return self._malformed(self._problem, finish_reason)
        text, reasoning = self._said["text"].shown, self._said["reasoning"].shown
        if not self._calls:
            return FinalAnswer(text, reasoning)
        try:
            calls = tuple(_tool_call(call, number) for number, call in enumerate(self._calls))
        except ValueError as error:
            return self._malformed(str(error), finish_reason)
        named = tuple(call if call.id else replace(call, id=f"call_{secrets.token_hex(12)}") for call in calls)
        return ToolCalls(named, text, reasoning)

    def _malformed(self, problem: str, finish_reason: FinishReason) -> MalformedAction:
        if finish_reason is FinishReason.LENGTH:
            problem = f"it was cut off at the token limit ({problem})"
        return MalformedAction(self._written.removesuffix(self._protocol._stop_text), problem)


class _Trimmed:
    """Text without outer white space, given out as early as that can be known."""

    def __init__(self) -> None:
        self.shown = ""
        self._held = ""

    def add(self, piece: str) -> str:
        whole = self._held + piece if self.shown else (self._held + piece).lstrip()
        ready = whole.rstrip()
        self._held = whole[len(ready) :]
        self.shown += ready
        return ready


# ------------------------------------------------------------------------------------- actions as messages


def action_message(action: Action) -> Message:
    """An action as the assistant message that it adds to its conversation."""
    match action:
        case ToolCalls(calls, text, reasoning):
            message: Message = {"role": "assistant", "content": text, "tool_calls": [_call_entry(c) for c in calls]}
        case FinalAnswer(text, reasoning):
            message = {"role": "assistant", "content": text}
        case MalformedAction(text, _):
            return {"role": "assistant", "content": text}
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def message_action(message: Message) -> ToolCalls | FinalAnswer:
    """The action that an assistant message is. Raises ValueError for a call that cannot be read."""
    reasoning = message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or []
    if not calls:
        return FinalAnswer(text_of(message), reasoning)
    return ToolCalls(tuple(_tool_call(call, n) for n, call in enumerate(calls)), text_of(message), reasoning)


def text_of(message: Message) -> str:
    """A message's text, whether it came as a string, as content parts, or not at all."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def _call_entry(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _tool_call(entry: Any, number: int) -> ToolCall:
    """A parsed call, checked. Raises ValueError in words that the policy can act on."""
    function = entry.get("function") if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name or not name.isprintable():
        raise ValueError(f"tool call {number + 1} has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"the arguments of {name} are not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name} must be a JSON object, not {type(arguments).__name__}")
    if not _is_sound(arguments):
        raise ValueError(f"the arguments of {name} hold NaN, infinity, half a character, or are nested too deeply")
    return ToolCall(str(entry.get("id") or ""), name, arguments)


def _is_sound(arguments: dict[str, Any]) -> bool:
    """Whether they can be logged, sent and rendered: Python's JSON reader lets more through than JSON text can hold."""
    try:
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _plain(message: Message) -> Message:
    """A message as chat templates expect it: text content, arguments as an object and not as a JSON string."""
    plain = {**message, "content": text_of(message)}
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}, "id": call.id}
            for call in (_tool_call(entry, number) for number, entry in enumerate(calls))
        ]
    return plain
