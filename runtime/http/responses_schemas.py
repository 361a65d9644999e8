"""Body of POST /v1/responses, and how it is asked as a chat completion: OpenAI's two forms lead to one agent.

Covered: text and function calls, in and out. What else the form has (files, images, hosted tools, stored
conversations, background runs) is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from policies.types import Message
from runtime.http.schemas import ChatCompletionRequest, FunctionSchema, RequestMetadata, WireModel

RESPONSE_ID = r"^resp_[A-Za-z0-9_.:-]{1,128}$"
_TEXT_PARTS = ("input_text", "output_text", "text")

# --------------------------------------------------------------------------------------------------- input


class InputPart(WireModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(WireModel):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    """Text, or text parts. Images, audio and files are not supported."""

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS:
                raise ValueError(f"only text is understood here, not {part['type']}; leave such parts out")
        return content

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class InputFunctionCall(WireModel):
    """A call that the policy made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str
    """A JSON object, as a string."""


class InputFunctionOutput(WireModel):
    """What such a call gave back."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | list[InputPart]

    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


def _kind(item: Any) -> str | None:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionOutput, Tag("function_call_output")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="an input item is a message, a function_call or a function_call_output; leave others out",
    ),
]


def input_messages(items: Sequence[InputMessage | InputFunctionCall | InputFunctionOutput]) -> list[Message]:
    """Input items as chat messages; what the policy said and the calls that it made with it are one message."""
    messages: list[Message] = []
    is_policys = False
    for item in items:
        match item:
            case InputMessage():
                messages.append({"role": item.role, "content": item.text()})
            case InputFunctionCall():
                if not is_policys:
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case InputFunctionOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text()})
        is_policys = messages[-1]["role"] == "assistant"
    return messages


# ------------------------------------------------------------------------------------------------- options


class FunctionTool(FunctionSchema):
    """A function that the client runs; hosted tools are not supported."""

    type: Literal["function"]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _functions_only(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and tool.get("type") != "function":
            raise ValueError(f"only function tools can be given here, not {tool.get('type')!r}")
        return {name: value for name, value in tool.items() if value is not None} if isinstance(tool, dict) else tool


class NamedFunctionChoice(WireModel):
    type: Literal["function"]
    name: str


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type json_schema needs a schema")
        return self


class TextOptions(WireModel):
    format: TextFormat = TextFormat.model_validate({})


class ResponsesRequest(WireModel):
    """With `tools` the client runs them; without, the server runs its own."""

    model: str
    """The served name, or an adapter's name to pin it."""
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[InputItem], Tag("items"), Field(min_length=1)],
        Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
    ]
    instructions: str | None = None
    """The system message. A response that continues another one keeps the other's."""
    previous_response_id: str | None = Field(None, pattern=RESPONSE_ID)
    """Go on where that response ended, on its logged token ids; `input` holds only what is new."""
    stream: bool = False
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionChoice | None = None
    text: TextOptions = Field(default_factory=TextOptions)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    """Most tokens of each step."""
    metadata: RequestMetadata = Field(default_factory=RequestMetadata)
    background: Any = None
    context_management: Any = None
    conversation: Any = None
    include: Any = None
    max_tool_calls: Any = None
    moderation: Any = None
    parallel_tool_calls: Any = None
    prompt: Any = None
    reasoning: Any = None
    store: Any = None
    top_logprobs: Any = None
    truncation: Any = None

    @field_validator("temperature", "top_p", "stream", "text", "metadata", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, field: Any) -> Any:
        return cls.model_fields[field.field_name].get_default(call_default_factory=True) if value is None else value

    @field_validator(
        "background", "context_management", "conversation", "include", "max_tool_calls", "moderation", "prompt",
        "reasoning", "top_logprobs", mode="before",
    )  # fmt: skip
    @classmethod
    def _refuse_what_is_not_here(cls, value: Any, field: Any) -> None:
        if value:
            raise ValueError(f"{field.field_name} is not supported here: leave it out")

    @field_validator("store", "parallel_tool_calls", mode="before")
    @classmethod
    def _must_be_true(cls, value: Any, field: Any) -> None:
        if value is not None and value is not True:
            raise ValueError(f"{field.field_name} is always true here: leave it out")

    @field_validator("truncation", mode="before")
    @classmethod
    def _never_truncates(cls, value: Any) -> None:
        if value not in (None, "disabled"):
            raise ValueError(
                "truncation is always 'disabled' here: leave it out, and shorten the conversation yourself"
            )

    def as_chat(self, history: Sequence[Message]) -> ChatCompletionRequest:
        """The same as a chat completion. `history` is the conversation behind `previous_response_id`.

        Raises pydantic's ValidationError for what does not fit together, ValueError for instructions that change.
        """
        tools = None if self.tools is None else [_chat_tool(tool) for tool in self.tools]
        choice = self.tool_choice
        return ChatCompletionRequest.model_validate(
            {
                "model": self.model,
                "messages": [*self._opening(history), *history, *self.new_messages],
                "stream": self.stream,
                "tools": tools,
                "tool_choice": _chat_choice(choice) if isinstance(choice, NamedFunctionChoice) else choice,
                "response_format": _chat_format(self.text.format),
                "temperature": self.temperature,
                "top_p": self.top_p,
                "max_completion_tokens": self.max_output_tokens,
                "metadata": self.metadata.model_dump(),
            }
        )

    @property
    def new_messages(self) -> list[Message]:
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else input_messages(self.input)

    def _opening(self, history: Sequence[Message]) -> list[Message]:
        if self.instructions is None:
            return []
        opening = {"role": "system", "content": self.instructions}
        if history and history[0] != opening:
            raise ValueError("instructions must be those that the conversation began with: it goes on as it was logged")
        return [] if history else [opening]


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(include={"name", "description", "parameters"})}


def _chat_choice(choice: NamedFunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _chat_format(wanted: TextFormat) -> dict[str, Any]:
    schema = {"name": wanted.name, "schema": wanted.json_schema or {}}
    return {"type": wanted.type, **({"json_schema": schema} if wanted.type == "json_schema" else {})}
