"""Reads demonstration files into one canonical shape. What is refused is told by its line, the rest is imported.

A demonstration in that shape can be replayed as an episode: it begins with what the agent sees and ends with an
assistant's message, every call has its results right behind it, no two actions follow each other with nothing seen
between, and arguments are JSON objects. Records that break this are refused rather than mended: a guess at what an
expert meant would be learned. Only what is lost without harm is brought into line: ids of calls are numbered anew,
nulls that pad the arguments are left out, and so is what follows the last action.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.importing.exact_json import dumps, holds_rounded, loads
from learner.importing.fields import RefusedRecord, kind
from learner.importing.formats import read_draft, records_of
from learner.importing.json_lines import Record, Refusal, read_values
from learner.importing.printed import is_print_of_nothing, require_no_template, require_words
from learner.importing.tool_schemas import NAME_RULE, TOOL_NAME, holds_null, without_padding
from learner.importing.turns import Call, Draft, SourceFormat, Turn
from learner.importing.written_calls import ARGUMENT_NAMES, called_in_text
from policies.types import Message, ToolSchema
from runtime.store.episodes import demonstration_digest

_MOST_REFUSED = 1000
"""So many refused records and not one imported: the file is something else."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a demonstration comes from."""

    file: str
    line: int
    """Where its record begins, from 1."""
    item_id: str | None
    """What the data set calls it; None where it has no name there."""
    format: SourceFormat


@dataclass(frozen=True, slots=True)
class ImportedDemonstration:
    """An expert's conversation, checked, and with what is to be learned from it."""

    messages: tuple[Message, ...]
    """In OpenAI's form; `arguments` are JSON text; the last one is the assistant's."""
    tools: tuple[ToolSchema, ...]
    """The tools on offer, in OpenAI's form; empty where the source does not tell."""
    learn_from: tuple[int, ...]
    """Indices of the assistant messages that are to be learned: all, unless the source says otherwise. Never empty."""
    provenance: Provenance
    task: str | None = None
    """`world/split/index`, where the source tells."""

    @property
    def calls_without_tools(self) -> bool:
        """Whether it calls tools and does not say which were on offer."""
        return not self.tools and any("tool_calls" in message for message in self.messages)

    @property
    def digest(self) -> str:
        """Equal for whatever teaches the same, as the server computes it."""
        return demonstration_digest(self.messages, self.tools, self.learn_from)

    def to_wire(self) -> dict[str, Any]:
        """The JSON object that `POST /v1/demonstrations` takes."""
        source = self.provenance
        return {
            "messages": list(self.messages),
            "tools": list(self.tools),
            "learn_from": list(self.learn_from),
            "provenance": {
                "file": source.file,
                "line": source.line,
                "item_id": source.item_id,
                "format": source.format.value,
            },
            **({} if self.task is None else {"task": self.task}),
        }


# ------------------------------------------------------------------------------------------------- reading


def read_demonstrations(
    path: str | os.PathLike[str], ignored: Collection[str] = ()
) -> Iterator[ImportedDemonstration | Refusal]:
    """What a file holds, one at a time and in its order. Never raises for what is in the file, or for no file.

    `ignored` are keys that the user calls harmless.
    """
    num_imported = num_refused = 0
    for read in _read_records(Path(path), ignored):
        result = read if isinstance(read, Refusal) else read_record(read.value, str(path), read.line)
        yield result
        num_imported += isinstance(result, ImportedDemonstration)
        num_refused += isinstance(result, Refusal)
        if num_refused >= _MOST_REFUSED and not num_imported:
            yield Refusal(0, f"given up: the first {num_refused} records were all refused")
            return
    if not num_imported and not num_refused:
        yield Refusal(0, "the file holds no records")


def _read_records(path: Path, ignored: Collection[str]) -> Iterator[Record | Refusal]:
    line = 0
    try:
        with path.open("rb") as stream:
            for read in records_of(read_values(stream), ignored):
                line = read.line
                yield read
    except OSError as error:
        yield Refusal(line, f"the file cannot be read: {error.strerror or error}")


def read_record(record: Any, file: str, line: int) -> ImportedDemonstration | Refusal:
    """Read one JSON value of any known format."""
    try:
        draft = read_draft(record)
        return _check(draft, Provenance(file, line, draft.item_id, draft.format))
    except RefusedRecord as refused:
        return Refusal(line, str(refused))
    except RecursionError:
        return Refusal(line, "it is nested too deeply")


# ------------------------------------------------------------------------------------------------ checking


def _check(draft: Draft, provenance: Provenance) -> ImportedDemonstration:
    """The canonical shape of a draft. Raises RefusedRecord."""
    transcript = _Transcript(draft.tools)
    for number, turn in enumerate(draft.turns, 1):
        try:
            transcript.add(turn)
        except RefusedRecord as refused:
            raise RefusedRecord(f"message {number}: {refused}") from refused
    if not transcript.num_until_action:
        raise RefusedRecord("no message of the assistant: there is nothing to learn")
    if not transcript.learn_from:
        hidden = "; the thinking of the others is encrypted, and a model would learn not to think"
        is_hidden = any(turn.hides_thinking for turn in draft.turns)
        reason = "nothing in it is to be learned: every assistant message is marked as not"
        raise RefusedRecord(reason + (hidden if is_hidden else ""))
    messages = tuple(transcript.messages[: transcript.num_until_action])
    return ImportedDemonstration(messages, draft.tools, tuple(transcript.learn_from), provenance, draft.task)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A call that has no result yet."""

    new_id: str
    source_id: str | None
    name: str


class _Transcript:
    """A conversation as it grows, turn by turn; knows which calls still wait for their results."""

    def __init__(self, tools: Sequence[ToolSchema]) -> None:
        self.messages: list[Message] = []
        self.learn_from: list[int] = []
        self.num_until_action = 0
        """How many messages there are up to the last action, itself included."""
        self._schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
        self._num_calls = 0
        self._waiting: list[_Waiting] = []

    def add(self, turn: Turn) -> None:
        """Take the next turn. Raises RefusedRecord where it cannot follow."""
        if turn.role == "tool":
            self._add_result(turn)
        elif self._waiting:
            raise RefusedRecord(f"{len(self._waiting)} of the calls before have no result")
        elif turn.role == "assistant":
            self._add_action(turn)
        else:
            require_no_template(turn.text)
            self.messages.append({"role": turn.role, "content": _sound(turn.text)})

    def _add_result(self, turn: Turn) -> None:
        call = self._answered(turn)
        self._waiting.remove(call)
        self.messages.append({"role": "tool", "tool_call_id": call.new_id, "content": _sound(turn.text)})

    def _answered(self, turn: Turn) -> _Waiting:
        """The call that a result belongs to: by its id, else by the tool's name, else the only one that waits."""
        if not self._waiting:
            raise RefusedRecord("a tool result, but no call waits for one")
        if turn.result_of is not None:
            named = [call for call in self._waiting if call.source_id == turn.result_of]
            if named:
                return named[0]
            if any(call.source_id is not None for call in self._waiting):
                raise RefusedRecord(f"a tool result for the call {turn.result_of!r}, which does not wait for one")
        if turn.tool_name is not None:
            named = [call for call in self._waiting if call.name == turn.tool_name]
            if len(named) == 1:
                return named[0]
            if not named and len(self._waiting) > 1:
                raise RefusedRecord(f"a result of the tool {turn.tool_name!r}, which was not called")
        if len(self._waiting) > 1:
            raise RefusedRecord(
                f"a tool result without the id of its call, while {len(self._waiting)} calls wait: "
                "nothing tells which one it belongs to"
            )
        return self._waiting[0]

    def _add_action(self, turn: Turn) -> None:
        if not self.messages:
            raise RefusedRecord("the assistant speaks first: there is no state to act in")
        if self.messages[-1]["role"] == "assistant":
            raise RefusedRecord("two messages of the assistant in a row: nothing was seen between them")
        if not turn.calls and not turn.text.strip():
            raise RefusedRecord("the assistant says nothing and calls nothing")
        if not turn.calls and (called := called_in_text(turn.text, self._schemas)):
            raise RefusedRecord(f"the assistant calls {min(called)!r} in its text: write the call as tool_calls")
        text = "" if turn.calls and is_print_of_nothing(turn.text) else turn.text
        require_words(text)
        message: Message = {"role": "assistant", "content": _sound(text)}
        if turn.calls:
            message["tool_calls"] = [self._entry(call, number) for number, call in enumerate(turn.calls, 1)]
        if turn.thinking.strip():
            message["reasoning_content"] = _sound(turn.thinking)
        if turn.is_learned and not turn.hides_thinking:
            self.learn_from.append(len(self.messages))
        self.messages.append(message)
        self.num_until_action = len(self.messages)

    def _entry(self, call: Call, number: int) -> dict[str, Any]:
        """A call in OpenAI's form, under an id of ours."""
        name = call.name
        if not isinstance(name, str) or not name:
            raise RefusedRecord(f"tool call {number} has no name")
        if not TOOL_NAME.fullmatch(name):
            raise RefusedRecord(f"it calls {name!r}; {NAME_RULE}")
        if self._schemas and name not in self._schemas:
            raise RefusedRecord(f"it calls {name!r}, which is not among its tools")
        if call.id is not None and any(waiting.source_id == call.id for waiting in self._waiting):
            raise RefusedRecord(f"two of its calls have the id {call.id!r}")
        arguments = _arguments(call, self._schemas.get(name))
        new_id = f"call_{self._num_calls}"
        self._waiting.append(_Waiting(new_id, call.id, name))
        self._num_calls += 1
        return {"id": new_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _sound(text: str) -> str:
    """Raises RefusedRecord for text that no file and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RefusedRecord("its text holds half a character") from error
    return text


def _require_not_wrapped(arguments: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    """Raises RefusedRecord for arguments within arguments, where the tool knows no such argument."""
    properties = schema.get("properties")
    wrapper = next((name for name in ARGUMENT_NAMES if isinstance(arguments.get(name), dict)), None)
    if wrapper and isinstance(properties, dict) and properties and not set(arguments) & set(properties):
        raise RefusedRecord(f"{where} stand once more within {wrapper!r}, which its tool does not take: unwrap them")


def _arguments(call: Call, schema: dict[str, Any] | None) -> str:
    """A call's arguments as JSON text, its numbers as they were written. Raises RefusedRecord."""
    value, where = call.arguments, f"the arguments of {call.name}"
    is_text = isinstance(value, str)
    if isinstance(value, str):
        try:
            value = loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RefusedRecord(f"{where} are not JSON: {error}") from error
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise RefusedRecord(f"{where} must be a JSON object, not {kind(value)}")
    if holds_rounded(value):
        raise RefusedRecord(f"{where} hold a number with more digits than can be kept: write it as text")
    if schema is not None:
        _require_not_wrapped(value, schema, where)
        value = without_padding(value, schema, where)
    elif holds_null(value) and not is_text:
        raise RefusedRecord(
            f"{where} hold a null, and without the tool's schema nothing tells whether it only pads a column: "
            "add the tools, or write the arguments as JSON text"
        )
    try:
        return dumps(value)
    except (ValueError, RecursionError) as error:
        raise RefusedRecord(f"{where} hold NaN, infinity, half a character, or are nested too deeply") from error
