"""Agents by their names in requests: which one a body, a query or a model name means."""

from __future__ import annotations

from policies.types import BASE_ADAPTER
from runtime.agent.served_agent import ServedAgent
from runtime.http.errors import ApiError
from runtime.http.parts import Parts


def agent_named(parts: Parts, name: str | None) -> ServedAgent:
    """The agent that a body or a query names; None: the server's own. Raises ApiError (404)."""
    agent = parts.agent(parts.agent_filter(name) or "")
    if agent is None:
        there_are = ", ".join(each.model for each in parts.agents)
        raise ApiError(404, f"there is no agent {name!r}; there are: {there_are}", "agent_not_found", "agent")
    return agent


def model_names(parts: Parts) -> list[str]:
    """What a request may name as its model: agents, the base network of each, and the loaded adapters."""
    own, *named = parts.agents
    bases = [BASE_ADAPTER, *(f"{agent.name}:{BASE_ADAPTER}" for agent in named)]
    adapters = [adapter.name for adapter in parts.engine.loaded_adapters() if not adapter.is_reward]
    return list(dict.fromkeys([own.model, *(agent.model for agent in named), *bases, *adapters]))
