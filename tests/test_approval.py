"""A candidate that passed the gate: acts, serves a share, or waits for somebody's yes; also after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from learner.__main__ import main as learner_command
from policies.chat.chat_protocol import ChatProtocol
from runtime.adapters.approval import Approval, PromotionMode, PromotionTerms
from runtime.adapters.swap import Swap, SwapError
from runtime.http.parts import Parts
from runtime.store.adapter_registry import AdapterRegistry, AdapterState
from runtime.store.learning_log import CycleStage, LearningLog
from tests.scripted_engine import ScriptedEngine
from tests.serving import parts_of, served
from tests.tiny_adapters import TinyNetwork, faithful_script


class Candidate:
    """A registry and a swap over a tiny network, with one candidate that a learner proposes."""

    def __init__(self, folder: Path, mode: PromotionMode, **more: Any) -> None:
        self.folder = folder
        self.tiny = TinyNetwork(folder / "tiny")
        self.registry = AdapterRegistry(folder / "agent.db")
        self.swap = self.new_swap(self.registry)
        self.approval = Approval(self.swap, self.registry, PromotionTerms(mode, **more))
        self.name = self.registry.register(self.tiny.adapter(1), None, "sft, c1").name

    def new_swap(self, registry: AdapterRegistry) -> Swap:
        return Swap(ScriptedEngine(faithful_script(registry)), registry, self.tiny.network)

    async def proposed(self) -> str:
        await self.approval.propose(self.name, "gain +10 %", "base", "learner")
        return self.registry.state(self.name)

    @property
    def acting(self) -> str:
        acting = self.registry.acting()
        return acting.name if acting else "base"


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        (PromotionMode.AUTO, AdapterState.ACTING),
        (PromotionMode.CANARY, AdapterState.CANARY),
        (PromotionMode.ASK, AdapterState.VERIFIED),
        (PromotionMode.DRY_RUN, AdapterState.REFUSED),
    ],
)
async def test_what_comes_of_a_proposal_is_for_the_servers_mode_to_say(
    tmp_path: Path, mode: PromotionMode, state: AdapterState
) -> None:
    candidate = Candidate(tmp_path, mode)
    assert await candidate.proposed() == state
    assert (candidate.acting == candidate.name) is (mode is PromotionMode.AUTO)
    assert bool(candidate.registry.proposals()) is (mode is PromotionMode.ASK)


async def test_what_waits_survives_a_restart_and_acts_once_somebody_says_yes(tmp_path: Path) -> None:
    candidate = Candidate(tmp_path, PromotionMode.ASK)
    await candidate.proposed()
    registry = AdapterRegistry(tmp_path / "agent.db")  # the server starts again, with an engine that holds nothing
    swap = candidate.new_swap(registry)
    await swap.restore()
    approval = Approval(swap, registry, PromotionTerms(PromotionMode.ASK))
    assert [proposal.adapter for proposal in registry.proposals()] == [candidate.name]
    assert registry.acting() is None
    await approval.promote(candidate.name, "looks good", None, "ann")
    assert registry.acting() == registry.adapter(candidate.name)
    assert registry.last_event(candidate.name).key == "ann"
    assert registry.proposals() == []


async def test_a_yes_that_comes_after_something_else_acts_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    candidate = Candidate(tmp_path, PromotionMode.ASK)
    await candidate.proposed()
    other = candidate.registry.register(candidate.tiny.adapter(2)).name
    await candidate.swap.promote(other)
    with pytest.raises(SwapError, match="base does not act any more"):
        await candidate.approval.promote(candidate.name, "", None, "ann")
    await candidate.approval.promote(candidate.name, "", other, "ann")
    assert candidate.acting == candidate.name


async def test_a_no_and_a_silence_of_too_long_refuse_it(tmp_path: Path) -> None:
    candidate = Candidate(tmp_path, PromotionMode.ASK, expires_after_s=3600)
    await candidate.proposed()
    [proposal] = candidate.registry.proposals()
    assert await candidate.approval.expire(proposal.created_at + 3599) == []
    assert await candidate.approval.expire(proposal.created_at + 3601) == [candidate.name]
    assert candidate.registry.state(candidate.name) is AdapterState.REFUSED
    assert "nobody said yes" in candidate.registry.last_event(candidate.name).reason
    second = candidate.registry.register(candidate.tiny.adapter(2)).name
    await candidate.approval.propose(second, "", "base", "learner")
    await candidate.approval.refuse(second, "no", "ann")
    assert candidate.registry.state(second) is AdapterState.REFUSED
    assert candidate.registry.proposals() == []


async def test_what_waits_gives_its_slot_to_others_and_can_still_be_approved(tmp_path: Path) -> None:
    candidate = Candidate(tmp_path, PromotionMode.ASK)
    await candidate.proposed()
    for seed in (2, 3, 4):
        await candidate.swap.bring_up(candidate.registry.register(candidate.tiny.adapter(seed)).name)
    assert candidate.registry.state(candidate.name) is AdapterState.UNLOADED
    await candidate.approval.promote(candidate.name, "", None, "ann")
    assert candidate.acting == candidate.name


def test_over_http_and_by_command_with_its_evidence(
    tmp_path: Path, protocol: ChatProtocol, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = Candidate(tmp_path / "c", PromotionMode.ASK)
    parts: Parts = parts_of(ScriptedEngine(faithful_script(candidate.registry)), protocol, tmp_path / "c")
    swap = Swap(parts.engine, parts.registry, candidate.tiny.network)
    approval = Approval(swap, parts.registry, PromotionTerms(PromotionMode.ASK))
    log = LearningLog(tmp_path / "c")
    log.add_decision("c1", candidate.name, "base", True, "gain +10 %", {"gain": 0.1})
    report = {"proposed": candidate.name}
    log.note("c1", CycleStage.PROPOSED, f"{candidate.name} waits for somebody's yes", report=report)
    log.close()
    status = ["status", "--state", str(tmp_path / "c")]
    from dataclasses import replace

    with served(replace(parts, swap=swap, approval=approval)) as server:
        body = {"reason": "gain +10 %", "expected_acting": "base", "is_proposal": True}
        record = httpx.post(f"{server.url}/v1/adapters/{candidate.name}/promote", json=body).json()
        assert not record["is_acting"]
        assert record["proposal"]["decisions"][0]["evidence"] == {"gain": 0.1}
        assert record["proposal"]["expires_at"] > record["proposal"]["created_at"]
        assert learner_command(status) == 0
        assert f"{candidate.name} waits for somebody's yes" in capsys.readouterr().out
        url = ["--url", f"{server.url}/v1"]
        assert learner_command(["approve", "agent-v0009", *url]) == 1
        said = capsys.readouterr().out
        assert said.startswith("agent-v0009 does not wait for a yes\n")
        assert candidate.name in said
        assert learner_command(["approve", "--agent", "night", *url]) == 1
        assert candidate.name not in capsys.readouterr().out
        assert candidate.acting == "base"
        assert learner_command(["approve", *url]) == 0
        assert httpx.get(f"{server.url}/v1/adapters").json()["data"][0]["is_acting"]
        assert learner_command(["approve", *url]) == 1
        assert "nothing waits" in capsys.readouterr().out
        assert learner_command(status) == 0
        assert f"{candidate.name} waited for somebody's yes, and is acting since" in capsys.readouterr().out
