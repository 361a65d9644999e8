"""What every record of tests/import_cases must become; shared by the test and by benchmarks/import_files.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.importing.demonstrations import ImportedDemonstration, read_demonstrations
from learner.importing.json_lines import Refusal

FOLDER = Path(__file__).parent / "import_cases"


@dataclass(frozen=True, slots=True)
class Case:
    """One record of one file."""

    file: str
    number: int
    """Which of the file's records, from 1."""
    format: str
    """In the words of people who use it."""
    expected: dict[str, Any]


def all_cases() -> list[Case]:
    told = json.loads((FOLDER / "expected.json").read_text("utf-8"))
    return [
        Case(name, number, file["format"], _spelt_out(record, told))
        for name, file in told["files"].items()
        for number, record in enumerate(file["records"], 1)
    ]


def _spelt_out(record: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """A record whose conversation and tools may be named instead of written out."""
    named = {"messages": told["conversations"], "tools": told["tools"]}
    return {
        key: named[key][value] if key in named and isinstance(value, str) else value for key, value in record.items()
    }


def read_file(name: str) -> list[ImportedDemonstration | Refusal]:
    return list(read_demonstrations(FOLDER / name))


def verdict(case: Case, read: ImportedDemonstration | Refusal | None) -> str:
    """`right`, `refused` (as it should be, with the reason), or what is wrong."""
    expected = case.expected
    if read is None:
        return "wrong: the file has fewer records"
    if isinstance(read, Refusal):
        if expected["status"] != "refused":
            return f"wrong: refused, {read.reason}"
        missing = [words for words in expected["reason"] if words not in read.reason]
        return f"wrong: the reason does not name {missing}: {read.reason}" if missing else "refused"
    if expected["status"] != "imported":
        return f"wrong: imported, {read.messages}"
    for name, found in (("messages", read.messages), ("tools", read.tools), ("learned", read.learn_from)):
        if list(found) != expected[name]:
            return f"wrong: {name} are {json.dumps(found)}"
    return "right"
