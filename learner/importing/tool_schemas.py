"""Tools as every API and data set writes them, in OpenAI's form.

Only what a server renders is kept: name, description and parameters. So a demonstration's prompt reads as a served one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from learner.importing.exact_json import holds_rounded, loads
from learner.importing.fields import CACHE_MARK, Fields, RefusedRecord, is_empty, is_padding, kind
from learner.importing.type_texts import TYPES, schema_of_type
from learner.importing.written_calls import read_literal
from policies.types import ToolSchema
from tools.bounds import TOOL_NAME

NAME_RULE = "a name has 1 to 64 of A-Z, a-z, 0-9, '_', '-' and '.'"

_SCHEMA_NAMES = (
    "parameters", "input_schema", "inputSchema", "parametersJsonSchema", "parameters_json_schema", "args_schema",
    "argsSchema", "tool_call_schema", "schema", "json_schema", "parameter_definitions",
)  # fmt: skip
"""Where a JSON schema of the arguments stands; some of them hold the bare properties, without `type: object`."""
_PROPERTIES_NAMES = ("properties", "inputs", "args", "arguments", "input")
"""Where the properties stand on their own: LangChain's `args`, smolagents' `inputs`."""
_UNRENDERED = frozenset(
    "type strict title annotations output_schema outputSchema output_type outputs response responses returns return "
    "results cache_control input_examples examples example defer_loading allowed_callers eager_input_streaming "
    "category category_name tool_name icons _meta execution behavior metadata return_direct tags viz parallel method "
    "template_response provider_data".split()
)
"""Of a tool, and in no prompt of ours."""


def read_tools(*given: Any) -> tuple[ToolSchema, ...]:
    """The tools of a record, from all the places where it has some; the same list twice counts once.

    Raises RefusedRecord where one cannot be read, or where two differ under one name.
    """
    tools: dict[str, ToolSchema] = {}
    for where in given:
        listed = dict[str, ToolSchema]()
        for number, tool in enumerate(_listed(where), 1):
            read = _read_tool(tool, number)
            name = read["function"]["name"]
            if name in listed or tools.get(name, read) != read:
                raise RefusedRecord(f"two of its tools are called {name!r}")
            listed[name] = read
        tools |= listed
    return tuple(tools.values())


def _listed(tools: Any) -> Iterable[Any]:
    if isinstance(tools, str):
        tools = read_literal(tools, "the list of its tools") if tools.strip() else []
    if isinstance(tools, dict) and isinstance(tools.get("tools"), list):  # MCP's answer, Bedrock's toolConfig
        settings = Fields(tools, "the tools")
        tools = settings.take("tools")
        settings.close(frozenset({"toolChoice", "nextCursor", "_meta", "ttlMs", "cacheScope", "resultType"}))
    if is_empty(tools):
        return ()
    if isinstance(tools, dict) and not is_one_tool(tools):
        if not all(isinstance(tool, dict) for tool in tools.values()):
            raise RefusedRecord("its tools are an object, not a list")
        tools = [{"name": name, **tool} for name, tool in tools.items()]  # Vercel's: by their names
    if not isinstance(tools, list | dict):
        raise RefusedRecord(f"its tools are {kind(tools)}, not a list")
    return _unwrapped(tools if isinstance(tools, list) else [tools])


def _unwrapped(tools: list[Any]) -> Iterable[Any]:
    """Each tool on its own, out of Gemini's declarations and of lists that are JSON text."""
    for tool in tools:
        if isinstance(tool, dict) and set(tool) == CACHE_MARK:
            continue
        if isinstance(tool, str) and tool.lstrip().startswith(("{", "[")):
            yield from _listed(tool)
        elif isinstance(tool, dict) and (
            found := tool.get("functionDeclarations") or tool.get("function_declarations")
        ):
            for name, value in tool.items():
                if name not in ("functionDeclarations", "function_declarations") and value is not None:
                    raise RefusedRecord(f"its tools hold {name!r} of the provider's own; only functions are read")
            yield from found if isinstance(found, list) else [found]
        else:
            yield tool


def is_one_tool(value: dict[str, Any]) -> bool:
    """Whether an object is a tool, and not tools by their names."""
    return any(isinstance(value.get(name), str) for name in ("name", "type")) or any(
        name in value for name in ("function", "toolSpec", "functionDeclarations", "function_declarations")
    )


def _read_tool(tool: Any, number: int) -> ToolSchema:
    where = f"tool {number}"
    fields = Fields(tool, where)
    tool_type = fields.take("type")
    if tool_type not in (None, "function", "custom", "tool", "dynamic", "tool_definition"):
        raise RefusedRecord(f"{where} is of type {tool_type!r}; only functions are read")
    for wrapper in ("function", "toolSpec"):
        if wrapper in fields:
            fields = _within(fields.take(wrapper), fields)
            fields.take("type")
    name = fields.take("name", "api_name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise RefusedRecord(f"{where} is called {name!r}; {NAME_RULE}")
    description = fields.take("description", "api_description")
    if tool_type == "custom":
        _expect_text(fields)
    if description is not None and not isinstance(description, str):
        raise RefusedRecord(f"the description of tool {name} is {kind(description)}, not text")
    parameters = _read_parameters(fields, name)
    fields.close(_UNRENDERED)
    if holds_rounded(parameters):
        raise RefusedRecord(f"the parameters of tool {name} hold a number with more digits than can be kept")
    function = {"name": name, "description": description or "", "parameters": parameters}
    return {"type": "function", "function": function}


def _within(inner: Any, outer: Fields) -> Fields:
    """A wrapped tool, with what stands beside the wrapper instead of within. Raises RefusedRecord."""
    fields = Fields(inner, outer.where)
    beside = {name: value for name, value in outer.left() if name in ("description", *_SCHEMA_NAMES)}
    for name, value in beside.items():
        outer.take(name)
        if name in fields and fields.take(name) != value:
            raise RefusedRecord(f"{outer.where} has two different {name}")
    outer.close(_UNRENDERED)
    return Fields({**dict(fields.left()), **beside}, outer.where)


def _expect_text(fields: Fields) -> None:
    """OpenAI's custom tool takes text; as a function, that text is its `input`, as calls of it are read."""
    text_format = fields.take("format")
    if isinstance(text_format, dict) and text_format.get("type", "text") != "text":
        raise RefusedRecord(f"{fields.where} takes text of a grammar; only functions are read")
    if not any(name in fields for name in _SCHEMA_NAMES):
        fields.put("parameters", {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]})


# ------------------------------------------------------------------------------------------------- parameters


def _read_parameters(fields: Fields, name: str) -> dict[str, Any]:
    if "required_parameters" in fields or "optional_parameters" in fields:
        return _two_lists(fields, name)
    given = fields.take(*_SCHEMA_NAMES)
    given = _from_text(given, name)
    if isinstance(given, dict) and set(given) == {"json"}:  # Bedrock's
        given = given["json"]
    if isinstance(given, dict) and isinstance(given.get("jsonSchema"), dict):  # Vercel's
        given = given["jsonSchema"]
    properties = fields.take(*_PROPERTIES_NAMES)
    required = fields.take("required")
    if not is_empty(given) and not is_empty(properties):
        raise RefusedRecord(f"tool {name} has two descriptions of its parameters")
    schema = _schema_of(properties if is_empty(given) else given, name, is_bare=is_empty(given))
    if required and "required" not in schema:
        schema["required"] = _names(required, name)
    return schema


def _two_lists(fields: Fields, name: str) -> dict[str, Any]:
    """ToolBench's: parameters that are required, and others."""
    required, optional = fields.take_list("required_parameters"), fields.take_list("optional_parameters")
    schema = _schema_of([*required, *optional], name, is_bare=True)
    schema.pop("required", None)
    return {**schema, "required": [each["name"] for each in required]} if required else schema


def _from_text(given: Any, name: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return loads(given)
    except (ValueError, RecursionError) as error:
        raise RefusedRecord(f"the parameters of tool {name} are not JSON: {error}") from error


def _names(required: Any, name: str) -> list[str]:
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise RefusedRecord(f"what tool {name} requires is not a list of names")
    return required


def _schema_of(given: Any, name: str, is_bare: bool) -> dict[str, Any]:
    if isinstance(given, list) and all(isinstance(each, dict) and "name" in each for each in given):
        given = {each["name"]: {key: value for key, value in each.items() if key != "name"} for each in given}
        is_bare = True
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise RefusedRecord(f"the parameters of tool {name} are {kind(given)}, not an object")
    if not given:
        return {"type": "object", "properties": {}}
    if is_bare or not _is_json_schema(given):
        return _from_properties(given, name)
    return clean_schema(given)


_SCHEMA_KEYS = frozenset(
    "type properties required additionalProperties $schema $defs definitions title description anyOf oneOf allOf $ref "
    "patternProperties optional".split()
)


def _is_json_schema(given: dict[str, Any]) -> bool:
    """Whether parameters are a schema of an object, and not the bare properties."""
    properties = given.get("properties")
    if isinstance(properties, dict) or (properties is None and "properties" in given):
        # A parameter may be called `properties`: then its own description stands there, of texts and not of schemas.
        are_schemas = all(isinstance(each, dict | bool | None) for each in (properties or {}).values())
        return are_schemas and not isinstance(given.get("type"), dict)
    written_type = given.get("type")
    if isinstance(written_type, str) and schema_of_type(written_type).get("type") == "object":
        return True
    return (
        bool(given)
        and set(given) <= _SCHEMA_KEYS
        and not any(
            isinstance(value, dict) and key not in ("$defs", "definitions", "patternProperties", "additionalProperties")
            for key, value in given.items()
        )
    )


def _from_properties(given: dict[str, Any], name: str) -> dict[str, Any]:
    """A schema from the bare properties. Required are those that neither have a default nor are called optional."""
    properties, required = {}, []
    for key, written in given.items():
        if written is None:
            continue
        if isinstance(written, str):
            written = {"type": written}
        if not isinstance(written, dict):
            raise RefusedRecord(f"the parameter {key!r} of tool {name} is {kind(written)}, not an object")
        type_text = written.get("type")
        is_optional = isinstance(type_text, str) and "optional" in type_text.lower()
        marks = [written.get(mark) for mark in ("required", "optional", "nullable")]
        if isinstance(marks[0], bool):
            is_optional = not marks[0]
        elif marks[1] is True or marks[2] is True:
            is_optional = True
        held = {k: v for k, v in written.items() if k != "optional" and not (k == "required" and isinstance(v, bool))}
        properties[key] = clean_schema(held)
        if not is_optional and "default" not in written:
            required.append(key)
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    return {**schema, "required": required} if required else schema


_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONE_SCHEMA = ("items", "additionalProperties", "not", "contains", "if", "then", "else", "propertyNames")


def clean_schema(schema: Any) -> Any:
    """A schema without the nulls of padding, and with JSON schema's names of types."""
    if not isinstance(schema, dict):
        return schema
    clean: dict[str, Any] = {}
    for key, value in schema.items():
        if value is None and not (key in ("default", "const") and _takes_null(schema)):
            continue
        if key in _OF_SCHEMAS and isinstance(value, dict):
            clean[key] = {name: clean_schema(each) for name, each in value.items() if not is_padding(each)}
        elif key in _SCHEMA_LISTS and isinstance(value, list):
            clean[key] = [clean_schema(each) for each in value if each is not None]
        elif key in _ONE_SCHEMA:
            clean[key] = clean_schema(value)
        elif key == "type" and isinstance(value, str):
            clean |= {name: each for name, each in schema_of_type(value).items() if schema.get(name) in (None, value)}
        elif key == "optional" and isinstance(value, list):
            continue  # ToolBench's: the rest of what is required
        else:
            clean[key] = value
    if clean.get("type") == "object" and "properties" not in clean and "properties" in schema:
        clean["properties"] = {}
    return clean


# ------------------------------------------------------------------------------------------ nulls in arguments


def _takes_null(schema: Any, root: Any = None) -> bool:
    """Whether a schema allows null."""
    root = schema if root is None else root
    if schema is True:
        return True
    if not isinstance(schema, dict):
        return False
    if isinstance(schema.get("$ref"), str):
        return _takes_null(_referred(schema["$ref"], root), root)
    if schema.get("nullable") is True:
        return True
    if isinstance(schema.get("enum"), list):
        return None in schema["enum"]
    written = schema.get("type")
    if written is not None:
        return "null" in (written if isinstance(written, list) else [TYPES.get(str(written).lower())])
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            return any(_takes_null(each, root) for each in schema[name])
    if isinstance(schema.get("allOf"), list):
        return all(_takes_null(each, root) for each in schema["allOf"])
    return "properties" not in schema and "const" not in schema


def _referred(reference: str, root: Any) -> Any:
    """What a local `$ref` means; None where it leads nowhere."""
    found = root
    for name in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def without_padding(value: Any, schema: Any, where: str, root: Any = None) -> Any:
    """Arguments without the null keys that the tool's schema does not allow; a null that it allows stays.

    Raises RefusedRecord where a null stands for what the schema requires: that is no padding.
    """
    root = schema if root is None else root
    if isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
        schema = _referred(schema["$ref"], root)
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [without_padding(each, items, where, root) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, held in value.items():
        inner = _schema_at(schema, key)
        if isinstance(held, dict) and is_padding(held):  # nulls that the schema allows stay
            held = without_padding(held, inner, where, root) or None
        if held is None and not _takes_null(inner, root):
            if isinstance(schema, dict) and key in (schema.get("required") or ()):
                raise RefusedRecord(f"{where} is null at {key!r}, which its tool requires")
            continue
        kept[key] = without_padding(held, inner, where, root)
    return kept


def _schema_at(schema: Any, key: str) -> Any:
    """The schema of one key of an object: False where it is not among those that the schema names."""
    if not isinstance(schema, dict):
        return schema in (None, True)
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list) and "properties" not in schema:
            found = [_schema_at(each, key) for each in schema[name] if isinstance(each, dict) and "properties" in each]
            return {"anyOf": found} if found else True
    properties = schema.get("properties")
    if isinstance(properties, dict) and key in properties:
        return properties[key]
    for pattern, inner in (schema.get("patternProperties") or {}).items():
        if re.search(pattern, key):
            return inner
    if "additionalProperties" in schema:
        return schema["additionalProperties"]
    return not properties


def holds_null(value: Any) -> bool:
    """Whether an object holds a null under one of its keys, at any depth."""
    if isinstance(value, dict):
        return any(held is None or holds_null(held) for held in value.values())
    return isinstance(value, list) and any(map(holds_null, value))
