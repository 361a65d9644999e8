"""The tools that the server runs: those it was started with, and those of a world's task.

A world's episode is not kept between requests: it is opened again and the logged calls are replayed, so that a
restart, a branch or a second choice all find the state that their own steps led to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from langchain_core.tools import BaseTool

from policies.chat.chat_protocol import action_message, text_of
from policies.types import Action, FinalAnswer, MalformedAction, Message, ToolSchema
from runtime.agent.loop import ServerTools
from runtime.store.episodes import Step
from tools.bounds import ToolBounds
from tools.schemas import schema_of
from tools.worlds.world import World, WorldEpisode, is_of_world, task_named


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
        self._schemas: dict[str, ToolSchema] = {}

    @property
    def has_tools(self) -> bool:
        """Tools of its own, beside those of a world's tasks."""
        return bool(self._tools)

    def task_of(self, task_id: str | None, messages: Sequence[Message]) -> str | None:
        """The id of the world's task that a request names or that its conversation is about; None for neither.

        A task of another world is kept as it is named: its client runs that world's tools itself.
        """
        if task_id is not None:
            if self._world is not None and is_of_world(task_id, self._world):
                task_named(self._world, task_id)
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
        tools, bounds, judge = list(self._tools), self._bounds, None
        if task_id is not None and self._world is not None and is_of_world(task_id, self._world):
            episode = self._world.open(task_named(self._world, task_id))
            for step in path:
                if not isinstance(step.action, MalformedAction):
                    episode.play(action_message(step.action))
            of_world = {tool.name for tool in episode.tools}
            # The task's own tool is meant where another has its name.
            tools = [*episode.tools, *(tool for tool in tools if tool.name not in of_world)]
            bounds = {name: bound for name, bound in bounds.items() if name not in of_world}
            judge = partial(_outcome_after, episode)
        schemas = tuple(self._schema(tool) for tool in tools)
        return schemas, ServerTools({tool.name: tool for tool in tools}, judge, bounds)

    def _schema(self, tool: BaseTool) -> ToolSchema:
        # A world's tools are made anew for each episode but look the same; converting their schemas is slow.
        if tool.name not in self._schemas:
            self._schemas[tool.name] = schema_of(tool)
        return self._schemas[tool.name]


def _outcome_after(episode: WorldEpisode, last: Action) -> float:
    """How an episode ended. Its tools have acted on the world already; an answer is taken here."""
    if isinstance(last, FinalAnswer):
        episode.play(action_message(last))
    return episode.outcome()
