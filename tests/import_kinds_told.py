"""Small records of every kind in tests/import_kinds, and what each must become, in a line of words.

A file's first line names its format; each other line has a `name`, its `record` (or the `lines`, or the `text`, of a
file) and what is `expected` of each record: the words of a refusal, or the conversation, told as `told` does. Shared by
the test and by benchmarks/import_files.py.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.importing.demonstrations import ImportedDemonstration, read_demonstrations
from learner.importing.json_lines import Refusal

FOLDER = Path(__file__).parent / "import_kinds"


@dataclass(frozen=True, slots=True)
class Kind:
    """One small file, and what each of its records must become."""

    format: str
    """In the words of people who use it."""
    name: str
    text: str
    """Of the file."""
    expected: list[Any]

    def verdicts(self) -> list[str]:
        """Of each record: `right`, `refused` (as it should be, with the reason), or what is wrong."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "f.jsonl"
            path.write_text(self.text, encoding="utf-8")
            reads = list(read_demonstrations(path))
        if len(reads) != len(self.expected):
            return [f"wrong: {len(reads)} records and not {len(self.expected)}"]
        return [_verdict(expected, read) for expected, read in zip(self.expected, reads, strict=True)]


def all_kinds() -> list[Kind]:
    kinds = []
    for path in sorted(FOLDER.iterdir()):
        head, *lines = path.read_text("utf-8").splitlines()
        for line in map(json.loads, lines):
            kinds.append(Kind(json.loads(head)["format"], line["name"], _text(line), line["expected"]))
    return kinds


def _text(line: dict[str, Any]) -> str:
    if "text" in line:
        return line["text"]
    return "\n".join(map(json.dumps, line["lines"])) if "lines" in line else json.dumps(line["record"])


def _verdict(expected: Any, read: ImportedDemonstration | Refusal) -> str:
    if isinstance(read, Refusal):
        if isinstance(expected, str):
            return f"wrong: refused, {read.reason}"
        missing = [words for words in expected["refused"] if words not in read.reason]
        return f"wrong: the reason does not name {missing}: {read.reason}" if missing else "refused"
    return "right" if told(read) == expected else f"wrong: imported, {told(read)}"


def told(read: ImportedDemonstration) -> str:
    """A conversation in one line: `s`, `u`, `a`, `t` speak; `*` is learned; `(thinking)`; `>call{}`; `#0` answers the
    first call; the tools in braces, `!` behind what they require."""
    turns = [_turn(message, number in read.learn_from) for number, message in enumerate(read.messages)]
    tools = "; ".join(_tool(tool["function"]) for tool in read.tools)
    return " | ".join(turns) + (f"  {{{tools}}}" if tools else "")


def _turn(message: dict[str, Any], is_learned: bool) -> str:
    role = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}[message["role"]]
    thought = f"({message['reasoning_content']})" if "reasoning_content" in message else ""
    answered = f"#{message['tool_call_id'].removeprefix('call_')} " if role == "t" else ""
    calls = [f" >{call['function']['name']}{call['function']['arguments']}" for call in message.get("tool_calls", ())]
    return f"{role}{'*' * is_learned}:{thought}{answered}{message['content']}{''.join(calls)}"


def _tool(function: dict[str, Any]) -> str:
    schema = function["parameters"]
    names = [
        f"{name}:{held.get('type') if isinstance(held, dict) else held}{'!' * (name in schema.get('required', ()))}"
        for name, held in schema.get("properties", {}).items()
    ]
    described = f" -{function['description']}" if function["description"] else ""
    return f"{function['name']}({', '.join(names)}){described}"
