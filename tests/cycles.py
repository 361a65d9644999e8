"""Whole learner cycles against a test server."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.client import Endpoint
from learner.cycle import run_cycle
from learner.data.collaborators import Collaborators
from learner.data.experts import Expert, WorldExpert
from learner.options import CollectionOptions, CycleOptions, TrainingOptions
from learner.practice import PracticeOptions, practise
from runtime.store.learning_log import CycleStatus, LearningLog
from runtime.store.step_log import StepLog
from tests.serving import MODEL, NOVICE_FOLDER, Served
from tools.worlds.order_desk import OrderDesk

WORLD = OrderDesk()


QUICK = CycleOptions(
    gate_tasks=8,
    collection=CollectionOptions(held_out_share=0.0, anchor_share=0.0),  # no share is drawn by random ids
    training=TrainingOptions(epochs=1, min_gradient_steps=0),
)


def collaborators(
    server: Served, folder: Path, experts: tuple[Expert, ...] = (WorldExpert(WORLD),), **changes: Any
) -> Collaborators:
    who = Collaborators(
        endpoint=Endpoint(server.async_client(max_retries=2)),  # as the command asks: a training outlasts connections
        log=StepLog(folder / "agent.db", read_only=True),
        learning_log=LearningLog(folder),
        protocol=server.parts.protocol,
        world=WORLD,
        experts=experts,
        base=NOVICE_FOLDER,
        state=folder,
    )
    return replace(who, **changes)


def run(
    server: Served, folder: Path, cycle: str = "cycle_1", options: CycleOptions = QUICK, **changes: Any
) -> CycleStatus:
    """Run one cycle to its end."""
    who = collaborators(server, folder, **changes)
    asyncio.run(run_cycle(cycle, who, options))
    status = who.learning_log.status(cycle)
    assert status is not None
    return status


def practised(server: Served, first: int, number: int) -> None:
    tasks = [WORLD.task("train", first + index) for index in range(number)]
    asyncio.run(practise(server.async_client(), WORLD, tasks, PracticeOptions(MODEL, seed=3)))
