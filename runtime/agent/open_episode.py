"""An open episode of a world, which a run acts on: one thing at a time, whoever asks on whichever thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from langchain_core.tools import BaseTool

from policies.chat.chat_protocol import action_message
from policies.types import Action, FinalAnswer, MalformedAction
from runtime.store.episodes import Step
from tools.worlds.blame import blaming, outcome_of, tools_of
from tools.worlds.world import World, WorldFailed, task_named


class OpenEpisode:
    """A world's episode, led to where a path of logged steps led it."""

    def __init__(self, world: World, task_id: str, path: Sequence[Step]) -> None:
        """Blocks as long as the world does. Raises UnknownTask, and WorldFailed where the world cannot do it."""
        self._world = world.name
        self._lock = threading.Lock()
        with blaming(self._world, "task"):
            task = task_named(world, task_id)
        with blaming(self._world, "open"):
            self._episode = world.open(task)
        with blaming(self._world, "play"):
            for step in path:
                if not isinstance(step.action, MalformedAction):
                    self._episode.play(action_message(step.action))
        self.tools: list[BaseTool] = tools_of(self._world, self._episode)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Held by whoever asks the episode anything. Raises WorldFailed where an earlier call still hangs in it."""
        if not self._lock.acquire(blocking=False):
            raise WorldFailed(f"an earlier call of this episode of the world {self._world} has not ended")
        try:
            yield
        finally:
            self._lock.release()

    def outcome_after(self, last: Action) -> float:
        """How the episode ended, 0 to 1. Its tools have acted on the world already; an answer is taken here.

        Raises WorldFailed where the world cannot say so.
        """
        with self.turn():
            if isinstance(last, FinalAnswer):
                with blaming(self._world, "play"):
                    self._episode.play(action_message(last))
            return outcome_of(self._world, self._episode)
