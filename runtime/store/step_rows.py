"""Records of `runtime.store.episodes` to rows of the step log, and back.

JSON goes through the standard library: orjson was refused, because it turns NaN into null without a word, cannot write
integers of more than 64 bits or half of a surrogate pair, and a model's arguments hold such things one day.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from policies.types import (
    Action,
    FinalAnswer,
    FinishReason,
    MalformedAction,
    SamplingParams,
    TokenIds,
    ToolCall,
    ToolCalls,
    ToolSchema,
)
from runtime.store.damage import json_object, json_objects, record_of
from runtime.store.episodes import (
    Actor,
    Correction,
    Episode,
    KeyUsage,
    Outcome,
    PromptChange,
    Purpose,
    ResponseRecord,
    Role,
    Step,
    StepCandidate,
    StopReason,
    ToolResult,
    Withdrawal,
)
from runtime.store.step_schema import (
    CORRECTION_COLUMNS,
    EPISODE_COLUMNS,
    OUTCOME_COLUMNS,
    RESPONSE_COLUMNS,
    STEP_CANDIDATE_COLUMNS,
    STEP_COLUMNS,
    STEP_MAY_BE_NULL,
    TOOL_SET_COLUMNS,
    WITHDRAWAL_COLUMNS,
)

Row = dict[str, Any]

TOKEN_BYTES = 4


# ------------------------------------------------------------------------------------------------ values


def tokens_to_blob(token_ids: Sequence[int]) -> bytes:
    """Token ids as int32 little endian. Raises struct.error for what is no int32."""
    return struct.pack(f"<{len(token_ids)}i", *token_ids)


def tokens_from_blob(blob: bytes) -> TokenIds:
    return struct.unpack(f"<{len(blob) // TOKEN_BYTES}i", blob)


def logprobs_to_blob(logprobs: Sequence[float]) -> bytes:
    """Logprobs as float32 little endian: about seven digits are kept."""
    return struct.pack(f"<{len(logprobs)}f", *logprobs)


def logprobs_from_blob(blob: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(blob) // 4}f", blob)


def fields_of(record: Any) -> Row:
    """A flat record's fields. `dataclasses.asdict` copies deeply, which was a third of the cost of an append."""
    return {name: getattr(record, name) for name in record.__slots__}


def to_json(value: Any) -> str:
    """JSON text. Raises ValueError for NaN and infinity, which JSON does not have and SQLite's views cannot read."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # Half of a surrogate pair has no UTF-8, but JSON can escape it.
    return text if has_utf8(text) else json.dumps(value, allow_nan=False, separators=(",", ":"))


def has_utf8(text: str) -> bool:
    """Whether SQLite can hold it as it is: not with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def action_to_json(action: Action) -> str:
    match action:
        case ToolCalls(calls, text, reasoning):
            fields = {"type": "tool_calls", "calls": [fields_of(call) for call in calls]}
            return to_json(fields | {"text": text, "reasoning": reasoning})
        case FinalAnswer(text, reasoning):
            return to_json({"type": "final_answer", "text": text, "reasoning": reasoning})
        case MalformedAction(text, problem):
            return to_json({"type": "malformed_action", "text": text, "problem": problem})
    raise TypeError(f"an action is ToolCalls, FinalAnswer or MalformedAction, got {type(action).__name__}")


def action_from_json(text: str) -> Action:
    fields = json_object(text)
    match fields.pop("type"):
        case "tool_calls":
            calls = tuple(ToolCall(**call) for call in fields.pop("calls"))
            return ToolCalls(calls, **fields)
        case "final_answer":
            return FinalAnswer(**fields)
        case "malformed_action":
            return MalformedAction(**fields)
        case unknown:
            raise ValueError(f"unknown type of action: {unknown!r}")


def sampling_from_json(text: str) -> SamplingParams:
    fields = json_object(text)
    fields["stop_token_ids"] = tuple(fields["stop_token_ids"])
    fields["logit_bias"] = tuple((token_id, bias) for token_id, bias in fields.get("logit_bias", ()))
    return SamplingParams(**fields)


@lru_cache(maxsize=256)
def tools_from_json(text: str) -> tuple[ToolSchema, ...]:
    """Equal tool sets are one object, so that ten thousand steps do not hold ten thousand copies. Not to be edited."""
    return tuple(json_objects(text))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- rows


def episode_to_row(episode: Episode) -> Row:
    return {
        "id": episode.id,
        "actor": Actor(episode.actor).value,
        "purpose": Purpose(episode.purpose).value,
        "adapter": episode.adapter,
        "task": episode.task,
        "metadata": to_json(episode.metadata),
        "created_at": episode.created_at,
        "owner": episode.owner,
        "is_assigned": int(episode.is_assigned),
        "user": episode.user,
        "agent": episode.agent,
    }


@record_of(
    "episodes", {**EPISODE_COLUMNS, "owner": str, "is_assigned": int, "user": str, "agent": str}, may_be_null={"task"}
)
def episode_from_row(row: sqlite3.Row) -> Episode:
    return Episode(
        id=row["id"],
        actor=Actor(row["actor"]),
        purpose=Purpose(row["purpose"]),
        adapter=row["adapter"],
        task=row["task"],
        metadata=json_object(row["metadata"]),
        created_at=row["created_at"],
        owner=row["owner"],
        is_assigned=bool(row["is_assigned"]),
        user=row["user"],
        agent=row["agent"],
    )


def tool_set_to_row(step: Step) -> Row:
    tools = to_json(step.tools)
    return {"digest": hashlib.sha256(tools.encode()).hexdigest(), "tools": tools}


@record_of("tool_sets", TOOL_SET_COLUMNS, key="digest")
def tool_set_from_row(row: sqlite3.Row) -> tuple[ToolSchema, ...]:
    if hashlib.sha256(row["tools"].encode("utf-8", "surrogatepass")).hexdigest() != row["digest"]:
        raise ValueError("its tools are not those that its digest is of")
    return tools_from_json(row["tools"])


def step_to_row(step: Step, tools_digest: str, prompt: bytes, completion: bytes, prefix_len: int) -> Row:
    """A step's row. `prompt` and `completion` are its ids as blobs; its parent has the first `prefix_len` of them."""
    logprobs = step.behavior_logprobs
    return {
        "id": step.id,
        "episode_id": step.episode_id,
        "parent_id": step.parent_id,
        "step_index": step.index,
        "new_messages": to_json(step.new_messages),
        "tools_digest": tools_digest,
        "prefix_len": prefix_len,
        "prompt_suffix": prompt[prefix_len * TOKEN_BYTES :],
        "num_prompt_tokens": len(step.prompt_token_ids),
        "completion_token_ids": completion,
        "num_completion_tokens": len(step.completion_token_ids),
        "tokens_crc32": zlib.crc32(completion, zlib.crc32(prompt)),
        "behavior_logprobs": None if logprobs is None else logprobs_to_blob(logprobs),
        "mean_logprob": sum(logprobs) / len(logprobs) if logprobs else None,
        "sampling": to_json(fields_of(step.sampling)),
        "adapter": step.adapter,
        "action": action_to_json(step.action),
        "finish_reason": FinishReason(step.finish_reason).value,
        "stop_reason": None if step.stop_reason is None else StopReason(step.stop_reason).value,
        "tool_results": to_json([fields_of(result) for result in step.tool_results]),
        "conversation_digest": step.conversation_digest,
        "created_at": step.created_at,
        "first_token_ms": step.first_token_ms,
        "latency_ms": step.latency_ms,
        "prompt_change": None if step.prompt_change is None else PromptChange(step.prompt_change).value,
        "thread_digest": step.thread_digest,
        "tail_digest": step.tail_digest,
    }


@record_of(
    "steps",
    {
        name: kind for name, kind in STEP_COLUMNS.items() if name != "mean_logprob"
    }  # which may be infinite, and is not read
    | {"prompt_change": str, "thread_digest": str, "tail_digest": str, "tools": str},
    may_be_null={*STEP_MAY_BE_NULL, "prompt_change"},
)
def step_from_row(row: sqlite3.Row, prompt: bytes) -> Step:
    """The step of a row joined with its tool set. `prompt` is the rebuilt prompt as a blob."""
    logprobs = row["behavior_logprobs"]
    stop_reason = row["stop_reason"]
    return Step(
        id=row["id"],
        episode_id=row["episode_id"],
        parent_id=row["parent_id"],
        index=row["step_index"],
        new_messages=tuple(json_objects(row["new_messages"])),
        tools=tools_from_json(row["tools"]),
        prompt_token_ids=tokens_from_blob(prompt),
        completion_token_ids=tokens_from_blob(row["completion_token_ids"]),
        behavior_logprobs=None if logprobs is None else logprobs_from_blob(logprobs),
        sampling=sampling_from_json(row["sampling"]),
        adapter=row["adapter"],
        action=action_from_json(row["action"]),
        finish_reason=FinishReason(row["finish_reason"]),
        stop_reason=None if stop_reason is None else StopReason(stop_reason),
        tool_results=tuple(ToolResult(**result) for result in json_objects(row["tool_results"])),
        conversation_digest=row["conversation_digest"],
        created_at=row["created_at"],
        first_token_ms=row["first_token_ms"],
        latency_ms=row["latency_ms"],
        prompt_change=None if row["prompt_change"] is None else PromptChange(row["prompt_change"]),
        thread_digest=row["thread_digest"],
        tail_digest=row["tail_digest"],
    )


def outcome_to_row(outcome: Outcome) -> Row:
    return fields_of(outcome) | {"role": Role(outcome.role).value}


@record_of("outcomes", {**OUTCOME_COLUMNS, "key": str, "role": str})
def outcome_from_row(row: sqlite3.Row) -> Outcome:
    return Outcome(**{**dict(row), "role": Role(row["role"])})


def withdrawal_to_row(withdrawal: Withdrawal) -> Row:
    return fields_of(withdrawal)


@record_of("withdrawals", WITHDRAWAL_COLUMNS)
def withdrawal_from_row(row: sqlite3.Row) -> Withdrawal:
    return Withdrawal(**dict(row))


def candidate_to_row(candidate: StepCandidate) -> Row:
    return fields_of(candidate) | {
        "action": action_to_json(candidate.action),
        "completion_token_ids": tokens_to_blob(candidate.completion_token_ids),
        "logprobs": logprobs_to_blob(candidate.logprobs),
        "finish_reason": FinishReason(candidate.finish_reason).value,
        "is_chosen": int(candidate.is_chosen),
    }


@record_of("step_candidates", STEP_CANDIDATE_COLUMNS, key="step_id")
def candidate_from_row(row: sqlite3.Row) -> StepCandidate:
    return StepCandidate(
        **{
            **dict(row),
            "action": action_from_json(row["action"]),
            "completion_token_ids": tokens_from_blob(row["completion_token_ids"]),
            "logprobs": logprobs_from_blob(row["logprobs"]),
            "finish_reason": FinishReason(row["finish_reason"]),
            "is_chosen": bool(row["is_chosen"]),
        }
    )


def correction_to_row(correction: Correction) -> Row:
    return {
        "id": correction.id,
        "step_id": correction.step_id,
        "action": action_to_json(correction.action),
        "completion_token_ids": tokens_to_blob(correction.completion_token_ids),
        "source": correction.source,
        "created_at": correction.created_at,
        "key": correction.key,
    }


@record_of("corrections", {**CORRECTION_COLUMNS, "key": str})
def correction_from_row(row: sqlite3.Row) -> Correction:
    return Correction(
        id=row["id"],
        step_id=row["step_id"],
        action=action_from_json(row["action"]),
        completion_token_ids=tokens_from_blob(row["completion_token_ids"]),
        source=row["source"],
        created_at=row["created_at"],
        key=row["key"],
    )


@record_of("responses", RESPONSE_COLUMNS)
def response_from_row(row: sqlite3.Row) -> ResponseRecord:
    return ResponseRecord(**{**dict(row), "request": json_object(row["request"])})


@record_of("key_usage", {"key": str, "day": int, "requests": int, "steps": int, "tokens": int}, key="key")
def usage_from_row(row: sqlite3.Row) -> KeyUsage:
    return KeyUsage(**dict(row))
