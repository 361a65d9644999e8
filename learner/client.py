"""The learner's side of the served endpoint: it samples, evaluates and promotes like any client, by HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, BadRequestError

from learner.practice import Attempt, PracticeOptions, practise
from policies.types import BASE_ADAPTER, Message, ToolSchema
from runtime.store.episodes import Purpose, new_id
from tools.worlds.world import Task, World

UNJUDGED = frozenset({"registered", "validated", "loaded", "verified", "unloaded"})
"""States of an adapter that has never served and was not refused."""


AS_SENT = {"x-stepagent-system": "client", "x-stepagent-tools": "client"}
"""A logged state is shown as it was: the server adds neither its agent's prompt nor tools of its own."""


@dataclass(frozen=True, slots=True)
class StateTrial:
    """One draw of an action at one state, the same for every adapter that tries it."""

    messages: Sequence[Message]
    """The conversation before the action."""
    tools: Sequence[ToolSchema]
    number: int
    """From 0: the state may be tried more than once."""
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """Equal for equal trials: under it an adapter's own is found in the log again."""
        content = [self.messages, self.tools, self.number, self.max_tokens]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The same luck for both adapters, so that what they differ in is themselves (common random numbers)."""
        return int(self.name[:15], 16)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served agent. Methods raise openai's errors where it does not answer or refuses."""

    client: AsyncOpenAI
    concurrency: int = 16
    """Requests at a time. An engine on a CPU reads its weights once for all of them; with n = 2 they fill 32 places."""
    agent: str = ""
    """Name of the agent that is spoken to; empty: the server's own."""

    async def _adapters(self) -> Any:
        """The agent's adapters, as the server lists them."""
        return await self.client.get("/adapters", cast_to=object, options={"params": {"agent": self.agent}})

    def _pin(self, adapter: str) -> str:
        """The model name of an adapter: the base network serves other agents, too."""
        return f"{self.agent}:{adapter}" if self.agent and adapter == BASE_ADAPTER else adapter

    async def parents(self) -> list[str]:
        """The agent's acting adapter, what it was trained from, and so on down to `base`."""
        listed = await self._adapters()
        parents = {adapter["name"]: adapter["parent"] for adapter in listed["data"]}
        name = next((adapter["name"] for adapter in listed["data"] if adapter["is_acting"]), None)
        chain = []
        while name is not None:
            chain.append(name)
            name = parents[name]
        return [*chain, BASE_ADAPTER]

    async def canary(self) -> str | None:
        """The adapter that serves a share of the agent's new episodes, if one does."""
        listed = await self._adapters()
        return next((adapter["name"] for adapter in listed["data"] if adapter["state"] == "canary"), None)

    async def sample(
        self,
        states: Sequence[tuple[Sequence[Message], Sequence[ToolSchema], int]],
        adapter: str,
        num_samples: int,
        on_done: Callable[[], object] = lambda: None,
    ) -> list[list[str]]:
        """Sample actions of an adapter at each state; returns the ids of the logged steps, by state.

        A state is its conversation, the tools on offer, and the most tokens that an action may have.

        A state that the endpoint cannot answer at, for example because it is too long for the model, has no ids.
        """
        places = asyncio.Semaphore(self.concurrency)

        async def sample_one(messages: Sequence[Message], tools: Sequence[ToolSchema], max_tokens: int) -> list[str]:
            async with places:
                try:
                    return await self._sample_at(messages, tools, adapter, n=num_samples, max_tokens=max_tokens)
                finally:
                    on_done()

        return list(await asyncio.gather(*(sample_one(*state) for state in states)))

    async def try_states(self, trials: Sequence[StateTrial], adapter: str) -> list[str | None]:
        """Sample one action of an adapter for each trial, by the trial's seed; returns the ids of the logged steps."""
        places = asyncio.Semaphore(self.concurrency)

        async def try_one(trial: StateTrial) -> str | None:
            async with places:
                found = await self._sample_at(
                    trial.messages, trial.tools, adapter, seed=trial.seed, max_tokens=trial.max_tokens, trial=trial.name
                )
                return found[0] if found else None

        return list(await asyncio.gather(*map(try_one, trials)))

    async def _sample_at(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSchema],
        adapter: str,
        n: int = 1,
        seed: int | None = None,
        max_tokens: int | None = None,
        trial: str | None = None,
    ) -> list[str]:
        """Ids of the logged steps; none where the endpoint cannot answer here, for example because it is too long."""
        # An episode of its own: a state of a logged episode must not be continued under it.
        metadata: Any = {"purpose": Purpose.EVALUATION, "episode_id": new_id("ep")} | (
            {"trial": trial} if trial else {}
        )
        asked: Any = {"messages": list(messages), "tools": list(tools), "n": n, "metadata": metadata}
        asked |= {"seed": seed} if seed is not None else {}
        asked |= {"max_tokens": max_tokens} if max_tokens is not None else {}
        try:
            answer = await self.client.chat.completions.create(model=self._pin(adapter), extra_headers=AS_SENT, **asked)
        except BadRequestError:
            return []
        return [steps[0]["id"] for steps in (answer.model_extra or {})["stepagent"]["choices"]]

    async def evaluate(
        self,
        world: World,
        tasks: Sequence[Task],
        adapter: str,
        temperature: float,
        on_done: Callable[[], object] = lambda: None,
        seed: int | None = None,
    ) -> list[Attempt]:
        """Try tasks under an adapter; they are not learned from."""
        options = PracticeOptions(self._pin(adapter), temperature, Purpose.EVALUATION, self.concurrency, seed)
        return await practise(self.client, world, tasks, options, lambda _: on_done())

    async def register(self, folder: Path, parent: str, reason: str, cycle: str) -> str:
        """Hand a trained folder (absolute) to the runtime, which validates, loads and verifies it; returns its name."""
        body = {
            "path": str(folder),
            "parent": None if parent == BASE_ADAPTER else parent,
            "reason": reason,
            "cycle": cycle,
            "agent": self.agent,
        }
        adapter: Any = await self.client.post("/adapters", cast_to=object, body=body)
        return adapter["name"]

    async def promote(self, name: str, reason: str, expected_acting: str) -> Any:
        """Propose an adapter; the record that comes back says whether it acts, is a canary, waits, or was refused.

        Raises openai's ConflictError where another adapter than `expected_acting` acts by now.
        """
        body = {"reason": reason, "expected_acting": expected_acting, "is_proposal": True}
        return await self.client.post(f"/adapters/{name}/promote", cast_to=object, body=body)

    async def start_canary(self, name: str, share: float, reason: str, expected_acting: str) -> Any:
        """As `promote`; raises beside another canary."""
        body = {"share": share, "reason": reason, "expected_acting": expected_acting, "is_proposal": True}
        return await self.client.post(f"/adapters/{name}/canary", cast_to=object, body=body)

    async def waiting(self) -> list[Any]:
        """The adapters that wait for somebody's yes, of all agents."""
        listed: Any = await self.client.get("/adapters", cast_to=object)
        return [adapter for adapter in listed["data"] if adapter["proposal"]]

    async def approve(self, name: str) -> Any:
        """Let act what waits."""
        return await self.client.post(f"/adapters/{name}/promote", cast_to=object, body={"reason": "approved"})

    async def decline(self, name: str, reason: str) -> Any:
        """Refuse what waits."""
        return await self.client.post(f"/adapters/{name}/refuse", cast_to=object, body={"reason": reason})

    async def refuse(self, name: str, reason: str) -> None:
        await self.client.post(f"/adapters/{name}/refuse", cast_to=object, body={"reason": reason})

    async def unload(self, name: str) -> None:
        """Free its slot; `register` brings it up again. Raises openai's ConflictError where it serves."""
        await self.client.post(f"/adapters/{name}/unload", cast_to=object, body={"reason": "its trials are done"})

    async def refuse_left_over(self, cycles: Sequence[str], spared: Collection[str] = ()) -> list[str]:
        """Refuse what these cycles have registered and nobody let act, but for the spared; returns the names."""
        listed: Any = await self.client.get("/adapters", cast_to=object)
        names = []
        for adapter in listed["data"]:
            is_left_over = adapter["cycle"] in cycles and adapter["state"] in UNJUDGED and not adapter["proposal"]
            if is_left_over and adapter["name"] not in spared:
                await self.refuse(adapter["name"], f"its cycle has ended without it ({adapter['cycle']})")
                names.append(adapter["name"])
        return names

    async def rollback(self, reason: str) -> Any:
        body = {"reason": reason, "agent": self.agent}
        return await self.client.post("/adapters/rollback", cast_to=object, body=body)

    async def demonstrate(self, demonstrations: Sequence[dict[str, Any]]) -> Any:
        """Import demonstrations; the answer says how many were new, known or refused."""
        body = {"demonstrations": list(demonstrations), "agent": self.agent}
        return await self.client.post("/demonstrations", cast_to=object, body=body)
