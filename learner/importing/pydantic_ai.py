"""Messages of pydantic-ai, as `all_messages_json` writes them, in the shape of everybody else's."""

from __future__ import annotations

from typing import Any

from learner.importing.fields import Fields, RefusedRecord

_REQUEST_ROLES = {"system-prompt": "system", "user-prompt": "user", "tool-return": "tool"}
_OF_PARTS = frozenset(
    "timestamp dynamic_ref part_kind id provider_name provider_details outcome metadata tool_kind".split()
)
_OF_MESSAGES = frozenset("usage provider_details provider_url provider_name run_id conversation_id metadata".split())


def is_pydantic_ai(value: Any) -> bool:
    """Whether a message is a request to a model, or its response, made of parts that each tell their kind."""
    return (
        isinstance(value, dict)
        and value.get("kind") in ("request", "response")
        and isinstance(value.get("parts"), list)
    )


def as_messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """One request or response as messages of roles. Raises RefusedRecord for what no such message can say."""
    parts = [Fields(part, f"a part of {where}") for part in message["parts"]]
    beside = {name: value for name, value in message.items() if name not in ("kind", "parts", *_OF_MESSAGES)}
    if message["kind"] == "response":
        return [{"role": "assistant", "content": [_said(part) for part in parts], **beside}]
    instructions = beside.pop("instructions", None)
    opening = [{"role": "system", "content": instructions}] if instructions else []
    return [*opening, *({**_asked(part), **beside} for part in parts)]


def _asked(part: Fields) -> dict[str, Any]:
    kind = part.take("part_kind")
    if kind not in _REQUEST_ROLES:
        raise RefusedRecord(f"{part.where} is a {kind}, which the model was told in words that the file does not hold")
    if part.take("scope") not in (None, "conversation"):
        raise RefusedRecord(f"{part.where} has a scope of its own: the model saw it once, and not where it stands")
    content, call_id, name = part.take("content"), part.take("tool_call_id"), part.take("tool_name")
    part.close(_OF_PARTS)
    return {"role": _REQUEST_ROLES[kind], "content": content, "tool_call_id": call_id, "name": name}


def _said(part: Fields) -> dict[str, Any]:
    kind = part.take("part_kind")
    content, signature = part.take("content"), part.take("signature")
    if kind == "tool-call":
        call = {"type": "tool_call", "name": part.take("tool_name"), "args": part.take("args")}
        call["id"] = part.take("tool_call_id")
        part.close(_OF_PARTS)
        return call
    if kind not in ("text", "thinking"):
        raise RefusedRecord(f"{part.where} is a {kind}; only text, thinking and calls of functions are read")
    part.close(_OF_PARTS)
    return {"type": kind, kind: content, "signature": signature}
