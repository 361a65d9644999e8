"""Thoughts and calls that a data set writes out within the assistant's text.

What is read: `<think>` before an answer; Hermes's and Nemotron's tags around calls; ToolACE's `[name(key=value)]`;
ToolBench's `Action:` and `Action Input:` lines, where tools answer them. Calls in marks of other models are refused.
Other texts stay texts: an action of ReAct that no tool answers is an answer, because every data set writes them its
own way.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from learner.importing.exact_json import loads
from learner.importing.fields import PART_TYPE_NAMES, Fields, RefusedRecord, is_empty
from learner.importing.turns import Call

_THOUGHT = re.compile(
    r"\s*(?:<think>(.*?)</think>|\[THINK\](.*?)\[/THINK\]|<seed:think>(.*?)</seed:think>|◁think▷(.*?)◁/think▷"
    r"|<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|<\|START_THINKING\|>(.*?)<\|END_THINKING\|>)\s*",
    re.DOTALL,
)
_THOUGHT_MARKS = ("<think>", "[THINK]", "<seed:think>", "◁think▷", "<|begin_of_thought|>", "<|START_THINKING|>")
_ANSWER = re.compile(
    r"<\|begin_of_solution\|>\s*(.*?)\s*<\|end_of_solution\|>\s*|<\|START_RESPONSE\|>(.*?)<\|END_RESPONSE\|>", re.DOTALL
)
"""What stands around the answer where such marks stand around the thought."""
_QUOTES = frozenset({"``", '""', "''", "()", "<>"})
_FENCE = re.compile(r"^[ \t]*```[^`\n]*$", re.MULTILINE)
_SENTENCE_ENDS = tuple(".!?:。！？…")
_HERMES_CALL = re.compile(r"<(tool_call|TOOLCALL)>\s*(.*?)\s*</\1>", re.DOTALL)
"""Nemotron's rows have the same tags in capitals, around a list."""
_TAGGED_ARGUMENTS = re.compile(r"[\w.:/\-]*\s*<")
"""How calls of Qwen3-Coder and GLM begin within the same tags: each argument has a tag of its own."""
_HERMES_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_HERMES_TOOLS = re.compile(r"<tools>\s*(\[.*?\]|\{.*?\})\s*</tools>", re.DOTALL)
_REACT = re.compile(r"(.*?)\bAction:[ \t]*([^\n]+?)[ \t]*\n\s*Action Input:[ \t]*(.*)", re.DOTALL)
_BRACKETS = re.compile(r"\[\s*[A-Za-z_][\w .\-/:]*\(.*\)\s*\]", re.DOTALL)


# ------------------------------------------------------------------------------------------------- thoughts


def split_thought(text: str, where: str) -> tuple[str, str]:
    """(thinking, the rest) of what the assistant wrote. Raises RefusedRecord where it ends within its thinking.

    Only a thought at the beginning counts: a `<think>` later in the text is text. Some models' prompts open the
    thinking, so that only its end is written; words about that mark look alike, and are refused.
    """
    if found := _THOUGHT.match(text):
        rest = text[found.end() :]
        if answer := _ANSWER.fullmatch(rest):
            rest = answer[1] if answer[1] is not None else answer[2]
        return next(thought for thought in found.groups() if thought is not None).strip(), rest
    if begun := next((mark for mark in _THOUGHT_MARKS if text.lstrip().startswith(mark)), None):
        raise RefusedRecord(f"{where} ends within its thinking: {begun} is not closed")
    before, mark, rest = text.partition("</think>")
    if mark and "<think>" not in before and "</think>" not in rest:
        if _is_end_spoken_of(before, rest):
            raise RefusedRecord(
                f"{where} has </think> among its words, and nothing tells whether a thought ends there: write the "
                "thought as reasoning_content, or take the mark out"
            )
        return before.strip(), rest.lstrip()
    return "", text


def _is_end_spoken_of(before: str, rest: str) -> bool:
    """Whether a `</think>` between these texts is quoted, shown in code, or a word of a sentence."""
    if before[-1:] + rest[:1] in _QUOTES:
        return True
    if len(_FENCE.findall(before)) % 2:
        next_lines = rest.split("\n", 2)
        stands_alone = not (before.rpartition("\n")[2] + next_lines[0]).strip()
        return not (stands_alone and len(next_lines) == 3 and not next_lines[1].strip())
    has_blanks = before.endswith((" ", "\t")) and rest.startswith((" ", "\t"))
    said = before.strip()
    is_within_sentence = said != "" and not said.endswith(_SENTENCE_ENDS)
    return has_blanks and is_within_sentence and rest.lstrip(" \t")[:1].islower()


# ----------------------------------------------------------------------------------------------------- calls


CALL_ID_NAMES = ("call_id", "tool_call_id", "toolCallId", "tool_use_id", "toolUseId", "callId")
CALL_NAMES = ("name", "tool_name", "toolName", "function_name", "functionName", "tool", "api_name", "api")
ARGUMENT_NAMES = (
    "arguments", "parameters", "input", "args", "kwargs", "params", "tool_input", "toolInput", "tool_arguments",
    "tool_kwargs", "action_input", "arguments_json", "arguments_text", "raw_arguments", "parameter", "argument",
)  # fmt: skip
_HARMLESS = frozenset(
    "parsed_arguments status view parse_error_type extra_content thought_signature thoughtSignature signature "
    "cache_control caller providerExecuted provider_executed providerOptions providerMetadata callProviderMetadata "
    "namespace internal rawInput provider_data extra metadata index inner_content ai_model_id raw_representation "
    "additional_properties".split()
)


def read_call(value: Any, where: str) -> Call:
    """A call as any API writes it: flat, or within `function`. Raises RefusedRecord."""
    fields = Fields(value, where)
    call_id = fields.take(*CALL_ID_NAMES)
    own_id = fields.take("id")
    fields.take(*PART_TYPE_NAMES)
    if fields.take("parse_error", "error"):
        raise RefusedRecord(f"{where} has a call that its source could not read")
    arguments = fields.take(*ARGUMENT_NAMES)
    function = fields.take("function", "functionCall", "func")
    if isinstance(function, dict):
        inner = Fields(function, where)
        name = inner.take(*CALL_NAMES)
        own_id = own_id or inner.take("id")
        inner_arguments = inner.take(*ARGUMENT_NAMES)
        is_told_twice = not _says_nothing(arguments) and not _says_nothing(inner_arguments)
        if is_told_twice and arguments != inner_arguments:
            raise RefusedRecord(f"{where} has two different arguments of {name}")
        arguments = inner_arguments if _says_nothing(arguments) else arguments
        inner.close(_HARMLESS)
        fields.take("name")
    else:
        name = fields.take(*CALL_NAMES)
        if function is not None and name not in (None, function):
            raise RefusedRecord(f"{where} calls two tools at once, {name!r} and {function!r}")
        name = function if name is None else name
    fields.close(_HARMLESS)
    identifier = call_id if call_id is not None else own_id  # responses have both: the call's id pairs it
    return Call(name, arguments, None if identifier in (None, "") else str(identifier))


def _says_nothing(arguments: Any) -> bool:
    return is_empty(arguments) or (isinstance(arguments, str) and arguments.strip() in ("", "{}", "null"))


def read_literal(text: str, what: str) -> Any:
    """A value as JSON writes it, or as Python does. Raises RefusedRecord where it is neither."""
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        reason = error
    try:
        with warnings.catch_warnings(action="ignore"):  # of what looks odd to Python's compiler
            value = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # a set of sets is a TypeError
        raise RefusedRecord(f"{what} is not JSON: {reason}") from reason
    _require_exact(value, text, what)
    return value


def _require_exact(value: Any, text: str, what: str) -> None:
    """Raises RefusedRecord where Python's reader changed a number, or made what JSON does not have."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise RefusedRecord(f"{what} has a key that is not text")
        for each in value.values():
            _require_exact(each, text, what)
    elif isinstance(value, list):
        for each in value:
            _require_exact(each, text, what)
    elif isinstance(value, float) and repr(value) not in text:
        raise RefusedRecord(f"{what} holds a number with more digits than can be kept")
    elif not isinstance(value, str | int | float | bool | None):
        raise RefusedRecord(f"{what} holds {type(value).__name__}, which JSON does not have")


def read_calls_text(text: str, where: str) -> tuple[Call, ...]:
    """The calls of a text that is a call, or a list of calls."""
    value = read_literal(text.strip().removeprefix("Calling tools:"), f"{where}: the call")
    return tuple(read_call(call, where) for call in (value if isinstance(value, list) else [value]))


_OTHER_MARKS = (
    "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<functioncall>", "<function=", "<function_calls>", "<|tool_call",
    "<｜tool▁call", "<tool_use>", "<|tool_calls_section_begin|>",
    "<|channel|>", "<|start|>", "<|message|>", "<TOOLCALL>", "<minimax:tool_call>", "<invoke name=", "functools[",
    "```tool_code", "<｜DSML｜", "<｜tool_call", "✿FUNCTION✿", "✿ARGS✿", "<start_function_call>",
    "<seed:tool_call>", "<steptml:", "<longcat_tool_call>", "<xai:function_call name=",
    "<|START_ACTION|>", "<|action_start|>", "<|plugin|>", "<|FunctionCallBegin|>", "<|function_call", "<|recipient|>",
)  # fmt: skip
"""How models of other makers begin a call, or a channel of their answer."""
_CALL_BEHIND_WORDS = re.compile("(" + "|".join(map(re.escape, _OTHER_MARKS)) + r")[^\s{\[<]{0,40}\s*[{\[<]")
"""A mark behind words begins a call where what follows looks like one: a text may also tell of such marks."""
_CALL_IN_TAGS = re.compile(r"(<tool_calls>|<function_call>)\s*[{\[]|```python\s*(tool_call\()")
"""Tags that other files have, too, begin a call where JSON follows; ChatGLM3 writes Python behind the tool's name."""
_UNMARKED_CHANNEL = re.compile(
    r"\Aanalysis(?=[A-Z\n]).*assistant(?:final\S|commentary)|\bto=functions\.[^\n{]{1,100}\{", re.DOTALL
)
"""gpt-oss's answer where its marks were left out on the way."""
_NAMED_OBJECT = re.compile(r"([\w.\-]{1,64})\s*(?:```\w*\s*)?(\{.*\})\s*(?:```)?", re.DOTALL)
"""A tool's name with its arguments below, or in a fence."""
_PYTHON_CALL = re.compile(r"(print\()?([A-Za-z_][\w.]{0,63})\(")
_CLOSING_TAG = re.compile(r"</([\w.\-]{1,64})>\Z")
_OPENING_TAG = re.compile(r"\s*<([\w.\-]{1,64})>")
_AROUND_CALLS = re.compile(r"</?(?:execute|tool|code|function|action)>|\A>>>")
_LANGUAGE = re.compile(r"\A\w*\s*")
_BESIDE_ARGUMENTS = frozenset((*CALL_NAMES, *ARGUMENT_NAMES, *"function id call_id tool_call_id type index".split()))
"""What a call in JSON has, and nothing else."""


def require_no_other_call(text: str, where: str) -> None:
    """Raises RefusedRecord for a text that is a call in the marks of a model: it would be learned as an answer."""
    begun = next((mark for mark in _OTHER_MARKS if text.lstrip().startswith(mark)), None)
    if begun is not None:
        raise RefusedRecord(f"{where} begins with {begun}: write the call as tool_calls")
    if found := _CALL_BEHIND_WORDS.search(text) or _CALL_IN_TAGS.search(text):
        raise RefusedRecord(f"{where} has a call behind {found[found.lastindex or 0]}: write the call as tool_calls")
    if _UNMARKED_CHANNEL.search(text.lstrip()):
        raise RefusedRecord(f"{where} has the channels of gpt-oss in its text: write thinking, calls and answer apart")


def called_in_text(text: str, schemas: Mapping[str, Any]) -> set[str]:
    """Those of these tools that a text calls, behind words or alone: in JSON, as Python would, by name with the
    arguments below, or within a tag of the tool's name. A ReAct agent's `Action:` lines are words that its own program
    reads.

    `schemas` are the tools' parameters by their names. What the user may have asked for is no call: words that begin
    with a tool's name, a schema, a log's line, code of another signature, markup.
    """
    if not schemas:
        return set()
    text = text.strip()
    blocks = [_LANGUAGE.sub("", block).strip() for block in text.split("```")[1::2]]
    lines = [line for line in text.split("\n") if line.startswith(("{", "["))]
    behind_words = text[text.index(lines[0]) :] if lines else text
    is_one_block = len(blocks) == 1 and text.startswith("```") and text.endswith("```")
    within = {behind_words, *blocks, *lines} - {text}
    called = {*_called_in_json(text, is_alone=True), *_called_in_tag(text, schemas)}
    called |= {name for each in within for name in _called_in_json(each, is_alone=is_one_block)}
    called |= _called_by_name(_AROUND_CALLS.sub("", blocks[0] if is_one_block else text).strip(), schemas, is_one_block)
    return called & set(schemas)


def _called_in_json(text: str, is_alone: bool) -> Iterator[str]:
    """Among words only what has nothing but a call's keys."""
    if not text.startswith(("{", "[")):
        return
    try:
        value = read_literal(text, "the text")
    except RefusedRecord:
        return
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        within = next((value[key] for key in ("tool_calls", "function_call", "tool_call") if key in value), value)
        values = within if isinstance(within, list) else [within]
    for call in (each for each in values if isinstance(each, dict)):
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        arguments = [inner[key] for key in ARGUMENT_NAMES if key in inner]
        if arguments and (is_alone or set(inner) <= _BESIDE_ARGUMENTS) and not _describes(inner, arguments):
            yield from (str(inner[key]) for key in (*CALL_NAMES, "function") if isinstance(inner.get(key), str))


def _describes(call: dict[str, Any], arguments: list[Any]) -> bool:
    """Whether it is a tool's description, whose arguments are a schema."""
    schemas = [each for each in arguments if isinstance(each, dict) and ("properties" in each or each.get("type"))]
    return "description" in call or any("properties" in each or each["type"] == "object" for each in schemas)


def _called_by_name(text: str, schemas: Mapping[str, Any], is_code: bool) -> set[str]:
    """A call as Python writes it, or a tool's name before an object. A block of code may be what the user asked for:
    there only a call by the tool's own parameters is one."""
    if (found := _NAMED_OBJECT.fullmatch(text)) and found[1] in schemas and _is_object(found[2]):
        return {found[1]}
    found = _PYTHON_CALL.match(text)
    if found is None or found[2] not in schemas or not text.endswith(")"):
        return set()
    try:
        with warnings.catch_warnings(action="ignore"):
            called = ast.parse(text.removeprefix("print(").removesuffix(")") if found[1] else text, mode="eval").body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return set()
    if not isinstance(called, ast.Call):
        return set()
    named = {each.arg for each in called.keywords}
    is_own = not called.args and named <= set(_properties(schemas[found[2]]))
    return {found[2]} if is_own or not is_code else set()


def _called_in_tag(text: str, schemas: Mapping[str, Any]) -> set[str]:
    """What stands in a tag of the tool's name as an object, or with a tag for each argument."""
    closing = _CLOSING_TAG.search(text)
    if closing is None or closing[1] not in schemas or f"<{closing[1]}>" not in text:
        return set()
    inside = text[text.rindex(f"<{closing[1]}>") + len(closing[1]) + 2 : closing.start()]
    first = _OPENING_TAG.match(inside)
    is_call = _is_object(inside) or (first is not None and first[1] in _properties(schemas[closing[1]]))
    return {closing[1]} if is_call else set()


def _is_object(text: str) -> bool:
    try:
        return isinstance(read_literal(text, "the text"), dict)
    except RefusedRecord:
        return False


def _properties(schema: Any) -> dict[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def split_tagged_calls(text: str, where: str) -> tuple[str, tuple[Call, ...]]:
    """(text, calls) of what holds Hermes's tags; the text unchanged where there are none."""
    found = list(_HERMES_CALL.finditer(text))
    if not found:
        return text, ()
    if any(_TAGGED_ARGUMENTS.match(each[2]) for each in found):
        raise RefusedRecord(f"{where} has a call in tags that is not written in JSON: write the call as tool_calls")
    calls = [call for each in found for call in read_calls_text(each[2], where)]
    between = [text[a.end() : b.start()] for a, b in pairwise(found)]
    if "".join([*between, text[found[-1].end() :]]).strip():
        raise RefusedRecord(f"{where} has text behind its calls: a call ends what the assistant says")
    return text[: found[0].start()].rstrip(), tuple(calls)


def bracket_calls(text: str, where: str) -> tuple[Call, ...]:
    """The calls of a text that is `[name(key=value), ...]` from its beginning to its end; none where it is not."""
    text = text.strip()
    if not _BRACKETS.fullmatch(text):
        return ()
    names: list[str] = []

    def placeholder(found: re.Match[str]) -> str:
        names.append(found[2].strip())
        return f"{found[1]}_call_{len(names) - 1}("

    # Names with spaces or points are no Python; a name stands at the beginning or behind a call's end.
    plain = re.sub(r"(^\[\s*|\)\s*,\s*)([A-Za-z_][\w .\-/:]*)\(", placeholder, text)
    try:
        parsed = ast.parse(plain, mode="eval").body
        entries = parsed.elts if isinstance(parsed, ast.List) else []
        calls = tuple(_python_call(entry, names, text, where) for entry in entries)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise RefusedRecord(f"{where} looks like calls in brackets, and cannot be read as such: {error}") from error
    return calls


def _python_call(entry: ast.expr, names: list[str], text: str, where: str) -> Call:
    if not isinstance(entry, ast.Call) or not isinstance(entry.func, ast.Name) or entry.args:
        raise ValueError("every call needs a name, and every argument a name")
    arguments = {}
    for keyword in entry.keywords:
        if keyword.arg is None:
            raise ValueError("an argument has no name")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
        _require_exact(arguments[keyword.arg], text, f"{where}: the argument {keyword.arg}")
    return Call(names[int(entry.func.id.removeprefix("_call_"))], arguments)


def react_call(text: str, where: str) -> tuple[str, tuple[Call, ...]]:
    """(text, calls) of a text with ToolBench's `Action:` and `Action Input:` lines; the text unchanged without them."""
    found = _REACT.fullmatch(text)
    if found is None:
        return text, ()
    arguments = read_literal(found[3].strip() or "{}", f"{where}: the input of {found[2]}")
    if found[2] == "Finish" and isinstance(arguments, dict) and "give_up" in str(arguments.get("return_type")):
        raise RefusedRecord(f"{where} gives up (return_type): the record is no expert's")
    return found[1].strip(), (Call(found[2], arguments),)


# ------------------------------------------------------------------------------------------- results and tools


def tagged_results(text: str) -> list[str]:
    """The texts of Hermes's results, where a text is nothing else; none where it is, or where words stand beside."""
    return [] if _HERMES_RESULT.sub("", text).strip() else _HERMES_RESULT.findall(text)


def named_result(text: str) -> tuple[str | None, str | None]:
    """(call id, tool name) that a result itself tells, as Hermes's and ToolACE's do."""
    try:
        value = loads(text)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(value, dict):
        return None, None
    call_id, name = value.get("tool_call_id"), value.get("name")
    return (call_id if isinstance(call_id, str) else None), (name if isinstance(name, str) else None)


def tools_in_text(text: str) -> list[Any]:
    """The tools that a system message of Hermes, ToolBench or ToolACE writes out."""
    listed = [read_literal(found, "the list of tools in the system message") for found in _HERMES_TOOLS.findall(text)]
    for opening in (
        "you have access to the following APIs:",
        "Here is a list of functions in JSON format that you can invoke:",
    ):
        _, found, rest = text.partition(opening)
        if found and rest.lstrip().startswith("["):
            listed.append(_leading_list(rest.lstrip()))
    return [tool for tools in listed for tool in (tools if isinstance(tools, list) else [tools])]


def _leading_list(text: str) -> Any:
    """The list that a text begins with."""
    for end in (found.end() for found in re.finditer(r"\]", text)):
        try:
            return read_literal(text[:end], "")
        except RefusedRecord:
            continue
    raise RefusedRecord("the list of tools in the system message cannot be read")
