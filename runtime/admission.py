"""From a chat request to the runs that answer it: which episode, which adapter, which tools, under which limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from policies.answer_grammar import json_grammar, tool_call_grammar
from policies.types import BASE_ADAPTER, EngineError, Message, SamplingParams, ToolSchema
from runtime.agent import Policy, Progress, ServerTools, Turn, run_client_step, run_episode
from runtime.conversation import Place, continued, locate
from runtime.parts import Parts
from runtime.types import Actor, Episode, Step, new_id
from runtime.wire import ChatCompletionRequest, NamedToolChoice


class UnknownModel(ValueError):
    """The request names a model that is not served here."""


@dataclass(frozen=True, slots=True)
class Run:
    """One choice of an answer, ready to start."""

    policy: Policy
    turn: Turn
    is_new: bool
    """The episode is not logged yet."""
    server_tools: ServerTools | None
    """None: the client runs the tools, one step is taken."""

    def start(self, parts: Parts) -> AsyncGenerator[Progress | Step, None]:
        if self.server_tools is None:
            return run_client_step(self.policy, parts.log, self.turn, self.is_new)
        return run_episode(self.policy, parts.log, self.turn, self.is_new, self.server_tools, parts.limits)


@asynccontextmanager
async def admitted(
    parts: Parts, request: ChatCompletionRequest, header_episode_id: str | None, previous: Step | None = None
) -> AsyncIterator[list[Run]]:
    """The `n` runs of a request; its episode's adapter is leased inside the `with`.

    `previous` is the logged step that the request continues; None: its conversation tells.

    Raises ValueError (UnknownModel, UnknownTask, GrammarError ...) for a request that cannot be answered, SwapError
    where its episode's adapter is not served any more, and EngineError while the engine is down.
    """
    if not (health := parts.engine.health()).is_alive:
        raise EngineError(health.problem)  # before adapters are looked for, which a dead engine has none of
    messages = tuple(message.as_message() for message in request.messages)
    asked_id = request.metadata.episode_id or header_episode_id
    place = locate(parts.log, messages, asked_id) if previous is None else continued(parts.log, messages, previous)
    known_id = place.path[-1].episode_id if place.path else asked_id
    logged = None if known_id is None else parts.log.episode(known_id)
    pinned = _pinned_adapter(parts, request.model)
    episode_id = logged.id if logged else asked_id or new_id("ep")
    began_with = logged.adapter if logged else None
    async with parts.swap.lease(episode_id, began_with=began_with, pinned=pinned) as adapter:
        policy = Policy(parts.engine, parts.protocol, adapter)
        episode = logged or _new_episode(parts, request, episode_id, policy, messages)
        request_in_place = _Request(parts, request, policy, episode, logged is None, place, messages)
        yield [await request_in_place.run(choice) for choice in range(request.n)]


def _pinned_adapter(parts: Parts, model: str) -> str | None:
    """The adapter that a request asks for by its model name; None: whichever is acting."""
    if model == parts.served_name:
        return None
    if model == BASE_ADAPTER or any(model == adapter.name for adapter in parts.engine.loaded_adapters()):
        return model
    raise UnknownModel(f"the model {model!r} is not served here; GET /v1/models lists what is")


def _new_episode(
    parts: Parts, request: ChatCompletionRequest, episode_id: str, policy: Policy, messages: tuple[Message, ...]
) -> Episode:
    metadata = request.metadata
    return Episode(
        id=episode_id,
        actor=Actor.POLICY,
        purpose=metadata.purpose,
        adapter=policy.adapter_name,
        task=parts.toolbox.task_of(metadata.task, messages),
        metadata=metadata.model_extra or {},
    )


@dataclass(frozen=True, slots=True)
class _Request:
    """A request whose place in the log, episode and policy are known."""

    parts: Parts
    body: ChatCompletionRequest
    policy: Policy
    episode: Episode
    is_new: bool
    place: Place
    messages: tuple[Message, ...]

    async def run(self, choice: int) -> Run:
        """One of its choices. World tools are opened for each: one choice's calls are not the other's."""
        server_tools, schemas = None, self.body.tool_schemas
        if self.body.tools is None:
            # On a thread: a world may take its time to open a task and to replay what was done in it.
            opened = asyncio.to_thread(self.parts.toolbox.open, self.episode.task, self.place.path)
            schemas, server_tools = await opened
        offered = () if self.body.tool_choice == "none" else schemas
        turn = Turn(
            episode=self.episode,
            parent=self.place.path[-1] if self.place.path else None,
            history=self.place.history,
            new_messages=self.place.new_messages,
            seen=self.messages,
            tools=offered,
            sampling=self._sampling(choice, offered),
            may_call=self.body.tool_choice != "none",
            stop=self.body.stop_texts,
            is_read_along=self.body.stream,
        )
        return Run(self.policy, turn, self.is_new, server_tools)

    def _sampling(self, choice: int, offered: tuple[ToolSchema, ...]) -> SamplingParams:
        grammar = _grammar(self.parts, self.body, offered)
        sampling = self.body.sampling(self.parts.engine.limits.max_context_tokens, grammar)
        return sampling if self.body.seed is None else replace(sampling, seed=self.body.seed + choice)


def _grammar(parts: Parts, request: ChatCompletionRequest, offered: tuple[ToolSchema, ...]) -> str | None:
    """The grammar that tool_choice or response_format ask for. Raises ValueError where the engine cannot hold to it."""
    schema = request.response_format.schema_of_answer if request.response_format else None
    if schema is None and not request.requires_call:
        return None
    if not parts.engine.limits.supports_grammar:
        raise ValueError("this engine cannot hold an answer to a schema: drop response_format, or use tool_choice auto")
    if isinstance(request.tool_choice, NamedToolChoice):
        offered = tuple(tool for tool in offered if tool["function"]["name"] == request.tool_choice.function.name)
    if request.requires_call:
        return tool_call_grammar(parts.protocol, offered)
    return json_grammar(parts.protocol, schema or {})
