"""What a chat template is like, found out by rendering with it, never by the model's name.

Makers of models agree on little: some templates have no words for tools, or for thinking; some refuse text beside a
call, several calls at once, or ids that they did not make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from policies.chat.messages import action_message
from policies.types import FinalAnswer, Message, ToolCall, ToolCalls, ToolSchema

Render = Callable[[Sequence[Message], Sequence[ToolSchema], bool, "CallHabits"], str]
"""Messages, tools, whether the policy's turn is opened, and how calls are put: what the template writes.

Raises ValueError where the template refuses them.
"""

QUESTION: list[Message] = [{"role": "user", "content": "?"}]
"""Is rendered to find out what a template is like."""

_ANSWER = "An answer."
_THOUGHT = "A thought."
_CALL = ToolCall("call_0", "a_tool", {})
_RESULT: Message = {"role": "tool", "tool_call_id": "call_0", "content": "A result."}
_TOOL: ToolSchema = {
    "type": "function",
    "function": {"name": "a_tool", "description": "Does.", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class CallHabits:
    """How a message with calls has to be put for a template to take it."""

    has_short_ids: bool = False
    """Mistral's ids: nine letters and digits."""
    drops_text: bool = False
    """A message is text or calls, never both."""


@dataclass(frozen=True, slots=True)
class TemplateTraits:
    """What one chat template does."""

    takes_tools: bool
    """It has words for calls and their results."""
    lists_tools: bool
    """It tells the policy which tools there are."""
    takes_several_calls: bool
    """A turn may make more than one."""
    writes_thoughts: bool
    """The last turn's thinking is written; else a policy cannot be taught to think with it."""
    takes_system_text: bool
    habits: CallHabits
    turn_opening: str
    """What opens the policy's turn: `<|im_start|>assistant`, perhaps a thinking mark."""
    after_answer: str
    """What follows the policy's answer; empty where the answer itself is not written."""
    call_opening: str
    """What begins a call, up to its tool's name; empty where no calls are taken."""
    call_middle: str
    """What stands between the tool's name and the arguments."""


def find_traits(render: Render) -> TemplateTraits:
    """Render small conversations and look. Raises ValueError where the template does not even take a question."""
    habits = _find_habits(render)
    put = habits or CallHabits()

    def write(messages: Sequence[Message], tools: Sequence[ToolSchema] = (), is_open: bool = False) -> str | None:
        try:
            return render(messages, tools, is_open, put)
        except ValueError:
            return None

    closed, opened = (render(QUESTION, (), is_open, put) for is_open in (False, True))
    answer = write([*QUESTION, action_message(FinalAnswer(_ANSWER, _THOUGHT))]) or ""
    plain_answer = render([*QUESTION, action_message(FinalAnswer(_ANSWER))], (), False, put)
    two_calls = ToolCalls((_CALL, ToolCall("call_1", "another_tool", {})))
    call_opening, call_middle = _around_name(write) if habits else ("", "")
    system = write([{"role": "system", "content": "A rule."}, *QUESTION], is_open=True) or ""
    return TemplateTraits(
        takes_tools=habits is not None,
        lists_tools=habits is not None and "a_tool" in (write(QUESTION, (_TOOL,), True) or ""),
        takes_several_calls="another_tool" in (write([*QUESTION, action_message(two_calls)]) or ""),
        writes_thoughts=_THOUGHT in answer,
        takes_system_text="A rule." in system,
        habits=put,
        turn_opening=opened[len(closed) :],
        after_answer=plain_answer.rpartition(_ANSWER)[2] if _ANSWER in plain_answer else "",
        call_opening=call_opening,
        call_middle=call_middle,
    )


def _find_habits(render: Render) -> CallHabits | None:
    """What the template refuses in a message with a call; None where it takes none at all."""
    call = action_message(ToolCalls((_CALL,), "Well."))
    for has_short_ids, drops_text in product((False, True), repeat=2):
        habits = CallHabits(has_short_ids, drops_text)
        try:
            if _CALL.name in render([*QUESTION, call, _RESULT], (), True, habits):
                return habits
        except ValueError:
            continue
    return None


def _around_name(write: Callable[..., str | None]) -> tuple[str, str]:
    """What begins a call that follows no text, and what stands between its name and its arguments."""
    answer = write([*QUESTION, action_message(FinalAnswer(_ANSWER))]) or ""
    call = write([*QUESTION, action_message(ToolCalls((_CALL,)))]) or ""
    before, _, after = call.partition(_CALL.name)
    num_shared = next((at for at, (a, b) in enumerate(zip(before, answer, strict=False)) if a != b), len(before))
    return before[num_shared:], after.partition("{}")[0] if "{}" in after else ""
