"""What a cycle's gate tries: tasks of the server's world, or demonstrations, and what must not be forgotten.

Tasks where the demonstrations are of that world, and demonstrations where they are of something else: doing well at
tasks that nobody teaches would decide nothing. Demonstrations of one task are one piece of evidence: counted each for
itself, six copies of a transcript would be six.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from learner.data.collaborators import Collaborators
from learner.data.collect import Collected, LoggedEpisode
from learner.data.inspection import most_tokens
from learner.evaluation.evidence import TASKS, Pair, Trial, merged, paired
from learner.evaluation.folds import fold_of, needs_folds
from learner.evaluation.gate import Contestants
from learner.evaluation.outlook import Outlook, evidence_outlook
from learner.evaluation.past_trials import PastTrials
from learner.evaluation.state_trials import score, try_states
from learner.evaluation.twins import Twin, twins_of
from policies.types import ToolCalls
from tools.worlds.blame import blaming, tools_of
from tools.worlds.threads import patiently
from tools.worlds.world import Task, World

TEMPERATURE = 1.0
"""The policy itself is judged, as users sample from it by default."""
DEMONSTRATIONS = "demonstrations"
"""What a unit is where no world's tasks are tried, and each demonstration is of a task of its own."""
DEMONSTRATED_TASKS = "demonstrated tasks"
"""What a unit is where some tasks were demonstrated more than once."""
SEED = 0
"""Of tasks, at which both adapters have the same luck."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A world's task, or all demonstrations of one task with their states: one piece of evidence."""

    subject: Task | tuple[LoggedEpisode, ...]
    """Demonstrations: the oldest first."""
    fold: int | None = None
    """None: nobody was trained on it, and the candidate itself tries it."""

    @property
    def name(self) -> str:
        return self.subject.id if isinstance(self.subject, Task) else self.subject[0].episode.id

    @property
    def demonstrations(self) -> tuple[LoggedEpisode, ...]:
        """Empty for a world's task."""
        return () if isinstance(self.subject, Task) else self.subject

    @property
    def num_states(self) -> int:
        return sum(len(each.path) for each in self.demonstrations)


@dataclass(frozen=True, slots=True)
class CycleTrials:
    """What each adapter is tried on. Nothing of it was trained on by the adapters that try it."""

    who: Collaborators
    units: tuple[Unit, ...]
    """Those that need no fold first, then fold by fold; else in an order that only names decide."""
    anchors: tuple[Unit, ...]
    past: PastTrials
    max_task_tokens: int | None = None
    """Most tokens of a step in a task, by what experts write; None: nobody has shown."""
    most_tasks: int | None = None
    """So many the world has; None where demonstrations are tried."""

    @classmethod
    def of_cycle(cls, acting: str, collected: Collected, who: Collaborators, num_tasks: int) -> CycleTrials:
        """The acting adapter draws the world's tasks: its trials can be used again until another one acts, and no line
        of adapters is selected on the same tasks. `num_tasks` 0: held-out demonstrations decide, as without a world.
        """
        world = who.world
        fitting = fitting_world(world, [*collected.demonstrations, *collected.held_out]) if num_tasks else None
        anchors = [Unit((anchor,)) for anchor in collected.anchors]
        anchors += [Unit(task_named(name, world)) for name in collected.anchor_tasks if world]
        most_tasks = fitting.splits["validation"] if fitting else None
        if fitting is None or most_tasks is None:
            units = _demonstrations(collected, twins_of(acting, who.learning_log))
        else:
            places = random.Random(acting).sample(range(most_tasks), min(num_tasks, most_tasks))
            units = [Unit(patiently(fitting.name, partial(_validating, fitting, place))) for place in places]
        shown = [step for each in (*collected.demonstrations, *collected.held_out) for step in each.path]
        max_task_tokens = max(map(most_tokens, shown), default=None)
        past = PastTrials(who.log, world, who.agent)
        return cls(who, tuple(units), tuple(anchors), past, max_task_tokens, most_tasks)

    @property
    def kind(self) -> str:
        is_repeated = any(len(unit.demonstrations) > 1 for unit in self.units)
        return self._kind(DEMONSTRATED_TASKS if is_repeated else DEMONSTRATIONS)

    def _kind(self, demonstrated: str) -> str:
        if any(isinstance(unit.subject, Task) for unit in self.units):
            return TASKS
        return demonstrated if self.folds else f"held-out {demonstrated}"

    @property
    def folds(self) -> list[int]:
        """For which adapters are needed that were trained without them."""
        return sorted({unit.fold for unit in self.units if unit.fold is not None})

    def outlook(self, num_candidates: int, spread: float | None = None) -> Outlook:
        """What they could show. `num_candidates`: those before on the same evidence included. `spread`: of the gain
        from pair to pair, where an earlier gate has seen it."""
        return evidence_outlook(
            len(self.units),
            sum(unit.num_states for unit in self.units),
            self._kind(DEMONSTRATIONS),
            num_demonstrations=sum(len(unit.demonstrations) for unit in self.units),
            num_candidates=num_candidates,
            spread=spread,
            most=self.most_tasks,
        )

    async def pairs(self, units: Sequence[Unit], contestants: Contestants) -> list[Pair]:
        """Try units under both adapters; those that the acting adapter could not finish are left out."""
        tasks = [unit for unit in units if isinstance(unit.subject, Task)]
        demonstrations = [unit for unit in units if unit.demonstrations]
        pairs = await self._try_tasks(tasks, contestants) + await self._try_demonstrations(demonstrations, contestants)
        return [pair for pair in pairs if pair is not None]

    async def _try_tasks(self, units: Sequence[Unit], contestants: Contestants) -> list[Pair | None]:
        tasks = [unit.subject for unit in units if isinstance(unit.subject, Task)]
        candidate, acting = await asyncio.gather(
            self._task_trials(tasks, contestants.candidate), self._task_trials(tasks, contestants.acting)
        )
        return [paired(unit.name, new, old, unit.fold) for unit, new, old in zip(units, candidate, acting, strict=True)]

    async def _task_trials(self, tasks: Sequence[Task], adapter: str) -> list[Trial | None]:
        """Tried anew only where the log does not tell how it went."""
        if self.who.world is None:
            return []
        bound = self.max_task_tokens
        trials = {task.id: self.past.of_task(adapter, task, SEED, bound) for task in tasks}
        missing = [task for task in tasks if trials[task.id] is None]
        ask = self.who.endpoint.evaluate
        attempts = await ask(self.who.world, missing, adapter, TEMPERATURE, seed=SEED, max_tokens=bound)
        for attempt in attempts:
            if not attempt.error:
                trials[attempt.task_id] = Trial(attempt.outcome, attempt.num_malformed)
                self.past.remember(adapter, attempt.task_id, attempt.episode_id)
        return [trials[task.id] for task in tasks]

    async def _try_demonstrations(self, units: Sequence[Unit], contestants: Contestants) -> list[Pair | None]:
        states = [state for unit in units for each in unit.demonstrations for state in each.states()]
        candidate, acting = await try_states(states, contestants, self.who, self.past)
        pairs, begin = list[Pair | None](), 0
        for unit in units:
            parts = list[Pair | None]()
            for each in unit.demonstrations:
                own = slice(begin, begin := begin + len(each.path))
                parts.append(paired(unit.name, score(candidate[own]), score(acting[own]), unit.fold))
            pairs.append(merged(unit.name, [part for part in parts if part is not None]))
        return pairs


def task_named(name: str, world: World) -> Task:
    """Raises IndexError for an index beyond the split's end."""
    _, split, index = name.split("/")
    return world.task(split, int(index))


def _validating(world: World, index: int) -> Task:
    """Raises WorldFailed where the world cannot say what its task is."""
    with blaming(world.name, "task"):
        return world.task("validation", index)


def _demonstrations(collected: Collected, twins: Mapping[int, Twin]) -> list[Unit]:
    """Those held out, by task; and by folds the others, where these are too few, as far as the fold's twin has seen
    none of the task's."""
    units = sorted((Unit(each) for each in _by_task(collected.held_out, collected.groups_of).values()), key=_order)
    if needs_folds(len(units)):
        tasks = _by_task(collected.demonstrations, collected.groups_of)
        in_folds = [(fold_of(task), each) for task, each in tasks.items()]
        judging = [Unit(each, fold) for fold, each in in_folds if fold in twins and _is_new(each, twins[fold])]
        units += sorted(judging, key=lambda unit: (unit.fold, _order(unit)))
    return units


def _by_task(
    demonstrations: Iterable[LoggedEpisode], groups_of: Mapping[str, frozenset[str]]
) -> dict[str, tuple[LoggedEpisode, ...]]:
    """The demonstrations of each task, the oldest first."""
    tasks: defaultdict[str, list[LoggedEpisode]] = defaultdict(list)
    for each in sorted(demonstrations, key=lambda each: (each.episode.created_at, each.episode.id)):
        (task,) = groups_of[each.episode.id]
        tasks[task].append(each)
    return {task: tuple(found) for task, found in tasks.items()}


def _is_new(demonstrations: Sequence[LoggedEpisode], twin: Twin) -> bool:
    return twin.has_seen.isdisjoint(each.episode.id for each in demonstrations)


def _order(unit: Unit) -> str:
    return hashlib.sha256(unit.name.encode()).hexdigest()


def fitting_world(world: World | None, demonstrations: Sequence[LoggedEpisode]) -> World | None:
    """The world, unless it has no tasks to validate on, or most demonstrations that have tools have other ones than
    the world's."""
    if world is None or not world.splits["validation"]:
        return None
    demonstrated = [tools for each in demonstrations if (tools := _tools_of(each))]
    if not demonstrated:
        return world
    names = patiently(world.name, partial(_names_of_tools, world))
    return world if fmean(tools <= names for tools in demonstrated) >= 0.5 else None


def _names_of_tools(world: World) -> set[str]:
    task = _validating(world, 0)
    with blaming(world.name, "open"):
        episode = world.open(task)
    return {tool.name for tool in tools_of(world.name, episode)}


def _tools_of(demonstration: LoggedEpisode) -> set[str]:
    """Names of the tools that it offers or calls."""
    offered = {tool["function"]["name"] for step in demonstration.path for tool in step.tools}
    actions = [step.action for step in demonstration.path]
    return offered | {call.name for action in actions if isinstance(action, ToolCalls) for call in action.calls}
