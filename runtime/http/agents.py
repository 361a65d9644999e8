"""Agents by their names in requests: which one a body, a query or a model name means."""

from __future__ import annotations

from policies.types import BASE_ADAPTER
from runtime.agent.served_agent import ServedAgent
from runtime.http.admission import AgentRefused, agents_of, refusal, require_agent
from runtime.http.errors import ApiError
from runtime.http.parts import Parts
from runtime.store.keys import ANYBODY, Key


def agent_named(parts: Parts, name: str | None, key: Key = ANYBODY) -> ServedAgent:
    """The agent that a body or a query names; None: the server's own. Raises ApiError (404), and AgentRefused for one
    that the key is not for."""
    agent = parts.agent(parts.agent_filter(name) or "")
    if agent is None:
        raise _no_agent(parts, name, key)
    return require_agent(key, agent)


def listed_agent(parts: Parts, name: str | None, key: Key = ANYBODY) -> str | None:
    """The agent whose entries a list is asked for, as the stores know it; None: those of all. One that is no longer
    served still has its entries.

    Raises AgentRefused, and ApiError (404) for a name that nothing bears: an empty list would hide that it is
    misspelled.
    """
    agent = parts.agent_filter(name)
    if agent is None:
        return None
    if not key.may_use(agent):
        raise AgentRefused(refusal(key, str(name)))
    if parts.agent(agent) is None and not _has_entries(parts, agent):
        raise _no_agent(parts, name, key)
    return agent


def _has_entries(parts: Parts, agent: str) -> bool:
    cycles = parts.learning.cycles.newest(1, [], agent) if parts.learning else []
    return bool(cycles or parts.log.episodes(limit=1, agent=agent))


def _no_agent(parts: Parts, name: str | None, key: Key) -> ApiError:
    there_are = ", ".join(each.model for each in agents_of(parts, key))
    return ApiError(404, f"there is no agent {name!r}; there are: {there_are}", "agent_not_found", "agent")


def model_names(parts: Parts, key: Key) -> list[str]:
    """What a request of this key may name as its model: agents, the base network of each, and the loaded adapters."""
    agents = agents_of(parts, key)
    bases = [f"{agent.name}:{BASE_ADAPTER}" if agent.name else BASE_ADAPTER for agent in agents]
    loaded = parts.engine.loaded_adapters()
    adapters = [adapter.name for adapter in loaded if not adapter.is_reward and key.may_use(adapter.agent)]
    return list(dict.fromkeys([*(agent.model for agent in agents), *bases, *adapters]))
