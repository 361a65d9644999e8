"""Logs of what was asked and answered: LangSmith, Langfuse, pairs of a request and its response."""

from __future__ import annotations

from typing import Any

from learner.importing.contents import plain_text
from learner.importing.exact_json import loads
from learner.importing.fields import Fields, RefusedRecord, is_empty, snake_case
from learner.importing.marks import Mark, close_record, mark_of
from learner.importing.messages import is_message, read_message, read_turns
from learner.importing.printed import require_not_printed
from learner.importing.rows import take_beside, with_system
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Draft, SourceFormat, Turn
from learner.importing.written_calls import tools_in_text

_INPUT_NAMES = ("messages", "input", "contents", "prompt", "chat_history", "question", "query", "text")
_OUTPUT_NAMES = ("message", "messages", "output", "answer", "text", "content", "response", "completion", "result")
OF_TRACES = frozenset(
    "run_type runtime inputs_preview outputs_preview extra events tags child_runs parent_run dotted_order serialized "
    "manifest trace app_path status reference_example share_token in_dataset first_token type name level "
    "statusMessage modelParameters model_parameters observations projectId environment bookmarked public release "
    "promptName promptVersion usageDetails costDetails calculatedTotalCost completionStartTime metadata "
    "expectedOutput sourceTraceId sourceObservationId datasetId datasetName attributes kind flags links resource "
    "scope instrumentation_scope context spanId traceId parentSpanId traceState startTimeUnixNano endTimeUnixNano "
    "instrumentationScope spanKind span_kind droppedAttributesCount droppedEventsCount htmlPath unit traceName "
    "traceTags inputPrice outputPrice totalPrice op_name display_name span_name span_type service_name "
    "is_remote otel_scope_name spans start_time_unix_nano "
    "end_time_unix_nano request_preview response_preview trace_metadata status_message".split()
)


_PAIRS = (
    ("request_body", "response_body"),  # Helicone
    ("messages", "response"),  # LiteLLM, DSPy, OpenHands
    ("request", "response"),
    ("input", "output"),
)
_BODIES = ("body", "inputBodyJson", "outputBodyJson")
"""Bedrock's log and OpenAI's batches keep what was said in an envelope within the envelope."""
_OF_LOGS = frozenset(
    "call_type api_base api_key cache_hit request_tags end_user method hidden_params kwargs args "
    "model_parameters model_group model_map_information guardrail_information requester_ip_address outputs model_type "
    "response_model proxy_server_request schema_type account_id identity region operation request_properties "
    "response_cost_failure_debug_info custom_llm_provider spend cache_key request_headers response_headers".split()
)
"""What gateways write beside a request and its answer."""


def as_pair(record: dict[str, Any]) -> dict[str, Any] | None:
    """A gateway's log of a request and its response as `request` and `response`; None for what is no such log."""
    for asked, answered in _PAIRS:
        request, response = decoded(record.get(asked)), decoded(record.get(answered))
        if isinstance(request, list) and asked == "messages":
            settings = decoded(record.get("model_parameters") or record.get("kwargs"))
            request = {"messages": request, "parameters": settings if isinstance(settings, dict) else None}
        is_log = (asked, answered) in _PAIRS[:2] or (
            isinstance(request, dict) and any(name in request for name in _BODIES)
        )
        request, response = _body(request), _body(response)
        if is_log and isinstance(request, dict) and isinstance(response, dict):
            beside = {key: held for key, held in record.items() if key not in (asked, answered)}
            beside = {key: held for key, held in beside.items() if snake_case(key) not in _OF_LOGS}
            return {**beside, "request": request, "response": response}
    return None


def _body(value: Any) -> Any:
    """What an envelope holds. Raises RefusedRecord where it says that the request failed."""
    if not isinstance(value, dict) or not (names := [name for name in _BODIES if name in value]):
        return value
    require_success(Fields(value, "the envelope"))
    return value[names[0]]


def read_trace(record: dict[str, Any], source: SourceFormat) -> Draft:
    """A run with what went in and what came out, under whatever names. Raises RefusedRecord."""
    fields = Fields(record, "the record")
    _require_model(record)
    given = decoded(fields.take("inputs", "input", "request"))
    answer = decoded(fields.take("outputs", "output", "response", "expectedOutput", "expected_output"))
    settings = _settings(fields)
    require_success(fields)
    system, tools, item_id = take_beside(fields)
    close_record(fields, OF_TRACES)
    asked, asked_system, asked_tools = read_asked(given)
    found: list[Any] = []
    said = read_answer(answer, found)
    if said and said[0].role == "system" and not (asked and said[: len(asked)] == asked):  # a response repeats it
        system, said = [*system, said[0]], said[1:]
    turns = said if asked and said[: len(asked)] == asked else [*asked, *said]
    turns = with_system(list(dict.fromkeys([*system, *asked_system])), turns)
    tools = [*tools, *asked_tools, *found, settings]
    if all(map(is_empty, tools)):
        tools = [tools_in_text(turn.text) for turn in turns if turn.role == "system"]
    return Draft(source, turns, read_tools(*tools), item_id)


_OF_PROGRAMS = frozenset(
    "tool retriever embedding parser prompt guardrail evaluator event reranker vector_store".split()
)


def _require_model(record: dict[str, Any]) -> None:
    """Raises RefusedRecord for a run that no model answered: a tool's result must not be learned as an answer."""
    kind = str(record.get("run_type") or record.get("type") or "").lower()
    if kind in _OF_PROGRAMS:
        raise RefusedRecord(f"it is a run of a {kind}, not of a model: export the model's runs alone")
    is_inner = bool(record.get("parent_run_id") or record.get("parentObservationId"))
    answer = decoded(next((record[name] for name in ("outputs", "output") if name in record), None))
    if kind in ("chain", "span") and is_inner and not _holds_messages(answer):
        raise RefusedRecord(
            f"it is a {kind} within another run, and its output no message: export the model's runs alone"
        )


def _holds_messages(answer: Any) -> bool:
    """Whether what came out is messages, under whatever names."""
    if isinstance(answer, dict) and not is_message(answer):
        held = next((answer[name] for name in ("messages", "message", "output") if name in answer), None)
        return _holds_messages(held) if held is not None else bool({"choices", "generations", "role"} & set(answer))
    return is_message(answer[-1] if isinstance(answer, list) and answer else answer)


def decoded(value: Any) -> Any:
    """Some exports hold JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _settings(fields: Fields) -> Any:
    """The tools that LangSmith and Langfuse keep among the settings of a run; the rest of those stays to be judged."""
    for path in (("extra", "invocation_params"), ("modelParameters",), ("model_parameters",), ("metadata",)):
        whole = dict(fields.left()).get(path[0])
        held = whole.get(path[1]) if isinstance(whole, dict) and len(path) > 1 else whole
        if not isinstance(held, dict) or not isinstance(whole, dict):
            continue
        tools = next((held[name] for name in ("tools", "functions") if not is_empty(held.get(name))), None)
        if tools is not None:
            rest = {name: value for name, value in held.items() if name not in ("tools", "functions")}
            fields.take(path[0])
            fields.put(path[0], {**whole, path[1]: rest} if len(path) > 1 else rest)
            return tools
    return None


def require_success(fields: Fields) -> None:
    """Raises RefusedRecord where a run, or OpenTelemetry's span, says that it failed."""
    left = dict(fields.left())
    if str(left.get("level", "")).upper() == "ERROR":
        raise RefusedRecord("level is 'ERROR': the run failed")
    status = left.get("status") or fields.take("status_code", "statusCode")
    if isinstance(status, dict):  # OpenTelemetry's
        status = status.get("code") or status.get("status_code")
    code = next((code for code in (status, left.get("response_status")) if isinstance(code, int)), None)
    if code is not None and code >= 400:
        raise RefusedRecord(f"the status is {code}: the request failed")
    if code is not None and 200 <= code < 300:
        fields.take("status", "response_status")
    is_bad = isinstance(status, str) and mark_of("status", status) is Mark.BAD
    if is_bad or str(status).lower() in ("status_code_error", "2", "archived"):
        raise RefusedRecord(f"status is {status!r}: the run is no expert's")


def read_asked(given: Any) -> tuple[list[Turn], list[Turn], list[Any]]:
    """(turns, system turns, tools) of what went in."""
    if isinstance(given, str):
        require_not_printed(given, is_users=True)
        return [Turn("user", given)], [], []
    if is_message(given):
        given = [given]
    if isinstance(given, list):
        turns, tools = read_turns(given, "the input")
        return turns, [], tools
    fields = Fields(given, "the input")
    fields.take("self")  # Weave's, of the client
    _take_text_setting(fields)
    system, tools, _ = take_beside(fields)
    messages = fields.take(*_INPUT_NAMES)
    for name in ("config", "kwargs", "invocation_params", "parameters", "options", "extra_body", "modelParameters"):
        if isinstance(held := fields.take(name), dict):
            inner = Fields(held, name)
            more_system, more_tools, _ = take_beside(inner)
            answer_format = inner.take("response_format")
            if isinstance(answer_format, dict) and answer_format.get("type", "text") != "text":
                raise RefusedRecord(f"{name}.response_format changes what the model may say, and cannot be kept")
            system, tools = [*system, *more_system], [*tools, *more_tools]
    close_record(fields, _OF_REQUESTS)
    turns, more_system, more_tools = read_asked(messages)
    return turns, [*system, *more_system], [*tools, *more_tools]


_OF_REQUESTS = frozenset({"include", "truncation", "background", "max_tool_calls"})
"""Settings of a request to OpenAI's responses that no model is told."""


def read_answer(answer: Any, tools: list[Any]) -> list[Turn]:
    """The turns of what came out."""
    if isinstance(answer, str):
        return read_message({"role": "assistant", "content": answer}, "the output", tools)
    if isinstance(answer, list) and answer and all(isinstance(each, list) for each in answer):
        answer = answer[0] if len(answer) == 1 else answer
    if isinstance(answer, list):
        if answer and all(isinstance(each, dict) and "choices" in each for each in answer):
            raise RefusedRecord("its output is the chunks of a stream: join what they say into one message")
        if len(answer) == 1 and isinstance(answer[0], dict) and "message" in answer[0]:
            return read_answer(answer[0], tools)
        turns, found = read_turns([_as_assistant(each) for each in answer], "the output")
        tools += found
        return turns
    if is_message(answer):
        return read_message(answer, "the output", tools)
    fields = Fields(answer, "the output")
    if fields.take("object") == "response":
        return _read_response(fields, tools)
    for name in ("choices", "generations", "candidates"):
        if name in fields:
            return read_answer(_only_choice(fields.take(name), name), tools)
    if "tool_calls" in fields or ("content" in fields and "role" not in fields):
        return read_message(_as_assistant(answer), "the output", tools)
    if "message" in fields:
        fields.take("text")  # of the message, again
    inner = next((held for name in _OUTPUT_NAMES if not is_empty(held := fields.take(name))), None)
    if inner is None:
        raise RefusedRecord("it has an input, and no output")
    close_record(fields, _OF_ANSWERS)
    return read_answer(inner, tools)


_OF_ANSWERS = frozenset("type usage index logprobs run native_finish_reason".split())


def _read_response(fields: Fields, tools: list[Any]) -> list[Turn]:
    """OpenAI's response: its items, and its tools, which it repeats. Its settings are those of the request."""
    _take_text_setting(fields)
    items = fields.take_list("output")
    tools.append(fields.take("tools"))
    system = plain_text(fields.take("instructions"), "the instructions")
    fields.take("output_text")  # of the items, again
    if fields.take("previous_response_id", "conversation"):
        raise RefusedRecord("it goes on from previous_response_id, which is not in the file")
    if not items:
        raise RefusedRecord("it has an input, and no output")
    close_record(fields, frozenset({"reasoning", "truncation", "background", "prompt", "billing", "moderation"}))
    turns, found = read_turns(items, "the output")
    tools += found
    return [*([Turn("system", system)] if system.strip() else []), *turns]


def _take_text_setting(fields: Fields) -> None:
    """How OpenAI's responses are to be written: no words of the conversation. Raises RefusedRecord for a schema."""
    text = dict(fields.left()).get("text")
    if not isinstance(text, dict):
        return
    text_format = fields.take("text").get("format")
    if isinstance(text_format, dict) and text_format.get("type", "text") != "text":
        raise RefusedRecord("its text.format changes what the model may say, and cannot be kept")


def _as_assistant(value: Any) -> Any:
    return {"role": "assistant", **value} if isinstance(value, dict) and not is_message(value) else value


def _only_choice(choices: Any, name: str) -> Any:
    while isinstance(choices, list) and len(choices) == 1:
        choices = choices[0]
    if isinstance(choices, list):
        raise RefusedRecord(f"its output has {len(choices)} {name}, and nothing tells which was taken")
    return choices
