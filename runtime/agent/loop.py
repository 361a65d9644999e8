"""The agent's loop: one step whose tools the client runs, or steps with the server's tools until the policy answers.

Nothing here knows of HTTP. A run yields its events as they happen: sampled tokens with what they make visible, and
each step once it stands in the log. Whoever closes the iterator (a client that hung up) cancels the engine's work,
and an unfinished step is not logged: it was not answered.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from langchain_core.tools import BaseTool

from policies.chat.chat_protocol import CallDelta, ChatProtocol, TextDelta
from policies.types import Action, FinalAnswer, FinishReason, MalformedAction, Message, ToolCalls
from runtime.agent.best_of import sampler_of
from runtime.agent.budget import RunBudget, RunLimits
from runtime.agent.conversation import Digests
from runtime.agent.rendering import SMALL_LETTERS, num_letters, rendered
from runtime.agent.shown import Shown
from runtime.agent.step import Delta, Progress, SampledStep
from runtime.agent.stop_texts import StopTexts
from runtime.agent.tool_calls import run_tool_calls
from runtime.agent.turn import Policy, Turn
from runtime.off_loop import off_loop
from runtime.privacy.redaction import Redactor
from runtime.store.episodes import Episode, Fact, Outcome, Step, StepCandidate, StopReason, ToolResult, new_id
from runtime.store.step_log import StepLog, StepLogError
from tools.bounds import ToolBounds
from tools.worlds.threads import WorldThreads
from tools.worlds.world import WorldFailed

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepTaken:
    """A step that stands in the log."""

    choice: int
    """Which of the answer's choices it belongs to."""
    step: Step
    candidates: tuple[StepCandidate, ...] = ()
    """What it was chosen among, itself included; empty where nothing else was drawn."""
    is_unjudged: bool = False
    """It ended an episode of the server's world, which could not say how good that end is."""


RunEvent = Progress | StepTaken
"""What happens in a run. Its last event is a step with a stop reason."""


@dataclass(frozen=True, slots=True)
class ServerTools:
    """The tools that the server runs for an episode, and who judges where it led (a world, or nobody)."""

    tools: Mapping[str, BaseTool]
    judge: Callable[[Action], float] | None = None
    """How good the end is that the last action makes, 0 to 1; called once, on a thread of the world's. Raises
    WorldFailed."""
    bounds: Mapping[str, ToolBounds] = field(default_factory=dict)
    """By the tool's name, for those that have bounds of their own."""
    turns: Mapping[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)
    """By the tool's name, for those of a world's episode: its calls are run in order, and each holds this meanwhile."""
    threads: WorldThreads = field(default_factory=WorldThreads)
    """Where the judge is asked."""


@dataclass(frozen=True, slots=True)
class Run:
    """One choice of an answer, ready to start."""

    choice: int
    policy: Policy
    turn: Turn
    is_new: bool
    """The episode is not logged yet."""
    server_tools: ServerTools | None
    """None: the client runs the tools, one step is taken."""
    max_tokens: int | None = None
    """What the client wants at most, of all steps together."""
    beside: tuple[Fact, ...] = ()
    """What is logged with the last step."""
    beside_each: Callable[[Step, int], tuple[Fact, ...]] = lambda _, __: ()
    """What is logged with each step."""

    def events(self, log: StepLog, limits: RunLimits) -> AsyncGenerator[RunEvent, None]:
        return _client_step(self, log) if self.server_tools is None else _episode(self, self.server_tools, log, limits)


async def _client_step(run: Run, log: StepLog) -> AsyncGenerator[RunEvent, None]:
    """One step; the client runs the tools it asks for. The step is durable when it is yielded."""
    turn, shown = run.turn, Shown()
    prompt = await rendered(turn, run.policy)
    sampler = sampler_of(run.policy, turn, prompt, shows_calls=bool(turn.tools) and turn.may_call)
    async with aclosing(sampler.progress(run.choice)) as stream:
        async for progress in stream:
            yield shown.add(progress)
    sampled = sampler.sampled
    sampled, rest = _up_to_a_stop(sampled, shown, _unshown(sampled, shown, run.policy.protocol))
    if rest:
        yield shown.add(Progress(run.choice, (), (rest,)))
    digests = await _digests(turn, shown.message(sampled.action, turn.shows_call_ids))
    step = sampled.led_to(_client_stop(sampled), digests)
    beside = (*sampled.candidates, *run.beside_each(step, sampled.num_beside_tokens), *run.beside)
    await _commit(log, turn.episode if run.is_new else None, step, *beside)
    yield StepTaken(run.choice, step, sampled.candidates)


async def _episode(
    run: Run, server_tools: ServerTools, log: StepLog, limits: RunLimits
) -> AsyncGenerator[RunEvent, None]:
    """Steps with server-run tools until the policy answers or its budget is spent. Each is durable when yielded."""
    budget, transcript = RunBudget(limits, run.max_tokens), _Transcript()
    turn, is_new, stop_reason = run.turn, run.is_new, None
    prompt = await rendered(turn, run.policy)
    while stop_reason is None:
        sampler = sampler_of(run.policy, _within_budget(turn, budget), prompt, budget.deadline)
        async with aclosing(sampler.progress(run.choice)) as stream:
            async for progress in stream:
                yield transcript.add(progress)
        transcript.end_step()
        sampled = sampler.sampled
        budget.spend(sampled)
        results = await _tool_results(sampled.action, server_tools, budget, turn.redactor)
        next_turn = turn.after(sampled.action, prompt + sampled.completion_token_ids, results)
        prompt = await rendered(next_turn, run.policy, is_first=False)
        stop_reason = budget.stop_reason(sampled, run.policy.room_after(prompt))
        digests = await _digests(run.turn, transcript.message) if stop_reason else Digests()
        step = sampled.led_to(stop_reason, digests, results)
        beside = (*sampled.candidates, *run.beside_each(step, sampled.num_beside_tokens))
        beside += run.beside if stop_reason else ()
        outcomes = await _outcome(step, server_tools, limits.tool_timeout_s)
        await _commit(log, turn.episode if is_new else None, step, *outcomes, *beside)
        turn, is_new = next_turn, False
        is_unjudged = stop_reason is not None and server_tools.judge is not None and not outcomes
        yield StepTaken(run.choice, step, sampled.candidates, is_unjudged)


async def _commit(log: StepLog, new_episode: Episode | None, *facts: Fact) -> None:
    """Log a step, with its episode where that is new. Another choice may have begun the same episode meanwhile."""
    if new_episode is not None:
        try:
            return await log.commit(new_episode, *facts)
        except StepLogError:
            if log.episode(new_episode.id) is None:
                raise
    await log.commit(*facts)


async def _digests(turn: Turn, answer: Message) -> Digests:
    """Of the conversation as the client sends it back after this answer."""
    is_large = num_letters([*turn.client_messages, answer]) > 10 * SMALL_LETTERS
    return await off_loop(is_large or (turn.redactor is not None and turn.redactor.is_slow), _digests_of, turn, answer)


def _digests_of(turn: Turn, answer: Message) -> Digests:
    sent_back = answer if turn.redactor is None else turn.redactor.message(answer)
    return Digests.of([*turn.client_messages, sent_back])


def _unshown(sampled: SampledStep, shown: Shown, protocol: ChatProtocol) -> Delta | None:
    """What the client has not read yet of an action that could not be read: its text as it was written, or of a call
    that was cut off the part that was."""
    if not isinstance(sampled.action, MalformedAction) or shown.calls:
        return None
    if sampled.finish_reason is FinishReason.LENGTH and sampled.turn.tools and sampled.turn.may_call:
        cut = protocol.partial_call(sampled.completion_token_ids, sampled.turn.tools)
        if cut is not None:
            return CallDelta(0, cut.name, cut.arguments, cut.id)
    at = sampled.action.text.find(shown.text)
    rest = sampled.action.text[at + len(shown.text) :] if at >= 0 else ""
    return TextDelta("text", rest) if rest else None


def _up_to_a_stop(sampled: SampledStep, shown: Shown, rest: Delta | None) -> tuple[SampledStep, Delta | None]:
    """The text that is shown of what could not be read ends at a stop text, too; the step has ended there, then."""
    if not isinstance(rest, TextDelta):
        return sampled, rest
    text, is_reached = StopTexts.cut_whole(sampled.turn.stop, shown.text + rest.text)
    rest = TextDelta("text", text[len(shown.text) :])
    return (replace(sampled, finish_reason=FinishReason.STOP) if is_reached else sampled), rest if rest.text else None


class _Transcript:
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

    @property
    def message(self) -> Message:
        """The answer as the client has it: it is shown no calls."""
        return {"role": "assistant", "content": self.text}


def _within_budget(turn: Turn, budget: RunBudget) -> Turn:
    max_tokens = min(turn.sampling.max_tokens, budget.most_tokens(turn.sampling.best_of))
    return replace(turn, sampling=replace(turn.sampling, max_tokens=max_tokens))


def _client_stop(sampled: SampledStep) -> StopReason:
    if sampled.finish_reason is FinishReason.LENGTH:
        return StopReason.TOKEN_LIMIT
    match sampled.action:
        case ToolCalls():
            return StopReason.CLIENT_TOOLS
        case FinalAnswer():
            return StopReason.FINAL_ANSWER
        case MalformedAction():
            return StopReason.MALFORMED


async def _tool_results(
    action: Action, server_tools: ServerTools, budget: RunBudget, redactor: Redactor | None
) -> tuple[ToolResult, ...]:
    if not isinstance(action, ToolCalls):
        return ()
    results = await run_tool_calls(
        action.calls,
        server_tools.tools,
        budget.tool_timeout_s,
        server_tools.bounds,
        server_tools.turns,
        seconds_left=lambda: budget.seconds_left,
        world=server_tools.threads.world,
    )
    return tuple(results if redactor is None else await asyncio.to_thread(_redacted, redactor, results))


def _redacted(redactor: Redactor, results: Sequence[ToolResult]) -> list[ToolResult]:
    return [replace(result, content=redactor.text(result.content)[0]) for result in results]


async def _outcome(step: Step, server_tools: ServerTools, timeout_s: float) -> list[Outcome]:
    """Of an episode that ends with this step; none where its world cannot say: the step was taken all the same."""
    if step.stop_reason is None or server_tools.judge is None:
        return []
    try:
        value = await server_tools.threads.ask(partial(server_tools.judge, step.action), timeout_s)
    except WorldFailed as error:
        _log.warning("episode %s has no outcome: %s", step.episode_id, error, exc_info=error.__cause__)
        return []
    return [Outcome(new_id("out"), step.episode_id, value, source="world")]
