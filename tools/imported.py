"""Tools of the user's own code, found by an import path: `package.module:object`.

The object is a LangChain tool, a list or toolkit of tools, or a callable without arguments that returns any of these.
Whatever is wrong with it is told before the server starts, not in an episode.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from langchain_core.tools import BaseTool, BaseToolkit
from pydantic import BaseModel

from tools.schemas import schema_of

TOOL_NAME = r"[A-Za-z0-9_-]{1,64}"
"""OpenAI's rule for the name of a function."""


def imported_tools(path: str, allow: Sequence[str] | None = None) -> list[BaseTool]:
    """The tools at an import path; with `allow` only those of these names, in the path's order.

    Raises ValueError, in words for the user, where there are none, one is unfit, or an allowed name is not there.
    """
    module_name, _, attribute = path.partition(":")
    tools = _tools_of(_attribute(_module(module_name, path), attribute, path), path)
    for tool in tools:
        check_tool(tool, path)
    check_names(tools, path)
    return allowed(tools, allow, path)


def check_tool(tool: BaseTool, source: str) -> None:
    """Raises ValueError where a model could not be shown this tool, or could not call it."""
    if not re.fullmatch(TOOL_NAME, tool.name):
        problem = "a name has letters, digits, _ and - only, at most 64 of them"
        raise ValueError(f"{source}: {tool.name!r} is no name that models know tools by: {problem}")
    try:
        schema = schema_of(tool)["function"]
    except Exception as error:  # pydantic, langchain and the user's own types each have their own
        raise ValueError(f"{source}: the arguments of {tool.name} have no JSON schema: {_in_words(error)}") from error
    if schema.get("parameters", {}).get("type", "object") != "object":
        raise ValueError(f"{source}: the arguments of {tool.name} are no object, but {schema['parameters']['type']!r}")
    if missing := _not_from_model(tool):
        raise ValueError(
            f"{source}: {tool.name} wants {', '.join(missing)} from LangGraph (an injected argument), "
            "which this server does not have: give the argument a default, or leave the tool out"
        )


def check_names(tools: Iterable[BaseTool], source: str) -> None:
    """Raises ValueError where two tools have one name."""
    names = [tool.name for tool in tools]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{source}: two tools are called {twice[0]!r}: rename one, or leave it out")


def allowed(tools: list[BaseTool], allow: Sequence[str] | None, source: str) -> list[BaseTool]:
    """Those of the allowed names; all for None. Raises ValueError for a name that is not there."""
    if allow is None:
        return tools
    names = [tool.name for tool in tools]
    if unknown := [name for name in allow if name not in names]:
        raise ValueError(f"{source}: allow names {unknown[0]!r}, but its tools are {', '.join(names) or 'none'}")
    return [tool for tool in tools if tool.name in allow]


def _module(name: str, path: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            hint = "is it installed here, or its folder on PYTHONPATH?"
            raise ValueError(f"{path}: there is no module {error.name!r}; {hint}") from error
        raise ValueError(f"{path}: {name} needs the module {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: importing {name} failed: {_in_words(error)}") from error


def _attribute(module: ModuleType, attribute: str, path: str) -> Any:
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            tools = [name for name, value in vars(module).items() if isinstance(value, BaseTool)]
            raise ValueError(
                f"{path}: {module.__name__} has no {attribute!r}; its tools are {', '.join(tools) or 'none'}"
            )
        found = getattr(found, name)
    return found


def _tools_of(found: Any, path: str) -> list[BaseTool]:
    if (tools := _as_tools(found)) is None and callable(found):
        tools = _as_tools(found := _made_by(found, path))
    if tools is None:
        raise ValueError(
            f"{path} is {_kind(found)}, not a LangChain tool: decorate a function with @tool of langchain_core.tools, "
            "or name a callable that returns tools"
        )
    if not tools:
        raise ValueError(f"{path} gives no tools")
    return tools


def _as_tools(found: Any) -> list[BaseTool] | None:
    """None where it is something else."""
    if isinstance(found, BaseTool):
        return [found]
    if isinstance(found, BaseToolkit):
        return found.get_tools()
    if isinstance(found, list | tuple | set | frozenset) and all(isinstance(each, BaseTool) for each in found):
        return list(found)
    return None


def _made_by(make: Any, path: str) -> Any:
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        problem = f"takes arguments ({error})"
        raise ValueError(
            f"{path} {problem}: decorate it with @tool of langchain_core.tools if it is to be a tool; one that returns "
            "tools is called without any"
        ) from error
    except ValueError:  # a callable of C without a signature
        pass
    try:
        made = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: calling it failed: {_in_words(error)}") from error
    if inspect.iscoroutine(made):
        made.close()
        raise ValueError(f"{path} is asynchronous: decorate it with @tool, or return the tools from a plain function")
    return made


def _not_from_model(tool: BaseTool) -> list[str]:
    """Arguments that it requires and that the model is not shown."""
    shown, taken = tool.tool_call_schema, tool.get_input_schema()
    if isinstance(shown, dict) or not issubclass(shown, BaseModel) or not issubclass(taken, BaseModel):
        return []
    fields = taken.model_fields.items()
    return [name for name, field in fields if field.is_required() and name not in shown.model_fields]


def _kind(found: Any) -> str:
    return "nothing (None)" if found is None else f"a {type(found).__name__}"


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
