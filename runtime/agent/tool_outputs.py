"""What a tool gave back, as the text that the agent is shown: never longer than it may be, and always UTF-8.

A tool is foreign code and may give back anything. A large output is turned into text no further than it is shown, so
that a gigabyte costs no more than what is left of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, TypeGuard

from langchain_core.messages import ToolMessage
from pydantic import BaseModel


def shown(output: Any, max_chars: int) -> str:
    """The output as text: a text as it is, content blocks as their texts, anything else as JSON."""
    if isinstance(output, ToolMessage):
        output = output.content
    if isinstance(output, bytes | bytearray | memoryview):
        output = _decoded(bytes(output[: 4 * max_chars + 1]), len(output))
    if isinstance(output, str):
        return cut(output, max_chars)
    if _are_content_blocks(output):
        return cut("\n".join(map(_block_text, output)), max_chars)
    return _json(output, max_chars)


def cut(text: str, max_chars: int) -> str:
    """At most so many characters, that UTF-8 can write, with a mark where there were more."""
    kept = text[:max_chars].encode(errors="replace").decode()
    return kept if len(text) <= max_chars else f"{kept}\n[cut here: the whole output has {len(text)} characters]"


def _decoded(start: bytes, num_bytes: int) -> str:
    try:
        return start.decode()
    except UnicodeDecodeError as error:
        is_cut_within_a_letter = len(start) < num_bytes and error.start > len(start) - 4
        return start[: error.start].decode() if is_cut_within_a_letter else f"[{num_bytes} bytes that are no text]"


def _are_content_blocks(output: Any) -> TypeGuard[list[dict[str, Any]]]:
    """LangChain's form of content, which its MCP and retrieval tools give back."""
    if not isinstance(output, list) or not output:
        return False
    return all(isinstance(each, dict) and _is_content_block(each) for each in output)


def _is_content_block(block: dict[str, Any]) -> bool:
    kind = block.get("type")
    return isinstance(block.get("text"), str) if kind == "text" else kind in ("image", "image_url", "audio", "file")


def _block_text(block: dict[str, Any]) -> str:
    if block["type"] == "text":
        return block["text"]
    source = next((block[key] for key in ("url", "image_url") if isinstance(block.get(key), str)), "")
    about = [str(block["mime_type"])] if block.get("mime_type") else []
    if source and not source.startswith("data:"):
        about.append(source)
    return f"[{' '.join([block['type'].removesuffix('_url'), *about])}: not shown]"


def _json(output: Any, max_chars: int) -> str:
    """JSON, written in pieces and no further than it is shown; the output's own text where it cannot be JSON."""
    try:
        pieces = json.JSONEncoder(ensure_ascii=False, default=_plain).iterencode(output)
        text = "".join(_up_to(pieces, max_chars + 1))
    except (TypeError, ValueError, RecursionError):  # keys that are no texts, a circle, too deep
        return cut(str(output), max_chars)
    if len(text) <= max_chars:
        return cut(text, max_chars)
    return f"{cut(text[:max_chars], max_chars)}\n[cut here: the whole output is longer]"


def _up_to(pieces: Iterator[str], num_chars: int) -> Iterator[str]:
    """The first pieces, until they have so many characters together."""
    for piece in pieces:
        yield piece
        num_chars -= len(piece)
        if num_chars <= 0:
            return


def _plain(value: Any) -> Any:
    """What JSON has no word for."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)
