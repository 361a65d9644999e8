"""Messages to tokens and tokens to actions, with the model's own chat template and response template.

Both templates come from the model's files (the latter also from policies/response_templates.py, or from the user) and
are run by transformers; there is no tool-call parser here. What is peculiar to a chat template is found out by
rendering with it, never by the model's name. What was sampled stays as it was sampled: a conversation that goes on is
continued on its token ids, and only its new messages are rendered. Re-rendering everything would be simpler, but a
tool call that the model spaced its own way would come back as other tokens than it was logged and trained with.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import ResponseTemplate as LoadedTemplate
from transformers.utils.chat_parsing.response_templates import load_response_template

from policies.response_templates import ResponseTemplate, known_response_template, read_response_template
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


_QUESTION: list[Message] = [{"role": "user", "content": "?"}]
"""Is rendered to find out what a template is like."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of what the policy says, as it says it: `kind` is `text` or `reasoning`."""

    kind: str
    text: str


class ChatProtocol:
    """One model's way of writing conversations. Holds no state of any conversation."""

    def __init__(
        self,
        tokenizer: Any,
        stop_token_ids: Iterable[int] = (),
        response_template: ResponseTemplate | None = None,
    ) -> None:
        """`response_template` goes before the tokenizer's own, and that before a known one for its chat template."""
        if tokenizer.chat_template is None:
            raise ChatProtocolError("the tokenizer has no chat template; add `chat_template` to its files")
        self.tokenizer = tokenizer
        given = _response_template_of(tokenizer) if response_template is None else response_template
        self._template = _load_response_template(given)
        self._has_short_call_ids = self._drops_text_beside_calls = False
        self.takes_tools = self._find_how_calls_are_taken()
        """False where the chat template has no words for calls and their results."""
        self._turn_opening = self._find_turn_opening()
        turn_end = self._find_turn_end()
        self.turn_end: str = tokenizer.decode([turn_end])
        self.stop_token_ids: TokenIds = tuple(dict.fromkeys((*stop_token_ids, tokenizer.eos_token_id, turn_end)))

    @classmethod
    def load(cls, model_path: str | Path, response_template_file: Path | None = None) -> ChatProtocol:
        """Read tokenizer, templates and stop tokens from a model's folder (or hub name).

        Raises ValueError (ChatProtocolError) or OSError where they are not there, or not fit for use.
        """
        # Mistral's own tokenizer library, which transformers prefers where it is installed, runs no chat template.
        tokenizer = AutoTokenizer.from_pretrained(model_path, mistral_format=False)
        try:
            stops = GenerationConfig.from_pretrained(model_path).eos_token_id
        except OSError:  # the file is optional; the tokenizer's own end of text remains
            stops = None
        given = None if response_template_file is None else read_response_template(response_template_file)
        return cls(tokenizer, [stops] if isinstance(stops, int) else stops or [], given)

    # ------------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> TokenIds:
        """The prompt, up to and including the opening of the policy's own turn."""
        if tools and not self.takes_tools:
            raise ChatProtocolError("the model's chat template has no words for tools: send none")
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
        turn_end = shorter.rfind(self.turn_end)
        if not (shorter.startswith(before) and longer.startswith(shorter)) or turn_end < len(before):
            return self.encode(longer)
        if told and told[-1] in self.stop_token_ids:
            turn_end += len(self.turn_end)
        return told + self.encode(longer[turn_end:])

    def completion_of(
        self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema] = ()
    ) -> tuple[TokenIds, TokenIds]:
        """(prompt, completion) token ids of an action as the template writes it: an expert's step in tokens."""
        prompt = self._text(messages, tools, is_open=True)
        return self.encode(prompt), self.encode(self.written(messages, action, tools))

    def written(self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema] = ()) -> str:
        """What the template writes for an action, from the end of the prompt to the end of the policy's turn."""
        for before in (messages, _QUESTION):  # the latter where the template rewrites a question that is answered
            prompt = self._text(before, tools, is_open=True)
            whole = self._text([*before, action_message(action)], tools, is_open=False)
            turn_end = whole.rfind(self.turn_end)
            if whole.startswith(prompt) and turn_end >= len(prompt):
                return whole[len(prompt) : turn_end + len(self.turn_end)]
        raise ChatProtocolError("the chat template does not write the policy's turn after its own opening")

    def encode(self, text: str) -> TokenIds:
        # `encode` keeps the interpreter's lock as long as it runs, for a long text that is seconds; this does not.
        [encoding] = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _text(self, messages: Sequence[Message], tools: Sequence[ToolSchema], is_open: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=is_open,
            )
        except Exception as error:  # a template is a program of the model's maker: it may raise anything
            raise ChatProtocolError(f"the model's chat template refuses these messages: {error}") from error

    def _plain(self, message: Message) -> Message:
        """A message as chat templates expect it: text content, arguments as an object and not as a JSON string."""
        plain = {**message, "content": text_of(message)}
        if calls := plain.pop("tool_calls", None):
            plain["tool_calls"] = [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}, "id": self._call_id(c.id)}
                for c in (_tool_call(entry, number) for number, entry in enumerate(calls))
            ]
            plain["content"] = "" if self._drops_text_beside_calls else plain["content"]
        if "tool_call_id" in plain:
            plain["tool_call_id"] = self._call_id(plain["tool_call_id"])
        return plain

    def _call_id(self, call_id: str) -> str:
        """An id as the template takes it: Mistral's wants nine letters and digits, whoever made the id."""
        if not self._has_short_call_ids or (len(call_id) == 9 and call_id.isalnum()):
            return call_id
        return hashlib.sha256(call_id.encode()).hexdigest()[:9]

    # ------------------------------------------------------------------------------- what the template is like

    def _find_how_calls_are_taken(self) -> bool:
        """Find out what the template refuses in a message with a call; False where it takes none at all."""
        for self._has_short_call_ids, self._drops_text_beside_calls in product((False, True), repeat=2):
            if self._writes_a_call():
                return True
        self._has_short_call_ids = self._drops_text_beside_calls = False
        return False

    def _writes_a_call(self) -> bool:
        call = action_message(ToolCalls((ToolCall("call_0", "a_tool", {}),), "Well."))
        result: Message = {"role": "tool", "tool_call_id": "call_0", "content": "?"}
        try:
            return "a_tool" in self._text([*_QUESTION, call, result], (), is_open=True)
        except ChatProtocolError:
            return False

    def _find_turn_opening(self) -> str:
        """What the template writes to open the policy's turn: `<|im_start|>assistant`, perhaps a thinking mark."""
        closed, opened = (self._text(_QUESTION, (), is_open) for is_open in (False, True))
        return opened[len(closed) :]

    def _find_turn_end(self) -> int:
        """The token that ends the policy's turn: the first one that the template writes after an answer.

        Neither the tokenizer nor the network says so: Gemma's end of text is another token, and so is that of a base
        network which was taught to chat.
        """
        answer = "An answer."
        text = self._text([*_QUESTION, action_message(FinalAnswer(answer))], (), is_open=False)
        _, found, after = text.rpartition(answer)
        ids = self.encode(after) if found else ()
        if not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise ChatProtocolError(
                f"the chat template ends a turn with {after!r}, which does not begin with a token of its own: "
                "a turn that ends with plain text cannot be told from what the policy says"
            )
        return ids[0]

    # -------------------------------------------------------------------------------------------- parsing

    def reader(self, tools: Sequence[ToolSchema] = ()) -> ActionReader:
        """A reader for one completion, fed as it is sampled."""
        return ActionReader(self, lambda: ResponseParser(self._template, prefix=self._turn_opening, tools=list(tools)))

    def parse(
        self,
        completion: Sequence[int],
        finish_reason: FinishReason = FinishReason.STOP,
        tools: Sequence[ToolSchema] = (),
    ) -> Action:
        """The action that a whole completion is."""
        reader = self.reader(tools)
        reader.feed(*completion)
        return reader.finish(finish_reason)[0]


def _response_template_of(tokenizer: Any) -> ResponseTemplate:
    template = getattr(tokenizer, "response_template", None) or known_response_template(tokenizer.chat_template)
    if template is None:
        raise ChatProtocolError(
            "the tokenizer has no response template, and its chat template bears the marks of none that is known here, "
            "so what the model writes cannot be read: give one with --response-template FILE, or add "
            "`response_template` to its tokenizer_config.json (see transformers' documentation of response parsing)"
        )
    return template


def _load_response_template(template: ResponseTemplate) -> LoadedTemplate:
    try:
        return load_response_template(template)
    except ValueError as error:
        raise ChatProtocolError(f"the response template cannot be used: {error}") from error


_KINDS = {"content": "text", "thinking": "reasoning", "reasoning": "reasoning", "reasoning_content": "reasoning"}
"""Fields of response templates that are shown as they come; makers of models agree on the names only in part."""

_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError)
"""What the response parser raises for bad writing; the last one for JSON that is nested a thousand deep."""


class ActionReader:
    """Reads one completion as it is sampled. Never raises for what a policy writes: bad writing is an action too."""

    def __init__(self, protocol: ChatProtocol, new_parser: Callable[[], ResponseParser]) -> None:
        self._protocol = protocol
        self._new_parser = new_parser
        self._parser = new_parser()
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._token_ids: list[int] = []
        self._written = ""
        self._calls: list[Any] = []
        self._said = {"text": _Trimmed(), "reasoning": _Trimmed()}
        self._problem = ""
        self._take(self._parser.initial_events)

    def feed(self, *token_ids: int) -> list[TextDelta]:
        """Take the next tokens; returns what can be shown of them. Many at once are cheaper than one by one."""
        self._token_ids += token_ids
        tokenizer = self._protocol.tokenizer.backend_tokenizer
        return self._parse("".join(self._decoder.step(tokenizer, token_id) or "" for token_id in token_ids))

    def finish(self, finish_reason: FinishReason) -> tuple[Action, list[TextDelta]]:
        """The whole action, and what was still held back of its text."""
        unshown = self._protocol.decode(self._token_ids)[len(self._written) :]
        deltas = self._parse(unshown) + self._finalize()
        if self._problem:
            deltas += self._said_before_problem()
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

    @property
    def written(self) -> str:
        """The completion so far as it was written, without the end of the turn."""
        return self._written.removesuffix(self._protocol.turn_end)

    def _said_before_problem(self) -> list[TextDelta]:
        """What was fed together with bad writing, and stood before it: the parser forgets that where it raises."""
        one_by_one = ActionReader(self._protocol, self._new_parser)
        for token_id in self._token_ids:
            one_by_one.feed(token_id)
        whole = {kind: said.shown for kind, said in one_by_one._said.items()}
        rest = {kind: text[len(self._said[kind].shown) :] for kind, text in whole.items()}
        return [TextDelta(kind, text) for kind, text in rest.items() if text]

    def _take(self, events: list[dict[str, Any]]) -> list[TextDelta]:
        deltas = []
        for event in events:
            kind = _KINDS.get(event["field"])
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
        return MalformedAction(self.written, problem)


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
