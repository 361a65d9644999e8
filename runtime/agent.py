"""The agent: takes steps, and runs episodes of them with the tools the server holds.

Nothing here knows of HTTP. A run yields what happens as it happens: sampled tokens with what they make visible, and
each step once it stands in the log. Whoever closes the iterator (a client that hung up) cancels the engine's work,
and an unfinished step is not logged: it was not answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from langchain_core.tools import BaseTool

from policies.chat_protocol import ActionReader, ChatProtocol, TextDelta, action_message
from policies.types import (
    BASE_ADAPTER,
    Action,
    Adapter,
    Engine,
    EngineError,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    Message,
    SampledToken,
    SamplingParams,
    TokenIds,
    ToolCalls,
    ToolSchema,
)
from runtime.bursts import in_bursts
from runtime.conversation import digests_of, messages_after
from runtime.step_log import StepLog, StepLogError
from runtime.stop_texts import StopTexts
from runtime.tool_calls import run_tool_calls
from runtime.types import Episode, Outcome, Step, StopReason, ToolResult, new_id

BURST_S = 0.01
"""Tokens that come quicker than this are read and shown together: a hundred times a second is smooth to any reader."""


class ContextFull(Exception):
    """The conversation leaves no room for an answer in the model's context."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Base network + adapter + chat protocol, ready to act."""

    engine: Engine
    protocol: ChatProtocol
    adapter: Adapter | None

    @property
    def adapter_name(self) -> str:
        return self.adapter.name if self.adapter else BASE_ADAPTER


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Where a run of server-run tools ends, whatever the policy wants."""

    max_steps: int = 16
    max_completion_tokens: int = 8192
    """Of all steps of the run together."""
    deadline_s: float = 300.0
    tool_timeout_s: float = 30.0
    max_malformed: int = 2
    """Malformed actions in a row before the run is given up."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Where the policy stands when it is to act: everything a step is made from."""

    episode: Episode
    parent: Step | None
    """The step that this turn continues."""
    history: tuple[Message, ...]
    """The conversation up to and including the parent's action."""
    new_messages: tuple[Message, ...]
    """What came since."""
    seen: tuple[Message, ...]
    """The whole conversation as the client sent it: without the calls and results of server-run tools."""
    tools: tuple[ToolSchema, ...]
    sampling: SamplingParams
    may_call: bool = True
    """False: the client wants no tool call; one that is written all the same cannot be taken as an action."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    is_read_along: bool = True
    """The client reads the answer as it is made."""
    step_id: str = field(default_factory=lambda: new_id("step"))
    """The id that the step will have; clients are told before it is taken."""

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.history + self.new_messages

    def prompt(self, protocol: ChatProtocol) -> TokenIds:
        """The token ids the policy is given: the parent's, as they were served, and the new messages'."""
        if self.parent is None or self.parent.tools != self.tools:
            return protocol.render(self.messages, self.tools)
        told = self.parent.prompt_token_ids + self.parent.completion_token_ids
        return protocol.extend(told, self.history, self.new_messages, self.tools)


@dataclass(frozen=True, slots=True)
class ServerTools:
    """The tools that the server runs for an episode, and who judges where it led (a world, or nobody)."""

    tools: Mapping[str, BaseTool]
    judge: Callable[[Action], float] | None = None
    """How good the end is that the last action makes; called once, on a thread of its own."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Sampled tokens, and what they make visible to the client."""

    sampled: tuple[SampledToken, ...]
    """None of them for text that was held back until the last token was known."""
    deltas: tuple[TextDelta, ...]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas if delta.kind == "text")


# --------------------------------------------------------------------------------------------------- runs


async def run_client_step(
    policy: Policy, log: StepLog, turn: Turn, is_new: bool
) -> AsyncGenerator[Progress | Step, None]:
    """One step; the client runs the tools it asks for. The step is durable when it is yielded."""
    said = ""
    async with aclosing(take_step(policy, turn, turn.prompt(policy.protocol))) as happenings:
        async for happening in happenings:
            if isinstance(happening, Progress):
                said += happening.text
                yield happening
                continue
            if isinstance(happening.action, MalformedAction) and (rest := _unsaid(happening.action, said)):
                said += rest
                yield Progress((), (TextDelta("text", rest),))
            step = replace(
                happening, stop_reason=_client_stop(happening), conversation_digest=_digest(turn.seen, said, happening)
            )
            await _commit(log, turn.episode if is_new else None, step)
            yield step


async def run_episode(
    policy: Policy, log: StepLog, turn: Turn, is_new: bool, server_tools: ServerTools, limits: RunLimits
) -> AsyncGenerator[Progress | Step, None]:
    """Steps with server-run tools until the policy answers or a limit is met. Each step is durable when yielded."""
    deadline = time.monotonic() + limits.deadline_s
    seen, said, taken = turn.seen, _Speech(), list[Step]()
    prompt = turn.prompt(policy.protocol)
    while not taken or taken[-1].stop_reason is None:
        async with aclosing(take_step(policy, _within_budget(turn, taken, limits), prompt, deadline)) as happenings:
            async for happening in happenings:
                if isinstance(happening, Progress):
                    yield said.add(happening)
                    continue
                timeout_s = min(limits.tool_timeout_s, max(0.0, deadline - time.monotonic()))
                results = await _tool_results(happening.action, server_tools, timeout_s)
                taken.append(replace(happening, tool_results=results))
        said.end_step()
        turn = _next_turn(turn, taken[-1])
        prompt = turn.prompt(policy.protocol)
        if stop_reason := _server_stop(taken, limits, deadline, _room(policy, prompt)):
            digest = _digest(seen, said.text, None)
            taken[-1] = replace(taken[-1], stop_reason=stop_reason, conversation_digest=digest)
        is_first = is_new and len(taken) == 1
        await _commit(log, turn.episode if is_first else None, taken[-1], *await _outcome(taken[-1], server_tools))
        yield taken[-1]


async def _commit(log: StepLog, new_episode: Episode | None, *facts: Step | Outcome) -> None:
    """Log a step, with its episode where that is new. Another choice may have begun the same episode meanwhile."""
    if new_episode is not None:
        try:
            return await log.commit(new_episode, *facts)
        except StepLogError:
            if log.episode(new_episode.id) is None:
                raise
    await log.commit(*facts)


def _unsaid(action: MalformedAction, said: str) -> str:
    """What the client has not read yet of an action that is shown as it was written."""
    at = action.text.find(said)
    return action.text[at + len(said) :] if at >= 0 else ""


def _digest(seen: Sequence[Message], said: str, step: Step | None) -> str:
    """Of the conversation as the client has it after this answer; a server-run episode shows it no calls."""
    answer: Message = {"role": "assistant", "content": said}
    if step is not None and isinstance(step.action, ToolCalls):
        answer["tool_calls"] = action_message(step.action)["tool_calls"]
    return digests_of([*seen, answer])[-1]


class _Speech:
    """What the policy says over the steps of a run, as the client reads it: an empty line between two steps."""

    def __init__(self) -> None:
        self.text = ""
        self._gap = ""

    def add(self, progress: Progress) -> Progress:
        if self._gap and progress.text:
            progress = replace(progress, deltas=(TextDelta("text", self._gap), *progress.deltas))
            self._gap = ""
        self.text += progress.text
        return progress

    def end_step(self) -> None:
        self._gap = "\n\n" if self.text else ""


def _within_budget(turn: Turn, taken: Sequence[Step], limits: RunLimits) -> Turn:
    left = limits.max_completion_tokens - sum(len(step.completion_token_ids) for step in taken)
    return replace(turn, sampling=replace(turn.sampling, max_tokens=min(turn.sampling.max_tokens, left)))


def _client_stop(step: Step) -> StopReason:
    if step.finish_reason is FinishReason.LENGTH:
        return StopReason.TOKEN_LIMIT
    match step.action:
        case ToolCalls():
            return StopReason.CLIENT_TOOLS
        case FinalAnswer():
            return StopReason.FINAL_ANSWER
        case MalformedAction():
            return StopReason.MALFORMED


def _server_stop(taken: Sequence[Step], limits: RunLimits, deadline: float, room: int) -> StopReason | None:
    step = taken[-1]
    if time.monotonic() >= deadline:
        return StopReason.DEADLINE
    if isinstance(step.action, FinalAnswer):
        return StopReason.TOKEN_LIMIT if step.finish_reason is FinishReason.LENGTH else StopReason.FINAL_ANSWER
    if room < 1 or sum(len(each.completion_token_ids) for each in taken) >= limits.max_completion_tokens:
        return StopReason.TOKEN_LIMIT
    lately = taken[-limits.max_malformed :]
    if len(lately) == limits.max_malformed and all(isinstance(each.action, MalformedAction) for each in lately):
        return StopReason.MALFORMED
    return StopReason.STEP_LIMIT if len(taken) >= limits.max_steps else None


async def _tool_results(action: Action, server_tools: ServerTools, timeout_s: float) -> tuple[ToolResult, ...]:
    if not isinstance(action, ToolCalls):
        return ()
    return tuple(await run_tool_calls(action.calls, server_tools.tools, timeout_s))


async def _outcome(step: Step, server_tools: ServerTools) -> list[Outcome]:
    if step.stop_reason is None or server_tools.judge is None:
        return []
    value = await asyncio.to_thread(server_tools.judge, step.action)
    return [Outcome(new_id("out"), step.episode_id, value, source="world")]


def _next_turn(turn: Turn, step: Step) -> Turn:
    """Where the policy stands after its tools ran, or after it was told that it could not be understood."""
    return replace(
        turn,
        parent=step,
        history=(*turn.messages, action_message(step.action)),
        new_messages=messages_after(step),
        step_id=new_id("step"),
    )


# --------------------------------------------------------------------------------------------------- steps


async def take_step(
    policy: Policy, turn: Turn, prompt: TokenIds, deadline: float | None = None
) -> AsyncGenerator[Progress | Step, None]:
    """Let the policy act once. Yields tokens as they are sampled, then the step, which is not logged yet.

    `deadline` is a time.monotonic() value. Raises ContextFull where the prompt leaves no room to answer, and
    EngineError where the engine fails.
    """
    created_at, began = time.time(), time.perf_counter()
    sampling = _within_context(turn.sampling, policy, prompt)
    reader = policy.protocol.reader(turn.tools)
    ending = StopTexts(turn.stop)
    tokens: list[SampledToken] = []
    first_token_ms = 0.0
    whole = not (turn.is_read_along or turn.stop or deadline)  # the latter two may end it before its last token
    stream = policy.engine.generate(prompt, sampling, policy.adapter, whole=whole)
    async with aclosing(in_bursts(stream, BURST_S, deadline)) as bursts:
        async for burst in bursts:
            first_token_ms = first_token_ms or (time.perf_counter() - began) * 1000
            progress = _read(burst, reader, ending)
            tokens += progress.sampled
            yield progress
            if ending.is_reached or (deadline is not None and time.monotonic() >= deadline):
                break
    if not tokens and deadline is not None and time.monotonic() >= deadline:
        raise EngineError("no token came before the run's deadline; the engine is busy: try again, or raise --deadline")
    if not tokens:
        raise EngineError("the engine's stream ended without a token")
    latency_ms = (time.perf_counter() - began) * 1000
    finish_reason = FinishReason.STOP if ending.is_reached else tokens[-1].finish_reason or FinishReason.LENGTH
    action, unshown = reader.finish(finish_reason)
    if isinstance(action, ToolCalls) and not turn.may_call:
        action = MalformedAction(reader.written, "it calls a tool, and no tool may be called now")
    if shown := ending.cut(unshown, is_last=True):
        yield Progress((), shown)
    yield Step(
        id=turn.step_id,
        episode_id=turn.episode.id,
        parent_id=turn.parent.id if turn.parent else None,
        index=turn.parent.index + 1 if turn.parent else 0,
        new_messages=turn.new_messages,
        tools=turn.tools,
        prompt_token_ids=prompt,
        completion_token_ids=tuple(token.token_id for token in tokens),
        behavior_logprobs=tuple(token.logprob for token in tokens),
        sampling=sampling,
        adapter=policy.adapter_name,
        action=FinalAnswer(ending.text) if ending.is_reached else action,
        finish_reason=finish_reason,
        stop_reason=None,
        tool_results=(),
        conversation_digest="",
        created_at=created_at,
        first_token_ms=first_token_ms,
        latency_ms=latency_ms,
    )


def _read(burst: list[SampledToken], reader: ActionReader, ending: StopTexts) -> Progress:
    """Read a burst, up to the token that completes a stop text: what was sampled after it is not part of the step."""
    if not ending.stops:
        return Progress(tuple(burst), ending.cut(reader.feed(*(token.token_id for token in burst))))
    shown: list[TextDelta] = []
    for num_read, token in enumerate(burst, 1):
        shown += ending.cut(reader.feed(token.token_id))
        if ending.is_reached:
            return Progress(tuple(burst[:num_read]), tuple(shown))
    return Progress(tuple(burst), tuple(shown))


def _within_context(sampling: SamplingParams, policy: Policy, prompt: TokenIds) -> SamplingParams:
    room = _room(policy, prompt)
    if room < 1:
        limit = policy.engine.limits.max_context_tokens
        raise ContextFull(
            f"the conversation is {len(prompt)} tokens long and the model's context holds {limit}; shorten it"
        )
    stops = sampling.stop_token_ids or policy.protocol.stop_token_ids
    return replace(sampling, max_tokens=min(sampling.max_tokens, room), stop_token_ids=stops)


def _room(policy: Policy, prompt: TokenIds) -> int:
    """How many tokens an answer may have after this prompt."""
    return policy.engine.limits.max_context_tokens - len(prompt)
