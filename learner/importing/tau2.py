"""What tau2-bench keeps of its runs: simulations of a customer and an agent, with the reward that the agent got."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from learner.importing.contents import result_text
from learner.importing.fields import Fields, RefusedRecord
from learner.importing.turns import Call, Draft, SourceFormat, Turn

_CAME_TO_AN_END = ("user_stop", "agent_stop")
_ENVIRONMENT = "environment"
"""Under which a simulation out of a file of results is told the policy and the domain."""


def is_simulation(record: dict[str, Any]) -> bool:
    return isinstance(record.get("messages"), list) and "termination_reason" in record and "task_id" in record


def simulations_of(value: Any) -> list[dict[str, Any]] | None:
    """Those of a file of results, each with what the file says of their environment; None for anything else."""
    if not isinstance(value, dict) or not isinstance(value.get("simulations"), list):
        return None
    info = value.get("info")
    environment = info.get("environment_info") if isinstance(info, dict) else None
    beside = {_ENVIRONMENT: environment} if isinstance(environment, dict) else {}
    return [{**each, **beside} for each in value["simulations"] if isinstance(each, dict)]


def read_simulation(record: dict[str, Any]) -> Draft:
    """What the agent was told, said and did. What the customer did with tools of his own is not among it. Raises
    RefusedRecord for a simulation that was given up or did not get the whole reward."""
    fields = Fields(record, "the simulation")
    reason = fields.take("termination_reason")
    if reason not in _CAME_TO_AN_END:
        raise RefusedRecord(f"the simulation ended with {reason!r}: it is no expert's")
    judged = Fields(fields.take("reward_info") or {}, "reward_info")
    reward = judged.take("reward")
    if isinstance(reward, int | float) and reward < 1:
        raise RefusedRecord(f"its reward is {reward}, of 1: the simulation is no expert's")
    environment = Fields(fields.take(_ENVIRONMENT) or {}, "the environment")
    policy, domain = environment.take_text("policy"), environment.take_text("domain_name")
    turns = [Turn("system", policy)] if policy else []
    for number, message in enumerate(fields.take_list("messages"), 1):
        turns += _turns(message, number, is_greeting=all(turn.role == "system" for turn in turns))
    if turns and turns[0].role == "assistant":  # the greeting, and the policy before it is not known
        del turns[0]
    item_id, task_id = fields.take("id"), fields.take("task_id")
    return Draft(
        SourceFormat.TAU2,
        turns,
        item_id=str(item_id) if item_id else None,
        task="/".join(["tau2-bench", *([domain] if domain else []), str(task_id)]),
    )


def _turns(message: Any, number: int, is_greeting: bool) -> Iterator[Turn]:
    fields = Fields(message, f"message {number}")
    role, of_customer = fields.take("role"), fields.take("requestor") == "user"
    if nested := fields.take_list("tool_messages"):
        for each in nested:
            yield from _turns(each, number, is_greeting)
        return
    text = fields.take_text("content")
    calls = [Fields(call, f"a call of message {number}") for call in fields.take_list("tool_calls")]
    match role:
        case "assistant":
            made = tuple(Call(call.take("name"), call.take("arguments"), call.take("id")) for call in calls)
            # It opens every conversation with the same words, which no model wrote.
            yield Turn("assistant", text, calls=made, is_learned=not is_greeting)
        case "user" if text and not calls:
            yield Turn("user", text)
        case "tool" if not of_customer:
            yield Turn("tool", result_text(text, f"message {number}"), result_of=fields.take("id"))
        case "system":
            yield Turn("system", text)
        case "user" | "tool":  # the customer's own tools
            return
        case _:
            raise RefusedRecord(f"message {number} is from {role!r}; known are system, user, assistant and tool")
