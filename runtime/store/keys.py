"""API keys: who may ask this server, and what for. Made, rotated and revoked as rows; nothing is edited.

A key is 256 bits of chance, and only its SHA-256 is kept. A slow hash (scrypt, argon2) was refused: it makes guessing
a short secret expensive, nobody guesses 256 bits, and it would cost every request a tenth of a second. A key is looked
up by its hash, so that the time of the look-up tells nothing of the key.

A key's name is never given again: it stands as the owner on episodes, and as the speaker on outcomes and promotions.
A key may be limited to some of the server's agents. An admin key may not: it sees and changes what belongs to all.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlite_utils import Database, Migrations

from runtime.store.adapter_registry import UNNAMED
from runtime.store.damage import Damaged, DamageNotes, Query, Row, problems_in, record_of, text_or_bytes
from runtime.store.episodes import Role
from runtime.store.transaction import make_append_only, write_transaction

LOCK_TIMEOUT_S = 5.0
KEY_NAME = r"[A-Za-z0-9_.-]{1,64}"


@dataclass(frozen=True, slots=True)
class Quota:
    """What a key may use up in a day (UTC); None: no bound."""

    requests: int | None = None
    steps: int | None = None
    tokens: int | None = None
    """Of prompts and completions together."""


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it stands now, without its secret."""

    name: str
    """Empty: nobody is asked for a key, and everybody is this one."""
    role: Role
    quota: Quota = Quota()
    agents: tuple[str, ...] = ()
    """The agents that it may speak to and teach, the server's own as UNNAMED; empty: all."""
    is_revoked: bool = False
    created_at: float = 0.0
    """Unix seconds; of its first making."""
    changed_at: float = 0.0

    def may(self, needed: Role) -> bool:
        return self.role.may(needed)

    def may_use(self, agent: str) -> bool:
        """Whether it may speak to an agent, and teach it; empty: the server's own."""
        return not self.agents or (agent or UNNAMED) in self.agents

    @property
    def sees_only(self) -> str | None:
        """The owner whose episodes it may see; None: all."""
        return None if self.role is Role.ADMIN else self.name

    def sees(self, owner: str) -> bool:
        """Whether it may see what belongs to this owner."""
        return self.role is Role.ADMIN or owner == self.name


ANYBODY = Key("", Role.ADMIN)
"""Who asks a server that asks for no key: as a server without keys has always answered."""

OPERATOR, LEARNER = "operator", "learner"
"""Names of the key that a server is started with, and of the one it makes for its own learner at each start."""


class KeyProblem(ValueError):
    """A change of keys that is not possible, and why."""


migrations = Migrations("keys")


@migrations()
def create_tables(db: Database) -> None:
    db.execute(
        "CREATE TABLE key_events (id INTEGER PRIMARY KEY, name TEXT NOT NULL, event TEXT NOT NULL, role TEXT NOT NULL, "
        "digest TEXT NOT NULL, requests INTEGER, steps INTEGER, tokens INTEGER, key TEXT NOT NULL, "
        "created_at REAL NOT NULL) STRICT"
    )
    db.execute("CREATE INDEX key_events_by_name ON key_events(name, id)")
    make_append_only(db, "key_events")


@migrations()
def limit_to_agents(db: Database) -> None:
    db.execute("ALTER TABLE key_events ADD COLUMN agents TEXT")  # a JSON list of names; null: all


def digest_of(secret: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def new_secret() -> str:
    """A key that nobody guesses; `sa_` tells a scanner for leaked secrets what it is."""
    return f"sa_{secrets.token_urlsafe(32)}"


_QUOTA = ("requests", "steps", "tokens")


@record_of(
    "key_events",
    {"name": str, "event": str, "role": str, "digest": str, "created_at": float, "agents": str}
    | dict.fromkeys(_QUOTA, int),
    may_be_null=(*_QUOTA, "agents"),
)
def _key_from_row(row: Row) -> Key:
    if row["event"] not in ("made", "rotated", "revoked"):
        raise ValueError(f"{row['event']!r} is nothing that happens to a key")
    is_revoked, agents = row["event"] == "revoked", _agents_of(row)
    return Key(row["name"], Role(row["role"]), _quota_of(row), agents, is_revoked, row["created_at"])


def key_problems(query: Query) -> Iterator[str]:
    """What is wrong with the keys' rows, in sentences."""
    yield from problems_in(query, "key_events", _key_from_row)


class KeyStore:
    """The store. Constructing migrates. May be used from any thread, and beside a running server."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self.db = Database(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, check_same_thread=False))
        self.db.enable_wal()
        self.db.execute("PRAGMA synchronous=FULL")
        migrations.apply(self.db)
        self._reading = threading.Lock()
        self._reader = Database(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, check_same_thread=False))
        self._reader.conn.text_factory = text_or_bytes
        self.damage = DamageNotes()
        """What could not be read."""

    def close(self) -> None:
        self._reader.close()
        self.db.close()

    # ---------------------------------------------------------------------------------------------- write

    def make(self, name: str, role: Role, quota: Quota = Quota(), by: str = "", agents: Sequence[str] = ()) -> str:
        """A new key, for these agents or for all; returns its secret, told this once. Raises KeyProblem for a name that
        was given before, and for agents that cannot be."""
        if not re.fullmatch(KEY_NAME, name):
            raise KeyProblem(f"a key's name is letters, digits, '_', '.', '-', at most 64 of them, not {name!r}")
        if name in (OPERATOR, LEARNER):
            raise KeyProblem(f"{name!r} is the name of the server's own key; choose another")
        if agents and role is Role.ADMIN:
            raise KeyProblem("an admin key is for all agents: choose another role, or leave the agents out")
        if wrong := [agent for agent in agents if not re.fullmatch(KEY_NAME, agent)]:
            raise KeyProblem(f"{wrong[0]!r} is no name of an agent: letters, digits, '_', '.', '-'")
        secret = new_secret()
        with self._lock, write_transaction(self.db):
            if self._newest(name) is not None:
                raise KeyProblem(f"a key named {name!r} was made before; a name is never given again, choose another")
            limit = json.dumps(sorted(set(agents))) if agents else None
            self._insert(name, "made", role, digest_of(secret), quota, by, limit)
        return secret

    def rotate(self, name: str, by: str = "") -> str:
        """Another secret for the same name; the old one is refused from now on. Raises KeyProblem."""
        secret = new_secret()
        with self._lock, write_transaction(self.db):
            row = self._living(name)
            self._insert(name, "rotated", Role(row["role"]), digest_of(secret), _quota_of(row), by, row["agents"])
        return secret

    def revoke(self, name: str, by: str = "") -> None:
        """Refuse a key from now on, for ever. Raises KeyProblem."""
        with self._lock, write_transaction(self.db):
            row = self._living(name)
            self._insert(name, "revoked", Role(row["role"]), "", _quota_of(row), by, row["agents"])

    # ----------------------------------------------------------------------------------------------- read

    def all_keys(self) -> list[Key]:
        """All that were ever made, oldest first."""
        return [key for key, _ in self.with_digests()]

    def with_digests(self) -> list[tuple[Key, str]]:
        """The same, each with the hash of its secret; an empty one where it is revoked."""
        with self._reading:  # not the lock of those who write, and who may wait for another process
            rows = list(self._reader.query("SELECT * FROM key_events ORDER BY id"))
        found: dict[str, tuple[Key, str]] = {}
        for row in rows:
            try:
                key = _key_from_row(row)
            except Damaged as damaged:
                self.damage.note(damaged)
                if row["name"] in found:  # it may have been revoked there: to refuse it is the safe side
                    found[row["name"]] = replace(found[row["name"]][0], is_revoked=True), ""
                continue
            made = found[key.name][0].created_at if key.name in found else key.created_at
            found[key.name] = replace(key, created_at=made, changed_at=key.created_at), row["digest"]
        return list(found.values())

    def num_events(self) -> int:
        """Grows with every change: a few microseconds to ask."""
        with self._reading:
            return self._reader.execute("SELECT coalesce(max(id), 0) FROM key_events").fetchone()[0]

    def _newest(self, name: str) -> dict[str, Any] | None:
        rows = self.db.query("SELECT * FROM key_events WHERE name = ? ORDER BY id DESC LIMIT 1", [name])
        return next(iter(rows), None)

    def _living(self, name: str) -> dict[str, Any]:
        row = self._newest(name)
        if row is None:
            raise KeyProblem(f"there is no key named {name!r}; `list` shows those there are")
        if row["event"] == "revoked":
            raise KeyProblem(f"the key {name!r} is revoked, for ever: make another under a new name")
        return row

    def _insert(
        self, name: str, event: str, role: Role, digest: str, quota: Quota, by: str, agents: str | None
    ) -> None:
        used_up = (quota.requests, quota.steps, quota.tokens)
        self.db.execute(
            "INSERT INTO key_events (name, event, role, digest, requests, steps, tokens, key, created_at, agents) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [name, event, role.value, digest, *used_up, by, time.time(), agents],
        )


def _quota_of(row: Row) -> Quota:
    return Quota(row["requests"], row["steps"], row["tokens"])


def _agents_of(row: Row) -> tuple[str, ...]:
    """Raises ValueError for what is no list of names: a key is never read as one for all agents by mistake."""
    if row["agents"] is None:
        return ()
    agents = json.loads(row["agents"])
    if not isinstance(agents, list) or not agents or not all(isinstance(agent, str) for agent in agents):
        raise ValueError("agents is no list of names")
    return tuple(agents)


def has_keys(path: Path) -> bool:
    """Whether keys were ever made for the server of this database. Opens nothing that is not there."""
    if not path.is_file():
        return False
    try:
        connection = sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True, timeout=LOCK_TIMEOUT_S)
        try:
            return connection.execute("SELECT EXISTS (SELECT 1 FROM key_events)").fetchone()[0] == 1
        finally:
            connection.close()
    except sqlite3.Error:  # no such table, or no database
        return False


@dataclass(slots=True)
class KeyRing:
    """The keys that a running server knows: those of the store, and those it was started with.

    A server asks for keys from the moment the first one was made, and does so for ever: revoking the last key opens
    nothing.
    """

    store: KeyStore | None = None
    operator_secret: str | None = None
    """The key that the server was started with: it may do everything."""
    learner_secret: str = field(default_factory=new_secret)
    """For the server's own learner: new at each start, and written nowhere."""
    _by_digest: dict[str, Key] = field(init=False, default_factory=dict)
    _num_events: int = field(init=False, default=-1)
    _asks: bool = field(init=False, default=False)

    @property
    def asks(self) -> bool:
        """Whether a request needs a key."""
        self._refresh()
        return self._asks

    def key_of(self, secret: str | None) -> Key | None:
        """Whose key it is; None: nobody's, or a revoked one. ANYBODY, where no key is asked for and none is known."""
        self._refresh()
        known = self._by_digest.get(digest_of(secret)) if secret else None
        return known if known is not None or self._asks else ANYBODY

    def admins(self) -> set[str]:
        """Names of the keys that may make others. The learner's own is nobody's to use."""
        self._refresh()
        return {key.name for key in self._by_digest.values() if key.role is Role.ADMIN} - {LEARNER}

    def _refresh(self) -> None:
        """Take in what was changed since, perhaps by another process."""
        num_events = self.store.num_events() if self.store else 0
        if num_events == self._num_events:
            return
        stored = self.store.with_digests() if self.store else []
        self._by_digest = dict(self._own_keys())
        self._by_digest |= {digest: key for key, digest in stored if not key.is_revoked}
        self._asks = self.operator_secret is not None or bool(stored)
        self._num_events = num_events

    def _own_keys(self) -> Iterable[tuple[str, Key]]:
        yield digest_of(self.learner_secret), Key(LEARNER, Role.ADMIN)
        if self.operator_secret is not None:
            yield digest_of(self.operator_secret), Key(OPERATOR, Role.ADMIN)
