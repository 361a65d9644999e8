"""What the runtime records: episodes, their steps, and what is said of them later. Shared with the learner.

A step is one decision of the agent. A demonstration is an episode whose actor is an expert: same types, same tables.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any

from policies.types import Action, FinishReason, Message, SamplingParams, TokenIds, ToolSchema


def new_id(prefix: str) -> str:
    """An id that sorts by the time of its making: `ep_...`, `step_...`."""
    return f"{prefix}_{time.time_ns():016x}{secrets.token_hex(4)}"


def demonstration_digest(messages: Sequence[Message], tools: Sequence[ToolSchema], learn_from: Sequence[int]) -> str:
    """SHA-256 in hex of messages, tools and what is learned: equal for whatever teaches the same.

    Nobody chooses it: one who could would have another demonstration taken for known. Messages count as an import
    writes them: each client makes ids of calls of its own, and spells their arguments its way.
    """
    content = [_plainly_written(messages), list(tools), list(learn_from)]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plainly_written(messages: Sequence[Message]) -> list[Message]:
    """The same, calls numbered, their arguments spelled one way, and no words for an empty text."""
    numbers: dict[Any, str] = {}  # by the id that a call has: the newest, where several turns use one id
    num_calls = 0
    written: list[Message] = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            number = numbers[call.get("id")] = f"call_{num_calls}"
            num_calls += 1
            function = call.get("function") or {}
            if isinstance(arguments := function.get("arguments"), str):
                function = {**function, "arguments": _respelled(arguments)}
            calls.append({**call, "id": number, "function": function})
        answered = message.get("tool_call_id")
        pairing = {"tool_calls": calls} if calls else {"tool_call_id": numbers.get(answered, answered)}
        words = {"content": ""} if message.get("content") is None else {}
        written.append({**message, **words, **(pairing if calls or answered else {})})
    return written


def _respelled(arguments: str) -> str:
    """JSON text with the usual spaces and no escapes; as it stands where that changes a number, or where it is none."""
    exact = True

    def number(spelled: str) -> float:
        nonlocal exact
        read = float(spelled)
        exact &= repr(read) == spelled or Decimal(repr(read)) == Decimal(spelled)
        return read

    try:
        respelled = json.dumps(json.loads(arguments, parse_float=number), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        return arguments
    return respelled if exact else arguments


class Actor(StrEnum):
    """Who chose an episode's actions."""

    POLICY = "policy"  # base network + adapter + chat protocol
    EXPERT = "expert"  # its episode is a demonstration


class Purpose(StrEnum):
    """Why an episode was run; only SERVE and PRACTICE are learned from."""

    SERVE = "serve"  # a user asked
    PRACTICE = "practice"  # a world's training task
    EVALUATION = "evaluation"  # a held-out task, or the gate's


class StopReason(StrEnum):
    """Why the agent handed the turn back after a step."""

    FINAL_ANSWER = "final_answer"  # it answered
    CLIENT_TOOLS = "client_tools"  # the client runs the tools it asked for
    STEP_LIMIT = "step_limit"  # server-run tools: the most steps of a run were taken
    TOKEN_LIMIT = "token_limit"  # the context or the run's token budget was used up
    DEADLINE = "deadline"  # the run's time was used up
    MALFORMED = "malformed"  # client-run tools: the action could not be read; or too many in a row


class PromptChange(StrEnum):
    """What a client changed of a conversation that it continues, so that its prompt is another one."""

    SYSTEM = "system"  # the system message: a clock in it, instructions swapped at a handoff
    HISTORY = "history"  # what was said: left out, compacted, replayed in other words


class Role(StrEnum):
    """What a key may do; each role may also do what those before it may."""

    USE = "use"  # ask the agent, and see its own episodes
    FEEDBACK = "feedback"  # say how its episodes ended, and correct their steps
    TEACH = "teach"  # import demonstrations, vouch for its episodes
    ADMIN = "admin"  # everything: all episodes, adapters, cycles, keys

    def may(self, needed: Role) -> bool:
        """Whether this role includes the other one."""
        return self.trust >= needed.trust

    @property
    def trust(self) -> int:
        """0 for USE up to 3 for ADMIN."""
        return list(Role).index(self)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What one tool call gave back. An error is an observation, not an exception."""

    tool_call_id: str
    name: str
    content: str
    is_error: bool = False
    latency_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Episode:
    """One task from its first message to its stop. Its steps, outcomes and corrections are rows of their own."""

    id: str
    actor: Actor
    purpose: Purpose
    adapter: str
    """What its policy began with and keeps to its last step (`base`: none); in a demonstration, the expert's name."""
    task: str | None = None
    """`world/split/index` where it is a world's task, else None."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the client sent as `metadata`, or an imported demonstration's provenance."""
    created_at: float = field(default_factory=time.time)
    """Unix seconds."""
    owner: str = ""
    """Name of the key that it belongs to (that imported it, for a demonstration); empty: nobody was asked for one."""
    is_assigned: bool = True
    """The server chose its adapter; False: the client asked for one by name."""
    user: str = ""
    """Whom the key's holder asked for; empty where the request did not say."""
    agent: str = ""
    """Name of the agent that acts in it, or that is to learn from it; empty: the server's own."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decision: what was seen, what was chosen, token-exact, and what it led to."""

    id: str
    episode_id: str
    parent_id: str | None
    """The step whose conversation this one continues; None for a first step. Siblings share a parent."""
    index: int
    """Number of ancestors: 0 for a first step."""
    new_messages: tuple[Message, ...]
    """The observation: the messages seen since the parent's action (all of them for a first step, or a changed one)."""
    tools: tuple[ToolSchema, ...]
    """The tools that were on offer."""
    prompt_token_ids: TokenIds
    """Exactly what the engine was given."""
    completion_token_ids: TokenIds
    """Exactly what was sampled (or what the expert's action is in tokens), the stop token included."""
    behavior_logprobs: tuple[float, ...] | None
    """Parallel to the completion, at temperature 1; None for an expert's step."""
    sampling: SamplingParams
    adapter: str
    action: Action
    finish_reason: FinishReason
    stop_reason: StopReason | None
    """None where the agent goes on with its server-run tools."""
    tool_results: tuple[ToolResult, ...]
    """Of the tools the server ran; the client's come back as the next step's `new_messages`."""
    conversation_digest: str
    """Of the conversation as the client sees it up to and including this answer: how a follow-up is recognised."""
    created_at: float
    """Unix seconds, when the step began."""
    first_token_ms: float
    latency_ms: float
    """From the step's begin to its last token, tools not counted."""
    prompt_change: PromptChange | None = None
    """Set where the client changed what it had said before: then `new_messages` is the whole conversation."""
    thread_digest: str = ""
    """As `conversation_digest`, but without system messages and however white space stands; empty: not taken."""
    tail_digest: str = ""
    """The same of the last two messages only, the answer and what it answers."""

    def __post_init__(self) -> None:
        logprobs = self.behavior_logprobs
        if logprobs is not None and len(logprobs) != len(self.completion_token_ids):
            raise ValueError(f"step {self.id}: {len(self.completion_token_ids)} tokens but {len(logprobs)} logprobs")


@dataclass(frozen=True, slots=True)
class StepCandidate:
    """One of several draws that a step was chosen among; the chosen one is among them, too."""

    step_id: str
    number: int
    """In the order they were drawn, from 0: the one that would have been the step without a choice."""
    action: Action
    completion_token_ids: TokenIds
    logprobs: tuple[float, ...]
    """Parallel to the completion, at temperature 1."""
    finish_reason: FinishReason
    score: float
    """Larger is better; compares within one step."""
    scorer: str
    """Who gave the score: `discriminator`, `mean_logprob`, `majority`."""
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an episode ended for those who asked. Arrives later, may arrive more than once: of those who are trusted
    most, what was said last counts."""

    id: str
    episode_id: str
    value: float
    """0 is failure, exactly 1 success; parts of it lie between."""
    source: str
    """Who says so: `user`, `world`, ..."""
    note: str = ""
    created_at: float = field(default_factory=time.time)
    key: str = ""
    """Name of the key that says so; empty: the server itself, or somebody who was asked for none."""
    role: Role = Role.ADMIN
    """The key's role then: how far it is trusted."""


@dataclass(frozen=True, slots=True)
class Correction:
    """An expert's action for a logged step: what should have been done there."""

    id: str
    step_id: str
    action: Action
    completion_token_ids: TokenIds
    """The action as the chat protocol renders it after the step's prompt."""
    source: str
    created_at: float = field(default_factory=time.time)
    key: str = ""
    """Name of the key that says so; empty as in an outcome."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """An outcome, a correction or a demonstration that no longer counts: it was wrong. What was said stays logged."""

    id: str
    fact_id: str
    """Of the outcome or correction, or of the demonstration's episode."""
    reason: str = ""
    key: str = ""
    """Name of the key that took it back."""
    created_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class ResponseRecord:
    """What was asked of a response that can be retrieved; what was answered are its steps."""

    id: str
    episode_id: str
    step_id: str
    """Its first step."""
    request: dict[str, Any]
    """The request's body."""
    created_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class ResponseDeletion:
    """A response that must not be retrieved any more. Its steps stay logged."""

    id: str
    """The response's."""
    created_at: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """What a key with a quota has used up in a day; logged, it is added to what is known of that day."""

    key: str
    """Its name."""
    day: int
    """Days since 1970, UTC."""
    requests: int = 0
    steps: int = 0
    tokens: int = 0
    """Of prompts and completions together."""


def new_messages_along(path: Sequence[Step]) -> Iterator[tuple[Step, tuple[Message, ...]]]:
    """A path's steps with what was new at each, from the last one on at which the whole conversation was."""
    begins = max((number for number, step in enumerate(path) if step.prompt_change is not None), default=0)
    for step in path[begins:]:
        yield step, step.new_messages


Fact = Episode | Step | StepCandidate | Outcome | Correction | Withdrawal | ResponseRecord | ResponseDeletion | KeyUsage
"""What the step log takes: appended, never edited, but for a day's usage, which is a sum."""
