"""A bad byte costs its row and nothing else: every list goes on, `verify` names it, and the server starts or says why.

Every column of every table is damaged in turn, in each way that its type allows.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.data.collect import collect
from learner.options import CollectionOptions
from policies.chat.chat_protocol import ChatProtocol
from runtime.config import parse_settings
from runtime.store.damage import StepLogError
from runtime.store.episodes import Role
from runtime.store.keys import KeyRing, KeyStore
from runtime.store.learning_log import LearningReader
from runtime.store.salvage import salvage
from runtime.store.soundness import problems_of
from runtime.store.step_log import StepLog
from serve import build_parts
from tests.serving import SayingEngine, Served, parts_of, served
from tests.small_states import fill_state, tables_of
from tests.tiny_adapters import TinyNetwork

KEY = {"authorization": "Bearer the-operators"}
DAMAGED, INTACT = "1", "2"
"""Of three records of each kind, which is damaged, and one that must go on being shown."""

_WRONG = {
    "TEXT": ("CAST(x'c328ff' AS TEXT)", "x'00ff'", "NULL"),
    "INTEGER": ("'many'", "x'00ff'", "NULL"),
    "REAL": ("'soon'", "x'00ff'", "NULL"),
    "BLOB": ("'text'", "zeroblob(3)", "NULL"),
}
_WRONG_JSON = ("'{'", "'[7]'", "'null'")
_JSON = ("metadata", "tools", "new_messages", "sampling", "action", "tool_results", "request", "report", "evidence")
_WORDS = ("actor", "purpose", "finish_reason", "stop_reason", "prompt_change", "stage", "state", "role", "event")
_LOG = {
    "episodes", "steps", "outcomes", "corrections", "tool_sets", "withdrawals", "responses", "response_deletions",
    "step_calls", "key_usage",
}  # fmt: skip
_REGISTRY = {"adapters", "adapter_events", "acting", "proposal_events", "watch_events"}
_LEARNER = {"cycles", "gate_decisions", "step_rewards", "cycle_episodes", "trained_weights", "erased_cycles"}
_ERASURES = {"erasures", "erased_episodes", "erasure_events", "erased_cursors"}
_UNTRIED = {"reward_models", "step_candidates"}
"""Of which the state here has no rows: `verify` checks their columns as it does all, what reads them was not tried."""
_ALL = sorted(_LOG | _REGISTRY | _LEARNER | _ERASURES | {"key_events"})
_FREE = {  # null is no damage there, or means what the column's absence means
    ("key_events", "requests"), ("key_events", "steps"), ("key_events", "tokens"), ("acting", "adapter"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyNetwork:
    return TinyNetwork(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sound_state(tiny: TinyNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("sound") / "state"
    fill_state(state, *(tiny.adapter(seed) for seed in (1, 2, 3)))
    with closing(sqlite3.connect(state / "agent.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert list(problems_of(state)) == []
    return state


@pytest.fixture(scope="module")
def server(sound_state: Path, protocol: ChatProtocol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = shutil.copytree(sound_state, tmp_path_factory.mktemp("damaged") / "state")
    keys = KeyRing(KeyStore(state / "agent.db"), "the-operators")
    with served(parts_of(SayingEngine(protocol), protocol, state, keys=keys)) as server:
        yield server


def values_for(column: str, kind: str, may_be_null: bool) -> list[str]:
    """SQL of what must not stand in a column: in every other column null, in the others a blob."""
    first, blob, null = _WRONG[kind]
    values = [first, null if len(column) % 2 and not may_be_null else blob]
    return values + (list(_WRONG_JSON) if column in _JSON else ["'nonsense'"] if column in _WORDS else [])


def row_of(connection: sqlite3.Connection, table: str) -> str:
    """A condition for the row that is damaged: of those that name no record of ours, the last one."""
    keys = [c[1] for c in connection.execute(f"PRAGMA table_info({table})")]
    named = next((key for key in ("id", "call_id", "cycle", "name", "adapter", "key") if key in keys), None)
    for text in (f"%\\_{DAMAGED}%", "%v000" + DAMAGED, "bob"):
        found = f"{named} LIKE '{text}' ESCAPE '\\'"
        if named and connection.execute(f"SELECT 1 FROM {table} WHERE {found}").fetchone():
            return found
    return f"rowid = (SELECT max(rowid) FROM {table})"


WITHOUT_ROWIDS = {
    "step_rewards": "step_id", "cycle_episodes": "cycle", "trained_weights": "digest", "erased_cycles": "cycle",
}  # fmt: skip
"""Tables, and what finds a row in them."""


class Damage:
    """One wrong value in one row, past all that guards it; `mend` takes it back."""

    def __init__(self, database: Path, table: str, column: str, value: str) -> None:
        self._connection = sqlite3.connect(database, isolation_level=None)
        self._connection.execute("PRAGMA foreign_keys = OFF")
        self._table, self._column = table, column
        rowid = WITHOUT_ROWIDS.get(table, "rowid")
        where = row_of(self._connection, table)
        self._row, self._before = self._connection.execute(
            f"SELECT {rowid}, {column} FROM {table} WHERE {where} LIMIT 1"
        ).fetchone()
        self._where = f"{rowid} = ?"
        self._write(value, (self._row,))

    def mend(self) -> None:
        if self._column == WITHOUT_ROWIDS.get(self._table):
            self._where, self._row = f"{self._column} NOT LIKE '%\\_%' ESCAPE '\\'", None
        self._write("?", (self._before, *([] if self._row is None else [self._row])))
        self._connection.close()

    def _write(self, value: str, values: tuple[Any, ...]) -> None:
        execute = self._connection.execute
        guards = execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger' AND tbl_name = ?", (self._table,))
        triggers = guards.fetchall()
        (schema,) = execute("SELECT sql FROM sqlite_schema WHERE name = ?", (self._table,)).fetchone()
        execute("BEGIN IMMEDIATE")
        for name, _ in triggers:
            execute(f"DROP TRIGGER {name}")
        self._set_schema(schema.replace("STRICT", "").replace("NOT NULL", ""))
        execute(f"UPDATE {self._table} SET {self._column} = {value} WHERE {self._where}", values)
        self._set_schema(schema)
        for _, sql in triggers:
            execute(sql)
        execute("COMMIT")

    def _set_schema(self, sql: str) -> None:
        execute = self._connection.execute
        execute("PRAGMA writable_schema = ON")
        execute("UPDATE sqlite_schema SET sql = ? WHERE name = ?", (sql, self._table))
        (version,) = execute("PRAGMA schema_version").fetchone()
        execute(f"PRAGMA schema_version = {version + 1}")  # every connection reads it anew
        execute("PRAGMA writable_schema = OFF")


LISTS = {
    "/v1/episodes": {"episodes", "withdrawals"},
    "/v1/episodes?actor=policy&purpose=serve": {"episodes"},
    "/v1/demonstrations": {"episodes", "withdrawals"},
    "/v1/export?format=atif": {"episodes", "steps", "outcomes", "tool_sets", "withdrawals", "step_rewards"},
    "/v1/export?format=trl": {"corrections"},
    "/v1/learner/cycles": {"cycles"},
    "/v1/learner/cycles/cycle_2": {"gate_decisions", "step_rewards"},
    "/v1/adapters": {"adapters", "adapter_events", "acting", "proposal_events", "gate_decisions"},
    "/v1/keys": {"key_events"},
    "/v1/erasures": _ERASURES,
    "/v1/learner/watch": {"watch_events", "acting", "outcomes"},
    "/metrics": _LEARNER,
    "/health": {"acting", "step_calls", "responses", "response_deletions", "key_usage"},
}
"""What each of them is read from."""


@pytest.mark.parametrize("table", _ALL)
def test_every_list_steps_over_a_damaged_row_and_verify_names_it(server: Served, table: str) -> None:
    database = server.parts.log._path
    failures, num_tried = [], 0
    with httpx.Client(base_url=server.url, headers=KEY, timeout=30) as client:
        for column, kind, may_be_null in tables_of(database)[table]:
            for value in values_for(column, kind, may_be_null or (table, column) in _FREE or table in WITHOUT_ROWIDS):
                if kind == "INTEGER" and column in ("id", "version"):
                    continue  # SQLite itself keeps anything else out: it is the row's number
                damage = Damage(database, table, column, value)
                try:
                    failures += [f"{table}.{column} = {value}: {each}" for each in wrong_with(client, database, table)]
                finally:
                    damage.mend()
                num_tried += 1
    assert num_tried
    assert not failures, "\n".join(failures[:40]) + f"\n({len(failures)} of {num_tried})"
    assert list(problems_of(database.parent)) == [], "all was mended"


def test_no_table_is_left_out(server: Served) -> None:
    assert sorted(tables_of(server.parts.log._path).keys() - _UNTRIED) == _ALL


def wrong_with(client: httpx.Client, database: Path, table: str) -> Iterator[str]:
    told = list(problems_of(database.parent))
    if not any(table in sentence for sentence in told):
        yield f"verify says {told[:1]}"
    for path, tables in LISTS.items():
        answer = client.get(path) if table in tables else None
        may_be_down = path == "/health" and table == "acting"  # nothing new can be served then
        if answer is not None and answer.status_code not in ((200, 503) if may_be_down else (200,)):
            yield f"{path} is answered {answer.status_code}: {answer.text[:200]}"
        elif answer is not None and '"data":' in answer.text and path not in ("/v1/keys", "/v1/erasures"):
            shown = {each.get("id", each.get("name")) for each in answer.json()["data"]}
            if not any(str(name).endswith(f"_{INTACT}") or name == "agent-v0002" for name in shown):
                yield f"{path} shows {shown}"
    if table in _LOG - {"tool_sets"}:
        with closing(StepLog(database, read_only=True)) as log:
            own = collect(
                log, None, ["base"], CollectionOptions(held_out_share=0.0, anchor_share=0.0), seed=0
            ).policy_episodes
        if f"ep_{INTACT}" not in {each.episode.id for each in own}:
            yield "the learner collects nothing"


# ------------------------------------------------------------------------------------------- what is said


def changed(server: Served, table: str, column: str, value: str) -> Damage:
    return Damage(server.parts.log._path, table, column, value)


def ask(server: Served, path: str) -> Any:
    return httpx.get(f"{server.url}{path}", headers=KEY, timeout=30)


def test_lists_name_what_they_leave_out(server: Served) -> None:
    damage = changed(server, "episodes", "metadata", "'{'")
    try:
        listed = ask(server, "/v1/episodes").json()
        one = ask(server, "/v1/episodes/ep_1")
        assert ask(server, "/v1/episodes/ep_2").status_code == 200
        with closing(StepLog(server.parts.log._path, read_only=True)) as log:
            collected = collect(log, None, ["base"], CollectionOptions(), seed=0)
    finally:
        damage.mend()
    assert [each["id"] for each in listed["damaged"]] == ["ep_1"]
    assert listed["damaged"][0]["table"] == "episodes"
    assert "ep_1" not in {each["id"] for each in listed["data"]}
    assert one.status_code == 503
    assert one.json()["error"]["code"] == "damaged"
    assert "restore" in one.json()["error"]["message"] or "ep_1" in one.json()["error"]["message"]
    assert collected.counts["damaged_rows"] == 1
    assert "damaged" not in ask(server, "/v1/episodes").json()


def test_a_damaged_step_is_named_within_its_episode_and_its_conversation_begins_anew(server: Served) -> None:
    damage = changed(server, "steps", "action", "'{'")
    try:
        shown = ask(server, "/v1/episodes/ep_1").json()
        said = {"role": "user", "content": "And now?"}
        asked = {"model": "novice", "metadata": {"episode_id": "ep_1"}, "messages": [said]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers=KEY, timeout=30)
    finally:
        damage.mend()
    assert len(shown["damaged"]) == 1
    assert len(shown["steps"]) == 1
    assert answer.status_code == 200, answer.text


def test_a_key_whose_last_event_is_damaged_is_refused_rather_than_believed(tmp_path: Path) -> None:
    with closing(KeyStore(tmp_path / "agent.db")) as keys:
        keys.make("bob", Role.USE)
        keys.revoke("bob")
        keys.make("ann", Role.USE)
        damage = Damage(tmp_path / "agent.db", "key_events", "role", "'boss'")
        known = {key.name: key.is_revoked for key in keys.all_keys()}
        damage.mend()
    assert known["bob"] or "bob" not in known


def test_a_step_that_is_its_own_ancestor_ends_nothing(server: Served) -> None:
    damage = changed(server, "steps", "parent_id", "id")
    try:
        assert ask(server, "/v1/episodes/ep_1").status_code == 200
        assert ask(server, "/v1/export?format=atif").status_code == 200
        assert any("step_1a" in each for each in problems_of(server.parts.log._path.parent))
    finally:
        damage.mend()


def test_a_learner_that_was_killed_in_mid_write_of_a_report_hides_no_other_cycle(server: Served) -> None:
    damage = changed(server, "cycles", "report", "'{\"diagnostics\": 3}'")
    try:
        assert len(ask(server, "/v1/learner/cycles").json()["data"]) == 3
        assert ask(server, "/metrics").status_code == 200
        assert LearningReader(server.parts.log._path.parent).diagnostics()
    finally:
        damage.mend()


# ------------------------------------------------------------------------------------------------- pages


def pages_of(database: Path) -> tuple[int, int]:
    with closing(sqlite3.connect(database)) as connection:
        return (
            connection.execute("PRAGMA page_count").fetchone()[0],
            connection.execute("PRAGMA page_size").fetchone()[0],
        )


def opened(database: Path) -> tuple[StepLog | None, str]:
    """A log, or the sentence that says why it cannot be opened."""
    try:
        return StepLog(database), ""
    except StepLogError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("junk", "stride"), [(b"\x00", 1), (b"\xff", 4), (b"\x5a", 4)], ids=["zeros", "ones", "letters"]
)
def test_whatever_page_is_damaged_the_log_is_read_beside_it_or_the_start_says_what_to_do(
    sound_state: Path, tmp_path: Path, junk: bytes, stride: int
) -> None:
    """Everything that the rest of the file holds stays readable; nothing but a sentence is ever raised."""
    whole = (sound_state / "agent.db").read_bytes()
    num_pages, page_size = pages_of(sound_state / "agent.db")
    num_read = 0
    for page in range(0, num_pages, stride):
        state = tmp_path / f"{page}"
        shutil.copytree(sound_state / "adapters", state / "adapters")
        content = bytearray(whole)
        content[page * page_size : (page + 1) * page_size] = junk * page_size
        (state / "agent.db").write_bytes(content)
        problems = list(problems_of(state))
        assert problems, f"page {page + 1}"
        log, why_not = opened(state / "agent.db")
        if log is None:
            assert "OPERATIONS" in why_not, f"page {page + 1}: {why_not}"
            continue
        listed = log.episodes(limit=100)
        num_read += bool(listed)
        collect(log, None, ["base"], CollectionOptions(), seed=0)
        log.close()
        shutil.rmtree(state)
    assert num_read > 0.7 * num_pages / stride


def test_what_can_be_read_is_salvaged(sound_state: Path, tmp_path: Path) -> None:
    """The database without its every fifth page, from the fifth on: what is lost is named, the rest is sound."""
    num_pages, page_size = pages_of(sound_state / "agent.db")
    whole = (sound_state / "agent.db").read_bytes()
    assert salvage(sound_state, tmp_path / "all") == []
    assert list(problems_of(tmp_path / "all")) == []
    num_saved = 0
    for page in range(4, num_pages, 5):
        damaged = tmp_path / f"damaged-{page}"
        shutil.copytree(sound_state / "adapters", damaged / "adapters")
        content = bytearray(whole)
        content[page * page_size : (page + 1) * page_size] = bytes(page_size)
        (damaged / "agent.db").write_bytes(content)
        lost = salvage(damaged, tmp_path / f"saved-{page}")
        left = list(problems_of(tmp_path / f"saved-{page}"))
        assert lost or not left, "what is not named is as it was"
        assert not [each for each in left if each.startswith("agent.db")], "the file itself is sound again"
        num_saved += not lost
    assert num_saved > 3, "indexes are made anew"


def test_a_start_on_a_damaged_file_ends_with_a_sentence_that_says_what_to_do(sound_state: Path, tmp_path: Path) -> None:
    state = shutil.copytree(sound_state, tmp_path / "state")
    content = bytearray((state / "agent.db").read_bytes())
    content[100:4096] = bytes(3996)  # the schema's own page
    (state / "agent.db").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        build_parts(parse_settings(["--state", str(state)]))
    assert "cannot start" in str(ended.value.code)
    assert "python -m runtime.backup restore" in str(ended.value.code)


def test_a_start_does_not_guess_which_adapter_acts(sound_state: Path, tmp_path: Path) -> None:
    state = shutil.copytree(sound_state, tmp_path / "state")
    Damage(state / "agent.db", "acting", "adapter", "'agent-v9999'")
    with pytest.raises(SystemExit) as ended:
        build_parts(parse_settings(["--state", str(state)]))
    assert "acting" in str(ended.value.code)


def test_what_is_stepped_over_is_json_all_the_same(server: Served) -> None:
    damage = changed(server, "episodes", "id", "CAST(x'c328ff' AS TEXT)")
    try:
        damaged = json.loads(ask(server, "/v1/episodes").content)["damaged"]
    finally:
        damage.mend()
    assert damaged[0]["id"]
