"""Session files, of which each is one conversation: Claude Code, Codex, Gemini CLI, Pi, and Hugging Face's traces.

Their lines are events of a program; only some of them are what the model saw or said. A line of a kind that is not
known refuses the session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from learner.importing.contents import plain_text
from learner.importing.fields import Fields, RefusedRecord
from learner.importing.marks import close_record
from learner.importing.messages import is_item, merge_items, read_message, read_turns
from learner.importing.rows import take_beside, take_task, with_system
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Draft, SourceFormat, Turn

Line = dict[str, Any]


def session_format(value: Any) -> SourceFormat | None:
    """Which program's session begins, or goes on, with this line; None for what is no such line."""
    if not isinstance(value, dict) or "role" in value:
        return None
    kind = value.get("type")
    if kind in ("session_meta", "response_item", "turn_context", "event_msg", "compacted") and "payload" in value:
        return SourceFormat.CODEX
    if kind == "session" and ("harness" in value or "cwd" in value or "id" in value):
        return SourceFormat.SESSION
    if kind == "system" and "subtype" in value and "session_id" in value:
        return SourceFormat.CLAUDE_CODE
    if ("sessionId" in value or "leafUuid" in value or kind == "file-history-snapshot") and isinstance(kind, str):
        return SourceFormat.CLAUDE_CODE
    if kind in ("user", "assistant") and isinstance(value.get("message"), dict):
        return SourceFormat.CLAUDE_CODE
    if "instructions" in value and "timestamp" in value and "id" in value and "messages" not in value:
        return SourceFormat.CODEX  # the first line of its older files
    return None


def read_session(source: SourceFormat, lines: Sequence[Line]) -> Draft:
    readers = {
        SourceFormat.CLAUDE_CODE: _read_claude_code,
        SourceFormat.CODEX: _read_codex,
        SourceFormat.SESSION: _read_simple,
    }
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict):
            raise RefusedRecord(f"line {number} of the session is not an object")
    return readers[source](lines)


# --------------------------------------------------------------------------------------------- Claude Code

_UNSEEN_LINES = tuple(
    "summary file-history-snapshot queue-operation progress custom-title ai-title agent-name last-prompt "
    "permission-mode tag pr-link mode saved_hook_context worktree-state rate_limit_event stream_event".split()
)
"""Lines that the model never saw."""
_NOTICES = frozenset(
    "todo_reminder task_reminder total_tokens_reminder silent_turn_reminder deferred_tools_delta deferred_tools_record "
    "agent_listing_delta mcp_instructions_delta skill_listing command_permissions environment model date date_change "
    "credential_org remote_session_change prompt_snapshot session_context auto_mode token_usage budget_usd "
    "output_token_usage hook_success async_hook_response".split()
)
"""Attachments in which the program tells the model of itself, as its system prompt does: a session file has neither."""
_OF_LINES = frozenset(
    "uuid parentUuid logicalParentUuid sessionId session_id cwd version gitBranch timestamp requestId userType isMeta "
    "isSidechain toolUseResult sourceToolUseID sourceToolAssistantUUID thinkingMetadata todos permissionMode slug type "
    "isVisibleInTranscriptOnly isCompactSummary error parent_tool_use_id agentId entrypoint promptId imagePasteIds "
    "level mcpMeta origin apiError teamName message isApiErrorMessage planContent summarizeMetadata".split()
)
_OF_MESSAGES = frozenset(
    {"type", "stop_sequence", "model", "id", "usage", "container", "stop_details", "context_management"}
)


def _read_claude_code(lines: Sequence[Line]) -> Draft:
    """The main conversation. What was rewound is left out, as it was for the model; other agents' lines too."""
    said: list[tuple[str | None, str | None, list[Turn]]] = []  # (uuid, the message's id, turns)
    session = None
    is_side = _is_other_agents(lines)
    for number, line in enumerate(lines, 1):
        kind = line.get("type")
        session = session or line.get("sessionId") or line.get("session_id")
        is_elsewhere = (line.get("isSidechain") is True or bool(line.get("parent_tool_use_id"))) and not is_side
        if kind in _UNSEEN_LINES or is_elsewhere or line.get("isApiErrorMessage") is True:
            continue
        if kind == "system":
            _require_no_compaction(line, number)
            continue
        if kind == "result":
            _require_good_end(line, number)
            continue
        if kind == "attachment":
            said += [(line.get("uuid"), None, turns) for turns in [_attached(line, number)] if turns]
            continue
        if kind not in ("user", "assistant"):
            raise RefusedRecord(f"line {number} of the session is of type {kind!r}: nothing tells whether it was seen")
        if line.get("isCompactSummary") is True:
            raise RefusedRecord(f"line {number}: the session was compacted, and what was seen after is not in the file")
        close_record(Fields({k: v for k, v in line.items() if k not in _OF_LINES}, f"line {number} of the session"))
        message = line.get("message")
        turns = _claude_message(message, kind, f"line {number}")
        if kind == "user" and turns and turns[0].role == "user":
            said = _rewound(said, line.get("parentUuid"))
        said.append((line.get("uuid"), None, turns))
    turns = [turn for _, _, each in said for turn in each]
    return Draft(SourceFormat.CLAUDE_CODE, merge_items(turns), item_id=session if isinstance(session, str) else None)


def _is_other_agents(lines: Sequence[Line]) -> bool:
    """Whether the file is the conversation of an agent that another one started: all its lines are marked so."""
    said = [line for line in lines if line.get("type") in ("user", "assistant")]
    return bool(said) and all(line.get("isSidechain") is True for line in said)


def _attached(line: Line, number: int) -> list[Turn]:
    """What an attachment puts into the user's mouth. Raises RefusedRecord for words that the file does not hold."""
    held = line.get("attachment")
    kind = held.get("type") if isinstance(held, dict) else None
    if not isinstance(held, dict) or kind in _NOTICES:
        return []
    if kind == "queued_command" and isinstance(held.get("prompt"), str):
        return [Turn("user", held["prompt"])]
    raise RefusedRecord(
        f"line {number}: the model saw an attachment of type {kind!r}, whose words are not in the conversation; "
        "--ignore attachment leaves such lines out"
    )


def _require_good_end(line: Line, number: int) -> None:
    """Raises RefusedRecord where the last line of `claude -p --output-format stream-json` says that the run failed."""
    if line.get("is_error") is True or line.get("subtype") not in (None, "success"):
        raise RefusedRecord(f"line {number}: the run ended with {line.get('subtype')!r}: it is no expert's")


def _require_no_compaction(line: Line, number: int) -> None:
    if "compact" in str(line.get("subtype", "")):
        raise RefusedRecord(f"line {number}: the session was compacted, and what was seen after is not in the file")


def _claude_message(message: Any, kind: str, where: str) -> list[Turn]:
    if not isinstance(message, dict):
        raise RefusedRecord(f"{where} has no message")
    plain = {key: value for key, value in message.items() if key not in _OF_MESSAGES}
    return read_message({"role": kind, **plain}, where, [])


def _rewound(
    said: list[tuple[str | None, str | None, list[Turn]]], parent: Any
) -> list[tuple[str | None, str | None, list[Turn]]]:
    """What is left of a conversation where the user went back and asked otherwise."""
    if parent is None:
        return []
    place = next((n for n, (uuid, _, _) in enumerate(said) if uuid is not None and uuid == parent), None)
    if place is None:
        return said
    behind = [turn for _, _, turns in said[place + 1 :] for turn in turns]
    # A prompt may name any of the lines of one answer and its results: only a later prompt was rewound.
    return said[: place + 1] if any(turn.role == "user" for turn in behind) else said


# --------------------------------------------------------------------------------------------------- Codex


def _read_codex(lines: Sequence[Line]) -> Draft:
    """A rollout: the items of its responses. Events repeat them for the screen."""
    items, system, tools, session = [], list[Turn](), list[Any](), None
    for number, line in enumerate(lines, 1):
        kind, payload = line.get("type"), line.get("payload")
        if kind == "response_item":
            items.append(payload)
        elif kind == "session_meta" or (kind is None and "instructions" in line):
            meta = payload if isinstance(payload, dict) else line
            session = session or meta.get("id")
            system += _codex_instructions(meta)
            tools.append(meta.get("dynamic_tools"))
        elif kind == "compacted":
            raise RefusedRecord(
                f"line {number}: the session was compacted, and what was seen after is another conversation"
            )
        elif kind == "event_msg":
            _require_no_rollback(payload, number)
        elif kind == "message" or is_item(line):
            items.append(line)  # an older file, without envelopes
        elif kind != "turn_context" and line.get("record_type") != "state":
            raise RefusedRecord(f"line {number} of the session is of type {kind!r}: nothing tells whether it was seen")
    if not items:
        raise RefusedRecord("the session holds no response items")
    turns, _ = read_turns(items, "the session")
    turns = merge_items(turns)
    return Draft(
        SourceFormat.CODEX,
        with_system(system, turns),
        read_tools(*tools),
        session if isinstance(session, str) else None,
    )


def _codex_instructions(meta: Line) -> list[Turn]:
    given = [meta.get("base_instructions"), meta.get("instructions")]
    texts = [plain_text(value, "the instructions") for value in given if value]
    return [Turn("system", text) for text in dict.fromkeys(texts) if text.strip()]


def _require_no_rollback(payload: Any, number: int) -> None:
    kind = payload.get("type") if isinstance(payload, dict) else None
    if kind in ("thread_rolled_back", "undo_completed"):
        raise RefusedRecord(f"line {number}: a turn was taken back, and nothing tells what the model saw after")


# ---------------------------------------------------------------------------------------------- Gemini CLI

_OF_GEMINI_LINES = frozenset("id timestamp tokens model displayContent type".split())
_OF_GEMINI_CALLS = frozenset(
    "status timestamp displayName description renderOutputAsMarkdown resultDisplay agentId kind".split()
)


def is_gemini_cli(record: Any) -> bool:
    """Whether a record is a session of Gemini CLI: one object, its messages by `type` and not by `role`."""
    return isinstance(record, dict) and "projectHash" in record and isinstance(record.get("messages"), list)


def read_gemini_cli(record: Line) -> Draft:
    """What the program said itself (`info`, `error`) the model never saw. The system prompt is not in the file."""
    fields = Fields(record, "the session")
    messages, session = fields.take_list("messages"), fields.take("sessionId")
    close_record(fields, frozenset({"projectHash", "startTime", "summary", "kind", "directories"}))
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        line = Fields(message, f"message {number}")
        kind = dict(line.left()).get("type")
        if kind == "user":
            turns.append(Turn("user", plain_text(line.take("content"), line.where)))
            line.close(_OF_GEMINI_LINES)
        elif kind == "gemini":
            turns += _gemini_line(line)
        elif kind not in ("info", "error", "warning"):
            raise RefusedRecord(f"message {number} is of type {kind!r}: nothing tells whether it was seen")
    return Draft(SourceFormat.GEMINI_CLI, turns, item_id=session if isinstance(session, str) else None)


def _gemini_line(line: Fields) -> list[Turn]:
    content, calls, results = line.take("content"), [], []
    thoughts = [Fields(thought, line.where) for thought in line.take_list("thoughts")]
    thinking = "\n\n".join(f"**{each.take_text('subject')}**\n\n{each.take_text('description')}" for each in thoughts)
    for each in line.take_list("toolCalls"):
        call = Fields(each, line.where)
        result = call.take_list("result")
        call_id, name, arguments = call.take("id"), call.take("name"), call.take("args")
        call.close(_OF_GEMINI_CALLS)
        calls.append({"functionCall": {"id": call_id, "name": name, "args": arguments}})
        results += result
    line.close(_OF_GEMINI_LINES)
    said = read_message(
        {"role": "assistant", "content": [{"type": "text", "text": content or ""}, *calls]}, line.where, []
    )
    seen = read_message({"role": "tool", "content": results}, line.where, []) if results else []
    return [replace(said[0], thinking=thinking), *seen]


# ------------------------------------------------------------------------- Hugging Face's traces, and Pi's

_UNSEEN_ENTRIES = tuple("model_change thinking_level_change label session_info custom".split())


def _read_simple(lines: Sequence[Line]) -> Draft:
    """A header and one message a line, in envelopes. Pi's lines form a tree; a session with branches is refused."""
    header = Fields(lines[0], "the session")
    session, tools = header.take("id"), header.take("tools")
    system, more_tools, _ = take_beside(header)
    task = take_task(header)
    learn_from = header.take("learn_from")
    close_record(
        header, frozenset("type harness name cwd provider modelId thinkingLevel parentSession metadata".split())
    )
    turns: list[Turn] = []
    inner: list[Any] = []
    last = None
    for number, line in enumerate(lines[1:], 2):
        kind = line.get("type")
        if "parentId" in line and last is not None and line["parentId"] not in (last, None):
            raise RefusedRecord(f"line {number}: the session has branches, and nothing tells which one counts")
        last = line.get("id", last)
        if kind == "message":
            envelope = Fields(line, f"line {number}")
            message = envelope.take("message")
            envelope.close(frozenset({"type", "id", "parentId", "timestamp"}))
            turns += read_message(_pi_message(message), f"line {number}", inner)
        elif kind not in _UNSEEN_ENTRIES:
            raise RefusedRecord(f"line {number} of the session is of type {kind!r}: nothing tells whether it was seen")
    if learn_from is not None:
        said = set(learn_from) if isinstance(learn_from, list) else set()
        turns = [replace(turn, is_learned=turn.is_learned and n in said) for n, turn in enumerate(turns)]
    name = session if isinstance(session, str) else None
    return Draft(SourceFormat.SESSION, with_system(system, turns), read_tools(tools, *more_tools, *inner), name, task)


def _pi_message(message: Any) -> Any:
    """Pi says why a message ended in words of its own."""
    if not isinstance(message, dict):
        return message
    unseen = ("api", "details", "stopReason" if message.get("stopReason") in ("stop", "toolUse") else "")
    return {key: value for key, value in message.items() if key not in unseen}
