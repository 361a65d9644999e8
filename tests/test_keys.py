"""Who may do what: keys with roles, made and revoked while the server runs, and what each of them sees."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from runtime.agent.served_agent import ServedAgent
from runtime.agent.tools import Toolbox
from runtime.http.app import create_app
from runtime.http.keys import NEEDS, NO_KEY, KeyCheck
from runtime.keys import main as keys_command
from runtime.store.adapter_registry import AdapterRegistry
from runtime.store.episodes import Role
from runtime.store.keys import ANYBODY, KeyProblem, KeyRing, KeyStore, digest_of
from runtime.store.learning_log import LearningLog
from runtime.store.step_log import StepLog
from tests.conftest import ServeScripted
from tests.serving import MODEL, ROOT, SayingEngine, parts_of

OPERATOR_SECRET = "operators-own"


class House:
    """A server that asks for keys, with one of each role."""

    def __init__(self, serve: ServeScripted, folder: Path, *says: str, **changes: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.store = KeyStore(folder / "agent.db")
        self.secrets = {role.value: self.store.make(role.value, role) for role in Role}
        self.secrets["operator"] = OPERATOR_SECRET
        self.url = serve(*says, keys=KeyRing(self.store, OPERATOR_SECRET), **changes).url

    def ask(self, key: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.secrets[key]}"}
        return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=30, **more)

    def chat(self, key: str, text: str = "Hello", **more: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "tools": [], **more}
        return self.ask(key, "POST", "/v1/chat/completions", json=body)

    def episode(self, key: str, **more: Any) -> str:
        return self.chat(key, **more).headers["x-episode-id"]


@pytest.fixture
def house(serve_scripted: ServeScripted, tmp_path: Path) -> House:
    return House(serve_scripted, tmp_path)


def test_every_route_has_a_role_that_somebody_decided_on(protocol: Any, tmp_path: Path) -> None:
    parts = parts_of(SayingEngine(protocol), protocol, tmp_path)
    app = create_app(parts)
    parts.log.close()
    parts.registry.close()
    decided = {(method, path) for _, method, path in NEEDS} | set(NO_KEY)
    served = {
        (method, route.path)  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }
    assert not served - decided, "these need a line in runtime/http/keys.py"


@pytest.mark.parametrize(("role", "method", "path"), NEEDS)
def test_a_route_refuses_every_role_below_its_own(house: House, role: Role, method: str, path: str) -> None:
    for lower in Role:
        if not lower.may(role):
            refused = house.ask(lower, method, path.replace("{", "").replace("}", ""))
            assert refused.status_code == 403
            assert f"role {role}" in refused.json()["error"]["message"]
    allowed = house.ask(role, method, path.replace("{", "").replace("}", ""))
    assert allowed.status_code not in (401, 403)
    assert httpx.request(method, f"{house.url}{path}").status_code == 401


def test_a_route_that_nobody_decided_on_is_an_admins(tmp_path: Path) -> None:
    async def answered(_: Request) -> Response:
        return Response()

    store = KeyStore(tmp_path / "agent.db")
    secrets = {role: store.make(role.value, role) for role in Role}
    app = Starlette(routes=[Route("/v1/new", answered, methods=["POST"])])
    app.add_middleware(KeyCheck, ring=KeyRing(store))
    client = TestClient(app)
    for role, secret in secrets.items():
        answer = client.post("/v1/new", headers={"x-api-key": secret})
        assert answer.status_code == (200 if role is Role.ADMIN else 403)
    store.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/nothing/here", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions/", 307),
    ],
)
def test_what_is_not_served_is_told_to_every_key(house: House, method: str, path: str, status: int) -> None:
    """It "needs a key with the role admin", who then was told that there is nothing."""
    for role in Role:
        assert house.ask(role, method, path).status_code == status
    assert httpx.request(method, f"{house.url}{path}").status_code == 401


def test_head_is_asked_as_get_is(house: House) -> None:
    """A monitor that asks for /health so was answered 405: a server that is well looked dead."""
    assert httpx.head(f"{house.url}/health").status_code == 200
    asked = house.ask("use", "HEAD", "/v1/models")
    assert (asked.status_code, asked.content, int(asked.headers["content-length"]) > 0) == (200, b"", True)
    assert httpx.head(f"{house.url}/v1/models").status_code == 401
    assert house.ask("use", "HEAD", "/metrics").status_code == 403
    assert house.ask("use", "HEAD", "/v1/chat/completions").status_code == 405


def test_a_key_is_taken_in_every_way_that_clients_send_it(house: House) -> None:
    secret = house.secrets["use"]
    for headers in (
        {"authorization": f"bearer {secret}"}, {"authorization": f"BEARER  {secret}"}, {"x-api-key": secret},
    ):  # fmt: skip
        assert httpx.get(f"{house.url}/v1/models", headers=headers).status_code == 200
    for headers in ({"authorization": f"Basic {secret}"}, {"x-api-key": "no"}, {"authorization": b"Bearer \xff\xfe"}):
        refused = httpx.get(f"{house.url}/v1/models", headers=headers)  # type: ignore[arg-type]
        assert refused.status_code == 401
        assert "x-api-key" in refused.json()["error"]["message"]


def test_a_key_made_rotated_or_revoked_by_command_counts_at_once_in_a_running_server(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> str:
        assert keys_command([*arguments, "--state", str(tmp_path)]) == 0
        return capsys.readouterr().out.strip()

    house.secrets["ann"] = command("make", "ann", "--role", "feedback")
    assert house.chat("ann").status_code == 200
    house.secrets["old"], house.secrets["ann"] = house.secrets["ann"], command("rotate", "ann")
    assert house.chat("old").status_code == 401
    assert house.chat("ann").status_code == 200
    assert "ann" in command("list")
    assert house.secrets["ann"] not in command("list")
    command("revoke", "ann")
    assert house.chat("ann").status_code == 401
    assert keys_command(["make", "ann", "--state", str(tmp_path)]) == 1
    assert "never given again" in capsys.readouterr().err


def test_keys_are_managed_over_http_by_an_admin_who_stands_on_each_change(house: House, tmp_path: Path) -> None:
    made = house.ask("admin", "POST", "/v1/keys", json={"name": "bob", "role": "use", "tokens_per_day": 5})
    assert made.status_code == 201
    house.secrets["bob"] = made.json()["secret"]
    assert house.ask("bob", "GET", "/v1/models").status_code == 200
    assert house.ask("admin", "POST", "/v1/keys", json={"name": "bob"}).status_code == 409
    listed = house.ask("operator", "GET", "/v1/keys").text
    assert '"bob"' in listed
    assert house.secrets["bob"] not in listed
    assert house.ask("operator", "POST", "/v1/keys/bob/revoke").json()["is_revoked"]
    assert house.ask("bob", "GET", "/v1/models").status_code == 401
    rows = sqlite3.connect(tmp_path / "agent.db").execute("SELECT event, key FROM key_events WHERE name = 'bob'")
    assert rows.fetchall() == [("made", "admin"), ("revoked", "operator")]


def test_nobody_locks_everybody_out_over_http(serve_scripted: ServeScripted, tmp_path: Path) -> None:
    """The first key closes the server to all without one; who could make another then?"""
    keys = f"{serve_scripted(keys=KeyRing(KeyStore(tmp_path / 'agent.db'))).url}/v1/keys"
    refused = httpx.post(keys, json={"name": "ann", "role": "use"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_admin_key")
    assert "role admin first" in refused.json()["error"]["message"]
    assert httpx.get(keys).json()["data"] == [], "it is as open as before"
    made = httpx.post(keys, json={"name": "head", "role": "admin"}).raise_for_status().json()
    head = {"authorization": f"Bearer {made['secret']}"}
    httpx.post(keys, json={"name": "ann", "role": "use"}, headers=head).raise_for_status()
    assert httpx.post(f"{keys}/head/revoke", headers=head).status_code == 409
    made = httpx.post(keys, json={"name": "deputy", "role": "admin"}, headers=head).raise_for_status().json()
    deputy = {"authorization": f"Bearer {made['secret']}"}
    assert httpx.post(f"{keys}/ann/revoke", headers=head).json()["is_revoked"]
    assert httpx.post(f"{keys}/head/revoke", headers=head).json()["is_revoked"]
    assert httpx.post(f"{keys}/deputy/revoke", headers=deputy).status_code == 409
    assert httpx.post(f"{keys}/nobody/revoke", headers=deputy).json()["error"]["code"] == "key_conflict"


async def test_two_admins_who_revoke_each_other_at_once_leave_one(
    serve_scripted: ServeScripted, tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "agent.db")
    keys = f"{serve_scripted(keys=KeyRing(store)).url}/v1/keys"
    ann, bob = (store.make(name, Role.ADMIN) for name in ("ann", "bob"))
    async with httpx.AsyncClient(timeout=30) as client:
        asked = [
            client.post(f"{keys}/{name}/revoke", headers={"x-api-key": secret})
            for name, secret in (("bob", ann), ("ann", bob))
        ]
        statuses = {answer.status_code for answer in await asyncio.gather(*asked)}
    assert 200 in statuses
    assert statuses <= {200, 401, 409}
    assert sum(not key.is_revoked for key in store.all_keys()) == 1


def test_a_secret_is_stored_nowhere(house: House, tmp_path: Path) -> None:
    house.chat("teach")
    for file in tmp_path.glob("agent.db*"):
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in house.secrets.values()), file


def test_a_key_sees_and_judges_its_own_episodes_and_an_admin_all(house: House) -> None:
    mine, others = house.episode("feedback"), house.episode("teach")
    assert mine != others, "the same words of another key begin an episode of their own"
    listed = [each["id"] for each in house.ask("feedback", "GET", "/v1/episodes").json()["data"]]
    assert listed == [mine]
    assert len(house.ask("admin", "GET", "/v1/episodes").json()["data"]) == 2
    for method, path, body in (
        ("GET", "", None), ("POST", "/outcome", {"value": 0}),
        ("POST", "/corrections", {"step_id": "s", "message": {"role": "assistant", "content": "No."}}),
    ):  # fmt: skip
        refused = house.ask("feedback", method, f"/v1/episodes/{others}{path}", json=body)
        assert refused.status_code == 404, path
    assert house.ask("feedback", "POST", f"/v1/episodes/{mine}/outcome", json={"value": 0}).status_code == 201
    assert house.ask("admin", "POST", f"/v1/episodes/{mine}/outcome", json={"value": 1}).status_code == 201
    refused = house.chat("feedback", metadata={"episode_id": others})
    assert refused.status_code == 409
    assert "another key" in refused.json()["error"]["message"]


def test_another_keys_conversation_is_not_continued_however_it_is_repeated(house: House) -> None:
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "All done."}]
    mine = house.episode("use")
    body = {"model": MODEL, "messages": [*said, {"role": "user", "content": "And?"}], "tools": []}
    for key, is_mine in (("use", True), ("teach", False), ("admin", False)):
        answer = house.ask(key, "POST", "/v1/chat/completions", json=body)
        assert (answer.headers["x-episode-id"] == mine) is is_mine, key


def test_who_said_it_stands_on_outcomes_corrections_demonstrations_and_promotions(house: House, tmp_path: Path) -> None:
    chat = house.chat("teach")
    episode = chat.headers["x-episode-id"]
    house.ask("teach", "POST", f"/v1/episodes/{episode}/outcome", json={"value": 1})
    correction = {"step_id": chat.headers["x-step-id"], "message": {"role": "assistant", "content": "Good day."}}
    assert house.ask("teach", "POST", f"/v1/episodes/{episode}/corrections", json=correction).status_code == 201
    demonstration = house.ask("teach", "POST", f"/v1/episodes/{episode}/promote").json()["id"]
    log = StepLog(tmp_path / "agent.db", read_only=True)
    assert [(outcome.key, outcome.role) for outcome in log.outcomes(episode)] == [("teach", Role.TEACH)]
    assert [each.key for each in log.corrections(correction["step_id"])] == ["teach"]
    expert = log.episode(demonstration)
    assert expert is not None
    assert expert.owner == "teach"


def test_an_outcome_of_the_world_is_no_claim_for_clients(house: House) -> None:
    episode = house.episode("teach")
    body = {"value": 1, "source": "world"}
    refused = house.ask("teach", "POST", f"/v1/episodes/{episode}/outcome", json=body)
    assert refused.status_code == 403
    assert "leave `source` out" in refused.json()["error"]["message"]
    assert house.ask("admin", "POST", f"/v1/episodes/{episode}/outcome", json=body).status_code == 201


def test_the_word_of_a_more_trusted_key_counts_whoever_spoke_last(house: House, tmp_path: Path) -> None:
    episode = house.episode("feedback")
    path = f"/v1/episodes/{episode}/outcome"
    house.ask("admin", "POST", path, json={"value": 1})
    house.ask("feedback", "POST", path, json={"value": 0})
    log = StepLog(tmp_path / "agent.db", read_only=True)
    assert [outcome.value for outcome in log.outcomes(episode)] == [0, 1]


def test_what_was_said_wrongly_is_taken_back_by_a_row_of_its_own(house: House, tmp_path: Path) -> None:
    chat = house.chat("teach")
    episode, step = chat.headers["x-episode-id"], chat.headers["x-step-id"]
    message = {"role": "assistant", "content": "Good day."}
    outcome = house.ask("teach", "POST", f"/v1/episodes/{episode}/outcome", json={"value": 1}).json()["id"]
    body = {"step_id": step, "message": message}
    correction = house.ask("teach", "POST", f"/v1/episodes/{episode}/corrections", json=body).json()["id"]
    asked = {"role": "user", "content": "Hello"}
    demonstrations = {"demonstrations": [{"messages": [asked, message]}]}
    house.ask("teach", "POST", "/v1/demonstrations", json=demonstrations)
    demonstration = house.ask("teach", "GET", "/v1/demonstrations").json()["data"][0]["id"]
    paths = (
        f"/v1/episodes/{episode}/outcomes/{outcome}", f"/v1/episodes/{episode}/corrections/{correction}",
        f"/v1/demonstrations/{demonstration}",
    )  # fmt: skip
    house.secrets["stranger"] = house.store.make("stranger", Role.TEACH)
    for path in paths:
        assert house.ask("stranger", "DELETE", path).status_code == 404
        withdrawn = house.ask("teach", "DELETE", path)
        assert withdrawn.status_code == 200, withdrawn.text
        assert withdrawn.json()["key"] == "teach"
        assert house.ask("admin", "DELETE", path).json() == withdrawn.json(), "twice adds nothing"
    log = StepLog(tmp_path / "agent.db", read_only=True)
    assert (log.outcomes(episode), log.corrections(step), log.corrected_steps()) == ([], [], [])
    assert house.ask("teach", "GET", "/v1/demonstrations").json()["data"] == []
    assert house.ask("teach", "POST", "/v1/demonstrations", json=demonstrations).json()["already_known"] == 1
    assert log.counts()["outcomes"] == 1, "what was said stays logged"
    assert log.verify() == []


def test_a_server_without_keys_answers_everybody_until_one_is_made_and_never_again_after(tmp_path: Path) -> None:
    ring = KeyRing(KeyStore(tmp_path / "agent.db"))
    assert ring.key_of(None) == ANYBODY
    assert ring.key_of("whatever") == ANYBODY
    learner = ring.key_of(ring.learner_secret)
    assert learner is not None
    assert learner.name == "learner"
    beside = KeyStore(tmp_path / "agent.db")
    secret = beside.make("ann", Role.ADMIN)
    assert ring.key_of(None) is None
    ann = ring.key_of(secret)
    assert ann is not None
    assert ann.name == "ann"
    beside.revoke("ann")
    assert ring.key_of(secret) is None
    assert ring.key_of(None) is None, "revoking the last key opens nothing"


def test_the_watch_shows_its_evidence_and_who_paused_it(house: House) -> None:
    paused = house.ask("admin", "POST", "/v1/learner/watch/pause", json={"reason": "a poll went wrong"})
    assert paused.status_code == 200, paused.text
    shown = house.ask("admin", "GET", "/v1/learner/watch").json()
    assert (shown["is_paused"], shown["key"], shown["reason"]) == (True, "admin", "a poll went wrong")
    assert shown["evidence"] == [], "the base network acts"
    assert not house.ask("admin", "POST", "/v1/learner/watch/resume").json()["is_paused"]


def test_an_episode_says_whether_the_server_chose_its_adapter(house: House) -> None:
    for model, is_assigned in ((MODEL, True), ("base", False)):
        episode = house.episode("use", model=model)
        assert house.ask("use", "GET", f"/v1/episodes/{episode}").json()["is_assigned"] is is_assigned


def test_names_are_never_given_again_and_events_never_edited(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "agent.db")
    store.make("ann", Role.USE)
    store.revoke("ann")
    for change in (
        lambda: store.make("ann", Role.USE), lambda: store.rotate("ann"), lambda: store.revoke("bob"),
        lambda: store.make("learner", Role.USE), lambda: store.make("a b", Role.USE),
    ):  # fmt: skip
        with pytest.raises(KeyProblem):
            change()
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        store.db.execute("UPDATE key_events SET role = 'admin'")
    assert digest_of("a") != digest_of("b")


@pytest.mark.parametrize("module", ["learner", "learner.practice"])
def test_the_learners_commands_refuse_a_key_on_the_command_line(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--api-key", "s3cret"], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 2
    assert "--api-key-file" in done.stderr


@pytest.mark.parametrize("release", sorted((ROOT / "tests" / "released_states").glob("*.sql")), ids=lambda p: p.stem)
def test_the_state_of_every_release_still_opens(release: Path, tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "agent.db")
    database.executescript(release.read_text())
    database.close()
    log, registry = StepLog(tmp_path / "agent.db"), AdapterRegistry(tmp_path / "agent.db")
    LearningLog(tmp_path).close()
    KeyStore(tmp_path / "agent.db").close()
    assert log.verify() == []
    old = log.episode("ep_old")
    assert old is not None
    assert (old.owner, old.is_assigned) == ("", True)
    assert [(outcome.value, outcome.key) for outcome in log.outcomes("ep_old")] == [(0.5, "")]
    assert len(log.corrected_steps()) == 1
    assert registry.acting() == registry.adapter("agent-v0001")
    log.close()


def test_a_background_response_is_read_and_cancelled_by_its_own_key_only(
    serve_scripted: ServeScripted, protocol: Any, tmp_path: Path
) -> None:
    """Whoever knew its id once read another's answer while it was made."""
    slow = SayingEngine(protocol, [65] * 400, pause_s=0.05)
    store = KeyStore(tmp_path / "agent.db")
    owner, other = store.make("owner", Role.USE), store.make("other", Role.USE)
    url = serve_scripted(engine=slow, keys=KeyRing(store, OPERATOR_SECRET)).url

    def ask(secret: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.request(method, f"{url}/v1/responses{path}", headers=headers, timeout=30, **more)

    begun = ask(owner, "POST", "", json={"model": MODEL, "input": "Hello", "background": True}).json()["id"]
    assert ask(other, "GET", f"/{begun}").status_code == 404
    assert ask(other, "POST", f"/{begun}/cancel").status_code == 404
    assert ask(owner, "GET", f"/{begun}").json()["status"] in ("queued", "in_progress")
    assert ask(owner, "POST", f"/{begun}/cancel").json()["status"] == "cancelled"


# --------------------------------------------------------------------------------------- keys for some agents


AGENTS = tuple(ServedAgent(name, name, Toolbox()) for name in ("night", "day"))


@pytest.fixture
def limited(serve_scripted: ServeScripted, tmp_path: Path) -> House:
    """`ann` may teach `night`, `own` may teach the server's own agent, and nobody else."""
    house = House(serve_scripted, tmp_path, named_agents=AGENTS)
    body = {"name": "ann", "role": "teach", "agents": ["night"]}
    answer = house.ask("operator", "POST", "/v1/keys", json=body).raise_for_status().json()
    assert answer["agents"] == ["night"]
    house.secrets["ann"] = answer["secret"]
    house.secrets["own"] = house.store.make("own", Role.TEACH, agents=["agent"])
    return house


TALK: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
DEMONSTRATION: Any = {"messages": [*TALK["messages"], {"role": "assistant", "content": "Good day."}]}
FOR_AN_AGENT = [
    ("POST", "/v1/chat/completions", "model", TALK),
    ("POST", "/v1/messages", "model", TALK),
    ("POST", "/v1/messages/count_tokens", "model", TALK),
    ("POST", "/v1/responses", "model", {"input": "Hi"}),
    ("POST", "/v1/responses/input_tokens", "model", {"input": "Hi"}),
    ("POST", "/v1/demonstrations", "agent", {"demonstrations": [DEMONSTRATION]}),
    ("GET", "/v1/episodes", "agent", None),
    ("GET", "/v1/demonstrations", "agent", None),
    ("GET", "/v1/export?format=openai", "agent", None),
]


@pytest.mark.parametrize(("method", "path", "field", "body"), FOR_AN_AGENT)
def test_a_key_for_some_agents_is_refused_for_the_others(
    limited: House, method: str, path: str, field: str, body: Any
) -> None:
    def ask(key: str, agent: str) -> httpx.Response:
        if body is None:
            return limited.ask(key, method, path, params={**httpx.URL(path).params, field: agent})
        return limited.ask(key, method, path, json={**body, field: agent})

    assert ask("ann", "night").is_success
    assert ask("own", MODEL).is_success
    assert ask("teach", "day").is_success, "a key that is not limited is for all"
    for key, other in (("ann", "day"), ("ann", MODEL), ("own", "night"), ("own", "day")):
        refused = ask(key, other)
        assert refused.status_code == 403, (key, other)
        assert "a key for other agents" in refused.json()["error"]["message"]
    if field == "model":
        for other in ("day:base", "base"):
            assert ask("ann", other).status_code == 403
        assert ask("ann", "night:base").is_success


def test_every_route_that_takes_an_agent_or_a_model_is_among_those_that_were_tried(limited: House) -> None:
    """So that a new one is decided on; what an admin key alone may ask is for all agents."""
    described = limited.ask("operator", "GET", "/openapi.json").json()
    for_admins = {(method, path) for role, method, path in NEEDS if role is Role.ADMIN}
    tried = {(method, path.split("?")[0]) for method, path, _, _ in FOR_AN_AGENT}
    found = set[tuple[str, str]]()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            schemas = [each.get("$ref", "") for each in (body, *body.get("anyOf", ()), *body.get("allOf", ()))]
            fields = {parameter["name"] for parameter in operation.get("parameters", ())}
            for name in filter(None, (reference.rsplit("/", 1)[-1] for reference in schemas)):
                fields |= described["components"]["schemas"][name].get("properties", {}).keys()
            if fields & {"agent", "model"}:
                found.add((method.upper(), path))
    assert found - for_admins - {("GET", "/v1/models/{model}")} == tried


def test_a_key_for_some_agents_is_told_of_no_other(limited: House) -> None:
    def models(key: str) -> set[str]:
        return {model["id"] for model in limited.ask(key, "GET", "/v1/models").json()["data"]}

    assert models("ann") == {"night", "night:base"}
    assert models("own") == {MODEL, "base"}
    assert limited.ask("ann", "GET", "/v1/models/night").is_success
    assert limited.ask("ann", "GET", "/v1/models/day").status_code == 403
    unknown = limited.ask("ann", "GET", "/v1/models/nobody")
    assert unknown.status_code == 404
    assert "there are: night;" in unknown.json()["error"]["message"]


def test_another_secret_is_no_key_for_more_agents_and_a_damaged_one_is_for_none(limited: House, tmp_path: Path) -> None:
    rotated = limited.ask("operator", "POST", "/v1/keys/ann/rotate").raise_for_status().json()
    assert rotated["agents"] == ["night"]
    limited.secrets["ann"] = rotated["secret"]
    assert limited.chat("ann", model="day").status_code == 403
    assert limited.chat("ann", model="night").is_success
    for wrong in ("", "[]", "{}", "[1]", '"night"', "null"):
        name = f"ann-{wrong.encode().hex()}"
        secret = limited.store.make(name, Role.USE, agents=["night"])
        with sqlite3.connect(tmp_path / "agent.db") as connection:
            for (guard,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
                connection.execute(f"DROP TRIGGER {guard}")
            connection.execute("UPDATE key_events SET agents = ? WHERE name = ?", (wrong, name))
        assert KeyRing(limited.store, "s").key_of(secret) is None


def test_an_admin_key_is_for_all_agents_and_unknown_agents_are_told(
    limited: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = {"name": "boss", "role": "admin", "agents": ["night"]}
    assert limited.ask("operator", "POST", "/v1/keys", json=body).status_code == 409
    body = {"name": "typist", "role": "use", "agents": ["nihgt"]}
    assert limited.ask("operator", "POST", "/v1/keys", json=body).status_code == 404
    body = {"name": "nobody", "role": "use", "agents": []}
    assert limited.ask("operator", "POST", "/v1/keys", json=body).status_code == 400
    state = ["--state", str(tmp_path)]
    assert keys_command(["make", "bob", "--agent", "day", "--agent", "agent", *state]) == 0
    limited.secrets["bob"] = capsys.readouterr().out.strip()
    assert keys_command(["make", "eve", "--agent", "../day", *state]) == 1
    assert keys_command(["list", *state]) == 0
    assert "for agent, day" in capsys.readouterr().out
    assert [limited.chat("bob", model=model).status_code for model in ("day", MODEL, "night")] == [200, 200, 403]
