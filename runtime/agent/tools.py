"""The tools that the server runs: those it was started with, and those of a world's task.

A world's episode is not kept between requests: it is opened again and the logged calls are replayed, so that a
restart, a branch or a second choice all find the state that their own steps led to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ParamSpec, TypeVar

from langchain_core.tools import BaseTool

from policies.chat.chat_protocol import text_of
from policies.types import Message, ToolSchema
from runtime.agent.loop import ServerTools
from runtime.agent.open_episode import OpenEpisode
from runtime.store.episodes import Step
from tools.bounds import ToolBounds
from tools.schemas import schema_of
from tools.worlds.blame import blaming
from tools.worlds.threads import WorldThreads
from tools.worlds.world import World, is_of_world, task_named

P = ParamSpec("P")
T = TypeVar("T")

MAX_SCHEMAS = 1000
"""That are remembered."""


class Toolbox:
    """Opens the server's tools for one run."""

    def __init__(
        self,
        tools: Sequence[BaseTool] = (),
        world: World | None = None,
        is_default: bool = True,
        bounds: Mapping[str, ToolBounds] | None = None,
    ) -> None:
        """`is_default`: they are run for every request that brings no tools of its own; else for those that ask.
        `bounds`, by the tool's name, for those that have bounds of their own."""
        self.is_default = is_default
        self._bounds = bounds or {}
        self._tools = tuple(tools)
        self._world = world
        self._schemas: dict[tuple[object, ...], ToolSchema] = {}
        """By all that a tool's schema is made of."""
        self._threads = WorldThreads(world.name if world else "")
        self._finding = WorldThreads(world.name if world else "")
        """Apart: a world that hangs where it is opened does not hold up conversations that are about no task."""

    @property
    def has_tools(self) -> bool:
        """Tools of its own, beside those of a world's tasks."""
        return bool(self._tools)

    @property
    def always_offered(self) -> tuple[ToolSchema, ...]:
        """What every request without tools is offered; none where that depends on its task, or on its asking."""
        return self._schemas_of(self._tools) if self.is_default and self._world is None else ()

    def task_of(self, task_id: str | None, messages: Sequence[Message]) -> str | None:
        """The id of the world's task that a request names or that its conversation is about; None for neither.

        A task of another world is kept as it is named: its client runs that world's tools itself.
        """
        if self._world is None:
            return task_id
        with blaming(self._world.name, "task" if task_id else "find_task"):
            if task_id is not None:
                if is_of_world(task_id, self._world):
                    task_named(self._world, task_id)
                return task_id
            task = self._world.find_task(messages)
            return task.id if task else None

    async def find_task(self, timeout_s: float, task_id: str | None, messages: Sequence[Message]) -> str | None:
        """`task_of`, in a thread that the world may block. Raises WorldFailed where it takes longer."""
        if self._world is None:
            return task_id
        return await self._finding.ask(partial(self.task_of, task_id, messages), timeout_s)

    def example_request(self) -> str:
        """Something a user could ask this server. Raises WorldFailed where the world cannot open a task."""
        if self._world is not None:
            with blaming(self._world.name, "task"):
                for split in ("heldout", "validation", "train"):
                    if self._world.splits[split]:
                        return text_of(self._world.task(split, 0).messages[-1])
        return "Hello! What can you do?"

    async def in_thread(self, timeout_s: float, work: Callable[P, T], *values: P.args, **more: P.kwargs) -> T:
        """Do what asks the world in a thread that it may block. Raises WorldFailed where it takes longer."""
        return await self._threads.ask(partial(work, *values, **more), timeout_s)

    def open(self, task_id: str | None, path: Sequence[Step]) -> tuple[tuple[ToolSchema, ...], ServerTools]:
        """Schemas and tools for a run that continues `path`.

        Raises UnknownTask, and WorldFailed where the world cannot open the task."""
        if task_id is None or self._world is None or not is_of_world(task_id, self._world):
            return self._schemas_of(self._tools), ServerTools(
                {tool.name: tool for tool in self._tools}, bounds=self._bounds
            )
        episode = OpenEpisode(self._world, task_id, path)
        of_world = {tool.name for tool in episode.tools}
        # The task's own tool is meant where another has its name.
        tools = [*episode.tools, *(tool for tool in self._tools if tool.name not in of_world)]
        bounds = {name: bound for name, bound in self._bounds.items() if name not in of_world}
        with blaming(self._world.name, "tools"):
            schemas = self._schemas_of(tools)
        turns = dict.fromkeys(of_world, episode.turn)
        by_name = {tool.name: tool for tool in tools}
        return schemas, ServerTools(by_name, episode.outcome_after, bounds, turns, self._threads)

    def _schemas_of(self, tools: Sequence[BaseTool]) -> tuple[ToolSchema, ...]:
        return tuple(map(self._schema, tools))

    def _schema(self, tool: BaseTool) -> ToolSchema:
        # A world's tools are made anew for each episode, and most look the same; converting their schemas is slow.
        arguments = tool.args_schema
        looks = json.dumps(arguments, default=repr) if isinstance(arguments, dict) else arguments
        key = (type(tool), tool.name, tool.description, looks)
        if key not in self._schemas:
            if len(self._schemas) >= MAX_SCHEMAS:
                self._schemas.clear()
            self._schemas[key] = schema_of(tool)
        return self._schemas[key]
