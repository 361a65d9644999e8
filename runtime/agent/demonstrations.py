"""Turns an expert's conversation into the episode and the steps that serving it would have logged.

Each assistant message that is to be learned from becomes one step, which stands on the tokens of the step before it as
a served one does. What is written in tokens is read back: a step that the chat protocol would read as another action
teaches what the expert did not do, and is refused. Mending such conversations was refused: a guess would be learned.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from policies.chat.chat_protocol import ChatProtocol, action_message, message_action
from policies.chat.learnable import unfit_arguments, unlearnable
from policies.chat.meaning import meaning
from policies.chat.read_back import misreading
from policies.types import (
    Action,
    EngineLimits,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    SamplingParams,
    TokenIds,
    ToolCalls,
    ToolSchema,
)
from runtime.store.episodes import (
    Actor,
    Episode,
    Purpose,
    Step,
    StopReason,
    demonstration_digest,
    new_id,
    new_messages_along,
)


class DemonstrationRefused(ValueError):
    """A conversation that cannot become steps of this model, and why."""


@dataclass(frozen=True)
class Demonstration:
    """An expert's conversation, and which of its messages are to be learned from."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSchema, ...] = ()
    asked_indices: tuple[int, ...] | None = None
    """Indices of the assistant messages to learn from; None: all."""
    expert: str = "expert"
    task: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    agent: str = ""
    """Name of the agent that is to learn from it; empty: the server's own."""
    opening: tuple[Message, ...] = ()
    """What that agent is told before the messages: its system prompt. Indices do not count it."""

    @property
    def told(self) -> tuple[Message, ...]:
        """All that was said, the opening included."""
        return (*self.opening, *self.messages)

    @cached_property
    def learn_from(self) -> tuple[int, ...]:
        """Indices of the messages to learn from, ascending. Raises DemonstrationRefused."""
        said = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not said:
            raise DemonstrationRefused("it has no assistant message: there is nothing to learn from")
        asked = said if self.asked_indices is None else sorted(set(self.asked_indices))
        if not asked:
            raise DemonstrationRefused("learn_from is empty: leave it out to learn from every assistant message")
        for index in asked:
            if index not in said:
                raise DemonstrationRefused(f"learn_from names message {index}, which is no assistant message")
        if asked[0] == 0:
            raise DemonstrationRefused("message 0 is to be learned from, but nothing was seen before it")
        return tuple(asked)

    @property
    def called_without_tools(self) -> frozenset[str]:
        """Names of the tools that it calls, where it does not say which were on offer; empty where it does."""
        if self.tools:
            return frozenset()
        calls = (call for message in self.messages for call in message.get("tool_calls") or ())
        return frozenset(call["function"]["name"] for call in calls)

    @cached_property
    def digest(self) -> str:
        """Equal for whatever teaches the same."""
        learn_from = [index + len(self.opening) for index in self.learn_from]
        return demonstration_digest(self.told, self.tools, learn_from)

    @property
    def episode_id(self) -> str:
        """Equal for equal digests and the same agent, so that importing twice adds nothing, and what one agent has been
        shown is not taken for known by another."""
        name = f"{self.agent} {self.digest}" if self.agent else ""
        return f"demo_{(hashlib.sha256(name.encode()).hexdigest() if name else self.digest)[:32]}"


def demonstrated_episode(demonstration: Demonstration) -> Episode:
    return Episode(
        id=demonstration.episode_id,
        actor=Actor.EXPERT,
        purpose=Purpose.SERVE,
        adapter=demonstration.expert,
        task=demonstration.task,
        metadata={**demonstration.provenance, "digest": demonstration.digest},
        agent=demonstration.agent,
    )


def demonstrated_steps(demonstration: Demonstration, protocol: ChatProtocol, limits: EngineLimits) -> tuple[Step, ...]:
    """One step for each message that is learned from; what lies between is the later step's observation.

    Raises DemonstrationRefused, ChatProtocolError, or ValueError for a tool call that cannot be read.
    """
    steps: list[Step] = []
    seen = 0  # messages that the steps so far cover
    for index in demonstration.learn_from:
        parent, place = steps[-1] if steps else None, index + len(demonstration.opening)
        action = message_action(demonstration.messages[index])
        prompt, completion = _in_tokens(demonstration, protocol, parent, seen, place, action)
        try:
            _require_learnable(protocol, prompt, completion, action, demonstration.tools, limits)
        except DemonstrationRefused as refused:
            raise DemonstrationRefused(f"message {index} {refused}") from refused
        new_messages = demonstration.told[seen:place]
        steps.append(_step(demonstration, parent, new_messages, prompt, completion, action))
        seen = place + 1
    return tuple(steps)


def _in_tokens(
    demonstration: Demonstration, protocol: ChatProtocol, parent: Step | None, seen: int, index: int, action: Action
) -> tuple[TokenIds, TokenIds]:
    """(prompt, completion) token ids of one step, the prompt continued from its parent's tokens as in serving."""
    messages, tools = demonstration.told, demonstration.tools
    prompt, completion = protocol.completion_of(messages[:index], action, tools)
    if parent is not None:
        told = parent.prompt_token_ids + parent.completion_token_ids
        prompt = protocol.extend(told, messages[:seen], messages[seen:index], tools)
    return prompt, completion


def promoted_episode(
    episode: Episode, path: Sequence[Step], corrections: Mapping[str, Action], expert: str
) -> Demonstration:
    """A logged episode, from its first step to the last of `path`, as a demonstration that `expert` vouches for.

    `corrections`, by a step's id, are what should have been done there: the first that differs from what was done
    stands in its place, and ends the demonstration, for what follows came after something else. Actions that could not
    be read, or that no tool took, are kept as they were said, and are not learned. Raises DemonstrationRefused where
    nothing else is there.
    """
    messages: list[Message] = []
    learned = []
    kept, last_action = _up_to_a_correction(path, corrections)
    for step, new_messages in new_messages_along(kept):
        action = last_action if step is kept[-1] else step.action
        messages.extend(new_messages)
        if not (unlearnable(action, step.tools) or unfit_arguments(action, step.tools)):
            learned.append(len(messages))
        messages.append(action_message(action))
    if not learned:
        raise DemonstrationRefused(f"episode {episode.id} has no action that its tools take: there is nothing to learn")
    return Demonstration(
        messages=tuple(messages),
        tools=kept[-1].tools,
        asked_indices=tuple(learned),
        expert=expert,
        task=episode.task,
        provenance={"promoted_from": episode.id},
        agent=episode.agent,
    )


def _up_to_a_correction(path: Sequence[Step], corrections: Mapping[str, Action]) -> tuple[Sequence[Step], Action]:
    """(the steps up to the first that was corrected, what should have been done there); all of them where none was."""
    for number, step in enumerate(path):
        corrected = corrections.get(step.id)
        if corrected is not None and not _means_the_same(corrected, step.action):
            return path[: number + 1], corrected
    return path, path[-1].action


def _means_the_same(one: Action, other: Action) -> bool:
    if isinstance(one, MalformedAction) or isinstance(other, MalformedAction):
        return False
    return meaning(one) == meaning(other)


def correction_in_tokens(
    protocol: ChatProtocol, path: Sequence[Step], action: Action, limits: EngineLimits
) -> TokenIds:
    """What should have been done at the last step of a path, as the policy would have to write it.

    A person's word is learned as it is: it must be a call that its tools take, or an answer. Raises
    DemonstrationRefused where it is not, or would be read back as something else; and ChatProtocolError.
    """
    messages, tools = _seen_at_the_last(path), path[-1].tools
    if isinstance(action, ToolCalls) and not tools:
        raise DemonstrationRefused(f"the correction calls {action.calls[0].name!r}, but its step was offered no tools")
    _, completion = protocol.completion_of(messages, action, tools)
    try:
        _require_learnable(protocol, path[-1].prompt_token_ids, completion, action, tools, limits)
    except DemonstrationRefused as refused:
        raise DemonstrationRefused(f"the correction {refused}") from refused
    if problem := unfit_arguments(action, tools):
        raise DemonstrationRefused(f"the correction {problem}")
    return completion


def _seen_at_the_last(path: Sequence[Step]) -> list[Message]:
    """The conversation before the last step of a path."""
    messages: list[Message] = []
    for step, new_messages in new_messages_along(path):
        messages.extend(new_messages)
        if step is not path[-1]:
            messages.append(action_message(step.action))
    return messages


def _require_learnable(
    protocol: ChatProtocol,
    prompt: TokenIds,
    completion: TokenIds,
    action: Action,
    tools: Sequence[ToolSchema],
    limits: EngineLimits,
) -> None:
    """Raises DemonstrationRefused where an action does nothing that its tools know, the model, saying just this, would
    have been understood otherwise, or it ends behind the context; the reason goes on after the name of the message."""
    if problem := unlearnable(action, tools) or misreading(protocol, completion, action, tools):
        raise DemonstrationRefused(problem)
    if (num_tokens := len(prompt) + len(completion)) > limits.max_context_tokens:
        raise DemonstrationRefused(f"ends at token {num_tokens}, but {limits.context}")


def _step(
    demonstration: Demonstration,
    parent: Step | None,
    new_messages: tuple[Message, ...],
    prompt: TokenIds,
    completion: TokenIds,
    action: ToolCalls | FinalAnswer,
) -> Step:
    return Step(
        id=new_id("step"),
        episode_id=demonstration.episode_id,
        parent_id=parent.id if parent else None,
        index=parent.index + 1 if parent else 0,
        new_messages=new_messages,
        tools=demonstration.tools,
        prompt_token_ids=prompt,
        completion_token_ids=completion,
        behavior_logprobs=None,
        sampling=SamplingParams(),
        adapter=demonstration.expert,
        action=action,
        finish_reason=FinishReason.STOP,
        stop_reason=StopReason.CLIENT_TOOLS if isinstance(action, ToolCalls) else StopReason.FINAL_ANSWER,
        tool_results=(),
        conversation_digest="",  # no client continues an expert's conversation
        created_at=time.time(),
        first_token_ms=0.0,
        latency_ms=0.0,
    )
