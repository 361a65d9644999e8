"""An action must read back as itself wherever it is learned: in an import, a correction, and what an expert says."""

from __future__ import annotations

import pytest

from learner.data.collect import LoggedState
from learner.data.inspection import _in_tokens
from policies.chat.chat_protocol import ChatProtocol
from policies.chat.read_back import misreading
from policies.types import Action, FinalAnswer, FinishReason, Message, SamplingParams, ToolCall, ToolCalls, ToolSchema
from runtime.agent.demonstrations import Demonstration, DemonstrationRefused, demonstrated_steps
from runtime.store.episodes import Step, new_id
from tests.serving import LIMITS

QUESTION: Message = {"role": "user", "content": "Is it raining?"}
TOOL: ToolSchema = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
SAID_OTHERWISE: list[Action] = [
    FinalAnswer(CALL),  # another type
    ToolCalls((ToolCall("call_0", "look", {}),), CALL),  # the same type, with other calls
    FinalAnswer("It rains.<|im_end|>And snows."),
]
SAID_SO: list[Action] = [FinalAnswer("It rains."), ToolCalls((ToolCall("call_0", "look", {"far": True}),))]


def state(protocol: ChatProtocol) -> LoggedState:
    step = Step(
        id=new_id("step"), episode_id="ep", parent_id=None, index=0, new_messages=(QUESTION,), tools=(TOOL,),
        prompt_token_ids=protocol.render([QUESTION], [TOOL]), completion_token_ids=(1,), behavior_logprobs=None,
        sampling=SamplingParams(), adapter="base", action=FinalAnswer("?"), finish_reason=FinishReason.STOP,
        stop_reason=None, tool_results=(), conversation_digest="", created_at=0.0, first_token_ms=0.0, latency_ms=0.0,
    )  # fmt: skip
    return LoggedState(None, (step,))


@pytest.mark.parametrize("action", SAID_OTHERWISE, ids=repr)
def test_an_action_that_reads_back_otherwise_is_refused_everywhere(protocol: ChatProtocol, action: Action) -> None:
    _, completion = protocol.completion_of([QUESTION], action, [TOOL])
    if misreading(protocol, completion, action, [TOOL]) is None:
        pytest.skip("its marks are encoded as text: it reads back as itself")
    assert _in_tokens(protocol, state(protocol), action) is None
    if isinstance(action, FinalAnswer):
        demonstration = Demonstration((QUESTION, {"role": "assistant", "content": action.text}), (TOOL,))
        with pytest.raises(DemonstrationRefused, match="message 1"):
            demonstrated_steps(demonstration, protocol, LIMITS)


@pytest.mark.parametrize("action", SAID_SO, ids=repr)
def test_an_action_that_reads_back_as_itself_is_learned(protocol: ChatProtocol, action: Action) -> None:
    _, completion = protocol.completion_of([QUESTION], action, [TOOL])
    assert misreading(protocol, completion, action, [TOOL]) is None
    assert _in_tokens(protocol, state(protocol), action) == completion
