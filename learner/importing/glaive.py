"""Glaive's rows: a whole conversation in one text, and the tools in the text of its system message."""

from __future__ import annotations

import re
from typing import Any

from learner.importing.exact_json import DECODER
from learner.importing.fields import Fields, RefusedRecord
from learner.importing.marks import close_record
from learner.importing.tool_schemas import read_tools
from learner.importing.turns import Call, Draft, SourceFormat, Turn
from learner.importing.written_calls import read_call, read_literal

_SPEAKER = re.compile(r"(?:\A|\n\s*\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ \t]*")
_CALL = re.compile(r"<functioncall>\s*(.*)", re.DOTALL)
_QUOTED = re.compile(r"""\{\s*"name":\s*"([^"]*)",\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)
"""A call as these rows write it: JSON, but for the single quotes around the arguments' JSON text."""


def read_glaive(record: dict[str, Any]) -> Draft:
    fields = Fields(record, "the record")
    system, chat = fields.take_text("system").removeprefix("SYSTEM:").strip(), fields.take_text("chat")
    close_record(fields)
    before, *said = _SPEAKER.split(chat)
    if before.strip() or not said:
        raise RefusedRecord("its chat is not a text of USER:, ASSISTANT: and FUNCTION RESPONSE:")
    turns = [Turn("system", system)] if system else []
    for number, (speaker, text) in enumerate(zip(said[::2], said[1::2], strict=True), 1):
        turns.append(_turn(speaker, text.replace("<|endoftext|>", "").strip(), f"part {number} of its chat"))
    return Draft(SourceFormat.GLAIVE, turns, read_tools(_tools_in(system)))


def _turn(speaker: str, text: str, where: str) -> Turn:
    if speaker != "ASSISTANT":
        return Turn("user" if speaker == "USER" else "tool", text)
    found = _CALL.search(text)
    if found is None:
        return Turn("assistant", text)
    return Turn("assistant", text[: found.start()].strip(), calls=(_call(found[1].strip(), where),))


def _call(written: str, where: str) -> Call:
    if quoted := _QUOTED.fullmatch(written):
        return Call(quoted[1], quoted[2])
    return read_call(read_literal(written, f"{where}: the call"), where)


def _tools_in(system: str) -> list[Any]:
    """The objects that stand one behind the other at the end of the system text."""
    tools, place = [], system.find("{")
    while 0 <= place < len(system):
        try:
            tool, end = DECODER.raw_decode(system, place)
        except (ValueError, RecursionError) as error:
            raise RefusedRecord(f"the tools in its system text are not JSON: {error}") from error
        tools.append(tool)
        place = system.find("{", end)
    return tools
