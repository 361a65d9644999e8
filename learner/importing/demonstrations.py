"""Reads demonstration files into one canonical shape. What is refused is told by its line, the rest is imported.

A demonstration in that shape can be replayed as an episode: it begins with what the agent sees and ends with an
assistant's message, every call has its results right behind it, no two actions follow each other with nothing seen
between, and arguments are JSON objects. Records that break this are refused rather than mended: a guess at what an
expert meant would be learned. Only what is lost without harm is brought into line: ids of calls are numbered anew,
fields that no server takes are dropped, and so is what follows the last action.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from learner.importing.formats import Draft, RefusedRecord, SourceFormat, Turn, is_message, read_draft
from learner.importing.json_lines import Record, Refusal, read_records
from policies.chat_protocol import action_message, message_action
from policies.types import FinalAnswer, Message, ToolCalls, ToolSchema

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
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
    rejected: tuple[Message, ...] | None = None
    """The whole conversation of a preference row's other side; None where there is none."""

    @property
    def digest(self) -> str:
        """SHA-256 in hex of messages, tools and what is learned: equal for whatever teaches the same.

        Does not cover provenance, so that the same file under another name adds nothing, nor the rejected side, so
        that one demonstration can never be held out in one row and trained on in the next.
        """
        content = [self.messages, self.tools, self.learn_from]
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()

    def to_wire(self) -> dict[str, Any]:
        """The JSON object that `POST /v1/demonstrations` takes; `rejected` only where there is one."""
        source = self.provenance
        wire: dict[str, Any] = {
            "messages": list(self.messages),
            "tools": list(self.tools),
            "learn_from": list(self.learn_from),
            "provenance": {
                "file": source.file,
                "line": source.line,
                "item_id": source.item_id,
                "format": source.format.value,
            },
            "digest": self.digest,
        }
        if self.rejected is not None:
            wire["rejected"] = list(self.rejected)
        return wire


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What came of one file."""

    imported: list[ImportedDemonstration] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    num_repeated: int = 0
    """Demonstrations left out because they were known already, or stand in the file twice."""


# ------------------------------------------------------------------------------------------------- reading


def import_file(path: str | os.PathLike[str], known_digests: Collection[str] = ()) -> ImportReport:
    """Read a whole file, without what is known already. For files that do not fit into memory: read_demonstrations."""
    imported: dict[str, ImportedDemonstration] = {}
    refused: list[Refusal] = []
    num_repeated = 0
    for read in read_demonstrations(path):
        if isinstance(read, Refusal):
            refused.append(read)
        elif (digest := read.digest) in known_digests or digest in imported:
            num_repeated += 1
        else:
            imported[digest] = read
    return ImportReport(list(imported.values()), refused, num_repeated)


def read_demonstrations(path: str | os.PathLike[str]) -> Iterator[ImportedDemonstration | Refusal]:
    """What a file holds, one at a time and in its order. Never raises for what is in the file, or for no file."""
    num_imported = num_refused = 0
    for read in _read_records(Path(path)):
        result = read if isinstance(read, Refusal) else read_record(read.value, str(path), read.line)
        yield result
        num_imported += isinstance(result, ImportedDemonstration)
        num_refused += isinstance(result, Refusal)
        if num_refused >= _MOST_REFUSED and not num_imported:
            yield Refusal(0, f"given up: the first {num_refused} records were all refused")
            return
    if not num_imported and not num_refused:
        yield Refusal(0, "the file holds no records")


def _read_records(path: Path) -> Iterator[Record | Refusal]:
    line = 0
    try:
        with path.open("rb") as stream:
            for read in read_records(stream, is_message):
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
    tools = _check_tools(draft.tools)
    names = [tool["function"]["name"] for tool in tools]
    messages, learn_from = _check_turns(draft.turns, names)
    if not learn_from:
        raise RefusedRecord("nothing in it is to be learned: every assistant message is marked as not")
    rejected = None
    if draft.rejected is not None:
        try:
            rejected, _ = _check_turns(draft.rejected, names)
        except RefusedRecord as refused:
            raise RefusedRecord(f"in the rejected side, {refused}") from refused
    return ImportedDemonstration(messages, tools, learn_from, provenance, rejected)


def _check_turns(turns: Sequence[Turn], tool_names: Sequence[str]) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    """(messages, learn_from), without what follows the last action. Raises RefusedRecord."""
    transcript = _Transcript(tool_names)
    for number, turn in enumerate(turns, 1):
        try:
            transcript.add(turn)
        except RefusedRecord as refused:
            raise RefusedRecord(f"message {number}: {refused}") from refused
    if not transcript.num_until_action:
        raise RefusedRecord("no message of the assistant: there is nothing to learn")
    return tuple(transcript.messages[: transcript.num_until_action]), tuple(transcript.learn_from)


class _Transcript:
    """A conversation as it grows, turn by turn; knows which calls still wait for their results."""

    def __init__(self, tool_names: Sequence[str]) -> None:
        self.messages: list[Message] = []
        self.learn_from: list[int] = []
        self.num_until_action = 0
        """How many messages there are up to the last action, itself included."""
        self._tool_names = tool_names
        self._num_calls = 0
        self._waiting: dict[str, str] = {}
        """Calls without a result yet: our id by the source's."""

    def add(self, turn: Turn) -> None:
        """Take the next turn. Raises RefusedRecord where it cannot follow."""
        role = turn.message.get("role")
        if role in ("tool", "function"):
            self.messages.append(self._result(turn.message))
            return
        if self._waiting:
            raise RefusedRecord(f"{len(self._waiting)} of the calls before have no result")
        if role == "assistant":
            self._add_action(turn)
        elif role in ("user", "system", "developer"):
            role = "user" if role == "user" else "system"
            self.messages.append({"role": role, "content": _text(turn.message)})
        else:
            raise RefusedRecord(f"the role {role!r} is not known")

    def _result(self, message: Message) -> Message:
        if not self._waiting:
            raise RefusedRecord("a tool result, but no call waits for one")
        # Formats without ids give results in the order of the calls.
        source_id = str(message.get("tool_call_id") or next(iter(self._waiting)))
        if source_id not in self._waiting:
            raise RefusedRecord(f"a tool result for the call {source_id!r}, which does not wait for one")
        return {"role": "tool", "tool_call_id": self._waiting.pop(source_id), "content": _text(message)}

    def _add_action(self, turn: Turn) -> None:
        if not self.messages:
            raise RefusedRecord("the assistant speaks first: there is no state to act in")
        if self.messages[-1]["role"] == "assistant":
            raise RefusedRecord("two messages of the assistant in a row: nothing was seen between them")
        action = _read_action(turn.message)
        if isinstance(action, ToolCalls):
            action = self._number_calls(action)
        if turn.is_learned:
            self.learn_from.append(len(self.messages))
        self.messages.append(action_message(action))
        self.num_until_action = len(self.messages)

    def _number_calls(self, action: ToolCalls) -> ToolCalls:
        calls = []
        for call in action.calls:
            if self._tool_names and call.name not in self._tool_names:
                raise RefusedRecord(f"it calls {call.name!r}, which is not among its tools")
            new_id = f"call_{self._num_calls}"
            if call.id and call.id in self._waiting:
                raise RefusedRecord(f"two of its calls have the id {call.id!r}")
            self._waiting[call.id or new_id] = new_id
            self._num_calls += 1
            calls.append(replace(call, id=new_id))
        return replace(action, calls=tuple(calls))


def _read_action(message: Message) -> ToolCalls | FinalAnswer:
    calls, reasoning = message.get("tool_calls") or [], message.get("reasoning_content") or ""
    if not isinstance(calls, list):
        raise RefusedRecord("tool_calls is not a list")
    if not isinstance(reasoning, str):
        raise RefusedRecord("reasoning_content is not text")
    plain = {"content": _text(message), "tool_calls": calls, "reasoning_content": reasoning}
    try:
        action = message_action(plain)
    except ValueError as error:
        raise RefusedRecord(str(error)) from error
    if isinstance(action, FinalAnswer) and not action.text.strip():
        raise RefusedRecord("the assistant says nothing and calls nothing")
    return action


def _text(message: Message) -> str:
    """A message's text; parts of text are joined, thinking that stands among them is left out."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RefusedRecord("its content is neither text nor a list of parts")
    return "".join(map(_text_of_part, content))


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("thinking", "reasoning", "redacted_thinking"):
        return ""
    if kind != "text" or not isinstance(part.get("text"), str):
        raise RefusedRecord(f"its content has a part of type {kind!r}; only text is read")
    return part["text"]


# --------------------------------------------------------------------------------------------------- tools


def _check_tools(tools: Any) -> tuple[ToolSchema, ...]:
    """Tools in OpenAI's form, from a list, from its JSON text, or from the bare functions. Raises RefusedRecord."""
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools) if tools.strip() else []
        except orjson.JSONDecodeError as error:
            raise RefusedRecord(f"its tools are not JSON: {error}") from error
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise RefusedRecord("its tools are not a list")
    checked = tuple(_check_tool(tool, number) for number, tool in enumerate(tools, 1))
    names = [tool["function"]["name"] for tool in checked]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RefusedRecord(f"two of its tools are called {min(repeated)!r}")
    return checked


def _check_tool(tool: Any, number: int) -> ToolSchema:
    """Only what a server renders is kept, so that a demonstration's prompt reads as a served one does."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise RefusedRecord(f"tool {number} is not an object")
    name, description = function.get("name"), function.get("description") or ""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise RefusedRecord(f"tool {number} is called {name!r}; a name has 1 to 64 of A-Z, a-z, 0-9, '_', '-' and '.'")
    if not isinstance(description, str) or not isinstance(parameters, dict):
        raise RefusedRecord(f"the description of tool {name} must be text, its parameters an object")
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
