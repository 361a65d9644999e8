"""From a chat request to the runs that answer it: which episode, which adapter, which tools, under which limits."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from policies.chat.grammars import (
    GrammarError,
    call_or_answer_grammar,
    json_grammar,
    no_call_grammar,
    tool_call_grammar,
)
from policies.types import (
    BASE_ADAPTER,
    Adapter,
    EngineError,
    EngineLimits,
    Message,
    SamplingParams,
    TokenIds,
    ToolSchema,
)
from runtime.agent.conversation import Place, continued, locate
from runtime.agent.loop import Run, ServerTools
from runtime.agent.rendering import SMALL_LETTERS, are_large, num_letters
from runtime.agent.scorers import NOTHING_ASKED, Choosing, ChoosingAsked, scorer_of
from runtime.agent.served_agent import ServedAgent
from runtime.agent.turn import Policy, Turn
from runtime.http.fields import FieldRefused
from runtime.http.parts import Parts
from runtime.http.schemas import ChatCompletionRequest
from runtime.off_loop import off_loop
from runtime.store.episodes import Actor, Episode, Step, new_id
from runtime.store.keys import Key
from runtime.store.step_log import Whose

FEW_MESSAGES = 20
"""Of a conversation that is read on the event loop."""
FEW_TOOLS = 20
"""Of a client's, read there."""


class UnknownModel(ValueError):
    """The request names a model that is not served here."""


class AgentRefused(ValueError):
    """The request is for an agent that its key is not for."""


class ErasedEpisode(ValueError):
    """The request names an episode that was erased."""


class ForeignEpisode(ValueError):
    """The request names an episode, or a response, that belongs to another key or agent."""


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request says beside its body."""

    key: Key
    episode_id: str | None = None
    """Continue or begin this episode."""
    tools: str | None = None
    """Whose tools the agent gets: `server`, `client`, or None for what the server was started with."""
    system: str | None = None
    """Whose system prompt the agent gets: `client` for what the client sends, even if that is none, and nothing of the
    agent's own; None: as usual."""
    choosing: ChoosingAsked = NOTHING_ASKED
    """How many actions are to be drawn at each step."""


@dataclass(frozen=True, slots=True)
class Addressed:
    """A request, and the agent that it is for."""

    agent: ServedAgent
    pinned: str | None
    """The adapter that it names instead of the agent; None: whichever is acting."""
    request: ChatCompletionRequest
    """With the agent's way of sampling where it says nothing of its own."""
    choosing: Choosing


def addressed(parts: Parts, request: ChatCompletionRequest, caller: Caller) -> Addressed:
    """Whom a request is for, and how its actions are found. A request that names an adapter is for the policy itself,
    and gets no defaults of the agent's.

    Raises UnknownModel, AgentRefused, FieldRefused for more draws than the server makes, and EngineError while the
    engine is down.
    """
    if not (health := parts.engine.health()).is_alive:
        raise EngineError(health.problem)  # before adapters are looked for, which a dead engine has none of
    agent, pinned = chosen_agent(parts, request.model, caller.key)
    request = _with_defaults(parts, request, agent) if pinned is None else request
    of_agent = agent.choosing if pinned is None else NOTHING_ASKED
    asked = caller.choosing if caller.choosing.num_draws else replace(caller.choosing, num_draws=request.num_draws)
    choosing = parts.choosing.chosen(asked, request.metadata.purpose, request.temperature, of_agent)
    return Addressed(agent, pinned, request, choosing)


async def admit(
    parts: Parts, to: Addressed, caller: Caller, lease: AsyncExitStack, previous: Step | None = None
) -> list[Run]:
    """The `n` runs of a request. Its episode's adapter is leased until `lease` is closed.

    `previous` is the logged step that the request continues; None: its conversation tells.

    Raises ValueError (UnknownTask, GrammarError ...) for a request that cannot be answered, and SwapError where its
    episode's adapter is not served any more.
    """
    agent, pinned, request, choosing = to.agent, to.pinned, to.request, to.choosing
    is_large = previous is not None or _num_parts(request) > FEW_MESSAGES
    messages, letters = await off_loop(is_large, _conversation, request, agent, caller)
    is_large = is_large or letters > 10 * SMALL_LETTERS
    asked_id = request.metadata.episode_id or caller.episode_id
    named = None if asked_id is None else _named_episode(parts, asked_id, agent, caller.key)
    whose = Whose(caller.key.name, request.user_name, asked_id, agent=agent.name)
    if previous is None or not _is_of(parts, previous, agent):
        place = await off_loop(is_large or asked_id is not None, locate, parts.log, messages, whose, request.stop_texts)
    else:
        place = await off_loop(True, continued, parts.log, messages, previous)
    logged = parts.log.episode(place.path[-1].episode_id) if place.path else named
    episode_id = logged.id if logged else asked_id or new_id("ep")
    began_with = logged.adapter if logged else None
    leased = parts.swap.lease(episode_id, began_with=began_with, pinned=pinned, agent=agent.name)
    policy = await _policy(parts, request, choosing, await lease.enter_async_context(leased))
    episode = logged
    if episode is None:
        task = await agent.toolbox.find_task(parts.limits.deadline_s, request.metadata.task, messages)
        episode = _new_episode(agent, request, episode_id, policy, task, caller.key, is_assigned=pinned is None)
    admitted = _Admitted(parts, agent, request, caller, policy, episode, logged is None, place, messages, choosing)
    opens_world = request.tools is None and episode.task is not None  # which may take its time to replay what was done
    if opens_world:
        in_thread = partial(agent.toolbox.in_thread, parts.limits.deadline_s)
        return [await in_thread(admitted.run, choice) for choice in range(request.n)]
    is_large = is_large or len(place.path) > FEW_MESSAGES or request.asks_for_grammar or _has_large_tools(request)
    return [await off_loop(is_large, admitted.run, choice) for choice in range(request.n)]


def _named_episode(parts: Parts, episode_id: str, agent: ServedAgent, key: Key) -> Episode | None:
    """The logged episode that a request names; None for one that is to begin under this id. Raises ForeignEpisode and
    ErasedEpisode."""
    named = parts.log.episode(episode_id)
    if named is None and parts.log.erased_among([episode_id]):
        raise ErasedEpisode(f"episode {episode_id!r} was erased, for good: choose another id")
    if named is not None and not key.sees(named.owner):
        raise ForeignEpisode(f"episode {episode_id!r} belongs to another key: choose another id")
    if named is not None and named.agent != agent.name:
        raise ForeignEpisode(f"episode {episode_id!r} belongs to another agent than {agent.model!r}: choose another id")
    return named


async def _policy(parts: Parts, request: ChatCompletionRequest, choosing: Choosing, adapter: Adapter | None) -> Policy:
    """What acts, as it was leased, and what chooses among its draws."""
    protocol = await off_loop(bool(request.template_options), parts.protocol.with_options, request.template_options)
    if choosing.num_draws == 1:
        return Policy(parts.engine, protocol, adapter)
    scorer = await scorer_of(choosing.by, adapter, parts.reward_models, choosing.may_fall_back)
    return Policy(parts.engine, protocol, adapter, scorer)


def _has_large_tools(request: ChatCompletionRequest) -> bool:
    tools = [tool.function for tool in request.tools or ()]
    return len(tools) > FEW_TOOLS or are_large({"says": each.description, "takes": each.parameters} for each in tools)


def _conversation(
    request: ChatCompletionRequest, agent: ServedAgent, caller: Caller
) -> tuple[tuple[Message, ...], int]:
    """As the agent sees it, with how many letters it has, roughly."""
    messages = request.conversation if caller.system == "client" else agent.told(request.conversation)
    return messages, num_letters(messages)


def _is_of(parts: Parts, step: Step, agent: ServedAgent) -> bool:
    """Whether a logged step is the agent's own: another agent's conversation is handed to it as one that is new."""
    episode = parts.log.episode(step.episode_id)
    return episode is not None and episode.agent == agent.name


def _with_defaults(parts: Parts, request: ChatCompletionRequest, agent: ServedAgent) -> ChatCompletionRequest:
    """The request, with the agent's way of sampling where it says nothing of its own."""
    if not agent.sampling:
        return request
    unsaid = {name: value for name, value in agent.sampling.items() if name not in request.model_fields_set}
    if request.asked_max_tokens is None and "max_tokens" in agent.sampling:
        unsaid["max_tokens"] = min(int(agent.sampling["max_tokens"]), parts.engine.limits.max_context_tokens)
    else:
        unsaid.pop("max_tokens", None)
    return request.model_copy(update=unsaid)


def _num_parts(request: ChatCompletionRequest) -> int:
    """Of all messages together; a text is one."""
    return sum(len(each.content) if isinstance(each.content, list) else 1 for each in request.messages)


async def prompt_length(
    parts: Parts, request: ChatCompletionRequest, caller: Caller, previous: Step | None = None
) -> int:
    """Tokens of the prompt that a request would have, rendered afresh. Raises as `admit` does."""
    agent, _ = chosen_agent(parts, request.model, caller.key)
    protocol = await off_loop(bool(request.template_options), parts.protocol.with_options, request.template_options)
    tools = await off_loop(_has_large_tools(request), lambda: request.tool_schemas)
    messages, _ = await off_loop(True, _conversation, request, agent, caller)
    if not tools and previous is None and caller.tools != "client" and agent.toolbox.is_default:
        deadline_s = parts.limits.deadline_s
        task = await agent.toolbox.find_task(deadline_s, request.metadata.task, messages)
        tools, _ = await agent.toolbox.in_thread(deadline_s, agent.toolbox.open, task, ())
    return len(await off_loop(True, protocol.render, messages, tools))


def chosen_agent(parts: Parts, model: str, key: Key) -> tuple[ServedAgent, str | None]:
    """The agent that a request asks for by its model name, and the adapter that it pins; None: whichever is acting.

    `support` is an agent, `support-v0003` an adapter of it, `support:base` the base network as that agent, and `base`
    the base network as the server's own. Raises UnknownModel, and AgentRefused for one that the key is not for.
    """
    for agent in parts.agents:
        if model == agent.model:
            return require_agent(key, agent), None
        if model == (f"{agent.name}:{BASE_ADAPTER}" if agent.name else BASE_ADAPTER):
            return require_agent(key, agent), BASE_ADAPTER
    whose = next((adapter.agent for adapter in _pinnable(parts) if adapter.name == model), None)
    for agent in parts.agents:
        if agent.name == whose:
            return require_agent(key, agent), model
    there_are = ", ".join(agent.model for agent in agents_of(parts, key))
    raise UnknownModel(
        f"the model {model!r} is not served here; there are: {there_are}; GET /v1/models lists the adapters, too"
    )


def agents_of(parts: Parts, key: Key) -> list[ServedAgent]:
    """Those that a key may speak to."""
    return [agent for agent in parts.agents if key.may_use(agent.name)]


def require_agent(key: Key, agent: ServedAgent) -> ServedAgent:
    """The agent. Raises AgentRefused for one that the key is not for."""
    if not key.may_use(agent.name):
        raise AgentRefused(refusal(key, agent.model))
    return agent


def refusal(key: Key, agent: str) -> str:
    """In words."""
    return f"{key.name!r} is a key for other agents than {agent!r}: ask the server's operator for another"


def _pinnable(parts: Parts) -> list[Adapter]:
    """Loaded adapters that may act: a reward model only scores."""
    return [adapter for adapter in parts.engine.loaded_adapters() if not adapter.is_reward]


def _new_episode(
    agent: ServedAgent,
    request: ChatCompletionRequest,
    episode_id: str,
    policy: Policy,
    task: str | None,
    key: Key,
    is_assigned: bool,
) -> Episode:
    metadata = request.metadata
    return Episode(
        id=episode_id,
        actor=Actor.POLICY,
        purpose=metadata.purpose,
        adapter=policy.adapter_name,
        task=task,
        metadata=metadata.model_extra or {},
        owner=key.name,
        is_assigned=is_assigned,
        user=request.user_name,
        agent=agent.name,
    )


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A request whose place in the log, episode and policy are known."""

    parts: Parts
    agent: ServedAgent
    body: ChatCompletionRequest
    caller: Caller
    policy: Policy
    episode: Episode
    is_new: bool
    place: Place
    messages: tuple[Message, ...]
    choosing: Choosing

    def run(self, choice: int) -> Run:
        """One of its choices. World tools are opened for each: one choice's calls are not the other's."""
        body, place = self.body, self.place
        offered, server_tools = self._tools()
        parent = place.path[-1] if place.path else None
        stands_on_parent = parent is not None and place.change is None and parent.tools == offered
        turn = Turn(
            episode=self.episode,
            parent_id=parent.id if parent else None,
            index=parent.index + 1 if parent else 0,
            served_token_ids=_served_token_ids(parent) if parent and stands_on_parent else (),
            history=place.history,
            new_messages=place.new_messages,
            client_messages=self.messages,
            tools=offered,
            sampling=self._sampling(choice, offered),
            may_call=body.may_call and bool(offered),
            one_call=not body.parallel_tool_calls and server_tools is None,
            shows_call_ids=body.functions is None,
            stop=body.stop_texts,
            stream=body.stream,
            tells_tokens=body.logprobs,
            prompt_change=place.change,
            redactor=self.parts.redactor,
        )
        return Run(choice, self.policy, turn, self.is_new, server_tools, body.asked_max_tokens)

    def _tools(self) -> tuple[tuple[ToolSchema, ...], ServerTools | None]:
        """What is on offer, and the tools behind it where the server runs them: the client's go before its own."""
        if self.body.tools:
            return self.body.tool_schemas, None
        toolbox, asked = self.agent.toolbox, self.caller.tools
        if asked == "client" or (asked is None and not toolbox.is_default):
            return (), None
        schemas, server_tools = toolbox.open(self.episode.task, self.place.path)
        return schemas, server_tools if schemas or server_tools.judge else None

    def _sampling(self, choice: int, offered: tuple[ToolSchema, ...]) -> SamplingParams:
        limits = self.parts.engine.limits
        sampling = self.body.sampling(limits, _grammar(self.parts, self.body, offered))
        _require_possible(sampling, limits)
        sampling = replace(sampling, best_of=self.choosing.num_draws)
        return sampling if self.body.seed is None else replace(sampling, seed=self.body.seed + choice)


def _served_token_ids(step: Step) -> TokenIds:
    """The conversation up to and including the step's action, as it was served."""
    return step.prompt_token_ids + step.completion_token_ids


def _require_possible(sampling: SamplingParams, limits: EngineLimits) -> None:
    """Raises FieldRefused for a bias on what is no token."""
    if wrong := [token_id for token_id, _ in sampling.logit_bias if token_id >= limits.vocab_size]:
        problem = f"token {wrong[0]} is outside the model's vocabulary of {limits.vocab_size}"
        raise FieldRefused("logit_bias", problem)


def _grammar(parts: Parts, request: ChatCompletionRequest, offered: tuple[ToolSchema, ...]) -> str | None:
    """The grammar that tools and response_format ask for. Raises ValueError where the engine cannot hold to it."""
    schema = request.response_format.schema_of_answer if request.response_format else None
    has_grammar, may_call = parts.engine.limits.supports_grammar, bool(offered) and request.may_call
    if schema is None and not request.requires_call:
        return _no_call(parts) if offered and not may_call and has_grammar else None
    if not has_grammar:
        raise ValueError("this engine cannot hold an answer to a schema: drop response_format, or use tool_choice auto")
    if request.requires_call:
        chosen = request.chosen_tools
        callable_tools = [tool for tool in offered if chosen is None or tool["function"]["name"] in chosen]
        return tool_call_grammar(parts.protocol, callable_tools)
    if may_call:
        return call_or_answer_grammar(parts.protocol, offered, schema)
    return json_grammar(parts.protocol, schema or {})


def _no_call(parts: Parts) -> str | None:
    """The tools stay in the prompt, which goes on as it was; the policy must not call one."""
    try:
        return no_call_grammar(parts.protocol)
    except GrammarError:  # a call that is written all the same is no action: see Turn.may_call
        return None
