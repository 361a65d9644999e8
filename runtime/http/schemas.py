"""HTTP bodies: what a request may say, and how answers are written. Answers are the openai package's own types.

Unknown fields are ignored, as clients send many; a field that is known and cannot be honoured is refused, since an
option that silently does nothing is worse than an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from policies.types import Message, SamplingParams, ToolSchema
from runtime.agent.demonstrations import Demonstration
from runtime.store.episodes import Purpose

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
EPISODE_ID = r"^[A-Za-z0-9_.:-]{1,128}$"


class WireModel(BaseModel):
    """A request body: strict about the types it knows, silent about fields it does not."""

    model_config = ConfigDict(extra="ignore", strict=True)


# ------------------------------------------------------------------------------------------------ messages


class TextPart(WireModel):
    type: Literal["text"]
    text: str


class FunctionCall(WireModel):
    name: str = Field(min_length=1)
    arguments: str = "{}"
    """A JSON object, as a string."""


class ToolCallEntry(WireModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(WireModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    """Text, or text parts. Images and audio are not supported."""
    tool_calls: list[ToolCallEntry] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, dict) and part.get("type", "text") != "text":
                raise ValueError(f"only text is understood here, not {part['type']}; leave such parts out")
        return content

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id of the call that it answers")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant message may have tool_calls")
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a {self.role} message needs content")
        return self

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role}


# ------------------------------------------------------------------------------------------------- options


class FunctionSchema(WireModel):
    name: str = Field(pattern=_NAME)
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of the arguments."""


class Tool(WireModel):
    type: Literal["function"]
    function: FunctionSchema


class NamedFunction(WireModel):
    name: str


class NamedToolChoice(WireModel):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(WireModel):
    name: str = "answer"
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs a json_schema")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """JSON schema that the answer must fit; None: any text."""
        if self.type == "json_schema" and self.json_schema:
            return self.json_schema.json_schema
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(WireModel):
    include_usage: bool = False


class RequestMetadata(WireModel):
    """What the server reads of `metadata`; the rest is logged with the episode as it came."""

    model_config = ConfigDict(extra="allow")

    episode_id: str | None = Field(default=None, pattern=EPISODE_ID)
    """Continue or begin this episode; without it the conversation itself tells."""
    task: str | None = None
    """`world/split/index` of a world's task."""
    purpose: Purpose = Field(default=Purpose.SERVE, strict=False)


_StopText = Annotated[str, Field(min_length=1, max_length=1000)]


class ChatCompletionRequest(WireModel):
    """Body of POST /v1/chat/completions. With `tools` the client runs them; without, the server runs its own."""

    model: str
    """The served name, or an adapter's name to pin it."""
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    response_format: ResponseFormat | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=32)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    """Most tokens of each step; takes precedence over max_tokens."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    """Not in OpenAI's form, but usual: keep this many of the likeliest tokens; 0 keeps all."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    parallel_tool_calls: bool = True
    metadata: RequestMetadata = Field(default_factory=RequestMetadata)

    @field_validator(
        "temperature", "top_p", "top_k", "n", "top_logprobs", "stream", "logprobs", "metadata", mode="before"
    )
    @classmethod
    def _null_is_default(cls, value: Any, field: Any) -> Any:
        return cls.model_fields[field.field_name].get_default(call_default_factory=True) if value is None else value

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias", mode="before")
    @classmethod
    def _refuse_penalties(cls, value: Any, field: Any) -> Any:
        if value:
            raise ValueError(f"{field.field_name} is not supported: the logged logprobs would not be the policy's own")
        return cls.model_fields[field.field_name].default

    @field_validator("parallel_tool_calls", mode="before")
    @classmethod
    def _refuse_one_call_only(cls, value: Any) -> Any:
        if value is False:
            raise ValueError("the policy decides itself how many calls it makes: leave parallel_tool_calls out")
        return True if value is None else value

    @model_validator(mode="after")
    def _check_together(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools: "
                f"{', '.join(names) or 'none were given'}"
            )
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required' but there are no tools")
        if self.requires_call and self.response_format and self.response_format.schema_of_answer is not None:
            raise ValueError("response_format cannot be asked for together with a tool call: drop one of them")
        return self

    @model_validator(mode="after")
    def _check_tool_messages(self) -> ChatCompletionRequest:
        called: set[str] = set()
        for number, message in enumerate(self.messages):
            called.update(call.id for call in message.tool_calls or ())
            if message.role == "tool" and message.tool_call_id not in called:
                raise ValueError(
                    f"message {number} answers the call {message.tool_call_id!r}, which no message before it makes"
                )
        return self

    @property
    def requires_call(self) -> bool:
        """The answer must be a tool call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tool_schemas(self) -> tuple[ToolSchema, ...]:
        return tuple(tool.model_dump() for tool in self.tools or ())

    def sampling(self, max_context_tokens: int, grammar: str | None) -> SamplingParams:
        """Raises ValueError where more tokens are asked for than the context could ever hold."""
        asked = self.max_completion_tokens or self.max_tokens
        if asked and asked > max_context_tokens:
            raise ValueError(f"{asked} tokens are asked for, but the model's context holds {max_context_tokens}")
        return SamplingParams(
            max_tokens=asked or max_context_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            num_top_logprobs=self.top_logprobs,
            grammar=grammar,
        )


class OutcomeRequest(WireModel):
    """Body of POST /v1/episodes/{id}/outcome."""

    value: float = Field(ge=0, le=1, allow_inf_nan=False)
    """0 is failure, 1 success; parts of it lie between."""
    source: str = Field("user", pattern=_NAME)
    note: str = Field("", max_length=10_000)


# ---------------------------------------------------------------------------------------- demonstrations


class DemonstrationMessage(ChatMessage):
    """One message of an expert's conversation; its assistant messages may tell what was thought."""

    reasoning_content: str | None = None


class DemonstrationEntry(WireModel):
    """One expert's conversation."""

    messages: list[DemonstrationMessage] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list)
    """The tools that were on offer."""
    learn_from: list[int] | None = None
    """Indices of the assistant messages to learn from; without it, all."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: logged as the episode's metadata."""
    expert: str = Field(default="expert", pattern=_NAME)
    task: str | None = None
    """`world/split/index` of a world's task."""

    def as_demonstration(self) -> Demonstration:
        return Demonstration(
            messages=tuple(message.as_message() for message in self.messages),
            tools=tuple(tool.model_dump() for tool in self.tools),
            asked_indices=None if self.learn_from is None else tuple(self.learn_from),
            expert=self.expert,
            task=self.task,
            provenance=self.provenance,
        )


class DemonstrationsRequest(WireModel):
    """Body of POST /v1/demonstrations."""

    demonstrations: list[DemonstrationEntry]


class PromotionRequest(WireModel):
    """Body of POST /v1/episodes/{id}/promote; may be left out."""

    expert: str = Field(default="user", pattern=_NAME)
    """Who vouches for the episode."""


class CorrectionRequest(WireModel):
    """Body of POST /v1/episodes/{id}/corrections: what should have been done at one of its steps."""

    step_id: str = Field(min_length=1, max_length=128)
    message: DemonstrationMessage
    """The assistant's message that an expert would have written there."""
    source: str = Field("user", pattern=_NAME)


# ----------------------------------------------------------------------------------------------- learner


class CycleRequest(WireModel):
    """Body of POST /v1/learner/cycles; may be left out. What is not said is as the server was started."""

    objectives: list[Literal["sft", "implicit", "inverse", "eto", "rft", "ppo"]] | None = Field(None, min_length=1)
    """What candidates are trained for; the gate chooses among them."""
    gate_tasks: int | None = Field(None, ge=8, le=10_000)
    """Tasks that the gate tries under each adapter."""
    canary_share: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    """Of the new episodes, for a candidate that passed the gate; 0: it acts at once."""
    seed: int | None = Field(None, ge=0, le=2**31)

    def as_options(self) -> list[str]:
        """As options of `python -m learner`."""
        said = self.model_dump(exclude_none=True)
        if "objectives" in said:
            said["objectives"] = ",".join(said["objectives"])
        return [part for name, value in said.items() for part in (f"--{name.replace('_', '-')}", str(value))]


# ---------------------------------------------------------------------------------------------- adapters

_Reason = Annotated[str, Field(max_length=10_000)]


class AdapterRegistration(WireModel):
    """Body of POST /v1/adapters."""

    path: str = Field(min_length=1, max_length=4096)
    """A PEFT folder on the server's machine, with its probe."""
    parent: str | None = None
    """Name of the adapter it was trained from; without it, from the base network."""
    reason: _Reason = ""
    cycle: str | None = Field(None, max_length=128)
    """The learner's cycle that made it; without it, somebody else did."""


class AdapterChange(WireModel):
    """Body of POST /v1/adapters/rollback and /v1/adapters/{name}/unload; may be left out."""

    reason: _Reason = ""


class AdapterPromotion(AdapterChange):
    """Body of POST /v1/adapters/{name}/promote; may be left out."""

    expected_acting: str | None = None
    """What it was found to be better than (`base`: the base network). Where another adapter acts by now, nothing is
    changed."""


class CanaryRequest(AdapterPromotion):
    """Body of POST /v1/adapters/{name}/canary."""

    share: float = Field(gt=0, le=1, allow_inf_nan=False)
    """Of the new episodes."""


class AdapterRefusal(WireModel):
    """Body of POST /v1/adapters/{name}/refuse."""

    reason: _Reason = Field(min_length=1)
