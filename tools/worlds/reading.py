"""A `ToolEpisode` whose tools are pydantic classes: they make the schemas, and read the calls."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.world import Message

OVER = "The episode is over: nothing can be done any more."


class Arguments(BaseModel):
    """The arguments of one tool; the docstring of a subclass is the tool's description."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call that was read."""

    name: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The same for the same call, however it was written."""
        return f"{self.name} {json.dumps(self.arguments, sort_keys=True)}"


class ReadingEpisode(ToolEpisode):
    """An episode that is played by calls of its `readers` alone. Only calls that could be read are remembered."""

    readers: ClassVar[Mapping[str, type[Arguments]]]
    """The tools by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @abstractmethod
    def do(self, call: Call) -> str:
        """Make a call that was read, and say what is observed."""

    @abstractmethod
    def expert_call(self) -> Call | None:
        """The expert's next call while the episode is not over; None where the expert does not know this state."""

    def schemas(self) -> list[ToolSchema]:
        return [_schema(name, reader) for name, reader in self.readers.items()]

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        if self.is_done:
            return OVER
        try:
            call = Call(name, self.readers[name].model_validate(arguments).model_dump())
        except ValidationError as error:
            return f"Error: {_problems(error)}"
        text = self.do(call)
        self.calls.append(call)
        return text

    def expert_action(self) -> Message | None:
        """The expert's next call, or its final answer; None where the expert does not know this state."""
        if self.is_done:
            return answering("Done." if self.outcome() == 1.0 else "I am sorry, this did not succeed.")
        call = self.expert_call()
        return None if call is None else calling(call.name, call.arguments, self.num_moves)


@lru_cache
def _schema(name: str, reader: type[Arguments]) -> ToolSchema:
    return {"name": name, "description": reader.__doc__ or "", "parameters": reader.model_json_schema()}


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}" for problem in error.errors()
    )
