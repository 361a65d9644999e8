"""Messages to tokens and tokens to actions, with the model's own chat template and response template.

Both templates come from the model's files (the latter also from response_templates.py, or from the user) and
are run by transformers; there is no tool-call parser here. What is peculiar to a chat template is found out by
rendering with it, never by the model's name. What was sampled stays as it was sampled: a conversation that goes on is
continued on its token ids, and only its new messages are rendered. Re-rendering everything would be simpler, but a
tool call that the model spaced its own way would come back as other tokens than it was logged and trained with.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import ResponseTemplate as LoadedTemplate
from transformers.utils.chat_parsing.response_templates import load_response_template

from policies.chat.action_reader import ActionReader, CallDelta, ReadingRules, TextDelta, new_call_id
from policies.chat.control_marks import ControlMarks, mended
from policies.chat.messages import action_message, message_action, text_of, tool_call_of
from policies.chat.response_templates import (
    ResponseTemplate,
    known_response_template,
    read_response_template,
    thinking_begins_the_turn,
)
from policies.chat.template_traits import QUESTION, CallHabits, find_traits
from policies.types import Action, FinishReason, Message, TokenIds, ToolCall, ToolSchema

__all__ = [
    "ActionReader",
    "CallDelta",
    "ChatProtocol",
    "ChatProtocolError",
    "PartialCall",
    "TextDelta",
    "action_message",
    "message_action",
    "text_of",
]


_MOST_VARIANTS = 8
"""Of a protocol with other options of its template, kept because finding out about a template takes a while."""


_OWN_WORDS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
"""What a chat template is given by us: no option of a client's may stand in its place."""


class ChatProtocolError(ValueError):
    """Messages that the model's chat template cannot render, or a model without the templates that are needed."""


@dataclass(frozen=True, slots=True)
class PartialCall:
    """A tool call as far as it was written when the completion was cut off."""

    name: str
    """Perhaps cut off itself; empty where not even the name had begun."""
    arguments: str
    """The beginning of the arguments' JSON text; empty where they had not begun."""
    id: str


class ChatProtocol:
    """One model's way of writing conversations. Holds no state of any conversation."""

    def __init__(
        self,
        tokenizer: Any,
        stop_token_ids: Iterable[int] = (),
        response_template: ResponseTemplate | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """`response_template` goes before the tokenizer's own, and that before a known one for its chat template.

        `template_options` are handed to the chat template, beside messages and tools.
        """
        if tokenizer.chat_template is None:
            raise ChatProtocolError("the tokenizer has no chat template; add `chat_template` to its files")
        self.tokenizer = tokenizer
        self._given = (tuple(stop_token_ids), response_template)
        self._template_options = dict(template_options or {})
        self._variants: dict[str, ChatProtocol] = {}
        given = _response_template_of(tokenizer) if response_template is None else response_template
        template = _load_response_template(thinking_begins_the_turn(given))
        self._marks = ControlMarks(tokenizer, f"{tokenizer.chat_template}{json.dumps(given, ensure_ascii=False)}")
        self.traits = find_traits(self._text_with_habits)
        self.takes_tools = self.traits.takes_tools
        """False where the chat template has no words for calls and their results."""
        turn_end = self._find_turn_end()
        self.turn_end: str = tokenizer.decode([turn_end])
        ends = (*self._given[0], tokenizer.eos_token_id, turn_end, *_ends_of_answers(tokenizer, template))
        self.stop_token_ids: TokenIds = tuple(dict.fromkeys(ends))
        self._rules = ReadingRules(
            tokenizer, self._marks, template, self.traits.turn_opening, self.turn_end, self.stop_token_ids
        )

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

    def with_options(self, options: Mapping[str, Any]) -> ChatProtocol:
        """The same protocol with further options of the chat template; those that it does not know say nothing.

        Raises ChatProtocolError for an option that the template cannot take.
        """
        words = self.tokenizer.chat_template
        known = {name: value for name, value in options.items() if name in words and name not in _OWN_WORDS}
        if not known:
            return self
        name = json.dumps(known, sort_keys=True)
        try:
            if name not in self._variants:
                while len(self._variants) >= _MOST_VARIANTS:
                    self._variants.pop(next(iter(self._variants)))
                options = {**self._template_options, **known}
                self._variants[name] = ChatProtocol(self.tokenizer, *self._given, options)
            return self._variants[name]
        except (TypeError, ValueError) as error:
            raise ChatProtocolError(f"the chat template cannot take these options: {error}") from error

    @property
    def vocabulary_fingerprint(self) -> int:
        """Of the tokenizer, above 0 and below 2**31: where it is equal, the same token ids mean the same texts."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return int(hashlib.sha256(vocabulary.encode()).hexdigest()[:7], 16) + 1

    # ------------------------------------------------------------------------------------------ rendering

    def render(self, messages: Sequence[Message], tools: Sequence[ToolSchema] = ()) -> TokenIds:
        """The prompt, up to and including the opening of the policy's own turn."""
        if tools and not self.takes_tools:
            raise ChatProtocolError("the model's chat template has no words for tools: send none")
        return self._marks.encode(self._text(messages, tools, is_open=True))

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
            return self._marks.encode(longer)
        if told and told[-1] in self.stop_token_ids:
            turn_end += len(self.turn_end)
        return told + self._marks.encode(longer[turn_end:])

    def completion_of(
        self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema] = ()
    ) -> tuple[TokenIds, TokenIds]:
        """(prompt, completion) token ids of an action as the template writes it: an expert's step in tokens."""
        prompt = self._text(messages, tools, is_open=True)
        return self._marks.encode(prompt), self._marks.encode(self._written(messages, action, tools))

    def written(self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema] = ()) -> str:
        """What the template writes for an action, from the end of the prompt to the end of the policy's turn."""
        return mended(self._written(messages, action, tools))

    def _written(self, messages: Sequence[Message], action: Action, tools: Sequence[ToolSchema]) -> str:
        for before in (messages, QUESTION):  # the latter where the template rewrites a question that is answered
            prompt = self._text(before, tools, is_open=True)
            whole = self._text([*before, action_message(action)], tools, is_open=False)
            turn_end = whole.rfind(self.turn_end)
            if whole.startswith(prompt) and turn_end >= len(prompt):
                return whole[len(prompt) : turn_end + len(self.turn_end)]
        raise ChatProtocolError("the chat template does not write the policy's turn after its own opening")

    def encode(self, text: str) -> TokenIds:
        """Token ids of the model's own writing, whose marks become control tokens."""
        # `encode` keeps the interpreter's lock as long as it runs, for a long text that is seconds; this does not.
        [encoding] = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def encode_plain(self, text: str) -> TokenIds:
        """Token ids of what somebody says: marks in it are its letters, and steer nothing."""
        return self._marks.encode_plain(text)

    def _text(self, messages: Sequence[Message], tools: Sequence[ToolSchema], is_open: bool) -> str:
        """What the chat template writes. Marks within messages and tools are broken: see `control_marks`."""
        return self._text_with_habits(messages, tools, is_open, self.traits.habits)

    def _text_with_habits(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], is_open: bool, habits: CallHabits
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [self._marks.broken(plain_message(message, habits)) for message in messages],
                tools=[self._marks.broken(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=is_open,
                **self._marks.broken(self._template_options),
            )
        except Exception as error:  # a template is a program of the model's maker: it may raise anything
            raise ChatProtocolError(f"the model's chat template refuses these messages: {error}") from error

    # ------------------------------------------------------------------------------- what the template is like

    def _find_turn_end(self) -> int:
        """The token that ends the policy's turn: the first one that the template writes after an answer.

        Neither the tokenizer nor the network says so: Gemma's end of text is another token, and so is that of a base
        network which was taught to chat.
        """
        after = self.traits.after_answer
        ids = self._marks.encode(after)
        if not ids or ids[0] not in self.tokenizer.added_tokens_decoder:
            raise ChatProtocolError(
                f"the chat template ends a turn with {after!r}, which does not begin with a token of its own: "
                "a turn that ends with plain text cannot be told from what the policy says"
            )
        return ids[0]

    # -------------------------------------------------------------------------------------------- parsing

    def reader(self, tools: Sequence[ToolSchema] = (), *, streams_calls: bool = False) -> ActionReader:
        """A reader for one completion, fed as it is sampled. `streams_calls`: its deltas are of calls too."""
        return ActionReader(self._rules, tools, streams_calls)

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

    def partial_call(self, completion: Sequence[int], tools: Sequence[ToolSchema] = ()) -> PartialCall | None:
        """The last call of a completion, as far as it was written before the limit; None where none had begun."""
        reader = self.reader(tools, streams_calls=True)
        deltas = [*reader.feed(*completion), *reader.finish(FinishReason.LENGTH)[1]]
        pieces = [delta for delta in deltas if isinstance(delta, CallDelta)]
        last = [piece for piece in pieces if piece.index == pieces[-1].index]
        cut = reader.call_being_written
        if cut is not None and not cut.is_name_taken:
            return PartialCall(cut.name, "", new_call_id())
        if last:
            return PartialCall(last[0].name, "".join(piece.arguments_piece for piece in last), last[0].id)
        return self._partial_opening(reader.written)

    def _partial_opening(self, written: str) -> PartialCall | None:
        """A call that was cut off before its opening was complete."""
        opening, middle = self.traits.call_opening.strip(), self.traits.call_middle
        mark = re.match(r"<[^<>]*>|\[[^\[\]]*\]", opening)  # without one, only a whole turn is a call
        before, found, name = written.rpartition(opening) if opening else ("", "", "")
        if found and (mark or not before.strip()):
            return PartialCall(name.partition(middle[0])[0] if middle else name, "", new_call_id())
        beginnings = [opening[:end] for end in range(mark.end() if mark else 1, len(opening))]
        has_begun = written.endswith(tuple(beginnings)) if mark else written.lstrip() in beginnings
        return PartialCall("", "", new_call_id()) if has_begun else None


def plain_message(message: Message, habits: CallHabits) -> Message:
    """A message as chat templates expect it: text content, arguments as an object and not as a JSON string."""
    plain = {**message, "content": text_of(message)}
    if calls := plain.pop("tool_calls", None):
        plain["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": c.arguments}, "id": _call_id(c.id, habits)}
            for c in (_call_as_told(entry, number) for number, entry in enumerate(calls))
        ]
        plain["content"] = "" if habits.drops_text else plain["content"]
    if "tool_call_id" in plain:
        plain["tool_call_id"] = _call_id(plain["tool_call_id"], habits)
    return plain


def _call_as_told(entry: Any, number: int) -> ToolCall:
    """A call of the history. One that was cut off before its name was told without it, and comes back so."""
    function = entry.get("function") if isinstance(entry, dict) else None
    if isinstance(function, dict) and function.get("name") == "":
        return ToolCall(str(entry.get("id") or ""), "", {})
    return tool_call_of(entry, number)


def _call_id(call_id: str, habits: CallHabits) -> str:
    """An id as the template takes it: Mistral's wants nine letters and digits, whoever made the id."""
    if not habits.has_short_ids or (len(call_id) == 9 and call_id.isalnum()):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _ends_of_answers(tokenizer: Any, template: LoadedTemplate) -> list[int]:
    """Special tokens that end an answer for its reader: nothing that is sampled after one would be read."""
    answer = template.fields.get("content")
    if answer is None or answer.close_re is None:
        return []
    added = tokenizer.added_tokens_decoder.items()
    return [token_id for token_id, token in added if token.special and answer.close_re.fullmatch(token.content)]


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
