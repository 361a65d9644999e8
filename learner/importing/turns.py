"""What every format is read into: turns of a conversation, not yet checked against each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from policies.types import ToolSchema


class SourceFormat(StrEnum):
    """How a demonstration was written down."""

    OPENAI = "openai"  # `messages` of `role` and `content`, whoever's parts the content has
    SHAREGPT = "sharegpt"  # `conversations` of `from` and `value`; ETO, Hermes, ToolBench, ToolACE, APIGen-MT
    AGENTGYM = "agentgym"  # the same with `item_id`, and `loss` by message; AgentTuning's too
    LANGCHAIN = "langchain"  # messages_to_dict, dumpd, model_dump; LangSmith
    PREFERENCE = "preference"  # TRL's and LlamaFactory's `chosen` and `rejected`; OpenAI's DPO
    COMPLETION = "completion"  # `prompt` and `completion`; Alpaca's `instruction` and `output`
    XLAM = "xlam"  # `query`, `answers`, `tools`
    GLAIVE = "glaive"  # `system` and `chat`, each one text
    ITEMS = "items"  # items of OpenAI's responses and of its Agents SDK
    GEMINI = "gemini"  # `contents` of `parts`
    CLAUDE_CODE = "claude_code"  # a session file
    CODEX = "codex"  # a session file
    GEMINI_CLI = "gemini_cli"  # a session file
    SESSION = "session"  # a session in Hugging Face's trace format, or Pi's
    OTEL = "otel"  # spans with OpenTelemetry's GenAI attributes
    LANGFUSE = "langfuse"  # observations
    INSPECT = "inspect"  # samples of an evaluation log
    SMOLAGENTS = "smolagents"  # an agent's memory
    TAU2 = "tau2"  # simulations of tau2-bench
    ATIF = "atif"  # the Agent Trajectory Interchange Format


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call as the source has it."""

    name: Any
    arguments: Any
    """An object, its JSON text, or None."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What was said in one go: by the system, the user, the assistant, or one tool."""

    role: str
    """`system`, `user`, `assistant` or `tool`."""
    text: str = ""
    thinking: str = ""
    """What the assistant thought before."""
    calls: tuple[Call, ...] = ()
    result_of: str | None = None
    """Of a tool's result: the id of its call, where the source has one."""
    tool_name: str | None = None
    """Of a tool's result: the tool, where the source tells."""
    is_learned: bool = True
    """Of use for the assistant's turns alone."""
    hides_thinking: bool = False
    """The assistant thought here, and the source keeps that encrypted, or left it out."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as its format says it, before its conversation is checked."""

    format: SourceFormat
    turns: list[Turn]
    tools: tuple[ToolSchema, ...] = ()
    item_id: str | None = None
    task: str | None = None
    """`world/split/index`, in a file that our own export wrote."""
    notes: list[str] = field(default_factory=list)
