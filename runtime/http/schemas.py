"""HTTP bodies: what a request may say, and how answers are written. Answers are the openai package's own types.

What becomes of each field that OpenAI's package knows stands in `runtime.http.fields`; unknown ones are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from policies.chat.messages import MAX_DEPTH, is_deeper
from policies.types import EngineLimits, Message, SamplingParams, ToolSchema
from runtime.agent.conversation import LEGACY_CALL_ID
from runtime.agent.demonstrations import Demonstration, DemonstrationRefused
from runtime.http.fields import CHAT_FIELDS, FieldRefused, check_fields
from runtime.store.episodes import Purpose, Role
from tools.bounds import TOOL_NAME

_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
EPISODE_ID = r"^[A-Za-z0-9_.:-]{1,128}$"


MAX_MESSAGES = 20_000
MAX_METADATA_BYTES = 64 * 1024


T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
"""A list of a request's that is refused at its first wrong item: of a million of them, one is told in any case."""


class WireModel(BaseModel):
    """A request body: strict about the types it knows, silent about fields it does not."""

    model_config = ConfigDict(extra="ignore", strict=True, use_attribute_docstrings=True)

    def said(self, name: str) -> Any:
        """The value of a field, None where the client said nothing."""
        return getattr(self, name) if name in self.model_fields_set else None


# ------------------------------------------------------------------------------------------------ messages


class Nullable(WireModel):
    """An object in which null is the same as nothing, as OpenAI's clients send it."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_nothing(cls, value: Any) -> Any:
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class TextPart(Nullable):
    type: Literal["text", "refusal"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refusal_is_text(cls, part: Any) -> Any:
        if isinstance(part, dict) and part.get("type") == "refusal":
            return {"type": "refusal", "text": part.get("refusal")}
        return part


class FunctionCall(Nullable):
    name: str
    """Empty in one that was cut off before it: told so, and sent back so."""
    arguments: str = "{}"
    """A JSON object, as a string."""

    @field_validator("arguments")
    @classmethod
    def _flat_enough(cls, arguments: str) -> str:
        """As the body itself: what is nested deeper can be read, but not held against the log."""
        if arguments.count("{") + arguments.count("[") > MAX_DEPTH and _is_deep_json(arguments):
            raise ValueError(f"the arguments are nested more than {MAX_DEPTH} deep; flatten them")
        return arguments


def _is_deep_json(text: str) -> bool:
    try:
        return is_deeper(orjson.loads(text))
    except orjson.JSONDecodeError:  # whoever reads the call says what is wrong
        return False


class ToolCallEntry(Nullable):
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionCall

    @model_validator(mode="before")
    @classmethod
    def _custom_is_a_function(cls, call: Any) -> Any:
        """A custom tool's call has one free text for its arguments, as in /v1/responses."""
        custom = call.get("custom") if isinstance(call, dict) and call.get("type") == "custom" else None
        if not isinstance(custom, dict):
            return call
        arguments = json.dumps({"input": custom.get("input")}, ensure_ascii=False)
        return {"id": call.get("id"), "type": "function", "function": {**custom, "arguments": arguments}}


class ChatMessage(WireModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | ListOf[TextPart] | None = None
    """Text, or text parts. Images and audio are not supported."""
    tool_calls: ListOf[ToolCallEntry] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    """OpenAI's older form of a call; a message of role `function` answers it."""
    refusal: str | None = None
    """What an assistant's message says instead of content."""
    reasoning_content: str | None = None
    """What was thought; chat templates that keep thoughts are given it. Also under `reasoning`."""

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_thoughts(cls, message: Any) -> Any:
        if isinstance(message, dict) and message.get("audio"):
            raise ValueError("only text is understood here, not audio; send what was said as content")
        if isinstance(message, dict) and (message.get("prefix") is True or message.get("partial") is True):
            raise ValueError("an answer cannot be begun for the model here (prefix, partial): leave such a message out")
        if isinstance(message, dict) and isinstance(message.get("reasoning"), str):
            return {"reasoning_content": message["reasoning"], **message}
        return message

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        for part in parts:
            if isinstance(part, dict) and part.get("type", "text") not in ("text", "refusal"):
                raise ValueError(f"only text is understood here, not {part['type']}; leave such parts out")
        return content

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool message needs the tool_call_id of the call that it answers")
        if self.calls and self.role != "assistant":
            raise ValueError("only an assistant message may have tool_calls")
        if self.content is None and self.role not in ("assistant", "function"):
            raise ValueError(f"a {self.role} message needs content")
        return self

    @property
    def calls(self) -> list[ToolCallEntry]:
        """Its tool calls, in whichever form they came."""
        if self.function_call is not None:
            return [ToolCallEntry(id=LEGACY_CALL_ID, function=self.function_call)]
        return self.tool_calls or []

    @property
    def answered_call_id(self) -> str | None:
        """The call that a tool's message answers."""
        return LEGACY_CALL_ID if self.role == "function" else self.tool_call_id

    def as_message(self) -> Message:
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: Message = {"role": role, "content": self._content()}
        if self.content is None and self.refusal is None and self.calls:
            del message["content"]
        if self.calls:
            message["tool_calls"] = [call.model_dump() for call in self.calls]
        if self.answered_call_id is not None and role == "tool":
            message["tool_call_id"] = self.answered_call_id
        if self.reasoning_content and role == "assistant":
            message["reasoning_content"] = self.reasoning_content
        return message

    @property
    def is_refusal(self) -> bool:
        """It says why it does nothing, in the place that OpenAI's form has for that."""
        parts = self.content if isinstance(self.content, list) else []
        return bool(self.refusal) or any(part.type == "refusal" for part in parts)

    def _content(self) -> Any:
        if self.content is None:
            return self.refusal or ""
        return self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]


# ------------------------------------------------------------------------------------------------- options


class FunctionSchema(Nullable):
    name: str = Field(pattern=rf"^{TOOL_NAME.pattern}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of the arguments."""


class Tool(WireModel):
    type: Literal["function"] = "function"
    function: FunctionSchema


class NamedFunction(WireModel):
    name: str


class NamedToolChoice(WireModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class AllowedTools(WireModel):
    mode: Literal["auto", "required"]
    tools: ListOf[NamedToolChoice] = Field(min_length=1)


class AllowedToolChoice(WireModel):
    """Only these of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def chosen_function(choice: Any) -> Any:
    """A tool_choice as it came. Raises ValueError where it names a tool of a kind that is not run here."""
    kind = choice.get("type", "function") if isinstance(choice, dict) else "function"
    if kind not in ("function", "allowed_tools"):
        raise ValueError(f"no tool of type {kind!r} is run here, so none can be chosen: leave it out")
    return choice


class JsonSchema(Nullable):
    name: str = "answer"
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    object_schema: dict[str, Any] | None = Field(None, alias="schema")
    """Beside `json_object`, as llama.cpp and others take it."""

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
        return (self.object_schema or {"type": "object"}) if self.type == "json_object" else None


class StreamOptions(Nullable):
    include_usage: bool = False


class RequestMetadata(WireModel):
    """What the server reads of `metadata`; the rest is logged with the episode as it came."""

    model_config = ConfigDict(extra="allow")

    episode_id: str | None = Field(default=None, pattern=EPISODE_ID)
    """Continue or begin this episode; without it the conversation itself tells."""
    task: str | None = None
    """`world/split/index` of a world's task."""
    purpose: Purpose = Field(default=Purpose.SERVE, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        _require_few_bytes("metadata", given)
        return given


def _require_few_bytes(what: str, value: Any) -> None:
    """Lists show what a client says of an episode with each of them: it must not be a document."""
    if isinstance(value, dict) and (size := len(orjson.dumps(value))) > MAX_METADATA_BYTES:
        raise ValueError(f"{what} may have {MAX_METADATA_BYTES} bytes, this has {size}: keep the rest elsewhere")


_RESULTS = ("tool", "function")

_StopText = Annotated[str, Field(min_length=1, max_length=1000)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]


class ChatCompletionRequest(WireModel):
    """Body of POST /v1/chat/completions; `runtime.http.fields` says what becomes of each field.

    With `tools` the client runs them. Without, the server runs its own, where it has any.
    """

    model: str
    """The served name, a named agent, or an adapter's name to pin it."""
    messages: ListOf[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: ListOf[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice | None = None
    functions: ListOf[FunctionSchema] | None = None
    """OpenAI's older form of `tools`."""
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    """OpenAI's older form of `tool_choice`."""
    parallel_tool_calls: bool = True
    """False: the answer ends with its first call."""
    response_format: ResponseFormat | None = None
    stop: _StopText | Annotated[ListOf[_StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=32)
    best_of: int | None = Field(None, ge=1, lt=10**6)
    """Of OpenAI's older completions: so many are drawn, and the best is answered. None: as the server was started."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1, lt=2**63)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    """Most tokens of the whole answer, hidden steps and thinking included; takes precedence over max_tokens."""
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**31)
    """Not in OpenAI's form, but usual: keep this many of the likeliest tokens; 0 and -1 keep all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Likewise: leave out tokens less likely than this part of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Likewise: above 1, what was said before becomes less likely."""
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    logit_bias: dict[str, float] | None = None
    """By token id, from -100 to 100."""
    reasoning_effort: str | None = None
    """Handed to the chat template: `reasoning_effort`, and for `none` and `minimal` `enable_thinking` as false."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Handed to the chat template as they are."""
    metadata: RequestMetadata = Field(default_factory=RequestMetadata)
    _is_checked: bool = PrivateAttr(False)
    user: str | None = None
    safety_identifier: str | None = None
    warnings: ListOf[str] = Field(default_factory=list)
    """Not the client's: what of its request has no effect."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        checked = check_fields(body, CHAT_FIELDS)
        if isinstance(checked, dict) and _has_names(checked.get("messages")):
            checked["warnings"].append("names of messages have no effect: say in the content who speaks")
        return checked

    @field_validator(
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "n",
        "top_logprobs", "stream", "logprobs", "metadata", "parallel_tool_calls", mode="before",
    )  # fmt: skip
    @classmethod
    def _null_is_default(cls, value: Any, field: Any) -> Any:
        return cls.model_fields[field.field_name].get_default(call_default_factory=True) if value is None else value

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choosable(cls, choice: Any) -> Any:
        return chosen_function(choice)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_of_tokens(cls, bias: Any) -> Any:
        """Refused at the first wrong one, as lists are."""
        for name, value in bias.items() if isinstance(bias, dict) else ():
            if not (name.isascii() and name.isdigit() and len(name) < 10):
                raise ValueError(f"token ids are whole numbers, not {name!r}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
                raise ValueError(f"the bias of token {name} is a number from -100 to 100, not {value!r:.100}")
        return bias

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        """Once: a large body comes from its thread as this model already, and pydantic checks a model again."""
        if not self._is_checked:
            self._take_the_older_form()
            self._check_together()
            self._check_tool_messages()
            self._is_checked = True
        return self

    def _take_the_older_form(self) -> None:
        named = self.function_call
        if named is not None and (self.tool_choice is None or self.functions is not None):
            self.tool_choice = NamedToolChoice(function=named) if isinstance(named, NamedFunction) else named
        if self.functions is None:
            return
        if self.tools:
            raise ValueError("tools and functions are two forms of one thing: send tools alone")
        self.tools = [Tool(function=function) for function in self.functions] or None
        self.parallel_tool_calls = False  # the older form has a place for one call

    def _check_together(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if unknown := sorted((self.chosen_tools or frozenset()).difference(names)):
            offered = ", ".join(names) or "none were given"
            raise ValueError(f"tool_choice names {unknown[0]!r}, which is not among the tools: {offered}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is 'required' but there are no tools")

        if self.best_of not in (None, self.n) and self.n > 1:
            raise FieldRefused("best_of", f"it finds one answer, and n asks for {self.n}: leave one of them out")

    def _check_tool_messages(self) -> None:
        called: set[str | None] = set()
        for number, message in enumerate(self.messages):
            called.update(call.id for call in message.calls)
            answered = message.answered_call_id
            if message.role in ("tool", "function") and answered not in called:
                raise ValueError(f"message {number} answers the call {answered!r}, which no message before it makes")

    @property
    def chosen_tools(self) -> frozenset[str] | None:
        """Names of the tools that tool_choice restricts the policy to; None: it does not."""
        match self.tool_choice:
            case NamedToolChoice(function=function):
                return frozenset({function.name})
            case AllowedToolChoice(allowed_tools=allowed):
                return frozenset(choice.function.name for choice in allowed.tools)
        return None

    @property
    def requires_call(self) -> bool:
        """The answer must be a tool call."""
        match self.tool_choice:
            case "required" | NamedToolChoice():
                return True
            case AllowedToolChoice(allowed_tools=allowed):
                return allowed.mode == "required"
        return False

    @property
    def may_call(self) -> bool:
        return self.tool_choice != "none"

    @property
    def asks_for_grammar(self) -> bool:
        """The answer must have a form that sampling is held to."""
        has_schema = self.response_format is not None and self.response_format.schema_of_answer is not None
        return self.requires_call or has_schema or not self.may_call

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def tool_schemas(self) -> tuple[ToolSchema, ...]:
        """The tools on offer."""
        tools = self.tools or []
        if isinstance(self.tool_choice, AllowedToolChoice):
            chosen = self.chosen_tools or frozenset()
            tools = [tool for tool in tools if tool.function.name in chosen]
        return tuple(tool.model_dump() for tool in tools)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages; results of parallel calls in the order of the calls, whichever came first."""
        return in_order_of_calls([message.as_message() for message in self.messages])

    @property
    def user_name(self) -> str:
        """Whom the client asks for; empty where it does not say."""
        return self.safety_identifier or self.user or ""

    @property
    def template_options(self) -> dict[str, Any]:
        """What the chat template is given beside messages and tools."""
        effort = self.reasoning_effort
        asked = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": _thinks(effort)}
        return asked | (self.chat_template_kwargs or {})

    @property
    def num_draws(self) -> int | None:
        """Of which each choice is the best. As many as are answered leave nothing to choose; None: nothing is said."""
        return 1 if self.best_of == self.n else self.best_of

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def sampling(self, limits: EngineLimits, grammar: str | None) -> SamplingParams:
        """Raises ValueError where more tokens are asked for than the context could ever hold."""
        asked = self.asked_max_tokens
        if asked and asked > limits.max_context_tokens:
            raise ValueError(f"{asked} tokens are asked for, but {limits.context}")
        return SamplingParams(
            max_tokens=asked or limits.max_context_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            seed=self.seed,
            num_top_logprobs=self.top_logprobs,
            grammar=grammar,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items()),
        )


def _has_names(messages: Any) -> bool:
    """Whether a message says who speaks, beside its role. Of a result it is the tool's name, which its call tells."""
    told = messages if isinstance(messages, list) else []
    return any(isinstance(each, dict) and each.get("name") and each.get("role") not in _RESULTS for each in told)


def _thinks(reasoning_effort: str) -> bool:
    return reasoning_effort not in ("none", "minimal")


def in_order_of_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Results that follow one another, in the order of the calls that they answer."""
    ordered, calls = list[Message](), dict[str, int]()
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        found = list(group)
        if is_result:
            found.sort(key=lambda message: calls.get(message["tool_call_id"], len(calls)))
        elif made := found[-1].get("tool_calls"):
            calls = {call["id"]: number for number, call in enumerate(made)}
        ordered += found
    return tuple(ordered)


class OwnModel(WireModel):
    """A body that chooses whom or what is acted on: a field that it does not know is refused. Of a misspelled one the
    default would be taken: the server's own agent, a key for all agents."""

    model_config = ConfigDict(extra="forbid")


class OutcomeRequest(WireModel):
    """Body of POST /v1/episodes/{id}/outcome."""

    value: float = Field(ge=0, le=1, allow_inf_nan=False)
    """0 is failure, 1 success; parts of it lie between. Only exactly 1 is learned from as a success: 0.99 is none to
    the default objective and `rft`, and a failure to `eto`. `ppo` and the watch over what acts take it as it is."""
    source: str = Field("user", pattern=_NAME)
    """Who says so. `world` is for the server, its learner and admin keys."""
    note: str = Field("", max_length=10_000)
    """For people: nothing is learned from it."""


# ---------------------------------------------------------------------------------------- demonstrations


_IS_A_REFUSAL = "is a refusal, which nobody is to learn; write what an expert would say as content"


class DemonstrationEntry(WireModel):
    """One expert's conversation."""

    messages: ListOf[ChatMessage] = Field(min_length=1)
    tools: ListOf[Tool] = Field(default_factory=list)
    """The tools that were on offer."""
    learn_from: ListOf[Annotated[int, Field(ge=-(2**63), lt=2**63)]] | None = None
    """Indices of the assistant messages to learn from; without it, all."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """Where it comes from: logged as the episode's metadata."""
    expert: str = Field(default="expert", pattern=_NAME)
    task: str | None = None
    """`world/split/index` of a world's task."""

    @field_validator("provenance", mode="before")
    @classmethod
    def _bounded(cls, given: Any) -> Any:
        _require_few_bytes("provenance", given)
        return given

    def as_demonstration(self) -> Demonstration:
        """Raises DemonstrationRefused where a refusal is to be learned from."""
        for index, message in enumerate(self.messages):
            if message.is_refusal and (self.learn_from is None or index in self.learn_from):
                raise DemonstrationRefused(f"message {index} {_IS_A_REFUSAL}")
        return Demonstration(
            messages=tuple(message.as_message() for message in self.messages),
            tools=tuple(tool.model_dump() for tool in self.tools),
            asked_indices=None if self.learn_from is None else tuple(self.learn_from),
            expert=self.expert,
            task=self.task,
            provenance=self.provenance,
        )


class DemonstrationsRequest(OwnModel):
    """Body of POST /v1/demonstrations."""

    demonstrations: ListOf[DemonstrationEntry]
    agent: str | None = None
    """The agent that is to learn from them; without it, the server's own."""


class PromotionRequest(WireModel):
    """Body of POST /v1/episodes/{id}/promote; may be left out."""

    expert: str = Field(default="user", pattern=_NAME)
    """Who vouches for the episode."""


class WithdrawalRequest(WireModel):
    """Body of a DELETE of an outcome, a correction or a demonstration; may be left out."""

    reason: str = Field("", max_length=10_000)


class ErasureRequest(OwnModel):
    """Body of a DELETE of episodes; may be left out. Both fields may stand in the query as well."""

    reason: str = Field("", max_length=1000)
    """Kept for good, with the tombstones: name nobody in it."""
    retrain: bool = False
    """Start a cycle without what is erased; what acts and has learned from it is rolled back first."""


class CorrectionRequest(WireModel):
    """Body of POST /v1/episodes/{id}/corrections: what should have been done at one of its steps."""

    step_id: str = Field(min_length=1, max_length=128)
    message: ChatMessage
    """The assistant's message that an expert would have written there."""
    source: str = Field("user", pattern=_NAME)

    @field_validator("message")
    @classmethod
    def _is_an_action(cls, message: ChatMessage) -> ChatMessage:
        if message.role != "assistant":
            raise ValueError("a correction is an assistant's message")
        if message.is_refusal:
            raise ValueError(f"the correction {_IS_A_REFUSAL}")
        return message


# ----------------------------------------------------------------------------------------------- learner


class CycleRequest(OwnModel):
    """Body of POST /v1/learner/cycles; may be left out. What is not said is as the server was started."""

    objectives: ListOf[Literal["sft_rft", "sft", "rft", "dft", "implicit", "inverse", "pivot", "eto", "ppo"]] | None = (
        Field(None, min_length=1)
    )
    """What candidates are trained for; the gate chooses among them."""
    gate_tasks: Annotated[int, Field(ge=0, le=0)] | Annotated[int, Field(ge=8, le=10_000)] | None = None
    """Tasks that the gate tries under each adapter; 0: demonstrations decide, though there is a world."""
    canary_share: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    """Of the new episodes, for a candidate that passed the gate; 0: it acts at once."""
    seed: int | None = Field(None, ge=0, le=2**31)
    agent: str | None = None
    """The agent that is to learn; without it, the server's own."""

    def as_options(self) -> list[str]:
        """As options of `python -m learner`; the agent has more of them."""
        said = self.model_dump(exclude_none=True, exclude={"agent"})
        if "objectives" in said:
            said["objectives"] = ",".join(said["objectives"])
        return [part for name, value in said.items() for part in (f"--{name.replace('_', '-')}", str(value))]


# -------------------------------------------------------------------------------------------------- keys


class KeyRequest(OwnModel):
    """Body of POST /v1/keys."""

    name: str = Field(pattern=_NAME)
    """Whose key it is; never given again."""
    role: Role = Field(Role.USE, strict=False)
    """Each includes those before it: use, feedback, teach, admin."""
    agents: ListOf[str] | None = Field(None, min_length=1, max_length=1000)
    """The agents that it may speak to and teach, by their model names; None: all. An admin key is for all."""
    requests_per_day: int | None = Field(None, ge=0, lt=2**62)
    """In a day of UTC; None: no bound."""
    steps_per_day: int | None = Field(None, ge=0, lt=2**62)
    tokens_per_day: int | None = Field(None, ge=0, lt=2**62)
    """Of prompts and completions together."""


# ---------------------------------------------------------------------------------------------- adapters

_Reason = Annotated[str, Field(max_length=10_000)]


class AdapterRegistration(OwnModel):
    """Body of POST /v1/adapters."""

    path: str = Field(min_length=1, max_length=4096)
    """A PEFT folder on the server's machine, with its probe."""
    parent: str | None = None
    """Name of the adapter it was trained from; without it, from the base network."""
    reason: _Reason = ""
    cycle: str | None = Field(None, max_length=128)
    """The learner's cycle that made it; without it, somebody else did."""
    agent: str | None = None
    """The agent that it is for; without it, the server's own."""


class RewardRegistration(OwnModel):
    """Body of POST /v1/adapters/{name}/reward."""

    path: str = Field(min_length=1, max_length=4096)
    """A PEFT folder on the server's machine, with its probe and its `reward.json`."""
    cycle: str | None = Field(None, max_length=128)
    """The learner's cycle that made it."""


class AdapterChange(OwnModel):
    """Body of POST /v1/adapters/{name}/unload; may be left out."""

    reason: _Reason = ""


class AgentChange(AdapterChange):
    """Body of POST /v1/adapters/rollback and /v1/learner/watch/...; may be left out."""

    agent: str | None = None
    """Whose adapters; without it, the server's own agent's."""


class AdapterPromotion(AdapterChange):
    """Body of POST /v1/adapters/{name}/promote; may be left out."""

    is_proposal: bool = False
    """A learner asks: what comes of it is for the server's `--promote` to say."""
    expected_acting: str | None = None
    """What it was found to be better than (`base`: the base network). Where another adapter acts by now, nothing is
    changed."""


class CanaryRequest(AdapterPromotion):
    """Body of POST /v1/adapters/{name}/canary."""

    share: float = Field(gt=0, le=1, allow_inf_nan=False)
    """Of the new episodes."""


class AdapterRefusal(OwnModel):
    """Body of POST /v1/adapters/{name}/refuse."""

    reason: _Reason = Field(min_length=1)
