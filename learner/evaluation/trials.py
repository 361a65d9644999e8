"""The trials of a cycle's gate: the same for every adapter.

They are tasks of the server's world where the demonstrations are of that world, and held-out demonstrations where they
are of something else: doing well at tasks that nobody teaches would decide nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from learner.data.collaborators import Collaborators
from learner.data.collect import Collected, LoggedEpisode
from learner.data.comparison import ComparedState, Verdict
from learner.data.inspection import inspect_demonstrations
from learner.evaluation.gate import Trial
from policies.types import ToolCalls
from tools.worlds.world import Task, World

TEMPERATURE = 1.0
"""The policy itself is judged, as users sample from it by default."""


@dataclass(frozen=True, slots=True)
class Trials:
    """What each adapter is tried on; nothing of it was trained on."""

    who: Collaborators
    num_samples: int
    """Actions sampled at each state of a held-out demonstration."""
    world: World | None
    """None: held-out demonstrations are tried."""
    tasks: Sequence[Task]
    held_out: Sequence[LoggedEpisode]

    @classmethod
    def of_cycle(cls, cycle: str, who: Collaborators, collected: Collected, num_tasks: int, num_samples: int) -> Trials:
        """`cycle` draws the validation tasks: always the same ones would in time be learned by selection."""
        world = fitting_world(who.world, [*collected.demonstrations, *collected.held_out])
        if world is None:
            return cls(who, num_samples, None, (), collected.held_out)
        size = world.splits["validation"]
        places = random.Random(cycle).sample(range(size), min(num_tasks, size))
        return cls(who, num_samples, world, [world.task("validation", place) for place in places], ())

    @property
    def unit(self) -> str:
        return "tasks" if self.world else "held-out demonstrations"

    @property
    def num(self) -> int:
        """Units of `on_done`: tasks, or states of demonstrations."""
        return len(self.tasks) if self.world else sum(len(each.path) for each in self.held_out)

    async def results(self, adapter: str, on_done: Callable[[], object]) -> list[Trial | None]:
        """How an adapter does, trial by trial; None where a trial did not come to an end."""
        if self.world is None:
            return await self._demonstrations(adapter, on_done)
        attempts = await self.who.endpoint.evaluate(self.world, self.tasks, adapter, TEMPERATURE, on_done)
        return [None if attempt.error else Trial(attempt.outcome, attempt.num_malformed) for attempt in attempts]

    async def _demonstrations(self, adapter: str, on_done: Callable[[], object]) -> list[Trial | None]:
        """A demonstration's score is the share of the sampled actions that agree with its expert's."""
        _, compared = await inspect_demonstrations(self.who, self.held_out, adapter, self.num_samples, on_done)
        states = iter(compared)
        return [_agreement(list(islice(states, len(demonstration.path)))) for demonstration in self.held_out]


def fitting_world(world: World | None, demonstrations: Sequence[LoggedEpisode]) -> World | None:
    """The world, unless every demonstration has tools that are not the world's."""
    if world is None or not demonstrations:
        return world
    names = {tool.name for tool in world.open(world.task("validation", 0)).tools}
    return world if any(_tools_of(each) <= names for each in demonstrations) else None


def _tools_of(demonstration: LoggedEpisode) -> set[str]:
    """Names of the tools that it offers or calls."""
    offered = {tool["function"]["name"] for step in demonstration.path for tool in step.tools}
    actions = [step.action for step in demonstration.path]
    return offered | {call.name for action in actions if isinstance(action, ToolCalls) for call in action.calls}


def _agreement(states: Sequence[ComparedState]) -> Trial | None:
    comparisons = [comparison for state in states for comparison in state.comparisons]
    if not comparisons:
        return None
    num_malformed = sum(comparison.verdict is Verdict.MALFORMED for comparison in comparisons)
    return Trial(fmean(comparison.agrees for comparison in comparisons), num_malformed)
