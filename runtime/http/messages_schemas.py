"""Body of POST /v1/messages, Anthropic's form, and how it is asked as a chat completion.

Covered: text, thinking, tools that the client runs, JSON output. Tools of Anthropic's own are left out with a warning;
images, documents and a begun answer (a last message of the assistant's) are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from policies.types import Message
from runtime.http.fields import MESSAGE_FIELDS, check_fields
from runtime.http.schemas import ChatCompletionRequest, ListOf, Nullable, RequestMetadata, WireModel

# ------------------------------------------------------------------------------------------------ messages


class TextBlock(WireModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(WireModel):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(WireModel):
    """Another server's: nobody here can read it."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(WireModel):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str
    """Empty in one that was cut off before it."""
    input: dict[str, Any]


class ToolResultBlock(Nullable):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: str | ListOf[TextBlock] = ""

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        return _require_kinds(content, ("text",))

    def text(self) -> str:
        return _text_in(self.content)


def _require_kinds(blocks: Any, kinds: Sequence[str]) -> Any:
    """Raises ValueError for a block of another kind, by its type."""
    for block in blocks if isinstance(blocks, list) else []:
        if isinstance(block, dict) and block.get("type") not in kinds:
            raise ValueError(f"only {', '.join(kinds)} is understood here, not {block.get('type')}; leave it out")
    return blocks


def _kind(block: Any) -> str | None:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


_KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(_kind),
]


def _text_in(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


class InputMessage(WireModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[ListOf[Block], Tag("blocks")],
        Discriminator(lambda value: "text" if isinstance(value, str) else "blocks"),
    ]

    @field_validator("content", mode="before")
    @classmethod
    def _known_kinds(cls, content: Any) -> Any:
        return _require_kinds(content, _KINDS)

    def as_messages(self) -> list[Message]:
        """As chat messages: results of tools are messages of their own, before what is said beside them."""
        blocks = [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
        results: list[Message] = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text()}
            for block in blocks
            if isinstance(block, ToolResultBlock)
        ]
        if self.role != "assistant":
            return [*results, {"role": self.role, "content": text}] if text or not results else results
        message: Message = {"role": "assistant", "content": text}
        if calls := [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        if thought := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
            message["reasoning_content"] = thought
        return [message]


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


# ------------------------------------------------------------------------------------------------- options


class ClientTool(Nullable):
    """A tool that the client runs."""

    type: Literal["custom", "function"] = "custom"
    name: str
    description: str = ""
    input_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})


class ToolChoice(Nullable):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(WireModel):
    type: str
    """`disabled`, or a kind of thinking."""

    @property
    def is_enabled(self) -> bool:
        return self.type != "disabled"


class OutputFormat(WireModel):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputOptions(WireModel):
    effort: str | None = None
    format: OutputFormat | None = None


class CallersMetadata(WireModel):
    user_id: str | None = None


class CountRequest(WireModel):
    """Body of POST /v1/messages/count_tokens: all of a request that its prompt depends on."""

    model: str
    """The served name, or an adapter's name to pin it."""
    messages: ListOf[InputMessage] = Field(min_length=1)
    system: str | ListOf[TextBlock] | None = None
    tools: ListOf[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputOptions | None = None
    output_format: OutputFormat | None = None
    """As `output_config.format`: its name in Anthropic's beta."""
    warnings: ListOf[str] = Field(default_factory=list)
    """Not the client's: what of its request has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        return check_fields(body, MESSAGE_FIELDS, ("function", "custom"))

    @model_validator(mode="after")
    def _check_last(self) -> CountRequest:
        if self.messages[-1].role == "assistant":
            raise ValueError("the last message is the assistant's: an answer cannot be begun for it; leave it out")
        return self

    def as_chat(self) -> ChatCompletionRequest:
        """The same as a chat completion. Raises pydantic's ValidationError for what does not fit together."""
        return ChatCompletionRequest.model_validate(self._as_chat())

    def _as_chat(self) -> dict[str, Any]:
        opening = [] if self.system is None else [{"role": "system", "content": _text_in(self.system)}]
        choice, output = self.tool_choice, self.output_config or OutputOptions()
        wanted = output.format or self.output_format
        return {
            "model": self.model,
            "messages": [*opening, *(each for message in self.messages for each in message.as_messages())],
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": None if choice is None else _chat_choice(choice),
            "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
            "reasoning_effort": output.effort,
            "chat_template_kwargs": None if self.thinking is None else {"enable_thinking": self.thinking.is_enabled},
            "response_format": None if wanted is None else _chat_format(wanted),
        }


class MessagesRequest(CountRequest):
    """With `tools` the client runs them. Without, the server runs its own, where it has any."""

    max_tokens: int = Field(ge=1, lt=2**63)
    """Of the whole answer, hidden steps and thinking included."""
    stream: bool = False
    stop_sequences: ListOf[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        default_factory=list, max_length=16
    )
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    metadata: CallersMetadata = Field(default_factory=CallersMetadata)

    @field_validator("stream", "stop_sequences", "temperature", "top_p", "top_k", "metadata", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, field: Any) -> Any:
        return cls.model_fields[field.field_name].get_default(call_default_factory=True) if value is None else value

    def _as_chat(self) -> dict[str, Any]:
        return super()._as_chat() | {
            "stream": self.stream,
            "stop": self.stop_sequences or None,
            "max_completion_tokens": self.max_tokens,
            "temperature": self.said("temperature"),
            "top_p": self.said("top_p"),
            "top_k": self.said("top_k"),
            "user": self.metadata.user_id,
            "metadata": RequestMetadata().model_dump(),
        }


def _chat_tool(tool: ClientTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _chat_choice(choice: ToolChoice) -> Any:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _chat_format(wanted: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted.json_schema}}
