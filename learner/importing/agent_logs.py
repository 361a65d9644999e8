"""What agents and their evaluations keep of a run: ATIF trajectories, samples of Inspect, memories of smolagents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from learner.importing.contents import plain_text, result_text
from learner.importing.fields import Fields, RefusedRecord, is_empty
from learner.importing.marks import close_message, close_record
from learner.importing.messages import read_message
from learner.importing.rows import take_beside, take_task, with_system
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Call, Draft, SourceFormat, Turn
from learner.importing.written_calls import read_call

# ---------------------------------------------------------------------------------------------------- ATIF


def read_atif(record: dict[str, Any]) -> Draft:
    """A trajectory of ATIF, with its steps' observations behind them."""
    fields = Fields(record, "the trajectory")
    steps = fields.take_list("steps")
    agent = Fields(fields.take("agent"), "the agent")
    tools = agent.take("tool_definitions")
    system, more_tools, _ = take_beside(agent)
    close_record(agent)
    item_id = fields.take("trajectory_id") or fields.take("session_id")
    if not is_empty(fields.take("subagent_trajectories", "continued_trajectory_ref")):
        raise RefusedRecord("it has trajectories of other agents within it, or goes on in another file")
    task = _read_own(fields)
    close_record(fields, frozenset({"notes", "final_metrics", "schema_version"}))
    turns = [turn for number, step in enumerate(steps, 1) for turn in _atif_step(step, number)]
    return Draft(
        SourceFormat.ATIF,
        with_system(system, turns),
        read_tools(tools, *more_tools),
        str(item_id) if item_id else None,
        task,
    )


def _read_own(fields: Fields) -> str | None:
    """The task, of what our own export says of an episode. Raises RefusedRecord where it failed."""
    extra = Fields(fields.take("extra") or {}, "extra")
    own = Fields(extra.take("stepagent") or {}, "extra.stepagent")
    outcomes = own.take_list("outcomes")
    newest = outcomes[-1].get("value") if outcomes and isinstance(outcomes[-1], dict) else None
    if isinstance(newest, int | float) and newest <= 0:
        raise RefusedRecord(f"its outcome is {newest}: the trajectory is marked as no expert's")
    task = take_task(own)
    own.close(frozenset({"actor", "purpose", "adapter", "task"}))
    close_record(extra)
    return task


_ATIF_SOURCES = {"system": "system", "user": "user", "agent": "assistant"}


def _atif_step(step: Any, number: int) -> list[Turn]:
    fields = Fields(step, f"step {number}")
    source = fields.take("source")
    role = _ATIF_SOURCES.get(source) if isinstance(source, str) else None
    if role is None:
        raise RefusedRecord(f"step {number} is from {source!r}; known are {', '.join(_ATIF_SOURCES)}")
    message = fields.take("message")
    thinking = fields.take_text("reasoning_content")
    calls = tuple(_atif_call(call, number) for call in fields.take_list("tool_calls"))
    observation = fields.take("observation")
    is_copied = fields.take("is_copied_context") is True
    extra = fields.take("extra")
    is_copied |= fields.take("llm_call_count") == 0  # a program's step, not a model's
    for unread in ("metrics", "step_id"):
        fields.take(unread)
    is_learned = close_message(fields, role == "assistant", frozenset({"extra"})) and not is_copied
    if isinstance(extra, dict):
        own = extra.get("stepagent")
        is_learned &= not (isinstance(own, dict) and own.get("is_learned") is False)
        extra = {name: value for name, value in extra.items() if name != "stepagent"}  # its rewards are no marks
        is_learned = close_message(Fields({"metadata": extra}, f"step {number}"), role == "assistant") and is_learned
    text = plain_text(message, f"step {number}")
    if role != "assistant":
        if not is_empty(observation):
            raise RefusedRecord(f"step {number} is no action, and has an observation")
        return [Turn(role, text)]
    said = read_message({"role": "assistant", "content": text}, f"step {number}", [])[0]
    if thinking and said.thinking not in ("", thinking):
        raise RefusedRecord(f"step {number} has different thinking in different places")
    turn = replace(said, thinking=thinking or said.thinking, calls=calls or said.calls, is_learned=is_learned)
    return [turn, *_atif_results(observation, number)]


def _atif_call(call: Any, number: int) -> Call:
    fields = Fields(call, f"step {number}")
    read = Call(fields.take("function_name"), fields.take("arguments"), fields.take("tool_call_id"))
    fields.take("extra")
    fields.close()
    return read


def _atif_results(observation: Any, number: int) -> list[Turn]:
    if is_empty(observation):
        return []
    fields = Fields(observation, f"the observation of step {number}")
    results = fields.take_list("results")
    fields.close()
    turns = []
    for result in results:
        each = Fields(result, f"the observation of step {number}")
        call_id, content = each.take("source_call_id"), each.take("content")
        if not is_empty(each.take("subagent_trajectory_ref")):
            raise RefusedRecord(f"step {number} was left to another agent, whose trajectory is elsewhere")
        each.take("extra")
        each.close()
        turns.append(Turn("tool", result_text(content, f"step {number}"), result_of=call_id))
    return turns


# ------------------------------------------------------------------------------------------------- Inspect

_OF_SAMPLES = frozenset(
    "epoch input choices target output store events model_usage role_usage attachments files setup sandbox "
    "working_time total_time timelines events_data started_at completed_at error_retries".split()
)


def read_inspect_sample(record: dict[str, Any]) -> Draft:
    """One sample of an evaluation log. Raises RefusedRecord where its score, or an error, says that it failed."""
    fields = Fields(record, "the sample")
    messages = fields.take("messages")
    events = fields.take("events")
    if fields.take("limit"):
        raise RefusedRecord("the sample ended at a limit: it is no expert's")
    if not is_empty(fields.take("invalidation")):
        raise RefusedRecord("the sample has an invalidation: it is marked as no expert's")
    item_id = fields.take("id")
    attachments = fields.take("attachments")
    system, tools, _ = take_beside(fields)
    close_record(fields, _OF_SAMPLES)
    if attachments:
        messages = _with_attachments(messages, attachments)
    turns = [turn for number, message in enumerate(messages, 1) for turn in _inspect_message(message, number)]
    offered = [
        event.get("tools") for event in events or [] if isinstance(event, dict) and event.get("event") == "model"
    ]
    name = None if item_id is None else str(item_id)
    return Draft(SourceFormat.INSPECT, with_system(system, turns), read_tools(*tools, *offered), name)


def _inspect_message(message: Any, number: int) -> list[Turn]:
    """What the data set put into the assistant's mouth is an example, and no action of its own."""
    is_given = isinstance(message, dict) and message.get("source") == "input"
    turns = read_message(message, f"message {number}", [])
    return [replace(turn, is_learned=turn.is_learned and not is_given) for turn in turns]


def _with_attachments(value: Any, attachments: dict[str, Any]) -> Any:
    """Long texts stand apart in a log, under `attachment://` and their digest."""
    if isinstance(value, str) and value.startswith("attachment://"):
        return attachments.get(value.removeprefix("attachment://"), value)
    if isinstance(value, list):
        return [_with_attachments(each, attachments) for each in value]
    if isinstance(value, dict):
        return {key: _with_attachments(each, attachments) for key, each in value.items()}
    return value


# ---------------------------------------------------------------------------------------------- smolagents

_OF_STEPS = frozenset(
    "step_number timing token_usage model_input_messages code_action observations_images task_images action_output "
    "is_final_answer duration start_time end_time step agent_memory model_output".split()
)


def is_smolagents_step(value: Any) -> bool:
    if not isinstance(value, dict) or not value or "role" in value:
        return False
    return (
        "model_output" in value
        or "model_output_message" in value
        or set(value) <= {"system_prompt", "task", "task_images"}
    )


def read_smolagents(steps: list[Any]) -> Draft:
    """The memory of an agent, as `get_full_steps` gives it, or as its runs are stored."""
    turns: list[Turn] = []
    for number, step in enumerate(steps, 1):
        fields = Fields(step, f"step {number}")
        if "system_prompt" in fields:
            turns.append(Turn("system", plain_text(fields.take("system_prompt"), fields.where)))
            fields.close(_OF_STEPS)
        elif "task" in fields:
            turns.append(Turn("user", f"New task:\n{fields.take_text('task')}"))
            if not is_empty(fields.take("task_images")):
                raise RefusedRecord("its task has images; only text is read")
            fields.close(_OF_STEPS)
        elif "plan" in fields:
            raise RefusedRecord(
                f"step {number} is a plan, which the agent asks for in words that the file does not hold"
            )
        elif "output" in fields and "model_output" not in fields:  # the final answer again
            fields.take("output")
            fields.close(_OF_STEPS)
        else:
            turns += _smolagents_step(fields)
    return Draft(SourceFormat.SMOLAGENTS, turns)


def _smolagents_step(fields: Fields) -> list[Turn]:
    where = fields.where
    message, text = fields.take("model_output_message"), fields.take("model_output")
    executed = tuple(read_call(call, where) for call in fields.take_list("tool_calls"))
    observations, error = fields.take_text("observations"), fields.take("error")
    if not is_empty(fields.take("observations_images")):
        raise RefusedRecord(f"{where} has images; only text is read")
    fields.close(_OF_STEPS)
    if isinstance(message, dict):
        message = {key: value for key, value in message.items() if key not in ("raw", "token_usage")}
        said = read_message({"role": "assistant", **message}, where, [])[0]
    else:
        said = read_message({"role": "assistant", "content": text}, where, [])[0]
    if not said.calls and any(call.name != "python_interpreter" for call in executed):
        said = replace(said, text="", calls=executed)  # the model wrote its call as JSON text; code stays text
    if error is not None:  # what led to an error is seen, and not learned
        said = replace(said, is_learned=False)
        told = error.get("message") if isinstance(error, dict) else error
        observations = f"{observations}\nError:\n{told}".strip()
    if len(said.calls) > 1:
        raise RefusedRecord(f"{where} has {len(said.calls)} calls and one observation for all of them")
    for call in said.calls:
        return [said, Turn("tool", observations, result_of=call.id)]
    return [said, Turn("user", f"Observation:\n{observations}")] if observations else [said]
