"""The one check of what an expert's action must be to be learned, whichever way it came.

That it can be read back from its tokens is `read_back`'s; here is whether it does something that its tools take.
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.chat.argument_check import argument_problem
from policies.types import Action, FinalAnswer, MalformedAction, ToolCalls, ToolSchema


def unlearnable(action: Action, tools: Sequence[ToolSchema]) -> str | None:
    """Why nobody should learn an action, as the end of a sentence about its message; None where it may be learned.

    Its arguments are not looked at, see `unfit_arguments`. No tools at all: the source does not tell, any call will do.
    """
    match action:
        case MalformedAction(_, problem):
            return f"cannot be read as an action: {problem}"
        case FinalAnswer(text):
            return None if text.strip() else "says nothing and calls nothing"
        case ToolCalls(calls):
            names = [tool["function"]["name"] for tool in tools]
            strange = [call.name for call in calls if names and call.name not in names]
            return f"calls {strange[0]!r}, which is not among its tools: {', '.join(names)}" if strange else None


def unfit_arguments(action: Action, tools: Sequence[ToolSchema]) -> str | None:
    """The first of an action's calls that its tool would not take, told as above; None where all fit.

    Not asked of transcripts: experts do give wrong arguments, are told so by the tool, and give right ones.
    """
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    for call in action.calls if isinstance(action, ToolCalls) else ():
        if problem := argument_problem(call.arguments, schemas.get(call.name)):
            return f"calls {call.name} wrongly: {problem}"
    return None
