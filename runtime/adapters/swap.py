"""Brings adapters up, lets one act, and takes them out again, while episodes go on undisturbed.

A version is brought up beside the acting one (validated, loaded, verified), then the acting pointer is flipped: new
episodes lease the new adapter, an episode keeps the one it began with, and an adapter that nobody leases any more is
unloaded. Loading in place under one name was refused: a running episode would change its policy in mid-sentence,
and engines mix old caches with new weights.

Each agent has an acting adapter, and perhaps a canary, of its own: a change of one agent's changes no other agent's.

One lock orders all changes; a second change waits for the first. A lease waits for none of them, with one exception:
an episode that comes back after its adapter was unloaded waits until that adapter is loaded again.

Not covered: a canary does not outlive a restart; who started it may start it again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import ParamSpec, TypeVar

from policies.adapters.base_network import BaseNetwork
from policies.adapters.files import AdapterFiles, AdapterRefused, validate_adapter
from policies.adapters.probe import Probe
from policies.types import BASE_ADAPTER, Adapter, Engine, EngineError
from runtime.adapters.leases import Leases
from runtime.adapters.verification import verify_adapter
from runtime.background import keep_doing
from runtime.off_loop import to_its_end
from runtime.store.adapter_registry import AdapterRegistry, AdapterState, RegistryError

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

IN_ENGINE = (
    AdapterState.LOADED,
    AdapterState.VERIFIED,
    AdapterState.CANARY,
    AdapterState.ACTING,
    AdapterState.DRAINING,
)
WANTED = (AdapterState.VERIFIED, AdapterState.CANARY, AdapterState.ACTING)
"""States that keep an adapter in the engine though no episode leases it, as long as nobody needs its slot: a verified
one, which nobody has promoted yet, then gives way and is brought up again when it is promoted."""

SLOT_PAUSE_S = 0.05
"""Between two looks for a free slot."""


class SwapError(Exception):
    """A change, or a lease, is not possible now, and why. Nothing was changed."""


class NoSlot(SwapError):
    """Every slot of the engine is in use."""


class Swap:
    """Leases for episodes; changes for the learner and the operator; `restore` and `drain` for the server."""

    def __init__(
        self,
        engine: Engine,
        registry: AdapterRegistry,
        base: BaseNetwork,
        lease_idle_s: float = 900.0,
        slot_wait_s: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
        agents: Sequence[str] = ("",),
    ) -> None:
        """`slot_wait_s`: how long an episode that comes back waits for a slot, where running steps hold them all.

        `agents`: those that are served; what acts for another one, which was served once, is not loaded.
        """
        self._engine = engine
        self._registry = registry
        self._base = base
        self._leases = Leases(lease_idle_s, clock)
        self._slot_wait_s = slot_wait_s
        self.agents = tuple(agents)
        self._changes = asyncio.Lock()
        self._served: dict[str, Adapter] = {}
        """Adapters that are loaded and verified; no other is ever handed out."""
        self._canaries: dict[str, tuple[str, float]] = {}
        """By agent: its canary's name, and the share of its new episodes."""

    # --------------------------------------------------------------------------------------------- leases

    @asynccontextmanager
    async def lease(
        self, episode_id: str, *, began_with: str | None = None, pinned: str | None = None, agent: str = ""
    ) -> AsyncIterator[Adapter | None]:
        """The adapter for one step of an agent's episode, None for the base network; hold it until the step's last
        token.

        `began_with` is the adapter of the logged episode, where there is one: after a restart, or an idle time-out,
        only the log knows it. `pinned` asks for an adapter by name, for a new episode alone. Raises SwapError where
        the episode's adapter is no longer served, or the pin is not possible.
        """
        held = self._leases.adapter_of(episode_id)
        assert None in (held, began_with) or held == began_with, f"episode {episode_id}: {held}, not {began_with}"
        name = held or began_with
        if name is None:
            name = self._choose(episode_id, agent) if pinned is None else self._pin(pinned)
        elif pinned not in (None, name):
            raise SwapError(f"episode {episode_id} began with {name} and keeps it; it cannot be pinned to {pinned}")
        with self._leases.hold(episode_id, name):
            yield None if name == BASE_ADAPTER else self._served.get(name) or await self._serve_again(name)

    def finish(self, episode_id: str) -> None:
        """The episode is over; its adapter need not wait for the idle time-out."""
        self._leases.finish(episode_id)

    def is_in_progress(self, episode_id: str) -> bool:
        """Whether an episode holds an adapter now."""
        return self._leases.adapter_of(episode_id) is not None

    def num_leases(self, name: str) -> int:
        """Episodes that hold this adapter now."""
        return self._leases.num_on(name)

    def canary_of(self, agent: str = "") -> str | None:
        """The adapter that serves a share of an agent's new episodes, if one does."""
        return self._canaries[agent][0] if agent in self._canaries else None

    # -------------------------------------------------------------------------------------------- changes

    @property
    def changes(self) -> asyncio.Lock:
        """Whoever else loads into the engine holds it meanwhile: two who look for a free slot would take the same."""
        return self._changes

    async def bring_up(self, name: str) -> Adapter:
        """Validate, load and verify an adapter, so that it can be pinned and promoted.

        Raises AdapterRefused, with the adapter refused on record and unloaded again, where it is at fault; SwapError
        where there is no slot for it; EngineError where the engine has died.
        """
        async with self._changes:
            return await self._bring_up(self._registry.adapter(name))

    async def promote(self, name: str, reason: str = "", expected_acting: str | None = None, key: str = "") -> None:
        """Let an adapter act for its agent's new episodes. One that is not up is brought up first, see `bring_up`.

        `expected_acting` is what it was found to be better than. Raises SwapError where that does not act any more
        (None: whatever acts). `key` is the name of the key that asks for it, here and below.
        """
        async with self._changes:
            adapter = self._registry.adapter(name)
            self.require_acting(expected_acting, adapter.agent)
            await self._bring_up(adapter)
            self._end_canary(name)
            await self.write(self._registry.promote, name, reason, key)

    async def start_canary(
        self, name: str, share: float, reason: str = "", expected_acting: str | None = None, key: str = ""
    ) -> None:
        """Give an adapter this share of its agent's new episodes, chosen by their ids. Raises SwapError beside another
        canary of that agent, and as `promote` does."""
        if not 0.0 < share <= 1.0:
            raise SwapError(f"a canary's share must lie in (0, 1], got {share}")
        async with self._changes:
            adapter = self._registry.adapter(name)
            self.require_acting(expected_acting, adapter.agent)
            if canary := self.canary_of(adapter.agent):
                raise SwapError(f"{canary} is a canary already; promote or refuse it first")
            await self._bring_up(adapter)
            await self.write(self._registry.record, name, AdapterState.CANARY, reason or f"share {share:g}", key)
            self._canaries[adapter.agent] = (name, share)

    async def refuse(self, name: str, reason: str, key: str = "") -> None:
        """Turn a candidate or canary down for ever. Episodes that began with it end with it."""
        async with self._changes:
            self._end_canary(name)
            await self.write(self._registry.record, name, AdapterState.REFUSED, reason, key)
            await self._sweep()

    async def unload(self, name: str, reason: str = "") -> None:
        """Free the slot, if it has one, of an adapter that serves no new episodes; it can be brought up again.

        Raises SwapError where it acts, is a canary, or takes a step.
        """
        async with self._changes:
            adapter, state = self._registry.adapter(name), self._registry.state(name)
            if state in (AdapterState.ACTING, AdapterState.CANARY) or self._leases.idle_since(name) is None:
                raise SwapError(f"{name} is {state} and serves: it cannot be unloaded")
            await self._unload(adapter, reason)

    async def rollback(
        self,
        reason: str,
        expected_acting: str | None = None,
        key: str = "",
        past: Collection[str] = (),
        agent: str = "",
    ) -> Adapter | None:
        """Let act again what acted for an agent before; None is the base network. A flip, where that is still loaded.

        Adapters named in `past` are passed over.

        Goes further down where that cannot be served any more. Raises SwapError where nothing is behind, or where
        another adapter than the one that is to be taken back acts by now (None: whichever acts).
        """
        async with self._changes:
            self.require_acting(expected_acting, agent)
            return await self._roll_back(agent, reason, key, past)

    async def restore(self) -> None:
        """Serve each agent's acting adapter on an engine that has just started, with nothing loaded.

        Where one cannot be served any more, what acted before it does, at worst the base network. Raises EngineError
        where the engine dies meanwhile: that says nothing against the adapter.
        """
        async with self._changes:
            await self._forget_the_last_engine()
            for agent in self.agents:
                await self._restore(agent)

    async def drain(self) -> None:
        """Unload the adapters that nobody leases any more."""
        async with self._changes:
            await self._sweep()

    async def keep_draining(self, every_s: float = 5.0) -> None:
        """`drain`, for ever: the server's background task."""
        await keep_doing("the draining of adapters", self.drain, every_s)

    # ------------------------------------------------------------------------------------- choosing a lease

    def _choose(self, episode_id: str, agent: str) -> str:
        if agent in self._canaries:
            name, share = self._canaries[agent]
            digest = hashlib.sha256(f"{name} {episode_id}".encode()).digest()
            if int.from_bytes(digest[:8]) < share * 2**64:
                return name
        acting = self._registry.acting(agent)
        return BASE_ADAPTER if acting is None else acting.name

    def _pin(self, name: str) -> str:
        if name == BASE_ADAPTER:
            return name
        state = self._registry.state(name)
        if name not in self._served or state is AdapterState.REFUSED:
            raise SwapError(f"{name} is {state} and cannot be pinned; bring it up first")
        return name

    async def _serve_again(self, name: str) -> Adapter:
        """Load an adapter for an episode that began with it and comes back late."""
        deadline = time.monotonic() + self._slot_wait_s
        while True:
            try:
                async with self._changes:
                    return self._served.get(name) or await to_its_end(self._load_again(name))
            except (AdapterRefused, EngineError, RegistryError, SwapError) as error:
                if not isinstance(error, NoSlot) or time.monotonic() >= deadline:
                    raise SwapError(f"the episode began with {name}, which is no longer served: {error}") from error
            await asyncio.sleep(SLOT_PAUSE_S)  # the lock is free meanwhile

    async def _load_again(self, name: str) -> Adapter:
        adapter = await self._bring_up(self._registry.adapter(name))
        is_acting = self._registry.acting(adapter.agent) == adapter
        state = AdapterState.ACTING if is_acting else AdapterState.DRAINING
        await self.write(self._registry.record, name, state, "an episode that began with it came back")
        return adapter

    # -------------------------------------------------- the steps of a change; all are called under the lock

    async def _bring_up(self, adapter: Adapter) -> Adapter:
        self._require_not_refused(adapter)
        if adapter.name in self._served:
            return adapter
        await self._note_if_unloaded(adapter)
        await self._require_slot()
        try:
            files = await self._validate(adapter)
            await self._load_and_verify(adapter, files.probe)
            self._served[adapter.name] = adapter
        except AdapterRefused as error:
            _log.error("%s is refused: %s", adapter.name, error)
            await self.write(self._registry.record, adapter, AdapterState.REFUSED, str(error))
            raise
        finally:  # also where the one who asked has gone away in between
            if adapter.name not in self._served:
                await self._unload(adapter, "it did not come up")
        return adapter

    async def _note_if_unloaded(self, adapter: Adapter) -> None:
        """The engine let go of it, but that could not be written then (a full disk)."""
        if self._registry.state(adapter.name) in IN_ENGINE and adapter not in self._engine.loaded_adapters():
            await self.write(self._registry.record, adapter, AdapterState.UNLOADED, "it was unloaded before")

    async def _validate(self, adapter: Adapter) -> AdapterFiles:
        files = await asyncio.to_thread(validate_adapter, adapter.path, self._engine.limits, self._base)
        if files.digest != adapter.digest:
            raise AdapterRefused("its weights are not those that were registered")
        await self.write(self._registry.record, adapter, AdapterState.VALIDATED)
        return files

    async def _load_and_verify(self, adapter: Adapter, probe: Probe) -> None:
        try:
            await self._engine.load_adapter(adapter)
            await self.write(self._registry.record, adapter, AdapterState.LOADED)
            await verify_adapter(self._engine, adapter, probe)
            await self.write(self._registry.record, adapter, AdapterState.VERIFIED)
        except EngineError as error:
            if not self._engine.health().is_alive:
                raise  # a dead engine says nothing about the adapter
            raise AdapterRefused(f"the engine cannot serve it: {error}") from error

    async def _unload(self, adapter: Adapter, reason: str) -> None:
        was_served = self._served.pop(adapter.name, None)  # first, so that nobody leases it meanwhile
        if adapter in self._engine.loaded_adapters():
            try:
                await self._engine.unload_adapter(adapter)
            except EngineError:
                if was_served:
                    self._served[adapter.name] = adapter
                raise
        if self._registry.state(adapter.name) in IN_ENGINE:
            await self.write(self._registry.record, adapter, AdapterState.UNLOADED, reason)

    async def _sweep(self) -> None:
        self._leases.expire()
        for adapter in self._acting_kind():
            is_wanted = self._registry.state(adapter.name) in WANTED
            if not is_wanted and self._leases.num_on(adapter.name) == 0:
                await self._unload_if_possible(adapter, "no episode needs it")

    async def _unload_if_possible(self, adapter: Adapter, reason: str) -> None:
        try:
            await self._unload(adapter, reason)
        except EngineError as error:  # it is tried again at the next sweep
            _log.warning("could not unload %s: %s", adapter.name, error)

    async def _comes_up(self, adapter: Adapter) -> bool:
        """False where the adapter is at fault, said loudly; what is no fault of it is raised."""
        if self._registry.state(adapter.name) is AdapterState.REFUSED:
            return False
        try:
            await self._bring_up(adapter)
        except AdapterRefused:
            return False
        return True

    async def _restore(self, agent: str) -> None:
        acting = self._registry.acting(agent)
        if acting is None:
            return
        if await self._comes_up(acting):
            await self.write(self._registry.record, acting, AdapterState.ACTING, "the engine started")
        else:
            await self._roll_back(agent, f"{acting.name} cannot be served any more")

    async def _roll_back(self, agent: str, reason: str, key: str = "", past: Collection[str] = ()) -> Adapter | None:
        acting, *behind = self._registry.rollback_chain(agent)
        for num_back, target in enumerate(behind, start=1):
            if target is not None and target.name in past:
                continue
            if target is None or (target != acting and await self._comes_up(target)):
                _log.warning("rolled back to %s: %s", "the base network" if target is None else target.name, reason)
                return await self.write(self._registry.rollback, reason, num_back, key, agent)
        raise SwapError("the base network acts; there is nothing to roll back to")

    async def write(self, change: Callable[P, T], *values: P.args, **more: P.kwargs) -> T:
        """Let the registry write, beside the event loop: running streams must not wait for the disk, nor for another
        process that writes. Where whoever asked goes away, the write still ends before the next change begins."""
        return await to_its_end(asyncio.to_thread(change, *values, **more))

    async def _require_slot(self) -> None:
        limit = self._engine.limits.max_adapters
        if len(self._engine.loaded_adapters()) >= limit:
            await self._sweep()
        if len(self._engine.loaded_adapters()) >= limit:
            await self._displace_reward()
        if len(self._engine.loaded_adapters()) >= limit:
            await self._displace()
        if len(self._engine.loaded_adapters()) >= limit:
            loaded = [adapter.name for adapter in self._acting_kind()]
            holders = [f"{name} ({self._registry.state(name)}, {self.num_leases(name)} episodes)" for name in loaded]
            holders += [each.name for each in self._engine.loaded_adapters() if each.is_reward]
            raise NoSlot(f"all {limit} slots of the engine are taken: {', '.join(holders)}")

    async def _displace(self) -> None:
        """Unload the draining adapter that was idle longest, if one is: its episodes wait for their users, and one
        that comes back finds it loaded again. Else conversations left open would keep every new version out.

        Where none drains, the verified one that was idle longest: else what nobody promotes or refuses would."""
        idle_since: dict[Adapter, tuple[bool, float]] = {}
        for adapter in self._acting_kind():
            since, state = self._leases.idle_since(adapter.name), self._registry.state(adapter.name)
            if since is not None and (state not in WANTED or state is AdapterState.VERIFIED):
                idle_since[adapter] = state is AdapterState.VERIFIED, since
        if idle_since:
            longest = min(idle_since, key=idle_since.__getitem__)
            await self._unload_if_possible(longest, "its slot was needed and its episodes were idle")

    async def _displace_reward(self) -> None:
        """Unload a reward model: it only helps to choose, and comes again when there is a slot."""
        for reward in [each for each in self._engine.loaded_adapters() if each.is_reward]:
            with suppress(EngineError):  # something is being scored by it just now
                await self._engine.unload_adapter(reward)

    def _acting_kind(self) -> list[Adapter]:
        """What lies in the engine to act, or to be tried: no reward models."""
        return [adapter for adapter in self._engine.loaded_adapters() if not adapter.is_reward]

    def require_acting(self, name: str | None, agent: str = "") -> None:
        """Raises SwapError where another adapter acts for an agent; None: whichever does."""
        now = self._registry.acting(agent)
        acting = BASE_ADAPTER if now is None else now.name
        if name not in (None, acting):
            raise SwapError(f"{name} does not act any more: {acting} does")

    def _require_not_refused(self, adapter: Adapter) -> None:
        last = self._registry.last_event(adapter.name)
        if last.state is AdapterState.REFUSED:
            raise SwapError(f"{adapter.name} was refused: {last.reason}")

    def _end_canary(self, name: str) -> None:
        self._canaries = {agent: canary for agent, canary in self._canaries.items() if canary[0] != name}

    async def _forget_the_last_engine(self) -> None:
        assert not self._engine.loaded_adapters(), "the engine has not just started"
        self._served.clear()
        self._canaries.clear()
        in_engine = self._registry.damage.sound(
            self._registry.adapters(), lambda adapter: (adapter, self._registry.state(adapter.name) in IN_ENGINE)
        )
        for adapter in [adapter for adapter, was_in_engine in in_engine if was_in_engine]:
            await self.write(self._registry.record, adapter, AdapterState.UNLOADED, "its engine has ended")
