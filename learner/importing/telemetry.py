"""OpenTelemetry's spans of model calls, by whichever of its conventions they were written.

Today's have `gen_ai.input.messages` and `gen_ai.output.messages` as attributes, or on one event. Until v1.36 every
message was an event of its own; before that, prompt and completion were two events. OpenLLMetry and OpenInference
number their attributes: `gen_ai.prompt.0.role`, `llm.input_messages.0.message.role`. All become messages, and are read
as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from learner.importing.fields import Fields, RefusedRecord, is_empty, is_harmless, kind, unknown
from learner.importing.marks import Mark, close_record, judge, mark_of
from learner.importing.messages import read_turns
from learner.importing.rows import take_beside, with_system
from learner.importing.tool_schemas import read_tools
from learner.importing.traces import OF_TRACES, decoded, read_answer, read_asked, read_trace, require_success
from learner.importing.turns import Draft, SourceFormat, Turn

_SETTINGS = tuple(
    "operation. provider. request. response. usage. token. conversation. agent. output.type tool.name tool.type "
    "tool.description tool.call.id data_source. openai. aws. azure. embeddings. server. workflow. prompt.name "
    "memory. is_streaming".split()
)
"""How the names of attributes begin, behind `gen_ai.`, that say nothing of what was said."""
_MESSAGE_EVENTS = {f"gen_ai.{role}.message": role for role in ("system", "user", "assistant", "tool")}
_DETAILS = "gen_ai.client.inference.operation.details"
_TEXT_EVENTS = {"gen_ai.content.prompt": "gen_ai.prompt", "gen_ai.content.completion": "gen_ai.completion"}
_FAILED = frozenset("length max_tokens content_filter error".split())


_PREFIXES = ("gen_ai.", "llm.", "openinference.", "ai.", "mlflow.", "pydantic_ai.")
"""How attributes of model calls begin: of the conventions, of Vercel's AI SDK, of MLflow and of Logfire."""


def _unfolded(record: dict[str, Any]) -> dict[str, Any]:
    """A span with its attributes by their whole names: Phoenix writes them as columns, or as objects in objects."""
    columns = {name: held for name, held in record.items() if name.startswith("attributes.")}
    if columns:
        rest = {name: held for name, held in record.items() if name not in columns and not name.startswith("context.")}
        named = {name.removeprefix("attributes."): held for name, held in columns.items() if held is not None}
        return {**rest, "attributes": named, "span_id": record.get("context.span_id")}
    held = record.get("attributes")
    if isinstance(held, dict) and any(isinstance(held.get(name), dict) for name in ("llm", "gen_ai", "openinference")):
        return {**record, "attributes": dict(_dotted(held))}
    return record


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, held in tree.items():
        if isinstance(held, dict) and held:
            yield from _dotted(held, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", held


def is_span(record: dict[str, Any]) -> bool:
    """Whether a record is a span of a model's call, or its attributes alone."""
    record = _unfolded(record)
    if any(name in record for name in ("output_messages", "gen_ai.output.messages", "gen_ai.input.messages")):
        return True
    events = record.get("events")
    if isinstance(events, list) and any(isinstance(e, dict) and _event_name(e).startswith("gen_ai.") for e in events):
        return True
    attributes = record.get("attributes", record)
    names: Iterable[Any] = attributes if isinstance(attributes, dict) else []
    if isinstance(attributes, list):
        names = [entry.get("key") for entry in attributes if isinstance(entry, dict)]
    return any(isinstance(name, str) and name.startswith(_PREFIXES) for name in names)


def holds_conversation(span: dict[str, Any]) -> bool:
    """Whether a span is a model's call, and not a tool's, or an agent's that holds others."""
    flat = flat_attributes(span.get("attributes", {}))
    if "mlflow.spanType" in flat and str(flat["mlflow.spanType"]).strip('"') not in ("CHAT_MODEL", "LLM"):
        return False
    operation, span_kind = flat.get("gen_ai.operation.name"), flat.get("openinference.span.kind", "LLM")
    return operation not in ("execute_tool", "embeddings", "create_agent", "retrieval") and span_kind == "LLM"


def spans_of_logs(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One span for the events of each, where a program wrote its messages as log records."""
    spans: dict[tuple[Any, Any], dict[str, Any]] = {}
    for record in records:
        key = (record.get("traceId"), record.get("spanId"))
        span = spans.setdefault(key, {"spanId": record.get("spanId"), "attributes": {}, "events": []})
        span["events"].append(record)
    return [span for span in spans.values() if any(_event_name(each).startswith("gen_ai.") for each in span["events"])]


def read_span(record: dict[str, Any]) -> Draft:
    """A span, or the attributes of one. Raises RefusedRecord where it failed, was cut off, or holds no conversation."""
    record = _unfolded(record)
    attributes = record.get("attributes", record)
    flat = {name: decoded(value) for name, value in flat_attributes(attributes).items() if value is not None}
    if "mlflow.spanInputs" in flat:
        return _read_mlflow(record, flat)
    if record is not attributes:
        _judge_span(record)
    asked, said = _from_events(record.get("events") or flat.pop("events", None), flat)
    indexed = _indexed_messages(flat)
    if isinstance(whole := flat.get("pydantic_ai.all_messages"), list):  # Logfire's, of an agent's whole run
        asked, said = whole[:-1], whole[-1:]
    sdk_asked, sdk_said, sdk_tools = _of_ai_sdk(flat)
    fields = Fields({name.removeprefix("gen_ai."): value for name, value in flat.items()}, "the span")
    asked = fields.take("input.messages", "input_messages", "prompt") or asked or indexed[0] or sdk_asked
    said = fields.take("output.messages", "output_messages", "completion") or said or indexed[1] or sdk_said
    system = fields.take("system_instructions", "system.instructions")
    fields.take("system")  # the provider, in older conventions
    tools = [fields.take("tool.definitions", "tool_definitions", "request.tools"), _indexed_tools(flat), sdk_tools]
    _judge_attributes(fields)
    _require_known({name: value for name, value in flat.items() if name.removeprefix("gen_ai.") in fields})
    if is_empty(asked) or is_empty(said):
        raise RefusedRecord("the span lacks gen_ai.input.messages or gen_ai.output.messages")
    system_turns, _, _ = take_beside(Fields({"system": system}, "the span"))
    before, _, found = read_asked(asked)
    turns = [*before, *_said(said, found)]
    name = record.get("span_id") or record.get("spanId")
    return Draft(
        SourceFormat.OTEL,
        with_system(system_turns, turns),
        read_tools(*tools, *found),
        name if isinstance(name, str) else None,
    )


def _read_mlflow(record: dict[str, Any], flat: dict[str, Any]) -> Draft:
    """A span of MLflow's: what went in and came out, as the traced function had it."""
    kind = str(flat.get("mlflow.spanType", "")).strip('"')
    if kind not in ("CHAT_MODEL", "LLM", "AGENT", "CHAIN"):
        raise RefusedRecord(f"it is a span of type {kind!r}, not of a model: export the model's spans alone")
    _judge_span(record)
    tools = flat.get("mlflow.chat.tools")
    pair = {"request": flat["mlflow.spanInputs"], "response": flat.get("mlflow.spanOutputs"), "tools": tools}
    return read_trace({name: held for name, held in pair.items() if held is not None}, SourceFormat.OTEL)


def _of_ai_sdk(flat: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(what went in, what came out, tools) of Vercel's AI SDK. Raises RefusedRecord where its answer was cut off."""
    asked = flat.get("ai.prompt.messages")
    if is_empty(asked):
        return None, None, None
    reason = flat.get("ai.response.finishReason", "stop")
    if reason not in ("stop", "tool-calls"):
        raise RefusedRecord(f"ai.response.finishReason is {reason!r}: its answer is no expert's")
    text, calls = flat.get("ai.response.text") or "", flat.get("ai.response.toolCalls")
    said = {"content": text, "tool_calls": calls, "reasoning": flat.get("ai.response.reasoning")}
    tools = flat.get("ai.prompt.tools")
    return asked, [said], [decoded(tool) for tool in tools] if isinstance(tools, list) else None


def _said(said: Any, tools: list[Any]) -> list[Turn]:
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], dict):
        return read_turns([{"role": "assistant", **said[0]}], "the output")[0]
    return read_answer(said, tools)


# ------------------------------------------------------------------------------------------------ what it is worth


def _judge_span(record: dict[str, Any]) -> None:
    fields = Fields({k: v for k, v in record.items() if k not in ("attributes", "events")}, "the span")
    require_success(fields)
    close_record(fields, OF_TRACES)


def _judge_attributes(fields: Fields) -> None:
    """Raises RefusedRecord for a mark of a failure, for an answer that was cut off, and by its name for an attribute of
    these conventions that nobody knows. Programs put attributes of their own beside: they are looked at for marks."""
    reasons = fields.take("response.finish_reasons")
    if isinstance(reasons, list) and {str(reason).lower() for reason in reasons} & _FAILED:
        raise RefusedRecord(f"finish_reasons is {reasons!r}: its answer was cut off")
    error = fields.take("error.type")
    if not is_empty(error):
        raise RefusedRecord(f"error.type is {error!r}: the run failed")
    for name, value in fields.left():
        if name.startswith("evaluation."):
            judge("the span", "label" if name.endswith("label") else "score" if name.endswith("value") else "id", value)
        elif mark_of(name, value) is Mark.BAD:
            raise RefusedRecord(f"{name} is {value!r}: the span is marked as no expert's")


def _require_known(flat: dict[str, Any]) -> None:
    for name, value in flat.items():
        bare = name.removeprefix("gen_ai.")
        if bare != name and not bare.startswith(_SETTINGS) and not is_harmless(bare, value):
            raise unknown("the span", name)


# ------------------------------------------------------------------------------------------------------- events


def _event_name(event: dict[str, Any]) -> str:
    attributes = flat_attributes(event.get("attributes") or {})
    return str(event.get("eventName") or event.get("event_name") or attributes.get("event.name") or event.get("name"))


def _from_events(events: Any, flat: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(what went in, what came out) as messages, from the events of a span. What they say of the span joins `flat`."""
    asked: list[Any] = []
    said: list[Any] = []
    for event in events if isinstance(events, list) else []:
        if not isinstance(event, dict):
            raise RefusedRecord(f"an event of the span is {kind(event)}, not an object")
        if "event.name" in event:  # Logfire's, within one attribute
            rest = {key: value for key, value in event.items() if key not in ("event.name", "gen_ai.message.index")}
            event = {"name": event["event.name"], "attributes": rest}
        name, held = _event_name(event), _event_content(event)
        if name in _MESSAGE_EVENTS:
            asked.append(_event_message(held, _MESSAGE_EVENTS[name]))
        elif name == "gen_ai.choice":
            said.append(_event_choice(held))
        elif name in _TEXT_EVENTS:
            flat.setdefault(_TEXT_EVENTS[name], held.get(_TEXT_EVENTS[name]))
        elif name == _DETAILS:
            flat |= {key: value for key, value in held.items() if key not in flat}
        elif name == "gen_ai.evaluation.result":
            _judge_attributes(Fields({key.removeprefix("gen_ai."): value for key, value in held.items()}, "the event"))
        elif name == "exception":
            raise RefusedRecord("it has an exception among its events: the run failed")
        elif name.startswith("gen_ai."):
            raise unknown("the span's events", name)
    return asked, said


def _event_content(event: dict[str, Any]) -> dict[str, Any]:
    """What an event says: its attributes, or its body, which some write as JSON text into one attribute."""
    held = {name: decoded(value) for name, value in flat_attributes(event.get("attributes") or {}).items()}
    for body in (held.pop("gen_ai.event.content", None), _typed_value(event.get("body"))):
        if isinstance(decoded(body), dict):
            held |= decoded(body)
    return held


_OF_EVENTS = ("gen_ai.system", "gen_ai.provider.name", "event.name", "event_name")


def _event_message(held: dict[str, Any], role: str) -> dict[str, Any]:
    message = {"role": role, **{name: value for name, value in held.items() if name not in _OF_EVENTS}}
    if role == "tool" and "id" in message:
        message["tool_call_id"] = message.pop("id")
    return message


def _event_choice(held: dict[str, Any]) -> dict[str, Any]:
    inner = held.get("message")
    said = {name: value for name, value in held.items() if name not in ("message", "index", *_OF_EVENTS)}
    return {"role": "assistant", **(inner if isinstance(inner, dict) else {"content": inner} if inner else {}), **said}


# -------------------------------------------------------------------------------------------- numbered attributes

_WRAPPERS = ("message", "tool_call", "message_content", "tool")
"""OpenInference's: an object within an object of one key."""


def _indexed_messages(flat: dict[str, Any]) -> tuple[Any, Any]:
    """(what went in, what came out) of OpenLLMetry's and OpenInference's numbered attributes, which are taken out."""
    asked = (
        _indexed(flat, "gen_ai.prompt") or _indexed(flat, "llm.input_messages") or _listed(flat, "llm.input_messages")
    )
    said = (
        _indexed(flat, "gen_ai.completion")
        or _indexed(flat, "llm.output_messages")
        or _listed(flat, "llm.output_messages")
    )
    return asked, said


def _listed(flat: dict[str, Any], name: str) -> list[Any]:
    """Phoenix's list of objects by their whole names: `{"message.role": ...}`, or objects in objects."""
    held = _whole(flat.pop(name, None))
    return held if isinstance(held, list) else []


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        entry = {name: _whole(held) for name, held in _dotted(value)}
        return _plain(_tree(entry, list(entry), ""))
    return [_whole(each) for each in value] if isinstance(value, list) else value


def _indexed_tools(flat: dict[str, Any]) -> list[Any]:
    tools = _indexed(flat, "llm.tools") or _listed(flat, "llm.tools")
    schemas = [each.get("json_schema", each) for each in tools if isinstance(each, dict)]
    return [decoded(each) for each in [*_indexed(flat, "llm.request.functions"), *schemas]]


def _indexed(flat: dict[str, Any], prefix: str) -> list[Any]:
    read = _plain(_tree(flat, [name for name in flat if re.match(re.escape(prefix) + r"\.\d+\.", name)], f"{prefix}."))
    return read if isinstance(read, list) else []


def _tree(flat: dict[str, Any], names: list[str], prefix: str) -> dict[str, Any]:
    """Attributes of these names, which are taken out, as objects in objects."""
    tree: dict[str, Any] = {}
    for name in names:
        place = tree
        *path, last = name.removeprefix(prefix).split(".")
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise RefusedRecord(f"the span has an attribute within another: {name}")
        place[last] = flat.pop(name)
    return tree


def _plain(tree: Any) -> Any:
    """A tree of attributes' names as lists and objects."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(part.isdigit() for part in tree):
        return [_plain(tree[part]) for part in sorted(tree, key=int)]
    if len(tree) == 1 and next(iter(tree)) in _WRAPPERS and isinstance(next(iter(tree.values())), dict):
        return _plain(next(iter(tree.values())))
    read = {name: _plain(held) for name, held in tree.items()}
    if "contents" in read and "content" not in read:
        read["content"] = read.pop("contents")
    return read


# --------------------------------------------------------------------------------------------------- attributes


def flat_attributes(attributes: Any) -> dict[str, Any]:
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
        return flat_attributes(held.get("values", [])) if isinstance(held, dict) else held
    return held
