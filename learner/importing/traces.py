"""Logs of what was asked and answered: LangSmith, Langfuse, OpenTelemetry, pairs of a request and its response."""

from __future__ import annotations

from typing import Any

from learner.importing.exact_json import loads
from learner.importing.fields import Fields, RefusedRecord, is_empty, kind
from learner.importing.marks import close_record
from learner.importing.messages import is_message, read_message, read_turns
from learner.importing.rows import take_beside, with_system
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Draft, SourceFormat, Turn
from learner.importing.written_calls import tools_in_text

_INPUT_NAMES = ("messages", "input", "contents", "prompt", "chat_history", "question", "query", "text")
_OUTPUT_NAMES = ("message", "messages", "output", "answer", "text", "content", "response", "completion", "result")
_OF_TRACES = frozenset(
    "run_type runtime inputs_preview outputs_preview extra events tags child_runs parent_run dotted_order serialized "
    "manifest trace app_path status reference_example share_token in_dataset first_token type name level "
    "statusMessage modelParameters model_parameters observations projectId environment bookmarked public release "
    "promptName promptVersion usageDetails costDetails calculatedTotalCost completionStartTime metadata "
    "expectedOutput sourceTraceId sourceObservationId datasetId datasetName attributes kind flags links resource "
    "scope instrumentation_scope context spanId traceId parentSpanId traceState startTimeUnixNano endTimeUnixNano "
    "instrumentationScope".split()
)


def read_trace(record: dict[str, Any], source: SourceFormat) -> Draft:
    """A run with what went in and what came out, under whatever names. Raises RefusedRecord."""
    fields = Fields(record, "the record")
    given = _decoded(fields.take("inputs", "input", "request"))
    answer = _decoded(fields.take("outputs", "output", "response", "expectedOutput", "expected_output"))
    settings = _settings(fields)
    _require_success(fields)
    system, tools, item_id = take_beside(fields)
    close_record(fields, _OF_TRACES)
    asked, asked_system, asked_tools = _read_asked(given)
    found: list[Any] = []
    said = _read_answer(answer, found)
    turns = said if asked and said[: len(asked)] == asked else [*asked, *said]
    turns = with_system([*system, *asked_system], turns)
    tools = [*tools, *asked_tools, *found, settings]
    if all(map(is_empty, tools)):
        tools = [tools_in_text(turn.text) for turn in turns if turn.role == "system"]
    return Draft(source, turns, read_tools(*tools), item_id)


def _decoded(value: Any) -> Any:
    """Some exports hold JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _settings(fields: Fields) -> Any:
    """The tools that LangSmith and Langfuse keep among the settings of a run."""
    for path in (("extra", "invocation_params"), ("modelParameters",), ("model_parameters",), ("metadata",)):
        held: Any = dict(fields.left()).get(path[0])
        for name in path[1:]:
            held = held.get(name) if isinstance(held, dict) else None
        if isinstance(held, dict) and not is_empty(held.get("tools") or held.get("functions")):
            tools = held.get("tools") or held.get("functions")
            fields.take(path[0])
            return tools
    return None


def _require_success(fields: Fields) -> None:
    left = dict(fields.left())
    if str(left.get("level", "")).upper() == "ERROR":
        raise RefusedRecord("level is 'ERROR': the run failed")
    status = left.get("status")
    if isinstance(status, dict):  # OpenTelemetry's
        status = status.get("code") or status.get("status_code")
    if str(status).lower() in ("error", "status_code_error", "2", "failed", "archived", "interrupted", "pending"):
        raise RefusedRecord(f"status is {status!r}: the run is no expert's")


def _read_asked(given: Any) -> tuple[list[Turn], list[Turn], list[Any]]:
    """(turns, system turns, tools) of what went in."""
    if isinstance(given, str):
        return [Turn("user", given)], [], []
    if is_message(given):
        given = [given]
    if isinstance(given, list):
        turns, tools = read_turns(given, "the input")
        return turns, [], tools
    fields = Fields(given, "the input")
    system, tools, _ = take_beside(fields)
    messages = fields.take(*_INPUT_NAMES)
    for name in ("config", "kwargs", "invocation_params", "parameters", "options", "extra_body", "modelParameters"):
        if isinstance(held := fields.take(name), dict):
            inner = Fields(held, name)
            more_system, more_tools, _ = take_beside(inner)
            system, tools = [*system, *more_system], [*tools, *more_tools]
    close_record(fields)
    turns, more_system, more_tools = _read_asked(messages)
    return turns, [*system, *more_system], [*tools, *more_tools]


def _read_answer(answer: Any, tools: list[Any]) -> list[Turn]:
    """The turns of what came out."""
    if isinstance(answer, str):
        return read_message({"role": "assistant", "content": answer}, "the output", tools)
    if isinstance(answer, list) and answer and all(isinstance(each, list) for each in answer):
        answer = answer[0] if len(answer) == 1 else answer
    if isinstance(answer, list):
        if len(answer) == 1 and isinstance(answer[0], dict) and "message" in answer[0]:
            return _read_answer(answer[0], tools)
        turns, found = read_turns([_as_assistant(each) for each in answer], "the output")
        tools += found
        return turns
    if is_message(answer):
        return read_message(answer, "the output", tools)
    fields = Fields(answer, "the output")
    for name in ("choices", "generations", "candidates"):
        if name in fields:
            return _read_answer(_only_choice(fields.take(name), name), tools)
    if "tool_calls" in fields or ("content" in fields and "role" not in fields):
        return read_message(_as_assistant(answer), "the output", tools)
    if "message" in fields:
        fields.take("text")  # of the message, again
    inner = next((held for name in _OUTPUT_NAMES if not is_empty(held := fields.take(name))), None)
    for unread in (
        "type",
        "generation_info",
        "llm_output",
        "usage",
        "index",
        "logprobs",
        "run",
        "native_finish_reason",
    ):
        fields.take(unread)
    if inner is None:
        raise RefusedRecord("it has an input, and no output")
    close_record(fields)
    return _read_answer(inner, tools)


def _as_assistant(value: Any) -> Any:
    return {"role": "assistant", **value} if isinstance(value, dict) and not is_message(value) else value


def _only_choice(choices: Any, name: str) -> Any:
    while isinstance(choices, list) and len(choices) == 1:
        choices = choices[0]
    if isinstance(choices, list):
        raise RefusedRecord(f"its output has {len(choices)} {name}, and nothing tells which was taken")
    return choices


# -------------------------------------------------------------------------------------------- OpenTelemetry


def read_span(record: dict[str, Any]) -> Draft:
    """A span with OpenTelemetry's GenAI attributes, as objects or as JSON text."""
    attributes = record.get("attributes", record)
    flat = _flat_attributes(attributes)
    fields = Fields({name.removeprefix("gen_ai."): _decoded(value) for name, value in flat.items()}, "the span")
    asked = fields.take("input.messages", "input_messages", "prompt")
    said = fields.take("output.messages", "output_messages", "completion")
    system, inner = fields.take("system_instructions", "system.instructions"), []
    tools = fields.take("tool.definitions", "tool_definitions", "request.tools")
    if record is not attributes:
        _require_success(Fields(record, "the span"))
    reasons = fields.take("response.finish_reasons")
    if isinstance(reasons, list) and {str(reason) for reason in reasons} & {"length", "content_filter", "error"}:
        raise RefusedRecord(f"finish_reasons is {reasons!r}: its answer was cut off")
    if flat.get("error.type"):
        raise RefusedRecord(f"error.type is {flat['error.type']!r}: the run failed")
    if asked is None or said is None:
        raise RefusedRecord("the span lacks gen_ai.input.messages or gen_ai.output.messages")
    system_turns, _, _ = take_beside(Fields({"system": system}, "the span"))
    turns, more = _read_answer_after(asked, said, inner)
    name = record.get("span_id") or record.get("spanId")
    return Draft(
        SourceFormat.OTEL,
        with_system(system_turns, turns),
        read_tools(tools, *more),
        name if isinstance(name, str) else None,
    )


def _read_answer_after(asked: Any, said: Any, tools: list[Any]) -> tuple[list[Turn], list[Any]]:
    before, _, found = _read_asked(asked)
    return [*before, *_read_answer(said, tools)], [*found, *tools]


def _flat_attributes(attributes: Any) -> dict[str, Any]:
    """Attributes by their names, out of OTLP's list of keys and typed values too."""
    if isinstance(attributes, dict):
        return attributes
    if not isinstance(attributes, list):
        raise RefusedRecord(f"its attributes are {kind(attributes)}")
    flat = {}
    for entry in attributes:
        held = Fields(entry, "an attribute").take("value")
        flat[str(entry.get("key"))] = _typed_value(held)
    return flat


def _typed_value(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((name, held),) = value.items()
    if name == "arrayValue":
        return [_typed_value(each) for each in held.get("values", [])] if isinstance(held, dict) else held
    if name == "kvlistValue":
        return _flat_attributes(held.get("values", [])) if isinstance(held, dict) else held
    return held


def is_span(record: dict[str, Any]) -> bool:
    """Whether a record is a span of a model's call, or its attributes alone."""
    if any(name in record for name in ("output_messages", "gen_ai.output.messages", "gen_ai.input.messages")):
        return True
    attributes = record.get("attributes")
    names = attributes if isinstance(attributes, dict) else []
    if isinstance(attributes, list):
        names = [entry.get("key") for entry in attributes if isinstance(entry, dict)]
    return any(isinstance(name, str) and name.startswith("gen_ai.") for name in names)
