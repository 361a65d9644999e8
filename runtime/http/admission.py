"""From a chat request to the runs that answer it: which episode, which adapter, which tools, under which limits."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from policies.grammars import json_grammar, tool_call_grammar
from policies.types import BASE_ADAPTER, EngineError, Message, SamplingParams, TokenIds, ToolSchema
from runtime.agent.conversation import Place, continued, locate
from runtime.agent.loop import Run
from runtime.agent.turn import Policy, Turn
from runtime.http.parts import Parts
from runtime.http.schemas import ChatCompletionRequest, NamedToolChoice
from runtime.store.episodes import Actor, Episode, Step, new_id
from runtime.store.keys import Key


class UnknownModel(ValueError):
    """The request names a model that is not served here."""


class ForeignEpisode(ValueError):
    """The request names an episode, or a response, that belongs to another key."""


async def admit(
    parts: Parts,
    request: ChatCompletionRequest,
    header_episode_id: str | None,
    key: Key,
    lease: AsyncExitStack,
    previous: Step | None = None,
) -> list[Run]:
    """The `n` runs of a request. Its episode's adapter is leased until `lease` is closed.

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
    if logged is not None and logged.owner != key.name and not (asked_id and key.sees(logged.owner)):
        if asked_id or previous:
            raise ForeignEpisode(f"episode {asked_id or logged.id!r} belongs to another key: choose another id")
        place, logged = Place((), (), messages), None  # somebody else's conversation began alike
    pinned = _pinned_adapter(parts, request.model)
    episode_id = logged.id if logged else asked_id or new_id("ep")
    began_with = logged.adapter if logged else None
    adapter = await lease.enter_async_context(parts.swap.lease(episode_id, began_with=began_with, pinned=pinned))
    policy = Policy(parts.engine, parts.protocol, adapter)
    episode = logged or _new_episode(parts, request, episode_id, policy, messages, key, is_assigned=pinned is None)
    admitted = _Admitted(parts, request, policy, episode, logged is None, place, messages)
    return [admitted.run(choice) for choice in range(request.n)]


def _pinned_adapter(parts: Parts, model: str) -> str | None:
    """The adapter that a request asks for by its model name; None: whichever is acting."""
    if model == parts.served_name:
        return None
    if model == BASE_ADAPTER or any(model == adapter.name for adapter in parts.engine.loaded_adapters()):
        return model
    raise UnknownModel(f"the model {model!r} is not served here; GET /v1/models lists what is")


def _new_episode(
    parts: Parts,
    request: ChatCompletionRequest,
    episode_id: str,
    policy: Policy,
    messages: tuple[Message, ...],
    key: Key,
    is_assigned: bool,
) -> Episode:
    metadata = request.metadata
    return Episode(
        id=episode_id,
        actor=Actor.POLICY,
        purpose=metadata.purpose,
        adapter=policy.adapter_name,
        task=parts.toolbox.task_of(metadata.task, messages),
        metadata=metadata.model_extra or {},
        owner=key.name,
        is_assigned=is_assigned,
    )


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request whose place in the log, episode and policy are known."""

    parts: Parts
    body: ChatCompletionRequest
    policy: Policy
    episode: Episode
    is_new: bool
    place: Place
    messages: tuple[Message, ...]

    def run(self, choice: int) -> Run:
        """One of its choices. World tools are opened for each: one choice's calls are not the other's."""
        server_tools, schemas = None, self.body.tool_schemas
        if self.body.tools is None:
            schemas, server_tools = self.parts.toolbox.open(self.episode.task, self.place.path)
        offered = () if self.body.tool_choice == "none" else schemas
        parent = self.place.path[-1] if self.place.path else None
        turn = Turn(
            episode=self.episode,
            parent_id=parent.id if parent else None,
            index=parent.index + 1 if parent else 0,
            served_token_ids=_served_token_ids(parent) if parent and parent.tools == offered else (),
            history=self.place.history,
            new_messages=self.place.new_messages,
            client_messages=self.messages,
            tools=offered,
            sampling=self._sampling(choice, offered),
            may_call=self.body.tool_choice != "none",
            stop=self.body.stop_texts,
            stream=self.body.stream,
        )
        return Run(choice, self.policy, turn, self.is_new, server_tools)

    def _sampling(self, choice: int, offered: tuple[ToolSchema, ...]) -> SamplingParams:
        grammar = _grammar(self.parts, self.body, offered)
        sampling = self.body.sampling(self.parts.engine.limits.max_context_tokens, grammar)
        return sampling if self.body.seed is None else replace(sampling, seed=self.body.seed + choice)


def _served_token_ids(step: Step) -> TokenIds:
    """The conversation up to and including the step's action, as it was served."""
    return step.prompt_token_ids + step.completion_token_ids


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
