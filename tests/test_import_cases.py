"""Files as people have them: each record becomes just what it says, or is refused by a reason that names why."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.__main__ import main
from learner.importing.demonstrations import ImportedDemonstration, read_record
from learner.importing.json_lines import Refusal
from tests.import_expectations import FOLDER, Case, all_cases, read_file, verdict

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}:{case.number}")
def test_a_record_becomes_what_it_must_become(case: Case) -> None:
    reads = read_file(case.file)
    read = reads[case.number - 1] if case.number <= len(reads) else None
    assert verdict(case, read) in ("right", "refused")


def test_every_case_file_has_its_expectations_and_no_records_more() -> None:
    told = {case.file for case in CASES}
    assert told == {path.name for path in FOLDER.iterdir()} - {"expected.json"}
    for name in told:
        assert len(read_file(name)) == sum(case.file == name for case in CASES), name


# ------------------------------------------------------------------------------------------- rules in general

USER, ANSWER = {"role": "user", "content": "Is it raining?"}, {"role": "assistant", "content": "Yes."}
PLAIN: dict[str, Any] = {"messages": [USER, ANSWER]}


def read(record: Any) -> ImportedDemonstration | Refusal:
    return read_record(json.loads(json.dumps(record)), "f.jsonl", 1)


def calling(arguments: Any, schema: Any = None) -> ImportedDemonstration | Refusal:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    tools = [] if schema is None else [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    return read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": tools})


def learned_arguments(arguments: Any, schema: Any = None) -> str:
    result = calling(arguments, schema)
    assert isinstance(result, ImportedDemonstration), result
    return result.messages[1]["tool_calls"][0]["function"]["arguments"]


UNKNOWN_NAMES = st.text("abcdefghijklmnopqrstuvwxyz_", max_size=12).map("zz_{}_zz".format)


@settings(max_examples=100, deadline=None)
@given(UNKNOWN_NAMES, st.sampled_from(["x", 0, 1, True, False, ["x"], {"a": 1}]))
def test_a_key_that_nobody_knows_refuses_its_record_by_name(name: str, value: Any) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {"role": "assistant", "tool_calls": [call]}
    records = [
        {**PLAIN, name: value},
        {"messages": [{**USER, name: value}, ANSWER]},
        {"messages": [USER, {**ANSWER, name: value}]},
        {"messages": [USER, {**calls, "tool_calls": [{**call, name: value}]}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "x", name: value}]}]},
        {**PLAIN, "tools": [{"name": "f", "description": "", "parameters": {}, name: value}]},
        {"prompt": "q", "completion": "a", name: value},
        {"prompt": "q", "chosen": "a", "rejected": "b", name: value},
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}], name: value},
    ]
    for record in records:
        result = read(record)
        assert isinstance(result, Refusal), record
        assert name in result.reason
        padded = json.loads(json.dumps(record).replace(json.dumps({name: value})[1:-1], f'"{name}": null'))
        assert name not in getattr(read(padded), "reason", "")


@pytest.mark.parametrize("name", ["quality_notes", "persona", "bot_memory", "preamble", "few_shot", "context_docs"])
def test_a_user_can_call_a_key_harmless(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({**PLAIN, name: "x"}))
    assert main(["import", "--dry-run", str(path)]) == 1
    assert f"--ignore {name}" in capfd.readouterr().out
    assert main(["import", "--dry-run", "--ignore", name, str(path)]) == 0


def test_a_null_stays_where_the_schema_allows_it_and_goes_where_it_only_pads() -> None:
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    schema = {"type": "object", "properties": {"a": nullable, "b": {"type": "string"}, "c": {"$ref": "#/$defs/C"}}}
    schema["$defs"] = {
        "C": {"type": "object", "properties": {"d": {"type": ["integer", "null"]}, "e": {"type": "string"}}}
    }
    given = {"a": None, "b": None, "c": {"d": None, "e": None}, "z": None}
    for arguments in (given, json.dumps(given)):
        assert json.loads(learned_arguments(arguments, schema)) == {"a": None, "c": {"d": None}}
    free = {"type": "object", "properties": {}, "additionalProperties": True}
    assert json.loads(learned_arguments({"a": None}, free)) == {"a": None}


def test_a_null_for_what_the_tool_requires_is_no_padding() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    result = calling({"city": None}, schema)
    assert isinstance(result, Refusal)
    assert "'city'" in result.reason


def test_without_a_schema_a_null_of_an_object_is_not_guessed_at() -> None:
    result = calling({"city": "Oslo", "unit": None})
    assert isinstance(result, Refusal)
    assert "pads a column" in result.reason
    assert learned_arguments('{"city": "Oslo", "unit": null}') == '{"city": "Oslo", "unit": null}'


@given(st.integers() | st.integers(10**15, 10**40), st.booleans())
def test_no_integer_changes_a_digit(number: int, is_text: bool) -> None:
    arguments: Any = {"id": number, "deep": [{"id": -number}]}
    assert json.loads(learned_arguments(json.dumps(arguments) if is_text else arguments)) == arguments


@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**30), max_value=10**30))
def test_a_decimal_number_is_kept_or_its_record_refused(number: Any) -> None:
    text = f"{number:f}"
    result = calling(f'{{"x": {text}}}')
    if isinstance(result, ImportedDemonstration):
        kept = json.loads(result.messages[1]["tool_calls"][0]["function"]["arguments"], parse_float=Decimal)["x"]
        assert Decimal(kept) == number
    else:
        assert "more digits" in result.reason


def test_an_argument_may_be_called_what_the_api_calls_it() -> None:
    for name in ("arguments", "parameters", "input", "args", "kwargs"):
        for value in ({"city": "Oslo"}, '{"city": "Oslo"}'):
            for call in ({"name": "f", name: value}, {"function": {"name": "f", name: value}}):
                result = read({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
                assert isinstance(result, ImportedDemonstration), result
                assert result.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"city": "Oslo"}'


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.mark.parametrize("name", ["parameters", "input_schema", "inputSchema", "args_schema", "parametersJsonSchema"])
def test_a_tools_schema_may_be_called_what_the_api_calls_it(name: str) -> None:
    wanted = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
    bare = {"name": "f", "description": "d", name: SCHEMA}
    for tools in ([bare], [{"type": "function", "function": bare}], json.dumps([bare]), [json.dumps(bare)]):
        result = read({**PLAIN, "tools": tools})
        assert isinstance(result, ImportedDemonstration), result
        assert result.tools == (wanted,)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "reasoning_text"])
def test_thinking_is_learned_as_thinking_wherever_it_stands(name: str) -> None:
    result = read({"messages": [USER, {**ANSWER, name: "I look out."}]})
    assert isinstance(result, ImportedDemonstration)
    assert result.messages[1] == {**ANSWER, "reasoning_content": "I look out."}


@pytest.mark.parametrize("name", ["system", "system_prompt", "instructions", "systemPrompt", "system_message"])
def test_a_system_text_beside_the_messages_is_their_first_message(name: str) -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [
        {**PLAIN, name: "Be brief."},
        {"messages": [system, USER, ANSWER], name: "Be brief."},
        {"prompt": USER["content"], "completion": "Yes.", name: "Be brief."},
        {"prompt": USER["content"], "chosen": "Yes.", "rejected": "No.", name: "Be brief."},
    ]
    for row in rows:
        result = read(row)
        assert isinstance(result, ImportedDemonstration), result
        assert result.messages == (system, USER, ANSWER)


def test_results_in_another_order_go_to_their_calls_by_id_or_name_or_not_at_all() -> None:
    calls = [{"id": i, "function": {"name": n, "arguments": {}}} for i, n in (("x", "f"), ("y", "g"))]
    said = {"role": "assistant", "tool_calls": calls}
    results = [
        {"role": "tool", "tool_call_id": "y", "content": "G"},
        {"role": "tool", "tool_call_id": "x", "content": "F"},
    ]
    named = [{"role": "tool", "name": "g", "content": "G"}, {"role": "tool", "name": "f", "content": "F"}]
    bare = [{"role": "tool", "content": "G"}, {"role": "tool", "content": "F"}]
    for told in (results, named):
        result = read({"messages": [USER, said, *told, ANSWER]})
        assert isinstance(result, ImportedDemonstration), result
        assert [(m["tool_call_id"], m["content"]) for m in result.messages[2:4]] == [("call_1", "G"), ("call_0", "F")]
    refused = read({"messages": [USER, said, *bare, ANSWER]})
    assert isinstance(refused, Refusal)
    assert "nothing tells which" in refused.reason


def test_columns_of_nulls_change_nothing() -> None:
    """A file in columns gives every message, call and tool the keys of all the others."""
    record = json.loads((FOLDER / "openai_tuning.jsonl").read_text().splitlines()[0])
    padded = copy.deepcopy(record)
    for message in padded["messages"]:
        for name in ("tool_calls", "tool_call_id", "name", "weight", "function_call", "audio", "train", "reasoning"):
            message.setdefault(name, None)
    padded |= {"functions": None, "label": None, "images": None, "system": None}
    schema = padded["tools"][0]["function"]["parameters"]
    schema["properties"] |= {"theta": None, "other": {"type": None, "enum": None}}
    schema["properties"]["city"] |= {"enum": None, "items": None, "default": None}
    first, second = read(record), read(padded)
    assert isinstance(first, ImportedDemonstration)
    assert isinstance(second, ImportedDemonstration), second
    assert (second.messages, second.tools, second.learn_from) == (first.messages, first.tools, first.learn_from)


# ------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_shows_each_record_as_json_and_needs_no_server(capfd: pytest.CaptureFixture[str]) -> None:
    path = FOLDER / "01_lf_kto_label_false.jsonl"
    assert main(["import", "--dry-run", "--json", str(path), str(path), "--url", "http://127.0.0.1:9/v1"]) == 1
    shown = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(each["line"], each["status"]) for each in shown] == [
        (1, "refused"), (2, "imported"), (1, "refused"), (2, "known"),
    ]  # fmt: skip
    assert "label" in shown[0]["reason"]
    assert shown[1]["reason"] is None
    assert [message["role"] for message in shown[1]["messages"]] == ["user", "assistant"]
    assert shown[1]["learned"] == [1]
    assert shown[1]["tools"] == []


def test_a_dry_run_ends_with_what_the_files_cover(capfd: pytest.CaptureFixture[str]) -> None:
    main(["import", "--dry-run", str(FOLDER / "04_arrow_nulls.jsonl"), str(FOLDER / "09k_eto_failed_output.jsonl")])
    table = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    for row in ("records imported 1", "records refused 1", "steps learned 2", "get_weather 1 / 1", "rotate 0 / 1"):
        assert row in table
    assert "refused: meta.success is False: it is marked as no expert's 1" in table


def test_a_dry_run_loads_nothing_heavy() -> None:
    program = (
        "import sys; from learner.__main__ import main; "
        f"main(['import', '--dry-run', '--json', {str(FOLDER / '08b_anthropic.jsonl')!r}]); "
        "heavy = {'torch', 'transformers', 'openai', 'langchain_core', 'sqlite_utils', 'fastapi'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
