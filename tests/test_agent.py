"""The agent loop: what ends a run, what is logged of it, and what is not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from langchain_core.tools import BaseTool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool

from policies.chat.chat_protocol import ChatProtocol
from policies.types import (
    BASE_ADAPTER,
    Action,
    EngineError,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    SamplingParams,
    TokenIds,
    ToolCalls,
)
from runtime.agent.budget import RunLimits
from runtime.agent.loop import Run, RunEvent, ServerTools, StepTaken
from runtime.agent.step import ContextFull, Progress
from runtime.agent.turn import Policy, Turn
from runtime.store.episodes import Actor, Episode, Purpose, Step, StopReason, new_id
from runtime.store.step_log import StepLog
from tests.serving import LIMITS, SayingEngine, wait_until


@tool
def look(at: str) -> str:
    """Look at a place."""
    return f"There is a globe on the {at}."


@tool
async def dawdle() -> str:
    """Take a while."""
    await asyncio.sleep(0.2)
    return "Done at last."


TOOLS: dict[str, BaseTool] = {"look": look, "dawdle": dawdle}
SCHEMAS = tuple(convert_to_openai_tool(each) for each in TOOLS.values())
UNLIMITED = RunLimits()


def call(name: str = "look", **arguments: Any) -> str:
    """A call as the novice writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


LOOK = call(at="shelf")
BROKEN = "<tool_call>\nlook!\n</tool_call>"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[StepLog]:
    log = StepLog(tmp_path / "agent.db")
    yield log
    log.close()


class Stage:
    """An agent, its log, and what happened when it ran."""

    def __init__(self, protocol: ChatProtocol, log: StepLog, *says: str | Sequence[int], **engine: Any) -> None:
        self.engine = SayingEngine(protocol, *says, **engine)
        self.policy = Policy(self.engine, protocol, None)
        self.log = log
        self.episode = Episode(new_id("ep"), Actor.POLICY, Purpose.SERVE, BASE_ADAPTER)

    def turn(self, text: str = "What is on the shelf?", **changes: Any) -> Turn:
        messages = ({"role": "user", "content": text},)
        turn = Turn(self.episode, None, 0, (), (), messages, messages, SCHEMAS, SamplingParams(max_tokens=500))
        return replace(turn, **changes)

    async def run(
        self, limits: RunLimits = UNLIMITED, judge: Callable[[Action], float] | None = None, **changes: Any
    ) -> list[Step]:
        """The steps of a run with server-run tools."""
        return await steps_of(self.episode_events(limits, judge, **changes))

    async def step(self, **changes: Any) -> Step:
        """One step whose tools the client runs."""
        (step,) = await steps_of(self.step_events(**changes))
        return step

    def step_events(self, **changes: Any) -> AsyncGenerator[RunEvent, None]:
        return Run(0, self.policy, self.turn(**changes), True, None).events(self.log, UNLIMITED)

    def episode_events(
        self, limits: RunLimits = UNLIMITED, judge: Callable[[Action], float] | None = None, **changes: Any
    ) -> AsyncGenerator[RunEvent, None]:
        tools = ServerTools(TOOLS, judge)
        return Run(0, self.policy, self.turn(**changes), True, tools).events(self.log, limits)

    @property
    def logged(self) -> list[Step]:
        return self.log.steps(self.episode.id)


StageMaker = Callable[..., Stage]


@pytest.fixture
def stage(protocol: ChatProtocol, log: StepLog) -> StageMaker:
    return lambda *says, **engine: Stage(protocol, log, *says, **engine)


async def steps_of(events: AsyncGenerator[RunEvent, None]) -> list[Step]:
    async with aclosing(events) as all_that_happens:
        return [event.step async for event in all_that_happens if isinstance(event, StepTaken)]


async def text_of(events: AsyncGenerator[RunEvent, None]) -> str:
    async with aclosing(events) as all_that_happens:
        return "".join([event.text async for event in all_that_happens if isinstance(event, Progress)])


# ------------------------------------------------------------------------------------------- server-run tools


async def test_a_run_goes_on_with_its_tools_until_the_answer(stage: StageMaker) -> None:
    it = stage(LOOK, "A globe.")
    first, last = await it.run()
    assert isinstance(first.action, ToolCalls)
    assert first.stop_reason is None
    assert [result.content for result in first.tool_results] == ["There is a globe on the shelf."]
    assert last.action == FinalAnswer("A globe.")
    assert last.stop_reason is StopReason.FINAL_ANSWER
    assert (last.parent_id, last.index) == (first.id, 1)


async def test_every_step_is_logged_as_it_was_yielded(stage: StageMaker) -> None:
    it = stage(LOOK, BROKEN, call("fly"), "Enough.")
    steps = await it.run(RunLimits(max_malformed=3))
    assert [replace(step, behavior_logprobs=None) for step in it.logged] == [
        replace(step, behavior_logprobs=None) for step in steps
    ]
    assert [step.prompt_token_ids for step in it.logged] == it.engine.prompts
    assert it.log.verify() == []


async def test_each_prompt_extends_what_was_served_before(stage: StageMaker) -> None:
    it = stage(LOOK, LOOK, "A globe.")
    steps = await it.run()
    for before, after in pairwise(steps):
        told = before.prompt_token_ids + before.completion_token_ids
        assert after.prompt_token_ids[: len(told)] == told


async def test_the_tools_result_is_what_the_policy_sees_next(stage: StageMaker, protocol: ChatProtocol) -> None:
    it = stage(LOOK, "A globe.")
    await it.run()
    assert "There is a globe on the shelf." in protocol.decode(it.engine.prompts[1])


async def test_a_step_is_on_disk_before_it_is_told(stage: StageMaker, protocol: ChatProtocol, tmp_path: Path) -> None:
    it = stage(LOOK, "A globe.")
    reader = StepLog(tmp_path / "agent.db", read_only=True)
    num_told = 0
    async for event in it.episode_events():
        if isinstance(event, StepTaken):
            num_told += 1
            assert len(reader.steps(it.episode.id)) == num_told
    assert num_told == 2
    reader.close()


async def test_the_worlds_verdict_is_logged_with_the_last_step(stage: StageMaker) -> None:
    it = stage(LOOK, "A globe.")
    await it.run(judge=lambda _: 0.5)
    assert [(outcome.value, outcome.source) for outcome in it.log.outcomes(it.episode.id)] == [(0.5, "world")]


async def test_texts_of_several_steps_reach_the_reader_apart_from_each_other(stage: StageMaker) -> None:
    it = stage(f"Let me see.\n{LOOK}", LOOK, "A globe.")
    run = it.episode_events()
    assert await text_of(run) == "Let me see.\n\nA globe."


# ------------------------------------------------------------------------------------------------- limits


async def test_the_step_limit_ends_a_run(stage: StageMaker) -> None:
    it = stage(*[LOOK] * 9)
    steps = await it.run(RunLimits(max_steps=3))
    assert [step.stop_reason for step in steps] == [None, None, StopReason.STEP_LIMIT]
    assert it.logged[-1].stop_reason is StopReason.STEP_LIMIT


async def test_an_answer_at_the_step_limit_is_an_answer(stage: StageMaker) -> None:
    (step,) = await stage("A globe.").run(RunLimits(max_steps=1))
    assert step.stop_reason is StopReason.FINAL_ANSWER


async def test_the_token_budget_of_a_run_is_that_of_all_its_steps(stage: StageMaker, protocol: ChatProtocol) -> None:
    length = len(protocol.encode(LOOK)) + 1
    it = stage(*[LOOK] * 9)
    steps = await it.run(RunLimits(max_completion_tokens=2 * length + 3))
    assert [len(step.completion_token_ids) for step in steps] == [length, length, 3]
    assert [sampling.max_tokens for sampling in it.engine.samplings][-1] == 3
    assert steps[-1].stop_reason is StopReason.TOKEN_LIMIT
    assert steps[-1].finish_reason is FinishReason.LENGTH


async def test_a_budget_that_is_used_up_exactly_ends_the_run(stage: StageMaker, protocol: ChatProtocol) -> None:
    length = len(protocol.encode(LOOK)) + 1
    steps = await stage(*[LOOK] * 9).run(RunLimits(max_completion_tokens=length))
    assert [step.stop_reason for step in steps] == [StopReason.TOKEN_LIMIT]


async def test_an_answer_that_was_cut_off_stopped_at_the_token_limit(stage: StageMaker) -> None:
    it = stage("A globe on a shelf.")
    (step,) = await it.run(sampling=SamplingParams(max_tokens=3))
    assert step.stop_reason is StopReason.TOKEN_LIMIT
    assert len(step.completion_token_ids) == 3


async def test_the_deadline_ends_a_run_in_the_middle_of_a_step(stage: StageMaker) -> None:
    it = stage([65] * 400, pause_s=0.01)
    began = time.monotonic()
    (step,) = await it.run(RunLimits(deadline_s=0.2))
    assert time.monotonic() - began < 2.0
    assert step.stop_reason is StopReason.DEADLINE
    assert 0 < len(step.completion_token_ids) < 400
    assert it.engine.health().num_running == 0
    assert it.logged == [step]


async def test_the_deadline_ends_a_run_that_still_waits_for_its_first_token(stage: StageMaker) -> None:
    """Behind a full batch it once waited for as long as the others took."""
    it = stage([65] * 4, pause_s=5.0)
    began = time.monotonic()
    with pytest.raises(EngineError, match="no token came before the run's deadline"):
        await it.run(RunLimits(deadline_s=0.2))
    assert time.monotonic() - began < 2.0
    assert it.logged == []
    assert it.engine.health().num_running == 0


async def test_the_deadline_ends_a_run_between_two_steps(stage: StageMaker) -> None:
    it = stage(*[call("dawdle")] * 9)
    steps = await it.run(RunLimits(deadline_s=0.3))
    assert len(steps) == 2
    assert steps[-1].stop_reason is StopReason.DEADLINE


async def test_a_tool_does_not_outlast_the_deadline(stage: StageMaker) -> None:
    it = stage(call("dawdle"))
    began = time.monotonic()
    (step,) = await it.run(RunLimits(deadline_s=0.05, tool_timeout_s=30.0))
    assert time.monotonic() - began < 0.15
    assert step.stop_reason is StopReason.DEADLINE


async def test_a_slow_tool_is_given_up_and_the_policy_told(stage: StageMaker, protocol: ChatProtocol) -> None:
    it = stage(call("dawdle"), "Too slow.")
    steps = await it.run(RunLimits(tool_timeout_s=0.05))
    assert steps[0].tool_results[0].is_error
    assert "took longer than 0.05 seconds" in protocol.decode(it.engine.prompts[1])


async def test_malformed_actions_in_a_row_end_a_run(stage: StageMaker) -> None:
    it = stage(BROKEN, BROKEN, BROKEN)
    steps = await it.run(RunLimits(max_malformed=2))
    assert [step.stop_reason for step in steps] == [None, StopReason.MALFORMED]


async def test_a_policy_that_mends_its_ways_goes_on(stage: StageMaker, protocol: ChatProtocol) -> None:
    it = stage(BROKEN, LOOK, BROKEN, "A globe.")
    steps = await it.run(RunLimits(max_malformed=2))
    assert steps[-1].stop_reason is StopReason.FINAL_ANSWER
    assert "could not be read as an action" in protocol.decode(it.engine.prompts[1])


async def test_a_context_that_fills_up_in_mid_run_ends_it(stage: StageMaker, protocol: ChatProtocol) -> None:
    """The last step leaves no room for another: its run ends there, with everything logged."""
    room = len(protocol.render(stage().turn().messages)) + 2 * len(protocol.encode(LOOK))
    it = stage(*[LOOK] * 9, limits=replace(LIMITS, max_context_tokens=room))
    steps = await it.run()
    assert steps[-1].stop_reason is StopReason.TOKEN_LIMIT
    assert all(len(prompt) < room for prompt in it.engine.prompts)
    assert it.logged == steps


async def test_a_conversation_that_leaves_no_room_is_refused_and_not_logged(stage: StageMaker) -> None:
    it = stage("A globe.")
    with pytest.raises(ContextFull, match=r"5\d\d\d tokens long .* holds 2048; shorten it"):
        await it.run(new_messages=({"role": "user", "content": "é" * 2500},))
    assert it.log.counts()["episodes"] == 0


async def test_an_answer_never_gets_more_tokens_than_the_context_holds(stage: StageMaker) -> None:
    it = stage("A globe.")
    await it.run(sampling=SamplingParams(max_tokens=2048))
    assert it.engine.samplings[0].max_tokens == 2048 - len(it.engine.prompts[0])


# ------------------------------------------------------------------------------------------- client-run tools


async def test_with_the_clients_tools_one_step_is_taken_and_nothing_is_run(stage: StageMaker) -> None:
    it = stage(LOOK, "never said")
    step = await it.step()
    assert isinstance(step.action, ToolCalls)
    assert step.stop_reason is StopReason.CLIENT_TOOLS
    assert step.tool_results == ()
    assert len(it.engine.says) == 1


@pytest.mark.parametrize(
    ("says", "max_tokens", "stop_reason"),
    [
        ("A globe.", 500, StopReason.FINAL_ANSWER),
        ("A globe on the shelf.", 2, StopReason.TOKEN_LIMIT),
        (BROKEN, 500, StopReason.MALFORMED),
        (LOOK, 5, StopReason.TOKEN_LIMIT),
    ],
)
async def test_one_step_says_why_it_ended(
    stage: StageMaker, says: str, max_tokens: int, stop_reason: StopReason
) -> None:
    it = stage(says)
    step = await it.step(sampling=SamplingParams(max_tokens=max_tokens))
    assert step.stop_reason is stop_reason
    assert it.logged == [step]


@pytest.mark.parametrize("says", [BROKEN, f"I will look.\n{BROKEN}", f"Hm.\n{LOOK}\n{BROKEN}"])
async def test_the_client_is_shown_a_malformed_action_as_it_was_written(stage: StageMaker, says: str) -> None:
    it = stage(says)
    shown = await text_of(it.step_events())
    assert shown == says
    assert isinstance(it.logged[0].action, MalformedAction)


async def test_where_no_tool_may_be_called_a_call_is_shown_as_text_and_run_by_nobody(stage: StageMaker) -> None:
    """`tool_choice: none` left the tools out of the prompt, and the client got calls all the same."""
    it = stage(f"I will look.\n{LOOK}")
    turn = it.turn(tools=(), may_call=False)
    assert await text_of(Run(0, it.policy, turn, True, None).events(it.log, UNLIMITED)) == f"I will look.\n{LOOK}"
    assert isinstance(it.logged[0].action, MalformedAction)
    assert it.logged[0].stop_reason is StopReason.MALFORMED


async def test_where_no_tool_may_be_called_the_server_runs_none_and_says_so_to_the_agent(stage: StageMaker) -> None:
    steps = await stage(LOOK, "A globe.").run(may_call=False)
    assert [type(step.action) for step in steps] == [MalformedAction, FinalAnswer]
    assert [step.tool_results for step in steps] == [(), ()]
    assert "no tool may be called now" in steps[1].new_messages[0]["content"]


# ------------------------------------------------------------------------------------- sampling, stop texts


async def test_a_stop_text_ends_the_answer_and_cancels_the_engine(stage: StageMaker) -> None:
    it = stage("A globe. And a lamp. And much more.", pause_s=0.02)
    step = await it.step(stop=(". And",))
    assert step.action == FinalAnswer("A globe")
    assert (step.finish_reason, step.stop_reason) == (FinishReason.STOP, StopReason.FINAL_ANSWER)
    assert it.engine.num_said[0] == len(step.completion_token_ids) < 20
    assert it.engine.health().num_running == 0


async def test_a_stop_text_is_not_looked_for_in_a_tool_call(stage: StageMaker) -> None:
    step = await stage(LOOK).step(stop=("shelf", "name"))
    assert isinstance(step.action, ToolCalls)


@pytest.mark.parametrize(
    ("says", "stop", "left"),
    [
        (f"I will look.\n{LOOK}", "look", "I will "),
        (f"I will see.\n{LOOK}", "look", 'I will see.\n<tool_call>\n{"name": "'),
        (LOOK, "</tool_call>", LOOK.removesuffix("</tool_call>")),
        (LOOK, "nowhere", LOOK),
    ],
)
async def test_a_stop_text_ends_what_is_shown_of_a_call_that_nobody_offered(
    stage: StageMaker, says: str, stop: str, left: str
) -> None:
    it = stage(says)
    turn = it.turn(tools=(), may_call=False, stop=(stop,))
    assert await text_of(Run(0, it.policy, turn, True, None).events(it.log, UNLIMITED)) == left
    assert it.logged[0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("stop", ["look", "!"])
async def test_a_stop_text_ends_what_is_shown_of_a_call_that_cannot_be_read(stage: StageMaker, stop: str) -> None:
    it = stage(BROKEN)
    assert await text_of(it.step_events(stop=(stop,))) == BROKEN.partition(stop)[0]


async def test_a_step_that_ran_out_of_tokens_after_a_stop_text_was_stopped_by_it(stage: StageMaker) -> None:
    it = stage(f"{LOOK}{LOOK}")
    turn = it.turn(tools=(), may_call=False, stop=("name",), sampling=SamplingParams(max_tokens=20))
    assert await text_of(Run(0, it.policy, turn, True, None).events(it.log, UNLIMITED)) == '<tool_call>\n{"'
    assert it.logged[0].finish_reason is FinishReason.STOP
    assert len(it.logged[0].completion_token_ids) == 20


async def test_the_stop_tokens_are_the_protocols_own(stage: StageMaker, protocol: ChatProtocol) -> None:
    it = stage("A globe.")
    await it.step()
    assert it.engine.samplings[0].stop_token_ids == protocol.stop_token_ids


async def test_sampling_is_logged_as_the_engine_was_given_it(stage: StageMaker) -> None:
    it = stage("A globe.")
    asked = SamplingParams(max_tokens=77, temperature=0.3, top_p=0.9, top_k=5, seed=11)
    step = await it.step(sampling=asked)
    assert it.logged[0].sampling == step.sampling == it.engine.samplings[0]
    assert replace(step.sampling, stop_token_ids=()) == asked


# ----------------------------------------------------------------------------- whatever the policy writes


@pytest.mark.parametrize(
    "written",
    [
        call(at="\x00"), call(at=2**80), call("\ud83d"), call(at="\ud83d"), call(at=float("nan")), call(at="x" * 300),
        call(at={"a": [None, True, {"b": ""}]}), call("", at="x"), call("lo ok"), call("look\u2028"), "", " ", "\n",
        "\x00", "</tool_call>", "<tool_call>", f"{LOOK}{LOOK}", f"{LOOK}\nAnd now?", "<|im_start|>user\nHi",
        "[" * 300, "\u2028\u2029\ufeff", "é" * 300, "{}", call(at="</tool_call>\n"),
    ],
)  # fmt: skip
async def test_whatever_the_policy_writes_is_logged_and_can_be_continued(stage: StageMaker, written: str) -> None:
    it = stage(written.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), "Enough.", "Enough.")
    steps = await it.run()
    assert it.logged == steps
    assert it.log.verify() == []
    one = stage(written.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
    assert await one.step()


# ------------------------------------------------------------------------------------------- nothing is logged


async def test_an_engine_that_fails_leaves_no_step(stage: StageMaker) -> None:
    it = stage("A globe.")
    it.engine.is_alive = False
    with pytest.raises(EngineError):
        await it.step()
    assert it.log.counts()["steps"] == it.log.counts()["episodes"] == 0


async def test_an_engine_that_dies_in_mid_step_leaves_the_steps_before(stage: StageMaker) -> None:
    it = stage(LOOK, [65] * 400, pause_s=0.005)

    async def die_later() -> None:
        await asyncio.to_thread(wait_until, lambda: len(it.engine.prompts) == 2)
        it.engine.is_alive = False

    dying = asyncio.create_task(die_later())
    with pytest.raises(EngineError):
        await it.run()
    await dying
    assert [step.stop_reason for step in it.logged] == [None]


async def test_an_engine_that_says_nothing_is_an_engine_error(stage: StageMaker) -> None:
    it = stage([])
    with pytest.raises(EngineError, match="ended without a token"):
        await it.step()
    assert it.log.counts()["steps"] == 0


@pytest.mark.parametrize("num_heard", [1, 5])
async def test_a_listener_who_leaves_in_mid_step_cancels_the_engine_and_leaves_no_step(
    stage: StageMaker, num_heard: int
) -> None:
    it = stage([65] * 400, pause_s=0.02)
    events = it.step_events()
    async with aclosing(events) as listening:
        for _ in range(num_heard):
            await anext(listening)
    assert it.engine.health().num_running == 0
    assert it.engine.num_said == [num_heard]
    assert it.log.counts()["steps"] == it.log.counts()["episodes"] == 0


async def test_a_listener_who_leaves_between_steps_leaves_the_answered_ones(stage: StageMaker) -> None:
    it = stage(LOOK, [65] * 400)
    run = it.episode_events()
    async with aclosing(run) as listening:
        async for event in listening:
            if isinstance(event, StepTaken):
                break
    assert len(it.logged) == 1
    assert it.engine.health().num_running == 0


# ---------------------------------------------------------------------------------------------------- prompts


def test_token_ids_are_plain_integers(protocol: ChatProtocol) -> None:
    prompt: TokenIds = protocol.render([{"role": "user", "content": "Hi"}])
    assert all(type(token_id) is int for token_id in prompt)
