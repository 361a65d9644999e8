"""Body of POST /v1/responses, and how it is asked as a chat completion: OpenAI's two forms lead to one agent.

`runtime.http.fields` says what becomes of each field. Text and function calls go in and out; items and tools of other
kinds are left out with a warning, images and files are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from policies.types import Message
from runtime.http.fields import RESPONSE_FIELDS, check_fields
from runtime.http.schemas import (
    ChatCompletionRequest,
    FunctionSchema,
    ListOf,
    Nullable,
    RequestMetadata,
    WireModel,
    chosen_function,
)

RESPONSE_ID = r"^resp_[A-Za-z0-9_.:-]{1,128}$"
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text")
_LOGPROBS = "message.output_text.logprobs"

# --------------------------------------------------------------------------------------------------- input


class InputPart(WireModel):
    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refusal_is_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") == "refusal":
            return {"type": "refusal", "text": part.get("refusal")}
        return part


def _require_text(parts: Any) -> Any:
    """Raises ValueError for a part that is no text, by its type."""
    for part in parts if isinstance(parts, list) else []:
        if isinstance(part, dict) and part.get("type", "text") not in _TEXT_PARTS:
            raise ValueError(f"only text is understood here, not {part['type']}; leave such parts out")
    return parts


def _text_in(parts: str | list[InputPart]) -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts)


class InputMessage(WireModel):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | ListOf[InputPart]
    """Text, or text parts. Images, audio and files are not supported."""

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        return _require_text(content)

    def text(self) -> str:
        return _text_in(self.content)


class InputFunctionCall(WireModel):
    """A call that the policy made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str
    """Empty in one that was cut off before it."""
    arguments: str
    """A JSON object, as a string."""

    @model_validator(mode="before")
    @classmethod
    def _custom_is_a_function(cls, item: Any) -> Any:
        """A call of a custom tool has one free text for its arguments."""
        if isinstance(item, dict) and item.get("type") == "custom_tool_call":
            return {**item, "type": "function_call", "arguments": json.dumps({"input": item.get("input")})}
        return item


class InputFunctionOutput(WireModel):
    """What such a call gave back."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | ListOf[InputPart]

    @model_validator(mode="before")
    @classmethod
    def _custom_is_a_function(cls, item: Any) -> Any:
        is_custom = isinstance(item, dict) and item.get("type") == "custom_tool_call_output"
        return {**item, "type": "function_call_output"} if is_custom else item

    @field_validator("output", mode="before")
    @classmethod
    def _text_only(cls, output: Any) -> Any:
        return _require_text(output)

    def text(self) -> str:
        return _text_in(self.output)


class InputReasoning(Nullable):
    """What the policy thought before it said or called what follows."""

    type: Literal["reasoning"]
    content: ListOf[InputPart] = Field(default_factory=list)
    summary: ListOf[InputPart] = Field(default_factory=list)

    def text(self) -> str:
        return _text_in(self.content or self.summary)


class ItemReference(Nullable):
    """An item of an earlier response, by its id."""

    type: Literal["item_reference"] = "item_reference"
    id: str = Field(min_length=1, max_length=256)


_KINDS = {"custom_tool_call": "function_call", "custom_tool_call_output": "function_call_output"}


def _kind(item: Any) -> str | None:
    if not isinstance(item, dict):
        return getattr(item, "type", None)
    if item.get("type") is None:  # a reference may leave its type out, and a message too
        return "item_reference" if "id" in item and "role" not in item else "message"
    return _KINDS.get(item["type"], item["type"])


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputFunctionCall, Tag("function_call")]
    | Annotated[InputFunctionOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")]
    | Annotated[ItemReference, Tag("item_reference")],
    Discriminator(
        _kind,
        custom_error_type="unknown_item",
        custom_error_message="an input item is a message, a function_call, a function_call_output or reasoning",
    ),
]

_KNOWN_KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _split_items(items: Any) -> tuple[Any, list[str]]:
    """The items that can be read, and a warning that names the kinds of the others, such as hosted tools' calls."""
    if not isinstance(items, list):
        return items, []
    others = sorted({str(_kind(item)) for item in items if isinstance(item, dict) and _kind(item) not in _KNOWN_KINDS})
    kept = [item for item in items if not isinstance(item, dict) or _kind(item) in _KNOWN_KINDS]
    return kept, [f"input items of these types were left out: {', '.join(others)}"] if others else []


def input_messages(items: Sequence[Any], item_of: Callable[[str], Message]) -> list[Message]:
    """Input items as chat messages; what the policy thought, said and called in one turn is one message.

    `item_of` finds the message that an item of an earlier response is or belongs to; it raises for an unknown id.
    """
    messages: list[Message] = []
    reasoning = ""
    for item in items:
        match item:
            case InputMessage(role="assistant"):
                _add_to_turn(messages, reasoning, {"content": item.text()})
            case InputMessage():
                messages.append({"role": item.role, "content": item.text()})
            case InputFunctionCall():
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _add_to_turn(messages, reasoning, {"tool_calls": [call]})
            case InputFunctionOutput():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.text()})
            case ItemReference():
                _add_to_turn(messages, reasoning, item_of(item.id))
        reasoning = item.text() if isinstance(item, InputReasoning) else ""
    for message in messages:
        if calls := message.get("tool_calls"):
            message["tool_calls"] = _each_once(calls)
    return messages


def _each_once(calls: Sequence[Message]) -> list[Message]:
    first = dict[str, Message]()
    for call in calls:
        first.setdefault(call["id"], call)
    return list(first.values())


def _add_to_turn(messages: list[Message], reasoning: str, part: Message) -> None:
    """Add to the policy's turn: a text begins a new one, unless the turn has said nothing yet; calls go on with it."""
    is_open = bool(messages) and messages[-1]["role"] == "assistant"
    is_new_text = (
        bool(part.get("content")) and is_open and bool(messages[-1]["content"] or "tool_calls" in messages[-1])
    )
    if not is_open or is_new_text:
        messages.append({"role": "assistant", "content": ""})
    turn = messages[-1]
    turn["content"] = part.get("content") or turn["content"]
    if calls := part.get("tool_calls"):
        turn.setdefault("tool_calls", []).extend(calls)
    if thought := reasoning or part.get("reasoning_content"):
        turn["reasoning_content"] = thought


# ------------------------------------------------------------------------------------------------- options


class FunctionTool(FunctionSchema):
    """A function that the client runs."""

    type: Literal["function"]
    strict: bool = False


class NamedFunctionChoice(WireModel):
    type: Literal["function"]
    name: str


class AllowedFunctions(WireModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: ListOf[NamedFunctionChoice] = Field(min_length=1)

    @field_validator("tools", mode="before")
    @classmethod
    def _functions_only(cls, tools: Any) -> Any:
        if not isinstance(tools, list):
            return tools
        return [tool for tool in tools if not isinstance(tool, dict) or tool.get("type") == "function"]


class Reasoning(Nullable):
    effort: str = ""


class TextFormat(Nullable):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("a format of type json_schema needs a schema")
        return self


class TextOptions(Nullable):
    format: TextFormat = TextFormat.model_validate({})


class ResponsesRequest(WireModel):
    """With `tools` the client runs them. Without, the server runs its own, where it has any."""

    model: str
    """The served name, or an adapter's name to pin it."""
    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[ListOf[InputItem], Tag("items"), Field(min_length=1)],
        Discriminator(lambda value: "text" if isinstance(value, str) else "items"),
    ]
    instructions: str | None = None
    """The system message. Those of a response that is continued are not carried over."""
    previous_response_id: str | None = Field(None, pattern=RESPONSE_ID)
    """Go on where that response ended, on its logged token ids; `input` holds only what is new."""
    stream: bool = False
    background: bool = False
    """Answer at once, and run on: the response is retrieved by its id."""
    store: bool = True
    """False: it cannot be retrieved or continued by its id. Its steps are logged all the same."""
    include: ListOf[str] = Field(default_factory=list)
    tools: ListOf[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionChoice | AllowedFunctions | None = None
    parallel_tool_calls: bool = True
    reasoning: Reasoning = Field(default_factory=Reasoning)
    text: TextOptions = Field(default_factory=TextOptions)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_logprobs: int = Field(0, ge=0, le=20)
    max_output_tokens: int | None = Field(None, ge=1, lt=2**63)
    """Most tokens of the whole response, hidden steps and thinking included."""
    metadata: RequestMetadata = Field(default_factory=RequestMetadata)
    user: str | None = None
    safety_identifier: str | None = None
    warnings: ListOf[str] = Field(default_factory=list)
    """Not the client's: what of its request has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        checked = check_fields(body, RESPONSE_FIELDS)
        if not isinstance(checked, dict) or "input" not in checked:
            return checked
        items, warnings = _split_items(checked["input"])
        return {**checked, "input": items, "warnings": [*checked["warnings"], *warnings]}

    @field_validator(
        "temperature", "top_p", "top_logprobs", "stream", "background", "store", "include", "reasoning", "text",
        "metadata", "parallel_tool_calls", mode="before",
    )  # fmt: skip
    @classmethod
    def _null_is_default(cls, value: Any, field: Any) -> Any:
        return cls.model_fields[field.field_name].get_default(call_default_factory=True) if value is None else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choosable(cls, choice: Any) -> Any:
        return chosen_function(choice)

    @model_validator(mode="after")
    def _check_together(self) -> ResponsesRequest:
        if self.background and self.stream:
            raise ValueError("a background response is retrieved, not streamed: leave stream out")
        if self.background and not self.store:
            raise ValueError("a background response has to be retrieved: leave store out")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return _LOGPROBS in self.include or self.top_logprobs > 0

    def as_chat(
        self, history: Sequence[Message], item_of: Callable[[str], Message], old_instructions: str | None = None
    ) -> ChatCompletionRequest:
        """The same as a chat completion. `history` is the conversation behind `previous_response_id`, which began with
        `old_instructions`; `item_of` as in `input_messages`.

        Raises pydantic's ValidationError for what does not fit together.
        """
        tools = None if self.tools is None else [_chat_tool(tool) for tool in self.tools]
        return ChatCompletionRequest.model_validate(
            {
                "model": self.model,
                "messages": [*self._opening, *_without(old_instructions, history), *self._new_messages(item_of)],
                "stream": self.stream,
                "tools": tools,
                "tool_choice": _chat_choice(self.tool_choice),
                "parallel_tool_calls": self.parallel_tool_calls,
                "response_format": _chat_format(self.text.format),
                "reasoning_effort": self.reasoning.effort or None,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs,
                "temperature": self.said("temperature"),
                "top_p": self.said("top_p"),
                "max_completion_tokens": self.max_output_tokens,
                "metadata": self.metadata.model_dump(),
                "user": self.user,
                "safety_identifier": self.safety_identifier,
            }
        )

    @property
    def _opening(self) -> list[Message]:
        return [] if self.instructions is None else [_system(self.instructions)]

    def _new_messages(self, item_of: Callable[[str], Message]) -> list[Message]:
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return input_messages(self.input, item_of)


def _without(instructions: str | None, history: Sequence[Message]) -> Sequence[Message]:
    begins_so = instructions is not None and history and history[0] == _system(instructions)
    return history[1:] if begins_so else history


def _system(instructions: str) -> Message:
    return {"role": "system", "content": instructions}


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(include={"name", "description", "parameters"})}


def _chat_choice(choice: str | NamedFunctionChoice | AllowedFunctions | None) -> Any:
    match choice:
        case NamedFunctionChoice():
            return _chat_function(choice)
        case AllowedFunctions(mode=mode, tools=tools):
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*map(_chat_function, tools)]}}
    return choice


def _chat_function(choice: NamedFunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}


def _chat_format(wanted: TextFormat) -> dict[str, Any]:
    schema = {"name": wanted.name, "schema": wanted.json_schema or {}}
    return {"type": wanted.type, **({"json_schema": schema} if wanted.type == "json_schema" else {})}
