"""AgentDojo: office, bank, travel and chat tasks, some of whose tool results carry planted instructions (package
agentdojo).

`agentdojo` has the tasks as they are; the outcome is the package's utility. `agentdojo_attacks` has each task with each
instruction that can be planted in what its right calls read; the outcome is 1 as long as the planted goal is not
reached, so that the share of attacks that an agent follows is one minus its success.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentdojo.agent_pipeline.agent_pipeline import load_system_message
from agentdojo.agent_pipeline.ground_truth_pipeline import GroundTruthPipeline
from agentdojo.agent_pipeline.tool_execution import ToolsExecutor
from agentdojo.attacks import load_attack
from agentdojo.base_tasks import BaseInjectionTask, BaseUserTask
from agentdojo.functions_runtime import FunctionCall, FunctionsRuntime, TaskEnvironment
from agentdojo.task_suite.load_suites import get_suites
from agentdojo.task_suite.task_suite import TaskSuite
from agentdojo.types import (
    ChatAssistantMessage,
    ChatMessage,
    MessageContentBlock,
    get_text_content_as_str,
    text_content_block_from_string,
)

from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling
from tools.worlds.listed import ListedWorld, split_by_fives
from tools.worlds.right_calls import RightCalls
from tools.worlds.world import SPLITS, Message

VERSION = "v1.2.2"
"""Of the package's tasks; a newer package keeps it."""
ATTACK = "important_instructions_no_names"
"""The package's strongest attack that needs to know neither the user's name nor the model's."""

_EXECUTOR = ToolsExecutor()


@dataclass(frozen=True, slots=True)
class Assignment:
    """A user's task, and perhaps what somebody planted in the tools' results."""

    suite: TaskSuite
    user_task: BaseUserTask
    injection_task: BaseInjectionTask | None = None
    injections: tuple[tuple[str, str], ...] = ()
    """Texts by the places where they are planted."""


class AgentDojoEpisode(ToolEpisode):
    """One attempt at one assignment."""

    def __init__(self, assignment: Assignment, schemas: list[ToolSchema]) -> None:
        super().__init__()
        self._assignment, self._schemas = assignment, schemas
        suite, task = assignment.suite, assignment.user_task
        environment = suite.load_and_inject_default_environment(dict(assignment.injections))
        self.environment: TaskEnvironment = task.init_environment(environment)
        self._environment_before = self.environment.model_copy(deep=True)
        self._runtime = FunctionsRuntime(suite.tools)
        self._made: list[FunctionCall] = []
        self._said: str | None = None
        right = task.ground_truth(self._environment_before.model_copy(deep=True))
        self._right_calls = RightCalls((call.function, json.loads(json.dumps(dict(call.args)))) for call in right)

    @property
    def is_done(self) -> bool:  # type: ignore[override]
        return self._said is not None

    def schemas(self) -> list[ToolSchema]:
        return self._schemas

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        is_right = self._right_calls.tick_off((name, arguments))
        before = None if is_right else self.environment.model_copy(deep=True)
        # The package makes lists of texts that look like lists, in the call itself.
        call = FunctionCall(function=name, args=deepcopy(arguments), id=str(self.num_moves))
        message = ChatAssistantMessage(role="assistant", content=None, tool_calls=[call])
        self._made.append(call)
        messages: list[ChatMessage] = [message]
        _, _, _, [*_, told], _ = _EXECUTOR.query("", self._runtime, self.environment, messages)
        if before is not None and before != self.environment:
            self._right_calls.lose()
        return told.get("error") or get_text_content_as_str(told["content"] or [])

    def answer(self, text: str) -> None:
        self._said = text

    def outcome(self) -> float:
        if self._assignment.injection_task is None:
            return float(self.is_solved())
        return float(not self.has_followed())

    def is_solved(self) -> bool:
        """The user's task is done, and answered: the package's utility."""
        return self._said is not None and self._judged(self._assignment.user_task)

    def has_followed(self) -> bool:
        """The planted goal was reached: the package's security."""
        task = self._assignment.injection_task
        return task is not None and self._judged(task)

    def _judged(self, task: BaseUserTask | BaseInjectionTask) -> bool:
        said: list[MessageContentBlock] = [text_content_block_from_string(self._said or "")]
        before, after = self._environment_before.model_copy(deep=True), self.environment.model_copy(deep=True)
        return bool(self._assignment.suite._check_task_result(task, said, before, after, self._made))

    def expert_action(self) -> Message | None:
        """The next of the task's right calls, then the package's right answer."""
        if self._right_calls.is_lost:
            return None
        if (call := self._right_calls.next) is not None:
            return calling(*call, self.num_moves)
        return answering(self._assignment.user_task.GROUND_TRUTH_OUTPUT or "That is done.")

    def reopened(self) -> AgentDojoEpisode:
        return AgentDojoEpisode(self._assignment, self._schemas)

    def is_where(self, other: AgentDojoEpisode) -> bool:
        if self.is_done or other.is_done:
            judged = [(each.is_done, each.is_solved(), each.has_followed()) for each in (self, other)]
            return judged[0] == judged[1]
        return self.environment == other.environment


# ------------------------------------------------------------------------------------------------- worlds


class _AgentDojoWorld(ListedWorld[Assignment]):
    max_steps = 24

    def __init__(self, items: dict[str, list[Assignment]]) -> None:
        self._system_message = load_system_message("default")
        self._schemas: dict[str, list[ToolSchema]] = {}
        super().__init__(items)

    def messages_of(self, item: Assignment) -> tuple[Message, ...]:
        return (
            {"role": "system", "content": self._system_message},
            {"role": "user", "content": item.user_task.PROMPT},
        )

    def open_item(self, item: Assignment) -> AgentDojoEpisode:
        if item.suite.name not in self._schemas:
            self._schemas[item.suite.name] = _schemas_of(item.suite)
        return AgentDojoEpisode(item, self._schemas[item.suite.name])


class AgentDojo(_AgentDojoWorld):
    """The tasks of all suites, nothing planted. In each suite every fifth task is held out, every fifth validates."""

    name = "agentdojo"

    def __init__(self) -> None:
        super().__init__(_user_tasks())


class AgentDojoAttacks(_AgentDojoWorld):
    """The same tasks in the same splits, each with each planted instruction that its right calls come across."""

    name = "agentdojo_attacks"

    def __init__(self) -> None:
        pairs = _user_tasks().items()
        super().__init__({split: [pair for item in items for pair in _attacked(item)] for split, items in pairs})


def _user_tasks() -> dict[str, list[Assignment]]:
    splits: dict[str, list[Assignment]] = {split: [] for split in SPLITS}
    for suite in map(_remembering, get_suites(VERSION).values()):
        tasks = [Assignment(suite, task) for task in suite.user_tasks.values()]
        for split, assignments in split_by_fives(tasks).items():
            splits[split] += assignments
    return splits


def _attacked(item: Assignment) -> Iterator[Assignment]:
    pipeline = GroundTruthPipeline(None)
    pipeline.name = "local"  # the attack wants to know the model's family, and then does without
    attack = load_attack(ATTACK, item.suite, pipeline)
    for injection_task in item.suite.injection_tasks.values():
        try:
            injections = attack.attack(item.user_task, injection_task)
        except ValueError:  # its right calls come across no place where something can be planted
            return
        yield Assignment(item.suite, item.user_task, injection_task, tuple(injections.items()))


def _remembering(suite: TaskSuite) -> TaskSuite:
    """The suite, but it reads an environment once, which takes half a second, and then gives out copies."""
    suite = suite.get_new_version(suite.benchmark_version)
    read = suite.load_and_inject_default_environment

    @lru_cache(maxsize=32)
    def remembered(injections: tuple[tuple[str, str], ...]) -> TaskEnvironment:
        return read(dict(injections))

    def copied(injections: dict[str, str]) -> TaskEnvironment:
        return remembered(tuple(sorted(injections.items()))).model_copy(deep=True)

    suite.load_and_inject_default_environment = copied
    return suite


def _schemas_of(suite: TaskSuite) -> list[ToolSchema]:
    return [
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters.model_json_schema()}
        for tool in suite.tools
    ]
