"""Random histories of swaps, episodes and crashes, held against a model of what was promised."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import AbstractAsyncContextManager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from policies.adapters.files import WEIGHTS_FILE, AdapterRefused
from policies.adapters.probe import PROBE_FILE
from runtime.adapters.swap import Swap, SwapError
from runtime.store.adapter_registry import TRANSITIONS, AdapterRegistry, AdapterState, RegistryError
from tests.scripted_engine import LIMITS, ScriptedEngine
from tests.tiny_adapters import TinyNetwork, faithful_script

LEASE_IDLE_S = 100.0
NUM_SOUND, NUM_BROKEN = 5, 2

episodes = st.sampled_from([f"ep_{index}" for index in range(8)])


class Crash(BaseException):
    """The process ends here."""


class MortalRegistry(AdapterRegistry):
    """Lets its process die before the write after the next `writes_left`, and before every later one."""

    writes_left: int | None = None

    def _insert_event(self, name: str, state: AdapterState, reason: str, key: str) -> None:
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Crash
            self.writes_left -= 1
        super()._insert_event(name, state, reason, key)


def machine_on(folders: list[Path], tiny: TinyNetwork) -> type[RuleBasedStateMachine]:
    """The last NUM_BROKEN of `folders` are of adapters that must be refused."""

    class Histories(RuleBasedStateMachine):
        @initialize()
        def start(self) -> None:
            self.loop = asyncio.new_event_loop()
            self.folder = Path(tempfile.mkdtemp())
            self.now = 0.0
            self.line: list[str] = ["base"]
            """The acting one is the last; what rollbacks would reach stands before it."""
            self.began_with: dict[str, str] = {}
            self.running: dict[str, AbstractAsyncContextManager[Any]] = {}
            self.broken: set[str] = set()
            self.start_process()
            for which in range(len(folders)):
                self.register(which)

        def start_process(self) -> None:
            self.registry = MortalRegistry(self.folder / "agent.db")
            self.engine = ScriptedEngine(faithful_script(self.registry))
            self.swap = Swap(
                self.engine, self.registry, tiny.network, LEASE_IDLE_S, slot_wait_s=0.0, clock=lambda: self.now
            )

        def teardown(self) -> None:
            if hasattr(self, "loop"):
                self.end_all_steps()
                self.loop.run_until_complete(self.loop.shutdown_default_executor())
                self.loop.close()
                self.registry.close()
                shutil.rmtree(self.folder)

        def do(self, change: Any) -> bool:
            """Whether the change was made; a change may be refused, never fail in another way."""
            try:
                self.loop.run_until_complete(change)
            except (AdapterRefused, RegistryError, SwapError):
                return False
            return True

        def some_adapter(self, data: st.DataObject) -> str:
            """One of the last few: refused ones are registered again, so that histories do not run dry."""
            return data.draw(st.sampled_from([adapter.name for adapter in self.registry.adapters()[-len(folders) :]]))

        def end_all_steps(self) -> None:
            for step in self.running.values():
                self.loop.run_until_complete(step.__aexit__(None, None, None))
            self.running.clear()

        # --------------------------------------------------------------------------------------- changes

        @rule(which=st.integers(0, len(folders) - 1))
        def register(self, which: int) -> None:
            adapter = self.registry.register(folders[which])
            if which >= NUM_SOUND:
                self.broken.add(adapter.name)

        @rule(data=st.data())
        def bring_up(self, data: st.DataObject) -> None:
            name = self.some_adapter(data)
            if self.do(self.swap.bring_up(name)):
                assert name not in self.broken

        @rule(data=st.data())
        def promote(self, data: st.DataObject) -> None:
            name = self.some_adapter(data)
            if self.do(self.swap.promote(name)):
                self.line.append(name)

        @rule(data=st.data(), episode=episodes)
        def promote_and_step(self, data: st.DataObject, episode: str) -> None:
            """What happens most often, and what the other rules are interesting after."""
            self.promote(data)
            self.begin_step(episode)

        @rule(data=st.data(), share=st.sampled_from([0.3, 1.0]))
        def start_canary(self, data: st.DataObject, share: float) -> None:
            self.do(self.swap.start_canary(self.some_adapter(data), share))

        @rule(data=st.data())
        def refuse(self, data: st.DataObject) -> None:
            name = self.some_adapter(data)
            if self.do(self.swap.refuse(name, "the gate")):
                assert name != self.line[-1]

        @precondition(lambda self: len(self.line) > 1)
        @rule()
        def rollback(self) -> None:
            if self.do(self.swap.rollback("worse")):
                acting = self.registry.acting()
                taken_back = self.line.pop()
                while self.line[-1] != (acting.name if acting else "base"):
                    skipped = self.line.pop()
                    assert self.registry.state(skipped) is AdapterState.REFUSED or skipped == taken_back

        @rule()
        def drain(self) -> None:
            self.loop.run_until_complete(self.swap.drain())

        # -------------------------------------------------------------------------------------- episodes

        @rule(episode=episodes)
        def begin_step(self, episode: str) -> None:
            if episode in self.running:
                return
            logged = self.began_with.get(episode)
            step = self.swap.lease(episode, began_with=logged)
            try:
                adapter = self.loop.run_until_complete(step.__aenter__())
            except SwapError:
                assert logged is not None, "a new episode is always served"
                return
            name = adapter.name if adapter else "base"
            self.running[episode] = step
            assert self.began_with.setdefault(episode, name) == name, "an episode never changes its adapter"

        @rule(episode=episodes)
        def end_step(self, episode: str) -> None:
            if step := self.running.pop(episode, None):
                self.loop.run_until_complete(step.__aexit__(None, None, None))

        @rule(episode=episodes)
        def finish(self, episode: str) -> None:
            self.swap.finish(episode)

        @rule(seconds=st.sampled_from([1.0, LEASE_IDLE_S + 1]))
        def wait(self, seconds: float) -> None:
            self.now += seconds

        @rule(data=st.data(), where=st.sampled_from(["at rest", "promoting", "restoring"]), after=st.integers(0, 5))
        def crash_and_restart(self, data: st.DataObject, where: str, after: int) -> None:
            if where == "restoring":
                self.crash()
            self.registry.writes_left = after
            with suppress(Crash):
                if where == "promoting":
                    self.promote(data)
                if where == "restoring":
                    self.loop.run_until_complete(self.swap.restore())
            self.crash()
            self.loop.run_until_complete(self.swap.restore())

        def crash(self) -> None:
            with suppress(Crash):
                self.end_all_steps()  # their streams break off with the process
            self.registry.close()
            self.start_process()

        # ------------------------------------------------------------------------------------- invariants

        @invariant()
        def acting_is_what_was_promoted(self) -> None:
            if not hasattr(self, "line"):
                return
            names = [adapter.name if adapter else "base" for adapter in self.registry.rollback_chain()]
            assert names == self.line[::-1]
            acting = self.registry.acting()
            if acting:
                assert acting in self.engine.loaded_adapters()
                assert self.registry.state(acting.name) is AdapterState.ACTING
                assert acting.name not in self.broken

        @invariant()
        def slots_are_never_exceeded(self) -> None:
            if hasattr(self, "engine"):
                assert len(self.engine.loaded_adapters()) <= LIMITS.max_adapters

        @invariant()
        def running_steps_keep_their_adapters_loaded(self) -> None:
            if hasattr(self, "engine"):
                loaded = {adapter.name for adapter in self.engine.loaded_adapters()} | {"base"}
                assert {self.began_with[episode] for episode in self.running} <= loaded

        @invariant()
        def every_history_follows_the_table(self) -> None:
            for adapter in self.registry.adapters() if hasattr(self, "registry") else ():
                states = [event.state for event in self.registry.events(adapter.name)]
                assert states[0] is AdapterState.REGISTERED
                assert all(after in TRANSITIONS[before] for before, after in pairwise(states))
                is_loaded = adapter in self.engine.loaded_adapters()
                assert is_loaded or states[-1] not in (
                    AdapterState.VERIFIED,
                    AdapterState.CANARY,
                    AdapterState.DRAINING,
                )

    return Histories


def test_no_history_breaks_a_promise(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny = TinyNetwork(folder)
    folders = [tiny.adapter(seed) for seed in range(NUM_SOUND)]
    cut = tiny.copy(90, folder / "cut")
    (cut / WEIGHTS_FILE).write_bytes((cut / WEIGHTS_FILE).read_bytes()[:-100])
    unproved = tiny.copy(91, folder / "unproved")
    (unproved / PROBE_FILE).unlink()
    run_state_machine_as_test(
        machine_on([*folders, cut, unproved], tiny),
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
