"""A state folder with rows in every table, made by the stores themselves."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from policies.types import FinalAnswer, ToolCall, ToolCalls
from runtime.store.adapter_registry import AdapterRegistry, AdapterState, ProposalEvent
from runtime.store.episodes import (
    Actor,
    Correction,
    KeyUsage,
    Outcome,
    ResponseDeletion,
    ResponseRecord,
    Role,
    StopReason,
    Withdrawal,
)
from runtime.store.erasure import Eraser, Scope
from runtime.store.keys import KeyStore, Quota
from runtime.store.learning_log import CycleStage, LearningLog, LessonRole, RewardSource, StepReward
from runtime.store.step_log import StepLog
from tests.records import make_episode, make_step

NUMBERS = (1, 2, 3)


def fill_state(state: Path, *adapters: Path) -> None:
    """Log and registry with a few records of every kind; the last adapter acts, the first one waits for a yes."""
    state.mkdir(parents=True, exist_ok=True)
    with closing(StepLog(state / "agent.db")) as log:
        for number in NUMBERS:
            _log_episode(log, number)
        _erase(state, log)
    _register(state, adapters)
    _learn(state)
    with closing(KeyStore(state / "agent.db")) as keys:
        for name in ("ann", "bob", "eve"):
            keys.make(name, Role.TEACH, Quota(requests=1000, tokens=10**6))
        keys.rotate("ann")
        keys.revoke("eve")


def _log_episode(log: StepLog, number: int) -> None:
    name = f"ep_{number}"
    episode = make_episode(id=name, metadata={"who": "ann"}, task=f"desk/train/{number}", created_at=1e9 + number)
    tools = ({"type": "function", "function": {"name": f"look_{number}", "parameters": {"type": "object"}}},)
    call = ToolCalls((ToolCall(f"call_{number}", "look", {"at": "the shelf"}),))
    first = make_step(episode, id=f"step_{number}a", tools=tools, action=call, stop_reason=StopReason.CLIENT_TOOLS)
    second = make_step(episode, first, id=f"step_{number}b", tools=tools, action=FinalAnswer("It is done."))
    expert = make_episode(id=f"demo_{number}", actor=Actor.EXPERT, adapter="expert", task=f"desk/train/{number}")
    shown = make_step(expert, id=f"step_{number}c", tools=tools, adapter="expert", behavior_logprobs=None)
    outcome = Outcome(f"out_{number}", name, 1.0, "user")
    wrong = replace(outcome, id=f"out_{number}w", value=0.0)
    log.append(
        episode, first, second, expert, shown, outcome, wrong,
        Correction(f"corr_{number}", first.id, FinalAnswer("Look first."), (1, 2), "ann"),
        Withdrawal(f"wd_{number}", wrong.id, "a slip"),
        ResponseRecord(f"resp_{number}", name, first.id, {"input": "Hello"}),
        ResponseDeletion(f"resp_{number}"), KeyUsage(f"key_{number}", 20000, 3, 4, 500),
    ).result()  # fmt: skip


def _erase(state: Path, log: StepLog) -> None:
    for number in NUMBERS:
        gone = make_episode(id=f"ep_gone_{number}")
        log.append(gone, make_step(gone)).result()
        eraser = Eraser(state, log)
        eraser.work(eraser.begin([gone.id], Scope.EPISODE, "asked for").id)


def _register(state: Path, adapters: tuple[Path, ...]) -> None:
    with closing(AdapterRegistry(state / "agent.db")) as registry:
        for folder in adapters:
            name = registry.register(folder, cycle="cycle_1").name
            for step in (AdapterState.VALIDATED, AdapterState.LOADED, AdapterState.VERIFIED):
                registry.record(name, step)
        if adapters:
            registry.promote(name, "better")
            registry.note_proposal("agent-v0001", ProposalEvent.PROPOSED, "better", None)
        registry.record_watch(True, "holidays")
        registry.record_watch(False, "back")


def _learn(state: Path) -> None:
    with closing(LearningLog(state)) as log:
        for number in NUMBERS:
            cycle = f"cycle_{number}"
            log.note(cycle, CycleStage.COLLECT)
            log.note(cycle, CycleStage.REFUSED, "not better", report={"diagnostics": {"sft": {"loss": 0.5}}})
            log.add_decision(cycle, "agent-v0001", "base", False, "not better", {"gain": 0.0})
            log.note_episodes(cycle, "sft", [(LessonRole.OWN, f"ep_{number}")])
            log.forget_words([f"cycle_gone_{number}"], f"erase_{number}")
            log.note_weights(cycle, "sft", f"digest_{number}")
            log.add_rewards([StepReward(f"step_{number}a", cycle, RewardSource.EXPERT_AGREEMENT, 1.0)])


def tables_of(database: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """By table: (column, declared type, whether it may be null)."""
    with closing(sqlite3.connect(database)) as connection:
        query = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE '\\_%' ESCAPE '\\' ORDER BY 1"
        names = [name for (name,) in connection.execute(query) if not name.startswith("sqlite_")]
        return {
            name: [
                (column, kind, not is_filled and not is_key)
                for _, column, kind, is_filled, _, is_key in connection.execute(f"PRAGMA table_info({name})")
            ]
            for name in names
        }
