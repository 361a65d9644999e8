"""How a world reads an assistant message and answers it: what most worlds would otherwise each write for themselves.

A world written on `ToolEpisode` says what a call does and what an answer does; reading arguments, error texts, cutting,
replaying and comparing are here. A world may do without and fulfil the protocol in `world.py` by itself.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from inspect import iscoroutine
from typing import Any

from langchain_core.tools import BaseTool
from pydantic import Field

from tools.worlds.world import Message, text_of

LONGEST_OBSERVATION = 16_000
"""Characters of an observation that the agent is shown. Below the server's own limit, so that a client that runs the
tools, the server and a replay all see the same text."""

ToolSchema = Mapping[str, Any]
"""What a tool looks like: `name`, `description` and `parameters`, a JSON schema."""


class WorldTool(BaseTool):
    """A world's tool, bound to an episode. The world reads the arguments, so that its own words tell a mistake.

    A call may block: whoever runs tools gives it a thread, and runs those of one episode one after the other."""

    run_call: Callable[[str, Any], str] = Field(exclude=True)

    @classmethod
    def of(cls, schema: ToolSchema, run_call: Callable[[str, Any], str]) -> WorldTool:
        """Raises ValueError for what does not say what a tool looks like."""
        name, description, parameters = _read(schema)
        arguments = {"title": name, "type": "object", "properties": {}, **parameters}
        return cls(name=name, description=description, args_schema=arguments, run_call=run_call)

    def _run(self, /, **arguments: Any) -> str:
        return self.run_call(self.name, arguments)


def _read(schema: ToolSchema) -> tuple[str, str, Mapping[str, Any]]:
    """Name, description and parameters. Raises ValueError where one is missing or something else."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"schemas() must give a mapping for each tool: name, description, parameters; not {schema!r}")
    if "name" not in schema and "function" in schema:
        raise ValueError("a tool of schemas() is what OpenAI's form has under 'function': name, description ...")
    for key, kind in {"name": str, "description": str, "parameters": Mapping}.items():
        if not isinstance(schema.get(key), kind) or (key == "name" and not schema[key]):
            what = "a JSON schema, such as {'type': 'object', 'properties': {}}" if kind is Mapping else "a text"
            raise ValueError(f"the tool {schema.get('name')!r} of schemas() needs {key!r}: {what}")
    return schema["name"], schema["description"], schema["parameters"]


def read_call(call: Message) -> tuple[str, Any]:
    """A tool call's name and arguments. Arguments that are not JSON stay text, which no tool accepts."""
    function = call["function"]
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return function["name"], arguments
    return function["name"], arguments


def calling(name: str, arguments: Mapping[str, Any], number: int) -> Message:
    """The assistant message of one call; `number` makes its id."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}],
    }


def answering(text: str) -> Message:
    """The assistant message of a final answer."""
    return {"role": "assistant", "content": text}


def shown(text: str) -> str:
    """An observation as the agent is shown it: text that UTF-8 can write, cut with a mark where it is too long."""
    text = text.encode(errors="replace").decode()
    if len(text) <= LONGEST_OBSERVATION:
        return text
    return f"{text[:LONGEST_OBSERVATION]}\n[cut here: the whole observation has {len(text)} characters]"


def said_by(error: BaseException) -> str:
    """What an exception says; what a package ends the program with says its kind, too."""
    try:
        said = str(error)
    except Exception:  # an exception of foreign code may not even say what it is
        said = ""
    return said if isinstance(error, Exception) and said else f"{type(error).__name__} {said}".strip()


def observed(given: Any) -> str:
    """What `run` gave back, as an observation: a text as it is; a dict, list, tuple or number as JSON. What is none of
    these is told as a mistake of the world's; the call has been made all the same."""
    if isinstance(given, str):
        return shown(given)
    kind = type(given).__name__
    if isinstance(given, dict | list | tuple | int | float):
        with suppress(Exception):  # a key that is no text, a list that holds itself, a value that cannot say what it is
            return shown(json.dumps(given, ensure_ascii=False, default=str))
        kind += " that is no JSON"
    return f"The call was made, but what it led to is unknown: `run` of the world must return text, not {kind}."


class ToolEpisode(ABC):
    """An episode whose moves are tool calls and answers."""

    is_done = False
    """Most worlds cannot say so before the conversation ends."""

    @cached_property
    def _moves(self) -> list[tuple[str, Any] | str]:
        """What was done so far: calls (name and arguments) and answers (text). Also of a dataclass, whose constructor
        calls no other."""
        return []

    # ------------------------------------------------------------------------------ what a world says

    @abstractmethod
    def schemas(self) -> Sequence[ToolSchema]:
        """The tools that may be called now."""

    @abstractmethod
    def run(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a call of one of the tools; what is observed: a text, or what is shown as JSON. It may raise for a call
        that it cannot read, and be `async`: each call has an event loop of its own."""

    def answer(self, text: str) -> str | None:
        """Take a final answer; the user's next message, or None where there is none."""
        del text
        return None

    @abstractmethod
    def outcome(self) -> float: ...

    def expert_action(self) -> Message | None:
        """What an expert does here; a world without one has nothing to say."""
        return None

    @abstractmethod
    def reopened(self) -> ToolEpisode:
        """A fresh attempt at the same task: another object, with which nothing was done yet."""

    @abstractmethod
    def is_where(self, other: Any) -> bool:
        """Whether another attempt at the same task has led to the same state."""

    # ------------------------------------------------------------------------------ what follows from it

    @property
    def tools(self) -> list[BaseTool]:
        schemas = self.schemas()
        if not isinstance(schemas, Iterable):
            raise ValueError(f"schemas() must give a list of tools, perhaps an empty one; not {schemas!r}")
        return [WorldTool.of(schema, self.call) for schema in schemas]

    @property
    def num_moves(self) -> int:
        return len(self._moves)

    def call(self, name: str, arguments: Any) -> str:
        """Run a call as the agent wrote it. Never raises for what the agent wrote: it is told in words."""
        self._moves.append((name, arguments))
        names = [schema["name"] for schema in self.schemas()]
        if name not in names:
            return shown(f"Error: there is no tool {name!r}; there are: {', '.join(names)}")
        if not isinstance(arguments, dict):
            return shown(f"Error: the arguments of {name} must be a JSON object")
        try:
            given = self.run(name, deepcopy(arguments))  # of which it may make what it likes: the move stays as it was
            return observed(asyncio.run(given) if iscoroutine(given) else given)
        except (KeyboardInterrupt, asyncio.CancelledError):
            raise
        except BaseException as error:  # a world's package raises whatever it likes for arguments that do not fit
            return shown(f"Error: {said_by(error)}")

    def play(self, message: Message) -> list[Message]:
        """Run an assistant message's tool calls in order, or take its answer."""
        if calls := message.get("tool_calls"):
            return [
                {"role": "tool", "tool_call_id": call.get("id", ""), "content": self.call(*read_call(call))}
                for call in calls
            ]
        text = text_of(message)
        self._moves.append(text)
        said = self.answer(text)
        if said is not None and not isinstance(said, str):
            raise TypeError(f"`answer` must return the user's next message as text, or None; not {type(said).__name__}")
        return [] if said is None else [{"role": "user", "content": shown(said)}]

    def same_effect(self, message_a: Message, message_b: Message) -> bool:
        """Whether both messages go on or both answer, are told the same, and lead to the same state."""
        if bool(message_a.get("tool_calls")) != bool(message_b.get("tool_calls")):
            return False
        trial_a, trial_b = self.copy(), self.copy()
        told_a = [told["content"] for told in trial_a.play(message_a)]
        told_b = [told["content"] for told in trial_b.play(message_b)]
        return told_a == told_b and trial_a.is_where(trial_b)

    def copy(self) -> ToolEpisode:
        """Another attempt that was led to the same state."""
        copy = self.reopened()
        if copy is self or copy._moves:  # led on from there it would be somewhere else, or nowhere for ever
            raise ValueError("`reopened` must give a fresh attempt at the task, not this one or one that was played")
        for move in self._moves:
            if isinstance(move, str):
                copy._moves.append(move)
                copy.answer(move)
            else:
                copy.call(*move)
        return copy
