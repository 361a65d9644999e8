"""`agents.toml`: several agents over one base model, and the tools that they may use. Parsed, checked, nothing loaded.

    [agents.support]
    system = "You look after the customers of a bookshop."
    tools = ["calculator", "orders"]
    demonstrations = ["support.jsonl"]

    [tools.orders]
    mcp = {url = "http://127.0.0.1:9000/mcp"}

Every problem is told with its line, its table and its key; a key that is not known is refused with the nearest one that
is. Light to import: the options are read before anything heavy is loaded.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from policies.types import BASE_ADAPTER
from tools import TOOL_NAMES

AGENT_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}"
UNNAMED = "agent"
"""What adapters of the server's own agent are called by: see `runtime.store.adapter_registry`, which takes a while to
import."""


class AgentsFileProblem(ValueError):
    """What is wrong with the file, one sentence a line."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


# ------------------------------------------------------------------------------------------------- tools


class McpServer(_Table):
    """A server of the Model Context Protocol: a program that is started, or an address."""

    command: str | tuple[str, ...] | None = None
    """The program, with its arguments as a list or in `args`: spoken to over its standard input and output."""
    args: tuple[str, ...] = ()
    """More arguments of the program."""
    env: dict[str, str] = Field(default_factory=dict)
    """Variables of the program's environment: it has these, PATH, HOME and the like, and none of the server's others.
    `${NAME}` in a value is that variable of the server."""
    cwd: Path | None = None
    """The folder that the program runs in; default: that of the file."""
    url: str | None = Field(None, pattern=r"^https?://")
    """Address of a server that runs already (streamable HTTP)."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Sent with each request to the address; `${NAME}` in a value is that variable of the server."""

    @model_validator(mode="after")
    def _one_of_the_two(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("give either `command` (a program) or `url` (an address)")
        if self.command is not None and not self.words:
            raise ValueError("`command` is empty: name the program")
        if self.url is not None and (self.args or self.env or self.cwd):
            raise ValueError("`args`, `env` and `cwd` go with `command`, not with `url`")
        if self.command is not None and self.headers:
            raise ValueError("`headers` go with `url`, not with `command`")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """The program and all its arguments; empty for an address."""
        begin = (self.command,) if isinstance(self.command, str) else self.command or ()
        return (*(word for word in begin if word), *self.args)


class ToolTable(_Table):
    """Tools that the server runs: an object by its import path, or those of an MCP server."""

    import_path: str | None = Field(None, alias="import")
    """`package.module:object`: a LangChain tool, a list of them, or a function that returns either."""
    mcp: McpServer | None = None
    """The server whose tools these are."""
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Most seconds of one call; default: --tool-timeout."""
    max_output_chars: int | None = Field(None, ge=1, lt=2**63)
    """Most characters of an answer that the agent is shown; the rest is cut off. Default: 20,000."""
    allow: tuple[str, ...] | None = None
    """Names of the tools that may be used; default: all."""

    @field_validator("import_path")
    @classmethod
    def _is_import_path(cls, given: str | None) -> str | None:
        if given is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", given):
            raise ValueError(f"{given!r} is no import path: write it as package.module:object")
        return given

    @model_validator(mode="after")
    def _one_source(self) -> ToolTable:
        if (self.import_path is None) == (self.mcp is None):
            raise ValueError("give either `import` (an import path) or `mcp` (a server)")
        if self.allow is not None and not self.allow:
            raise ValueError("`allow` is empty, so that no tool is left: leave it out to allow all")
        return self


# ------------------------------------------------------------------------------------------------ agents


class SamplingDefaults(_Table):
    """How an agent samples where a request does not say; None: as without an agent."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**63)
    """Most tokens of an answer; never more than the model's context holds."""

    @property
    def said(self) -> dict[str, float | int]:
        """What is set, by the names that requests have for it."""
        return self.model_dump(exclude_none=True)


class AgentTable(_Table):
    """One agent: what it is told, what it may use, what it learns from, and what a better adapter of it may do."""

    system: str = ""
    """The system prompt of conversations whose client sends none."""
    system_file: Path | None = None
    """A file that holds it."""
    tools: tuple[str, ...] = ()
    """Tools that the server runs for it: names of built-in tools, or of tables [tools.NAME]."""
    run_tools: Literal["always", "asked"] = "always"
    """When they are run: for every request without `tools`, or if asked by the header `x-stepagent-tools: server`."""
    world: str = ""
    """World whose tasks it does; empty for none."""
    demonstrations: tuple[Path, ...] = ()
    """Files of expert demonstrations, imported for it once the server is up."""
    promote: Literal["auto", "canary", "ask", "dry-run"] | None = None
    """What an adapter of it that passed the gate does; default: --promote."""
    canary_share: float | None = Field(None, gt=0, le=1)
    """Of its new episodes, with promote = "canary"; default: --canary-share."""
    approval_days: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Days that a candidate of it waits for somebody's yes; default: --approval-days."""
    learn_every: int | None = Field(None, ge=0, lt=2**63)
    """Start a learning cycle after so many new episodes of it; default: --learn-every."""
    keep_days: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Days after their last step that episodes of it are kept; default: --keep-days."""
    keep_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Most gigabytes that texts and tokens of its own episodes may take; the oldest go first. Default: no bound but
    --keep-gb, which holds for all agents together in any case."""
    sampling: SamplingDefaults = Field(default_factory=lambda: SamplingDefaults.model_validate({}))
    """How it samples where a request does not say."""
    best_of: int | None = Field(None, ge=1, le=64)
    """Actions that are drawn at each of its steps, of which one is chosen, where a request does not say; default:
    --best-of."""
    best_of_by: Literal["auto", "discriminator", "mean_logprob", "majority"] | None = None
    """What chooses; default: --best-of-by."""

    @field_validator("tools")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]!r} is named twice")
        return names

    @field_validator("system_file", "demonstrations")
    @classmethod
    def _beside_the_file(cls, given: Path | tuple[Path, ...] | None, info: ValidationInfo) -> Any:
        """Paths are those of the file's folder, wherever the server is started."""
        if isinstance(given, tuple):
            return tuple(_existing(path, info) for path in given)
        return given if given is None else _existing(given, info)

    @model_validator(mode="after")
    def _one_prompt(self) -> AgentTable:
        if self.system_file is not None and self.system:
            raise ValueError("`system` and `system_file` are both given: leave one of them out")
        if self.system_file is not None and not _text_of(self.system_file).strip():
            raise ValueError(f"system_file {self.system_file} is empty")
        return self

    @property
    def system_prompt(self) -> str:
        """Empty: it has none."""
        return self.system if self.system_file is None else _text_of(self.system_file).strip()


class AgentsFile(_Table):
    """The whole file."""

    agents: dict[str, AgentTable] = Field(default_factory=dict)
    """By the model name that chooses the agent."""
    tools: dict[str, ToolTable] = Field(default_factory=dict)
    """By the name that agents and --tools call them."""

    @field_validator("agents")
    @classmethod
    def _known_to_be_agents(cls, agents: dict[str, AgentTable]) -> dict[str, AgentTable]:
        for name in agents:
            if not re.fullmatch(AGENT_NAME, name):
                raise ValueError(f"{name!r} is no name of an agent: letters, digits, '_', '.', '-', at most 48 of them")
            if name in (BASE_ADAPTER, UNNAMED) or re.search(r"-v\d+$", name):
                raise ValueError(f"{name!r} is what an adapter is called: choose another name for the agent")
        return agents

    @field_validator("tools")
    @classmethod
    def _not_built_in(cls, tools: dict[str, ToolTable]) -> dict[str, ToolTable]:
        for name in tools:
            if not re.fullmatch(AGENT_NAME, name):
                raise ValueError(f"{name!r} is no name of a tool: letters, digits, '_', '.', '-', at most 48 of them")
            if name in TOOL_NAMES:
                raise ValueError(f"{name!r} is a tool of the server already: choose another name")
        return tools

    @model_validator(mode="after")
    def _says_something(self) -> AgentsFile:
        if not self.agents and not self.tools:
            raise ValueError("it names no agent: write a table [agents.NAME]")
        return self


NOBODY = AgentsFile.model_construct(agents={}, tools={})
"""As without a file: the server's own agent alone."""


def read_agents(path: Path) -> AgentsFile:
    """Raises AgentsFileProblem with a sentence for each thing that is wrong."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AgentsFileProblem(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise AgentsFileProblem(f"{path} is no TOML: {error}") from error
    try:
        # By way of JSON: there a list may become a tuple, and a text a path, while "3" is still no number.
        found = AgentsFile.model_validate_json(json.dumps(tables, default=str), context=path.parent)
    except ValidationError as error:
        problems = (_in_words(path, text, problem) for problem in error.errors(include_url=False))
        raise AgentsFileProblem("\n".join(problems)) from error
    if problems := [*_unknown_tools(path, text, found)]:
        raise AgentsFileProblem("\n".join(problems))
    return found


def _existing(path: Path, info: ValidationInfo) -> Path:
    found = (info.context or Path()) / path
    if not found.is_file():
        raise ValueError(f"{found} is not a file")
    return found


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # an editor's mark of UTF-8 is no part of the prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _unknown_tools(path: Path, text: str, found: AgentsFile) -> Iterator[str]:
    known = (*TOOL_NAMES, *found.tools)
    for name, agent in found.agents.items():
        for tool in agent.tools:
            if tool not in known:
                place, guess = _place(path, text, ("agents", name, "tools")), nearest(tool, known)
                yield f"{place}: no tool {tool!r}{guess}: there are {', '.join(known)}, or write [tools.{tool}]"


# ------------------------------------------------------------------------------------ problems in words


def printable(text: str) -> str:
    """For a terminal: what would speak to it is written as an escape."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def place_in(path: Path, where: Sequence[str]) -> str:
    """File, line, table and key, for a problem that shows when the file has been read."""
    return _place(path, _text_of(path), where)


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """The known name that is most like it, as an end of a sentence; empty where none is alike by this much."""
    alike = get_close_matches(name, list(known), n=1, cutoff=likeness)
    return f" (did you mean {alike[0]!r}?)" if alike else ""


def _in_words(path: Path, text: str, problem: Any) -> str:
    """One of pydantic's problems with its place, as a sentence."""
    where = tuple(str(part) for part in problem["loc"])
    said = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _keys_of(where[:-1])
        inner = [
            f"sampling.{name}" for name in SamplingDefaults.model_fields if len(where) == 3 and where[0] == "agents"
        ]
        guess = nearest(where[-1], known) or nearest(f"sampling.{where[-1]}", inner, 0.8)
        said = f"there is no such key{guess}: there are {', '.join(known)}"
    elif problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        said = "this must be a table"
    elif "input" in problem and isinstance(problem["input"], str | int | float | bool):
        said = f"{said}, not {problem['input']!r}" if problem["type"] not in ("value_error",) else said
    return f"{_place(path, text, where)}: {said}"


def _keys_of(where: Sequence[str]) -> list[str]:
    """The keys that a table may have."""
    tables: dict[tuple[str, ...], type[BaseModel]] = {
        (): AgentsFile,
        ("agents",): AgentTable,
        ("agents", "sampling"): SamplingDefaults,
        ("tools",): ToolTable,
        ("tools", "mcp"): McpServer,
    }
    kind = tables[(*where[:1], *where[2:3])]
    return [field.alias or name for name, field in kind.model_fields.items()]


def _place(path: Path, text: str, where: Sequence[str]) -> str:
    """File, line, table and key."""
    line = line_of(text, where)
    kind = {"agents": "agent", "tools": "tool"}.get(where[0], "") if where else ""
    named = [f"{kind} {where[1]!r}"] if kind and len(where) > 1 else []
    rest = ".".join(part for part in where[2 if named else 0 :] if not part.startswith("function-"))
    place = ", ".join([f"{path}{f' line {line}' if line else ''}", *named, *([f"`{rest}`"] if rest else [])])
    return printable(place)


def line_of(text: str, where: Sequence[str]) -> int | None:
    """The line, from 1, on which a key stands, or else the nearest table around it; None for the whole file.

    `tomllib` does not tell: the line of a table's head, or of a key after it, is looked for. A key in a table that is
    written in one line is on the line of that table.
    """
    table: tuple[str, ...] = ()
    best, depth = None, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if head := re.match(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(#.*)?$", line):
            table = _dotted(head[1])
            here = table
        elif key := re.match(r"""\s*((?:[\w.-]+|"[^"]*"|'[^']*'|\s*\.\s*)+?)\s*=""", line):
            here = (*table, *_dotted(key[1]))
        else:
            continue
        shared = min(len(here), len(where))
        if here[:shared] == tuple(where[:shared]) and shared > depth:
            best, depth = number, shared
    return best


def _dotted(key: str) -> tuple[str, ...]:
    """The parts of a key such as `agents."night shift".tools`."""
    return tuple(part.strip().strip("\"'") for part in re.findall(r'"[^"]*"|\'[^\']*\'|[^.\s]+', key))
