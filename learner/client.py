"""The learner's side of the served endpoint: it samples, evaluates and promotes like any client, by HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served agent. Methods raise openai's errors where it does not answer or refuses."""

    client: AsyncOpenAI
    concurrency: int = 8

    async def parents(self) -> list[str]:
        """The acting adapter, what it was trained from, and so on down to `base`."""
        listed: Any = await self.client.get("/adapters", cast_to=object)
        parents = {adapter["name"]: adapter["parent"] for adapter in listed["data"]}
        name = next((adapter["name"] for adapter in listed["data"] if adapter["is_acting"]), None)
        chain = []
        while name is not None:
            chain.append(name)
            name = parents[name]
        return [*chain, BASE_ADAPTER]

    async def canary(self) -> str | None:
        """The adapter that serves a share of the new episodes, if one does."""
        listed: Any = await self.client.get("/adapters", cast_to=object)
        return next((adapter["name"] for adapter in listed["data"] if adapter["state"] == "canary"), None)

    async def sample(
        self,
        states: Sequence[tuple[Sequence[Message], Sequence[ToolSchema]]],
        adapter: str,
        num_samples: int,
        on_done: Callable[[], object] = lambda: None,
    ) -> list[list[str]]:
        """Sample actions of an adapter at each state; returns the ids of the logged steps, by state.

        A state that the endpoint cannot answer at, for example because it is too long for the model, has no ids.
        """
        places = asyncio.Semaphore(self.concurrency)

        async def sample_one(messages: Any, tools: Any) -> list[str]:
            # An episode of its own: a state of a logged episode must not be continued under it.
            metadata: Any = {"purpose": Purpose.EVALUATION, "episode_id": new_id("ep")}
            async with places:
                try:
                    answer = await self.client.chat.completions.create(
                        model=adapter, messages=list(messages), tools=list(tools), n=num_samples, metadata=metadata
                    )
                except BadRequestError:
                    return []
                finally:
                    on_done()
            return [steps[0]["id"] for steps in (answer.model_extra or {})["stepagent"]["choices"]]

        return list(await asyncio.gather(*(sample_one(*state) for state in states)))

    async def evaluate(
        self,
        world: World,
        tasks: Sequence[Task],
        adapter: str,
        temperature: float,
        on_done: Callable[[], object] = lambda: None,
    ) -> list[Attempt]:
        """Try tasks under an adapter; they are not learned from."""
        options = PracticeOptions(adapter, temperature, Purpose.EVALUATION, self.concurrency)
        return await practise(self.client, world, tasks, options, lambda _: on_done())

    async def register(self, folder: Path, parent: str, reason: str, cycle: str) -> str:
        """Hand a trained folder (absolute) to the runtime, which validates, loads and verifies it; returns its name."""
        body = {
            "path": str(folder),
            "parent": None if parent == BASE_ADAPTER else parent,
            "reason": reason,
            "cycle": cycle,
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
        """The adapters that wait for somebody's yes."""
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

    async def refuse_left_over(self, cycles: Sequence[str]) -> list[str]:
        """Refuse what these cycles have registered and nobody has judged; returns the names."""
        listed: Any = await self.client.get("/adapters", cast_to=object)
        names = []
        for adapter in listed["data"]:
            if adapter["cycle"] in cycles and adapter["state"] in UNJUDGED and not adapter["proposal"]:
                await self.refuse(adapter["name"], f"its cycle ended before it was judged ({adapter['cycle']})")
                names.append(adapter["name"])
        return names

    async def rollback(self, reason: str) -> Any:
        return await self.client.post("/adapters/rollback", cast_to=object, body={"reason": reason})

    async def demonstrate(self, demonstrations: Sequence[dict[str, Any]]) -> Any:
        """Import demonstrations; the answer says how many were new, known or refused."""
        body = {"demonstrations": list(demonstrations)}
        return await self.client.post("/demonstrations", cast_to=object, body=body)
