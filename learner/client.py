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
    episode_id: str = ""
    """Of which logged episode the state is: an erasure of that one erases the trial. No part of the trial's name."""

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
    """States at a time. An engine on a CPU reads its weights once for all that run; with two draws they fill 32
    places."""
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

    async def digest(self, adapter: str) -> str:
        """Of the weights of an adapter of the agent, as they were registered."""
        listed = await self._adapters()
        return next(each["digest"] for each in listed["data"] if each["name"] == adapter)

    async def world(self) -> str:
        """The name of the agent's world, as the server loads it; empty: it has none."""
        return (await self._adapters()).get("world", "")

    async def canary(self) -> str | None:
        """The adapter that serves a share of the agent's new episodes, if one does."""
        listed = await self._adapters()
        return next((adapter["name"] for adapter in listed["data"] if adapter["state"] == "canary"), None)

    async def sample(
        self, draws: Sequence[Sequence[StateTrial]], adapter: str, on_done: Callable[[], object] = lambda: None
    ) -> list[list[str]]:
        """Sample actions of an adapter at some states; returns the ids of the logged steps, by state.

        `draws`: those of each state. A draw that the endpoint cannot answer, for example because the state is too long
        for the model, has no id. `on_done` is called after each state.
        """
        places = asyncio.Semaphore(self.concurrency)

        async def sample_one(trials: Sequence[StateTrial]) -> list[str]:
            async with places:
                try:
                    found = await asyncio.gather(*(self.try_state(trial, adapter) for trial in trials))
                    return [step_id for step_id in found if step_id]
                finally:
                    on_done()

        return list(await asyncio.gather(*map(sample_one, draws)))

    async def try_state(self, trial: StateTrial, adapter: str) -> str | None:
        """Sample an adapter's action by the trial's seed; returns the logged step's id.

        None where the endpoint cannot answer, for example because the state is too long for the model.
        """
        # An episode of its own: a state of a logged episode must not be continued under it.
        metadata: Any = {"purpose": Purpose.EVALUATION, "episode_id": new_id("ep"), "trial": trial.name}
        metadata |= {"copied_from": trial.episode_id} if trial.episode_id else {}
        asked: Any = {"messages": list(trial.messages), "tools": list(trial.tools), "seed": trial.seed}
        asked |= {"max_tokens": trial.max_tokens} if trial.max_tokens is not None else {}
        try:
            pinned = self._pin(adapter)
            answer = await self.client.chat.completions.create(
                model=pinned, metadata=metadata, extra_headers=AS_SENT, **asked
            )
        except BadRequestError:
            return None
        (choice,) = (answer.model_extra or {})["stepagent"]["choices"]
        return choice[0]["id"]

    async def evaluate(
        self,
        world: World,
        tasks: Sequence[Task],
        adapter: str,
        temperature: float,
        on_done: Callable[[], object] = lambda: None,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> list[Attempt]:
        """Try tasks under an adapter, with `max_tokens` at most in a step; they are not learned from."""
        pinned = self._pin(adapter)
        options = PracticeOptions(pinned, temperature, Purpose.EVALUATION, self.concurrency, seed, max_tokens)
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

    async def add_reward(self, adapter: str, folder: Path, cycle: str) -> str:
        """Hand a reward model's folder (absolute) to the runtime, as an adapter's newest; returns its name."""
        body = {"path": str(folder), "cycle": cycle}
        reward: Any = await self.client.post(f"/adapters/{adapter}/reward", cast_to=object, body=body)
        return reward["name"]

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
        """The adapters that wait for somebody's yes, of the named agent; of all where none is named."""
        listed: Any = await (self._adapters() if self.agent else self.client.get("/adapters", cast_to=object))
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
