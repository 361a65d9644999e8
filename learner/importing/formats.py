"""Tells a record's format, and hands it to its reader.

What is read is one line of `SourceFormat` each. What is not: actions written out as text (ReAct's lines that no tool
answers) stay text, an answer and not a tool call; images and sound are refused. The conversation is checked elsewhere,
once for all formats.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from learner.importing.agent_logs import is_smolagents_step, read_atif, read_inspect_sample, read_smolagents
from learner.importing.fields import RefusedRecord, is_empty, is_harmless, kind
from learner.importing.glaive import read_glaive
from learner.importing.json_lines import Record, Refusal
from learner.importing.message_rows import by_conversation
from learner.importing.messages import is_langchain, is_message
from learner.importing.pydantic_ai import is_pydantic_ai
from learner.importing.rows import (
    ANSWER_NAMES,
    CHOSEN_NAMES,
    PROMPT_NAMES,
    read_completion,
    read_conversation,
    read_gemini,
    read_openai_preference,
    read_preference,
    read_xlam,
)
from learner.importing.sessions import is_gemini_cli, read_gemini_cli, read_session, session_format
from learner.importing.tau2 import is_simulation, read_simulation, simulations_of
from learner.importing.telemetry import holds_conversation, is_span, read_span, spans_of_logs
from learner.importing.traces import as_pair, read_trace
from learner.importing.turns import Draft, SourceFormat

_LANGSMITH = ("run_type", "dotted_order", "session_id", "app_path", "reference_example_id", "example_id", "dataset_id")


@dataclass(frozen=True, slots=True)
class Session:
    """The lines of a session file: they are one record."""

    format: SourceFormat
    lines: list[Any]


def read_draft(record: Any) -> Draft:
    """Read one record. Raises RefusedRecord where it is of no known format, or not to be learned from."""
    if isinstance(record, Session):
        return read_session(record.format, record.lines)
    if isinstance(record, list):
        if record and is_smolagents_step(record[0]):
            return read_smolagents(record)
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RefusedRecord(f"it is {kind(record)}, not a JSON object")
    return _read_object({key: value for key, value in record.items() if value is not None})


def _read_object(record: dict[str, Any]) -> Draft:
    if isinstance(record.get("steps"), list) and ("schema_version" in record or "agent" in record):
        return read_atif(record)
    if isinstance(record.get("steps"), list) and record["steps"] and is_smolagents_step(record["steps"][0]):
        return read_smolagents(record["steps"])
    if record.get("object") in ("trace", "trace.span"):
        return read_trace(_generation(record), SourceFormat.ITEMS)
    if is_span(record):
        return read_span(record)
    if "preferred_output" in record or "non_preferred_output" in record:
        return read_openai_preference(record)
    if any(isinstance(record.get(name), str | list | dict) for name in CHOSEN_NAMES):
        return read_preference(record)
    if isinstance(record.get("chat"), str) and "messages" not in record:
        return read_glaive(record)
    if is_simulation(record):
        return read_simulation(record)
    if is_gemini_cli(record):
        return read_gemini_cli(record)
    if "messages" in record and "epoch" in record and "scores" in record:
        return read_inspect_sample(record)
    if isinstance(record.get("values"), dict) and "messages" in record["values"]:
        return read_conversation(
            {**{k: v for k, v in record.items() if k not in _OF_STATES}, **record["values"]}, "messages"
        )
    is_answer = any(name in record for name in (*PROMPT_NAMES, *ANSWER_NAMES))
    if _is_messages(record.get("history")) and not is_answer:  # SWE-agent's: its trajectory says the same, step by step
        return read_conversation({key: value for key, value in record.items() if key != "trajectory"}, "history")
    if "messages" in record and (envelope := as_pair(record)) is not None:
        return read_trace(envelope, SourceFormat.OPENAI)
    for name in ("messages", "conversations", "conversation", "dialogue", "dialog", "trajectory", "traj"):
        if name in record:
            return read_conversation(record, name)
    if (envelope := as_pair(record)) is not None:
        return read_trace(envelope, SourceFormat.OPENAI)
    if isinstance(record.get("body"), dict) and "messages" in record["body"]:  # a line of OpenAI's batches
        beside = {key: value for key, value in record.items() if key not in ("body", "method")}
        return read_conversation({**beside, **record["body"]}, "messages")
    if "contents" in record:
        return read_gemini(record)
    if isinstance(record.get("request"), dict) and "contents" in record["request"]:
        return read_gemini({**record["request"], **{k: v for k, v in record.items() if k != "request"}})
    if "query" in record and "answers" in record:
        return read_xlam(record)
    if any(name in record for name in PROMPT_NAMES) and any(name in record for name in ANSWER_NAMES):
        return read_completion(record)
    if _is_whole_conversation(record):
        return read_conversation(record, "input")
    if any(name in record for name in ("input", "inputs", "request")):
        return read_trace(record, _trace_format(record))
    if any(name in record for name in ("response", "result", "output", "outputs", "choices")):
        raise RefusedRecord("it has an answer, and not what was asked: join each answer with its request first")
    keys = ", ".join(map(repr, list(record)[:8])) or "none"
    raise RefusedRecord(
        f"no known format: it has no messages, conversations or chosen; its keys are {keys}. "
        'Write each conversation as {"messages": [{"role": ..., "content": ...}], "tools": [...]}, one a line'
    )


def _generation(record: dict[str, Any]) -> dict[str, Any]:
    """What a span of OpenAI's Agents SDK says of a model's call. Raises RefusedRecord for its other spans."""
    held = record.get("span_data")
    if not isinstance(held, dict) or held.get("type") != "generation":
        what = held.get("type") if isinstance(held, dict) else "trace"
        only_id = ", which keeps the response's id and not its words" if what == "response" else ""
        raise RefusedRecord(f"it is a span of type {what!r}{only_id}: export the generation spans alone")
    beside = {key: value for key, value in record.items() if key not in ("span_data", "object")}
    return {**beside, "input": held.get("input"), "output": held.get("output")}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and is_message(value[0])


def _is_whole_conversation(record: dict[str, Any]) -> bool:
    """Whether the input holds what the assistant said too, and no output stands beside it: `to_input_list()`."""
    given = record.get("input")
    has_output = any(name in record for name in ("output", "outputs", "response", "expectedOutput", "expected_output"))
    return not has_output and isinstance(given, list) and any(_is_assistants(each) for each in given)


def _is_assistants(value: Any) -> bool:
    return isinstance(value, dict) and (value.get("role") == "assistant" or value.get("type") == "function_call")


_OF_STATES = frozenset("values next config created_at parent_config tasks interrupts checkpoint checkpoint_id".split())
"""What LangGraph keeps beside the values of a state."""


def _trace_format(record: dict[str, Any]) -> SourceFormat:
    if "inputs" in record or any(name in record for name in _LANGSMITH):
        return SourceFormat.LANGCHAIN
    if str(record.get("type", "")).isupper() or "traceId" in record or "expectedOutput" in record:
        return SourceFormat.LANGFUSE
    return SourceFormat.OPENAI if "request" in record else SourceFormat.ITEMS


# -------------------------------------------------------------------------------------- records of a file


def records_of(values: Iterator[Record | Refusal], ignored: Collection[str] = ()) -> Iterator[Record | Refusal]:
    """The records that the values of a file make: one by one, or as lines of a session, or messages of a conversation.

    An evaluation's log, a trace with its observations and a batch of spans hold several records in one value.
    """
    for read in values:
        if isinstance(read, Refusal):
            yield read
        elif (source := session_format(read.value)) is not None:
            yield from _sessions(source, read, values, ignored)
        elif is_message(read.value) or is_smolagents_step(read.value):
            for parts in by_conversation(chain([read], values)):
                yield _gathered(parts[0].line, parts, ignored)
        else:
            yield from (Record(read.line, without_ignored(value, ignored)) for value in _contained(read.value))


def _gathered(
    line: int, parts: list[Record | Refusal], ignored: Collection[str], source: SourceFormat | None = None
) -> Record | Refusal:
    """One conversation out of its lines. A line that cannot be read is a hole in it."""
    hole = next((part for part in parts if isinstance(part, Refusal)), None)
    if hole is not None:
        return Refusal(hole.line, f"{hole.reason}; the conversation has a hole there")
    values = without_ignored([part.value for part in parts if isinstance(part, Record)], ignored)
    return Record(line, values if source is None else Session(source, values))


def _sessions(
    source: SourceFormat, first: Record, rest: Iterator[Record | Refusal], ignored: Collection[str]
) -> Iterator[Record | Refusal]:
    """A file's sessions: a header of Hugging Face's format begins the next one."""
    parts: list[Record | Refusal] = [first]
    for read in rest:
        is_header = isinstance(read, Record) and isinstance(read.value, dict) and read.value.get("type") == "session"
        if source is SourceFormat.SESSION and is_header:
            yield _gathered(parts[0].line, parts, ignored, source)
            parts = []
        parts.append(read)
    yield _gathered(parts[0].line, parts, ignored, source)


def _contained(value: Any) -> Iterator[Any]:
    """The records within a value."""
    if isinstance(value, list) and not _is_one_conversation(value):
        for each in value:
            yield from _contained(each)
    elif isinstance(value, dict) and isinstance(value.get("samples"), list) and "eval" in value:  # Inspect's log
        if value.get("status") not in (None, "success"):
            value = {
                **value,
                "samples": [{**s, "status": value["status"]} for s in value["samples"] if isinstance(s, dict)],
            }
        yield from value["samples"]
    elif (simulations := simulations_of(value)) is not None:
        yield from simulations
    elif isinstance(value, dict) and "resourceSpans" in value:  # OTLP
        scopes = [each for resource in _objects(value, "resourceSpans") for each in _objects(resource, "scopeSpans")]
        spans = [span for scope in scopes for span in _objects(scope, "spans") if is_span(span)]
        yield from [span for span in spans if holds_conversation(span)] or spans
    elif isinstance(value, dict) and "resourceLogs" in value:  # OTLP's, of events
        scopes = [each for resource in _objects(value, "resourceLogs") for each in _objects(resource, "scopeLogs")]
        yield from spans_of_logs([each for scope in scopes for each in _objects(scope, "logRecords")])
    elif isinstance(value, dict) and _objects(
        value, "observations"
    ):  # Langfuse; what is said of a trace holds for each
        beside = {name: value[name] for name in ("scores", "tags", "metadata") if name in value}
        generations = [each for each in _objects(value, "observations") if each.get("type") == "GENERATION"]
        whole = {key: held for key, held in value.items() if key != "observations"}
        yield from ({**beside, **each} for each in generations) if generations else (whole,)
    elif (
        isinstance(value, dict) and isinstance(value.get("data"), dict) and _objects(value["data"], "spans")
    ):  # MLflow's
        spans = [span for span in _objects(value["data"], "spans") if is_span(span)]
        beside = {"info": value["info"]} if isinstance(value.get("info"), dict) else {}
        yield from ({**span, **beside} for span in [span for span in spans if holds_conversation(span)] or spans)
    elif (rows := _rows_within(value)) is not None:
        for each in rows:
            yield from _contained(each)
    else:
        yield value


_ROWS = ("data", "rows", "records", "examples", "items", "traces", "runs", "samples", "results")

_OF_PAGES = ("features", "meta", "partial", "has_more")


def _rows_within(value: Any) -> list[Any] | None:
    """The records of an answer of an API: a list under one key, and beside it nothing but counts and pages."""
    if not isinstance(value, dict):
        return None
    lists = [name for name, held in value.items() if isinstance(held, list) and held]
    name = next((name for name in _ROWS if name in value), None)
    beside = {key: held for key, held in value.items() if key not in (name, *_OF_PAGES) and not is_empty(held)}
    is_one_list = name is not None and set(lists) - {"features"} == {name}
    if not is_one_list or not all(is_harmless(key, held) for key, held in beside.items()):
        return None
    rows = value[name]
    if not all(isinstance(each, dict) for each in rows) or is_message(rows[0]):
        return None
    return [each["row"] if "row_idx" in each and isinstance(each.get("row"), dict) else each for each in rows]


def _objects(value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    held = value.get(name)
    return [each for each in held if isinstance(each, dict)] if isinstance(held, list) else []


def _is_one_conversation(value: list[Any]) -> bool:
    first = value[0] if value else None
    is_messages = is_message(first) or is_langchain(first) or is_pydantic_ai(first)
    return is_messages or is_smolagents_step(first) or session_format(first) is not None


_NOT_WITHIN = frozenset("arguments args parameters input_schema inputSchema tools functions properties".split())


def without_ignored(value: Any, ignored: Collection[str]) -> Any:
    """A record without the keys that the user calls harmless. Arguments and tools are left whole."""
    if not ignored:
        return value
    if isinstance(value, list):
        return [without_ignored(each, ignored) for each in value]
    if isinstance(value, dict):
        return {
            key: held if key in _NOT_WITHIN else without_ignored(held, ignored)
            for key, held in value.items()
            if key not in ignored or is_empty(held)
        }
    return value
