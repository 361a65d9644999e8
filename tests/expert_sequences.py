"""Sequences of the world's expert, to be trained on."""

from __future__ import annotations

from learner.objectives.objectives import (
    action_sequence,
)
from learner.packing.prefix_tree import ScoredSequence
from policies.chat.chat_protocol import ChatProtocol, message_action
from policies.types import FinalAnswer
from tools.worlds.order_desk import OrderDesk


def expert_rows(protocol: ChatProtocol, split: str, num_tasks: int) -> list[ScoredSequence]:
    """The expert's actions on some tasks, one row each."""
    world, rows = OrderDesk(), []
    for index in range(num_tasks):
        task = world.task(split, index)
        episode, messages = world.open(task), list(task.messages)
        while True:
            message = episode.expert_action()
            action = message_action(message)
            prompt, completion = protocol.completion_of(messages, action)
            rows.append(action_sequence(prompt, completion, (task.id, len(rows))))
            if isinstance(action, FinalAnswer):
                break
            messages += [message, *episode.play(message)]
    return rows
