"""The adapters that were ever registered, what became of each, and the pointer to the one that acts.

Three tables in the state folder's `agent.db`, appended to and never edited. One writer: the runtime. The registry
keeps its own copy of each adapter's folder, so that what is served cannot be changed by whoever made it; adopting
the maker's folder was refused for that reason. The acting pointer's history is a chain: each change names the change
it would roll back to, so rolling back twice goes two adapters down and never to and fro.

An adapter belongs to one agent, for ever, and each agent has an acting pointer of its own; the agent without a name is
the server's own. Versions are counted through all agents: they are the engine's ids.

Not covered: two processes that write one registry at the same time.
"""

from __future__ import annotations

import filecmp
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations

from policies.adapters.files import ADAPTER_FILES, CONFIG_FILE, AdapterRefused, adapter_rank, weights_digest
from policies.adapters.probe import PROBE_FILE
from policies.adapters.reward import REWARD_FILE, REWARD_FOLDER
from policies.types import Adapter
from runtime.store.damage import (
    Damaged,
    DamageNotes,
    Query,
    Row,
    damaged_file,
    is_damage,
    problems_in,
    record_of,
    text_or_bytes,
)
from runtime.store.transaction import make_append_only, write_transaction


class AdapterState(StrEnum):
    """What has become of an adapter."""

    REGISTERED = "registered"  # it has a version and a folder; nobody has judged it
    VALIDATED = "validated"  # its files are sound and fit the base network and the engine
    LOADED = "loaded"  # it lies in the engine; nothing is served by it
    VERIFIED = "verified"  # the engine says what the trainer said; it can be pinned and promoted
    CANARY = "canary"  # it serves a share of the new episodes
    ACTING = "acting"  # it serves the new episodes
    DRAINING = "draining"  # it serves only the episodes that began with it
    UNLOADED = "unloaded"  # it lies in no engine; it can be brought up again
    REFUSED = "refused"  # it was judged unfit, for ever; its event says why


_S = AdapterState
TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    _S.REGISTERED: frozenset({_S.VALIDATED, _S.REFUSED}),
    _S.VALIDATED: frozenset({_S.VALIDATED, _S.LOADED, _S.REFUSED}),  # again: it was not loaded after the first time
    _S.LOADED: frozenset({_S.VERIFIED, _S.UNLOADED, _S.REFUSED}),
    _S.VERIFIED: frozenset({_S.CANARY, _S.ACTING, _S.DRAINING, _S.UNLOADED, _S.REFUSED}),
    _S.CANARY: frozenset({_S.ACTING, _S.DRAINING, _S.UNLOADED, _S.REFUSED}),
    _S.ACTING: frozenset({_S.DRAINING, _S.UNLOADED}),  # unloaded: its engine has ended
    _S.DRAINING: frozenset({_S.ACTING, _S.UNLOADED}),
    _S.UNLOADED: frozenset({_S.VALIDATED, _S.REFUSED}),  # refused: its files have gone bad since
    _S.REFUSED: frozenset(),
}


class RegistryError(Exception):
    """The registry was asked for something that does not exist or is not allowed, and why."""


class UnknownAdapter(RegistryError):
    """No adapter has this name."""


class ForeignAdapter(RegistryError):
    """The adapter belongs to another agent."""


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One change of an adapter's state."""

    adapter: str
    state: AdapterState
    reason: str
    created_at: float
    """Unix seconds."""
    key: str = ""
    """Name of the key that asked for it; empty: the server itself, or somebody who was asked for none."""


LOCK_TIMEOUT_S = 5.0
"""How long a write waits for another process that writes to the file."""


class ProposalEvent(StrEnum):
    """What became of a candidate that needs somebody's yes."""

    PROPOSED = "proposed"  # it passed the gate and waits
    APPROVED = "approved"  # somebody let it act
    DECLINED = "declined"  # somebody refused it
    EXPIRED = "expired"  # nobody said anything for too long


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate that waits for somebody's yes."""

    adapter: str
    reason: str
    expected_acting: str | None
    """What it was found to be better than."""
    key: str
    created_at: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """The watch over live adapters was paused, or goes on."""

    is_paused: bool
    reason: str = ""
    key: str = ""
    created_at: float = 0.0
    """Unix seconds; 0: it was never paused."""


MODEL_CARD = "README.md"

UNNAMED = "agent"
"""What adapters of the server's own agent are called by: `agent-v0001`."""
REWARD_VERSIONS = 1_000_000_000
"""Above the versions of adapters: an engine's ids must not meet."""

INCOMING = ".incoming-"
"""Begins the name of a folder that is being copied in and is no adapter yet."""

migrations = Migrations("adapter_registry")


@migrations()
def create_tables(db: Database) -> None:
    db.execute(
        "CREATE TABLE adapters (version INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, rank INTEGER NOT NULL, "
        "parent TEXT REFERENCES adapters(name), digest TEXT NOT NULL, created_at REAL NOT NULL)"
    )
    db.execute(
        "CREATE TABLE adapter_events (id INTEGER PRIMARY KEY, adapter TEXT NOT NULL REFERENCES adapters(name), "
        "state TEXT NOT NULL, reason TEXT NOT NULL, created_at REAL NOT NULL)"
    )
    db.execute("CREATE INDEX adapter_events_by_adapter ON adapter_events(adapter, id)")
    db.execute(
        "CREATE TABLE acting (id INTEGER PRIMARY KEY, adapter TEXT REFERENCES adapters(name), "
        "behind INTEGER REFERENCES acting(id), reason TEXT NOT NULL, created_at REAL NOT NULL)"
    )
    make_append_only(db, "adapters", "adapter_events", "acting")


@migrations()
def name_the_cycle(db: Database) -> None:
    db.execute("ALTER TABLE adapters ADD COLUMN cycle TEXT")


@migrations()
def say_who(db: Database) -> None:
    """Who asked for each change."""
    for table in ("adapter_events", "acting"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN key TEXT NOT NULL DEFAULT ''")


@migrations()
def pause_the_watch(db: Database) -> None:
    """Whether live evidence may change what acts."""
    db.execute(
        "CREATE TABLE watch_events (id INTEGER PRIMARY KEY, is_paused INTEGER NOT NULL, reason TEXT NOT NULL, "
        "key TEXT NOT NULL, created_at REAL NOT NULL) STRICT"
    )
    make_append_only(db, "watch_events")


@migrations()
def ask_before_promoting(db: Database) -> None:
    """Candidates that wait for somebody's yes, and what became of them."""
    db.execute(
        "CREATE TABLE proposal_events (id INTEGER PRIMARY KEY, adapter TEXT NOT NULL REFERENCES adapters(name), "
        "event TEXT NOT NULL, reason TEXT NOT NULL, expected_acting TEXT, key TEXT NOT NULL, "
        "created_at REAL NOT NULL) STRICT"
    )
    db.execute("CREATE INDEX proposal_events_by_adapter ON proposal_events(adapter, id)")
    make_append_only(db, "proposal_events")


@migrations()
def keep_reward_models(db: Database) -> None:
    """The reward models beside adapters; the newest of an adapter is used."""
    db.execute(
        "CREATE TABLE reward_models (id INTEGER PRIMARY KEY, adapter TEXT NOT NULL REFERENCES adapters(name), "
        "number INTEGER NOT NULL, rank INTEGER NOT NULL, digest TEXT NOT NULL, cycle TEXT, key TEXT NOT NULL, "
        "created_at REAL NOT NULL, UNIQUE (adapter, number)) STRICT"
    )
    make_append_only(db, "reward_models")


@migrations()
def say_whose(db: Database) -> None:
    """The agent of each adapter and of each acting pointer; without a name, the server's own."""
    for table in ("adapters", "acting", "watch_events"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN agent TEXT NOT NULL DEFAULT ''")
    db.execute("CREATE INDEX acting_by_agent ON acting(agent, id)")


_WAITING = """
SELECT * FROM proposal_events AS said
WHERE event = 'proposed' AND id = (SELECT max(id) FROM proposal_events WHERE adapter = said.adapter)
  AND NOT EXISTS (SELECT 1 FROM adapter_events WHERE adapter_events.adapter = said.adapter
                  AND state IN ('acting', 'canary', 'refused') AND adapter_events.created_at >= said.created_at)
ORDER BY id"""


def in_words(agent: str) -> str:
    """An agent, in a sentence."""
    return f"the agent {agent!r}" if agent else "the server's own agent"


# ---------------------------------------------------------------------------------------------------- rows


@record_of(
    "adapters",
    {
        "version": int,
        "name": str,
        "rank": int,
        "parent": str,
        "digest": str,
        "created_at": float,
        "cycle": str,
        "agent": str,
    },
    may_be_null={"parent", "cycle"},
    key="name",
)
def _adapter_from_row(row: Row, folder: Path) -> Adapter:
    path = folder / row["name"]
    return Adapter(row["name"], row["version"], path, row["rank"], row["parent"], row["digest"], agent=row["agent"])


@record_of("adapter_events", {"adapter": str, "state": str, "reason": str, "created_at": float, "key": str})
def _event_from_row(row: Row) -> AdapterEvent:
    return AdapterEvent(row["adapter"], AdapterState(row["state"]), row["reason"], row["created_at"], row["key"])


@record_of("acting", {"adapter": str, "behind": int, "created_at": float}, may_be_null={"adapter", "behind"})
def _acting_from_row(row: Row) -> dict[str, Any]:
    return dict(row)


@record_of(
    "proposal_events",
    {"adapter": str, "event": str, "reason": str, "expected_acting": str, "key": str, "created_at": float},
    may_be_null={"expected_acting"},
)
def _proposal_from_row(row: Row) -> Proposal:
    ProposalEvent(row["event"])
    return Proposal(row["adapter"], row["reason"], row["expected_acting"], row["key"], row["created_at"])


@record_of("watch_events", {"is_paused": int, "reason": str, "key": str, "created_at": float})
def _watch_from_row(row: Row) -> WatchEvent:
    return WatchEvent(bool(row["is_paused"]), row["reason"], row["key"], row["created_at"])


@record_of(
    "reward_models",
    {
        "id": int, "adapter": str, "number": int, "rank": int, "digest": str, "cycle": str, "key": str,
        "created_at": float,
    },
    may_be_null={"cycle"},
)  # fmt: skip
def _reward_from_row(row: Row, adapter: Path) -> Adapter:
    """`adapter` is the folder of the adapter that it lies beside."""
    name, path = f"{row['adapter']}-reward{row['number']}", adapter / _reward_folder(row["number"])
    version = REWARD_VERSIONS + row["id"]
    return Adapter(name, version, path, row["rank"], row["adapter"], row["digest"], is_reward=True)


def registry_problems(query: Query) -> Iterator[str]:
    """What is wrong with the registry's rows, in sentences."""
    yield from problems_in(query, "adapters", lambda row: _adapter_from_row(row, Path()))
    yield from problems_in(query, "reward_models", lambda row: _reward_from_row(row, Path()))
    readers = {
        "adapter_events": _event_from_row,
        "acting": _acting_from_row,
        "proposal_events": _proposal_from_row,
        "watch_events": _watch_from_row,
    }
    for table, read in readers.items():
        yield from problems_in(query, table, read)


def weights_to_check(query: Query) -> Iterator[Adapter]:
    """The adapters that may serve again, with their folders' names as paths: what lies there must have their digest."""
    if not query("SELECT 1 FROM sqlite_schema WHERE name = 'adapters'"):
        return
    last_state = "(SELECT state FROM adapter_events WHERE adapter = adapters.name ORDER BY id DESC LIMIT 1)"
    for row in query(f"SELECT *, {last_state} AS state FROM adapters ORDER BY version"):
        if row["state"] != AdapterState.REFUSED.value:  # such a one never acts: its files may go
            with suppress(Damaged):
                yield _adapter_from_row(row, Path("adapters"))


class AdapterRegistry:
    """The store. Its folders lie beside the database file: `adapters/support-v0007`. May be used from any thread.

    A write takes as long as the disk does, and waits for other processes that write to the file; a read waits for
    neither.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path.parent / "adapters"
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_crash in self._folder.glob(f"{INCOMING}*"):
            shutil.rmtree(left_by_a_crash, ignore_errors=True)
        self._lock = threading.RLock()
        self.db = Database(sqlite3.connect(path, check_same_thread=False, timeout=LOCK_TIMEOUT_S))
        self.db.enable_wal()
        self.db.execute("PRAGMA synchronous=FULL")
        self.db.execute("PRAGMA secure_delete=ON")
        migrations.apply(self.db)
        self.damage = DamageNotes()
        """What could not be read."""
        self._reading = threading.Lock()
        self._path = path
        self._reader = sqlite3.connect(path, check_same_thread=False)
        self._reader.row_factory, self._reader.text_factory = sqlite3.Row, text_or_bytes

    def close(self) -> None:
        self._reader.close()
        self.db.close()

    # ---------------------------------------------------------------------------------------------- write

    def register(
        self,
        path: Path,
        parent: str | None = None,
        reason: str = "",
        cycle: str | None = None,
        key: str = "",
        agent: str = "",
    ) -> Adapter:
        """Copy a PEFT folder in under the next version's name. The folder itself may go afterwards.

        Registering the very same files again for the same agent gives the adapter they already are, so that a maker
        who did not hear the answer can ask again; files that were refused get a new version and a new judgement.
        Raises AdapterRefused, and records nothing, for a folder without readable weights and rank; all else is judged
        by validation and stays on record. Raises UnknownAdapter for an unknown parent, and ForeignAdapter for one of
        another agent, whose data it would bring along.
        """
        if parent is not None and (whose := self.adapter(parent).agent) != agent:
            raise ForeignAdapter(f"{parent} is an adapter of {in_words(whose)}: it is no parent for {in_words(agent)}")
        incoming = self._folder / f"{INCOMING}{secrets.token_hex(4)}"
        try:
            self._copy(path, incoming)
            rank, digest = adapter_rank(incoming), weights_digest(incoming)
            if not 1 <= rank < 2**31:
                raise AdapterRefused(f"its rank is {rank}, which no network has")
            with self._lock:
                known = self._known(incoming, digest, agent)
                return known or self._adopt(incoming, rank, digest, parent, reason, cycle, key, agent)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def record(self, adapter: Adapter | str, state: AdapterState, reason: str = "", key: str = "") -> None:
        """Append a change of state. Raises RegistryError where the transition table does not allow it.

        An adapter becomes acting here only if the pointer is on it already (its engine has started anew); else
        `promote` and `rollback` move the pointer and the state together.
        """
        name = adapter if isinstance(adapter, str) else adapter.name
        with self._lock:
            if state is AdapterState.ACTING and self.acting(self.adapter(name).agent) != self.adapter(name):
                raise RegistryError(f"{name} cannot become acting without being promoted")
            self._require_transition(name, state)
            with write_transaction(self.db):
                self._insert_event(name, state, reason, key)

    def promote(self, name: str, reason: str = "", key: str = "") -> None:
        """Let an adapter that is verified, or a canary, act for its agent; the one before it drains."""
        with self._lock:
            agent = self.adapter(name).agent
            current = self._acting_row(agent)
            self._flip(agent, name, current["id"] if current else None, reason, key)

    def rollback(self, reason: str, num_back: int = 1, key: str = "", agent: str = "") -> Adapter | None:
        """Let act again what acted for an agent `num_back` promotions before; None is the base network.

        Raises RegistryError where nothing is behind, or where what is behind does not lie verified in the engine.
        """
        with self._lock:
            chain = self._chain(agent)
            if not 1 <= num_back < len(chain):
                raise RegistryError(f"nothing to roll back to: {self._chain_in_words(agent)}")
            target = chain[num_back]
            self._flip(agent, target["adapter"], target["behind"], reason, key)
            return self.acting(agent)

    def add_reward(self, name: str, path: Path, cycle: str | None = None, key: str = "") -> Adapter:
        """Copy a reward model in beside an adapter: its newest from now on. The very same weights as the newest are the
        one that there is. Raises UnknownAdapter, and AdapterRefused for a folder without readable
        weights and rank."""
        adapter = self.adapter(name)
        if not path.is_dir():
            raise AdapterRefused(f"the reward model's folder {path} does not exist")
        incoming = self._folder / f"{INCOMING}{secrets.token_hex(4)}"
        try:
            self._copy_reward(path, incoming)
            rank, digest = adapter_rank(incoming), weights_digest(incoming)
            with self._lock:
                newest = self.reward_of(name)
                if newest is not None and newest.digest == digest:
                    return newest
                number = 1 + self._rows("SELECT count(*) AS num FROM reward_models WHERE adapter = ?", name)[0]["num"]
                folder = adapter.path / _reward_folder(number)
                shutil.rmtree(folder, ignore_errors=True)  # left by one that died before its row
                with write_transaction(self.db):
                    self._insert_reward(name, number, rank, digest, cycle, key)
                    incoming.rename(folder)
                reward = self.reward_of(name)
                assert reward is not None
                return reward
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def note_proposal(
        self, name: str, event: ProposalEvent, reason: str, expected_acting: str | None, key: str = ""
    ) -> None:
        """Append that an adapter waits for somebody's yes, or why it no longer does. Raises UnknownAdapter."""
        self.adapter(name)
        with self._lock, write_transaction(self.db):
            self.db.execute(
                "INSERT INTO proposal_events (adapter, event, reason, expected_acting, key, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                [name, event.value, reason, expected_acting, key, time.time()],
            )

    def record_watch(self, is_paused: bool, reason: str, key: str = "", agent: str = "") -> None:
        """Append that the watch over an agent's adapters pauses, or goes on."""
        with self._lock, write_transaction(self.db):
            self.db.execute(
                "INSERT INTO watch_events (is_paused, reason, key, created_at, agent) VALUES (?, ?, ?, ?, ?)",
                [int(is_paused), reason, key, time.time(), agent],
            )

    # ----------------------------------------------------------------------------------------------- read

    def proposals(self) -> list[Proposal]:
        """What waits for somebody's yes, oldest first."""
        return list(self.damage.sound(self._rows(_WAITING), _proposal_from_row))

    def proposal(self, name: str) -> Proposal | None:
        return next((proposal for proposal in self.proposals() if proposal.adapter == name), None)

    def watch(self, agent: str = "") -> WatchEvent:
        """Whether the watch over an agent's adapters is paused, and who said so. Where that can no longer be read, it
        is: the safe side."""
        for row in self._rows("SELECT * FROM watch_events WHERE agent = ? ORDER BY id DESC LIMIT 1", agent):
            try:
                return _watch_from_row(row)
            except Damaged as damaged:
                self.damage.note(damaged)
                return WatchEvent(True, str(damaged))
        return WatchEvent(False)

    def state_since(self, name: str, state: AdapterState) -> float:
        """When an adapter was last put into this state by a change; 0 for never. Unix seconds."""
        rows = self._rows(
            "SELECT created_at FROM adapter_events WHERE adapter = ? AND state = ? ORDER BY id DESC LIMIT 1",
            name,
            state.value,
        )
        return rows[0]["created_at"] if rows else 0.0

    def acting_since(self, agent: str = "") -> float:
        """When what acts for an agent was last promoted, or rolled back to; 0: nothing ever was. Unix seconds."""
        row = self._acting_row(agent)
        return row["created_at"] if row else 0.0

    def adapter(self, name: str) -> Adapter:
        """Raises UnknownAdapter."""
        rows = self._rows("SELECT * FROM adapters WHERE name = ?", name)
        if not rows:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        return self._adapter_from(rows[0])

    def adapters(self, damaged: list[Damaged] | None = None) -> tuple[Adapter, ...]:
        """All that were ever registered, oldest first; those whose rows are damaged are added to `damaged` instead."""
        rows = self._rows("SELECT * FROM adapters ORDER BY version")
        return tuple(self.damage.sound(rows, self._adapter_from, damaged))

    def reward_of(self, name: str) -> Adapter | None:
        """The newest reward model beside an adapter, as it was registered; None where there is none."""
        rows = self._rows("SELECT * FROM reward_models WHERE adapter = ? ORDER BY number DESC", name)
        return next(self.damage.sound(rows, lambda row: _reward_from_row(row, self._folder / name)), None)

    def cycle_of(self, name: str) -> str | None:
        """The learner's cycle that made an adapter; None where somebody else did."""
        return next((row["cycle"] for row in self._rows("SELECT cycle FROM adapters WHERE name = ?", name)), None)

    def state(self, name: str) -> AdapterState:
        """Raises UnknownAdapter."""
        return self.last_event(name).state

    def last_event(self, name: str) -> AdapterEvent:
        """What brought the adapter into its present state, and why. Raises UnknownAdapter, and Damaged."""
        return _event_from_row(self._event_rows(name, "ORDER BY id DESC LIMIT 1")[0])

    def events(self, name: str) -> tuple[AdapterEvent, ...]:
        """An adapter's changes of state, oldest first. Raises UnknownAdapter."""
        return tuple(self.damage.sound(self._event_rows(name, "ORDER BY id"), _event_from_row))

    def acting(self, agent: str = "") -> Adapter | None:
        """The adapter that serves an agent's new episodes; None is the base network. Raises Damaged: another would be
        served."""
        row = self._acting_row(agent)
        if row is None or row["adapter"] is None:
            return None
        try:
            return self.adapter(row["adapter"])
        except UnknownAdapter:
            raise Damaged("acting", row["id"], f"no adapter is called {row['adapter']!r}") from None

    def rollback_chain(self, agent: str = "") -> tuple[Adapter | None, ...]:
        """The acting one, then what rollbacks would reach, one by one; the last is always the base network, None."""
        names = [row["adapter"] for row in self._chain(agent)]
        return tuple(None if name is None else self.adapter(name) for name in names)

    # ----------------------------------------------------------------------------------------- inner rooms

    def _copy(self, path: Path, incoming: Path) -> None:
        """The adapter's own files and nothing else that may lie in its folder."""
        if not path.is_dir():
            raise AdapterRefused(f"the adapter folder {path} does not exist")
        incoming.mkdir()
        for name in (*ADAPTER_FILES, MODEL_CARD):
            if (path / name).is_file():
                shutil.copyfile(path / name, incoming / name)
        if (path / REWARD_FOLDER).is_dir():
            self._copy_reward(path / REWARD_FOLDER, incoming / REWARD_FOLDER)

    def _copy_reward(self, path: Path, incoming: Path) -> None:
        incoming.mkdir()
        for name in (*ADAPTER_FILES, REWARD_FILE):
            if (path / name).is_file():
                shutil.copyfile(path / name, incoming / name)

    def _known(self, incoming: Path, digest: str, agent: str) -> Adapter | None:
        query = "SELECT * FROM adapters WHERE digest = ? AND agent = ? ORDER BY version DESC"
        for row in self._rows(query, digest, agent):
            adapter = self._adapter_from(row)
            _, different, missing = filecmp.cmpfiles(incoming, adapter.path, (CONFIG_FILE, PROBE_FILE), shallow=False)
            if not different and not missing and self.state(adapter.name) is not AdapterState.REFUSED:
                return adapter
        return None

    def _adopt(
        self,
        incoming: Path,
        rank: int,
        digest: str,
        parent: str | None,
        reason: str,
        cycle: str | None,
        key: str,
        agent: str,
    ) -> Adapter:
        version = self._rows("SELECT 1 + coalesce(max(version), 0) AS next FROM adapters")[0]["next"]
        name = f"{agent or UNNAMED}-v{version:04d}"
        adapter = Adapter(name, version, self._folder / name, rank, parent, digest, agent=agent)
        reward = _reward_in(incoming)
        shutil.rmtree(adapter.path, ignore_errors=True)  # left by a registration that died before its row
        with write_transaction(self.db):
            self.db.execute(
                "INSERT INTO adapters (version, name, rank, parent, digest, created_at, cycle, agent) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [version, name, rank, parent, digest, time.time(), cycle, agent],
            )
            self._insert_event(name, AdapterState.REGISTERED, reason, key)
            if reward is not None:
                self._insert_reward(name, 1, *reward, cycle, key)
            incoming.rename(adapter.path)
        return adapter

    def _flip(self, agent: str, name: str | None, behind: int | None, reason: str, key: str) -> None:
        """Move an agent's acting pointer, with both changes of state, in one transaction."""
        before = self.acting(agent)
        if name is not None:
            self._require_transition(name, AdapterState.ACTING)
        with write_transaction(self.db):
            self.db.execute(
                "INSERT INTO acting (adapter, behind, reason, created_at, key, agent) VALUES (?, ?, ?, ?, ?, ?)",
                [name, behind, reason, time.time(), key, agent],
            )
            if before is not None and self.state(before.name) is AdapterState.ACTING:
                self._insert_event(before.name, AdapterState.DRAINING, reason, key)
            if name is not None:
                self._insert_event(name, AdapterState.ACTING, reason, key)

    def _require_transition(self, name: str, state: AdapterState) -> None:
        now = self.state(name)
        if state not in TRANSITIONS[now]:
            raise RegistryError(f"{name} is {now} and cannot become {state}")

    def _insert_event(self, name: str, state: AdapterState, reason: str, key: str) -> None:
        self.db.execute(
            "INSERT INTO adapter_events (adapter, state, reason, created_at, key) VALUES (?, ?, ?, ?, ?)",
            [name, state.value, reason, time.time(), key],
        )

    def _insert_reward(self, name: str, number: int, rank: int, digest: str, cycle: str | None, key: str) -> None:
        self.db.execute(
            "INSERT INTO reward_models (adapter, number, rank, digest, cycle, key, created_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [name, number, rank, digest, cycle, key, time.time()],
        )

    def _event_rows(self, name: str, order: str) -> list[sqlite3.Row]:
        rows = self._rows(f"SELECT * FROM adapter_events WHERE adapter = ? {order}", name)
        if not rows:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        return rows

    def _acting_row(self, agent: str) -> dict[str, Any] | None:
        rows = self._rows("SELECT * FROM acting WHERE agent = ? ORDER BY id DESC LIMIT 1", agent)
        return _acting_from_row(rows[0]) if rows else None

    def _chain(self, agent: str) -> list[dict[str, Any]]:
        """The acting pointer's row and those behind it; ends with a row of the base network."""
        base = {"adapter": None, "behind": None}
        rows = {row["id"]: row for row in self.damage.sound(self._rows("SELECT * FROM acting"), _acting_from_row)}
        chain, row = [], self._acting_row(agent)
        while row is not None and row["adapter"] is not None:
            chain.append(row)
            row = rows.get(row["behind"])
        return [*chain, base]

    def _chain_in_words(self, agent: str) -> str:
        chain = self.rollback_chain(agent)
        return ", before it ".join("the base network" if one is None else one.name for one in chain)

    def _adapter_from(self, row: Row) -> Adapter:
        return _adapter_from_row(row, self._folder)

    def _rows(self, sql: str, *params: Any) -> list[sqlite3.Row]:
        """What is committed; within a write, too, for no write reads what it has written itself."""
        try:
            with self._reading:
                return self._reader.execute(sql, params).fetchall()
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                raise damaged_file(error, self._path) from error
            raise


def _reward_folder(number: int) -> str:
    """Within an adapter's folder: the one that came with it, and those that later cycles made of its own actions."""
    return REWARD_FOLDER if number == 1 else f"{REWARD_FOLDER}-{number:04d}"


def _reward_in(folder: Path) -> tuple[int, str] | None:
    """Rank and digest of the reward model in an adapter's folder. None where there is none that can be read: the
    adapter itself acts as well without it, and whoever wants to choose by it is told that there is none."""
    try:
        reward = folder / REWARD_FOLDER
        return (adapter_rank(reward), weights_digest(reward)) if reward.is_dir() else None
    except AdapterRefused:
        return None
