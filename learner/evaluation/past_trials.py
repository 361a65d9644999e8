"""Trials that an adapter has had before, from the log: an adapter never changes, so that they need not be repeated.

What is found is checked rather than believed, since a client may call its own request an evaluation: at a state, the
conversation and the seed must be the trial's; a task's outcome is not read but played again in the world.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial

from learner.client import StateTrial
from learner.data.collect import main_line
from learner.evaluation.evidence import Trial
from learner.practice import step_seed
from policies.chat.chat_protocol import action_message, text_of
from policies.types import MalformedAction, Message, ToolCalls
from runtime.store.episodes import Purpose, Step
from runtime.store.step_log import StepLog
from tools.worlds.blame import blaming, outcome_of
from tools.worlds.threads import patiently
from tools.worlds.world import Task, World, WorldFailed


@dataclass(slots=True)
class PastTrials:
    """Of all adapters of an agent. The log is searched once for each; what is tried later is to be remembered."""

    log: StepLog
    world: World | None
    agent: str = ""
    num_reused: int = 0
    _by_adapter: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Ids of episodes, by the trial's name or the task's id."""

    def of_state(self, adapter: str, trial: StateTrial) -> Step | None:
        for episode_id in self._episodes(adapter).get(trial.name, []):
            step = next(iter(self.log.steps(episode_id)), None)
            if step is not None and _is_of(step, trial):
                self.num_reused += 1
                return step
        return None

    def of_task(self, adapter: str, task: Task, seed: int, max_tokens: int | None = None) -> Trial | None:
        """One in which a step could be as long as now, or was shorter of itself."""
        for episode_id in self._episodes(adapter).get(task.id, []):
            path = main_line(self.log.steps(episode_id))
            has_seeds = all(step.sampling.seed == step_seed(seed, task, n) for n, step in enumerate(path))
            is_within = max_tokens is None or all(_is_within(step, max_tokens) for step in path)
            if path and has_seeds and is_within and self.log.outcomes(episode_id):
                return self._how_it_went(task, path)
        return None

    def _how_it_went(self, task: Task, path: tuple[Step, ...]) -> Trial | None:
        """None where the world raises or hangs: whoever tries the task anew says why."""
        assert self.world is not None
        try:
            trial = patiently(self.world.name, partial(_replayed, self.world, task, path))
        except WorldFailed:
            return None
        self.num_reused += 1
        return trial

    def remember(self, adapter: str, name: str, episode_id: str) -> None:
        """What was tried just now. `name`: of a state's trial, or a task's id."""
        self._episodes(adapter).setdefault(name, []).append(episode_id)

    def _episodes(self, adapter: str) -> dict[str, list[str]]:
        if adapter not in self._by_adapter:
            found: defaultdict[str, list[str]] = defaultdict(list)
            wanted = {"purpose": Purpose.EVALUATION, "adapter": adapter, "agent": self.agent}
            for episode in self.log.episodes(limit=1_000_000, **wanted):
                name = episode.metadata.get("trial") or episode.task
                if isinstance(name, str):
                    found[name].append(episode.id)
            self._by_adapter[adapter] = dict(found)
        return self._by_adapter[adapter]


def _replayed(world: World, task: Task, path: tuple[Step, ...]) -> Trial:
    with blaming(world.name, "play"):
        episode = world.open(task)
        for step in path:
            if isinstance(step.action, ToolCalls):
                episode.play(action_message(step.action))
    num_malformed = sum(isinstance(step.action, MalformedAction) for step in path)
    return Trial(outcome_of(world.name, episode), num_malformed)


def _is_within(step: Step, max_tokens: int) -> bool:
    return len(step.completion_token_ids) < max_tokens or step.sampling.max_tokens == max_tokens


def _is_of(step: Step, trial: StateTrial) -> bool:
    is_same = _texts(step.new_messages) == _texts(tuple(trial.messages)) and len(step.tools) == len(trial.tools)
    return is_same and step.sampling.seed == trial.seed and step.sampling.is_policy


def _texts(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message["role"], text_of(message)) for message in messages]
