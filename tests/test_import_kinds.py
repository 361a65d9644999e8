"""Hundreds of small records, in the shapes that tools write: each is read as its format says, or refused by name."""

from __future__ import annotations

import pytest

from learner.importing.demonstrations import ImportedDemonstration, read_record
from learner.importing.type_texts import schema_of_type
from tests.import_kinds_told import Kind, all_kinds

KINDS = all_kinds()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.format}: {kind.name}")
def test_a_record_becomes_what_its_format_says(kind: Kind) -> None:
    assert set(kind.verdicts()) <= {"right", "refused"}


@pytest.mark.parametrize(
    "text",
    ["f" + ".a" * 20_000 + "()", "f(" * 2_000 + ")" * 2_000, "f(" + "1+" * 50_000 + "1)", "{" * 50_000 + "}" * 50_000],
    ids=["names", "calls", "sums", "sets"],
)
def test_an_answer_that_is_deep_for_pythons_reader_ends_no_import(text: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": text}]
    assert isinstance(read_record({"messages": messages, "tools": [tool]}, "f", 1), ImportedDemonstration)


@pytest.mark.parametrize(
    ("written", "schema"),
    [
        ("str, optional", {"type": "string"}),
        ("Optional[int]", {"type": "integer"}),
        ("List[List[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        ("Dict[str, float]", {"type": "object", "additionalProperties": {"type": "number"}}),
        ("Tuple[int, str]", {"type": "array"}),
        ("Union[str, int]", {"type": ["string", "integer"]}),
        ("int | None", {"type": ["integer", "null"]}),
        ("Union[List[str], str]", {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}),
        ("STRING", {"type": "string"}),
        ("Any", {}),
        ("Callable[[float], float]", {"type": "Callable[[float], float]"}),
    ],
)
def test_a_types_text_becomes_a_schema(written: str, schema: dict[str, object]) -> None:
    assert schema_of_type(written) == schema
