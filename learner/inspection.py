"""Lets the acting policy act where experts have acted, and holds the two actions against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learner.comparison import ComparedState, compare_state
from learner.endpoint import Endpoint
from policies.chat_protocol import action_message
from policies.types import Message
from runtime.step_log import StepLog
from runtime.types import Step


@dataclass(frozen=True, slots=True)
class InspectedState:
    """A state where an expert acted, and what the acting policy does there."""

    expert: Step
    samples: tuple[Step, ...]
    """The policy's own actions, as they were logged."""
    compared: ComparedState
    """The comparisons stand in the order of the samples."""


async def inspect(
    trajectories: Sequence[Sequence[Step]], endpoint: Endpoint, log: StepLog, acting: str, num_samples: int
) -> list[InspectedState]:
    """Sample the acting adapter at every step of the experts' trajectories, and compare by meaning."""
    experts = [(step, messages) for steps in trajectories for step, messages in zip(steps, _seen(steps), strict=True)]
    sampled = await endpoint.sample([(messages, step.tools) for step, messages in experts], acting, num_samples)
    states = []
    for (expert, _), step_ids in zip(experts, sampled, strict=True):
        samples = tuple(step for step_id in step_ids if (step := log.step(step_id)) is not None)
        compared = compare_state([sample.action for sample in samples], expert.action)
        states.append(InspectedState(expert, samples, compared))
    return states


def _seen(steps: Sequence[Step]) -> list[list[Message]]:
    """The conversation before each step of a trajectory."""
    seen, messages = [], list[Message]()
    for step in steps:
        messages = [*messages, *step.new_messages]
        seen.append(messages)
        messages = [*messages, action_message(step.action)]
    return seen
