"""The tools that the server runs: those it was started with, and those of a world's task.

A world's episode is not kept between requests: it is opened again and the logged calls are replayed, so that a
restart, a branch or a second choice all find the state that their own steps led to.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from policies.chat_protocol import action_message, text_of
from policies.types import Message, ToolCalls, ToolSchema
from runtime.agent.loop import ServerTools
from runtime.store.episodes import Step
from tools.worlds.world import Task, World


class UnknownTask(ValueError):
    """A task id that names no task of the server's world."""


class Toolbox:
    """Opens the server's tools for one run."""

    def __init__(self, tools: Sequence[BaseTool] = (), world: World | None = None, is_default: bool = True) -> None:
        """`is_default`: they are run for every request that brings no tools of its own; else for those that ask."""
        self.is_default = is_default
        self._tools = tuple(tools)
        self._world = world
        self._schemas: dict[str, ToolSchema] = {}

    def task_of(self, task_id: str | None, messages: Sequence[Message]) -> str | None:
        """The id of the world's task that a request names or that its conversation is about; None for neither.

        A task of another world is kept as it is named: its client runs that world's tools itself.
        """
        if task_id is not None:
            if self._world is not None and task_id.partition("/")[0] == self._world.name:
                self._task(task_id)
            return task_id
        task = self._world.find_task(messages) if self._world else None
        return task.id if task else None

    def example_request(self) -> str:
        """Something a user could ask this server."""
        if self._world is None:
            return "Hello! What can you do?"
        return text_of(self._world.task("heldout", 0).messages[-1])

    def open(self, task_id: str | None, path: Sequence[Step]) -> tuple[tuple[ToolSchema, ...], ServerTools]:
        """Schemas and tools for a run that continues `path`."""
        tools, outcome = list(self._tools), None
        if task_id is not None and self._world is not None and task_id.partition("/")[0] == self._world.name:
            episode = self._world.open(self._task(task_id))
            for step in path:
                if isinstance(step.action, ToolCalls):
                    episode.play(action_message(step.action))
            tools, outcome = [*episode.tools, *tools], episode.outcome
        return tuple(self._schema(tool) for tool in tools), ServerTools({tool.name: tool for tool in tools}, outcome)

    def _task(self, task_id: str) -> Task:
        assert self._world is not None
        _, _, place = task_id.partition("/")
        split, _, index = place.partition("/")
        try:
            return self._world.task(split, int(index))
        except (KeyError, IndexError, ValueError):
            splits = ", ".join(f"{name} 0..{size - 1}" for name, size in self._world.splits.items())
            raise UnknownTask(f"there is no task {task_id!r}; {self._world.name} has {splits}") from None

    def _schema(self, tool: BaseTool) -> ToolSchema:
        # A world's tools are made anew for each episode but look the same; converting their schemas is slow.
        if tool.name not in self._schemas:
            self._schemas[tool.name] = convert_to_openai_tool(tool)
        return self._schemas[tool.name]
