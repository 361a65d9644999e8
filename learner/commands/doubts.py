"""python -m learner doubts: the steps of demonstrations that something contradicts; no server is needed."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from learner.commands.server import ServerOptions, step_log_of, unknown_agent
from learner.terminal import plain
from runtime.store.step_log import StepLog

if TYPE_CHECKING:
    from learner.data.collect import LoggedEpisode
    from learner.data.doubts import Doubt
    from tools.worlds.world import World


class DoubtsOptions(ServerOptions):
    """List the steps of demonstrations that corrections, outcomes, other demonstrations at the same state or a world's
    expert contradict. Nothing is changed: withdraw a demonstration with DELETE /v1/demonstrations/{id}, or correct its
    step."""

    world: str = ""
    """World whose expert is asked at every step of its tasks; empty: none."""
    cross_fit: int = Field(0, ge=0, le=10)
    """Also train so many networks, each without a part of the demonstrations, and list what they find unlikely; 0:
    train none."""
    model: Path = Path("policies/novice_model")
    """The base model's folder, to train from."""
    threads: int = 1
    """Threads of the arithmetic on a CPU."""
    as_json: bool = Field(False, validation_alias="json")
    """Print JSON, one object a line, instead of text."""


def run(options: DoubtsOptions) -> int:
    """Exit code 0 whether or not there are any; 1 where nothing can be read."""
    log = step_log_of(options)
    if log is None:
        return 1
    with closing(log):
        if problem := unknown_agent(log, options.agent):
            print(plain(problem), file=sys.stderr)
            return 1
        try:
            num_steps, doubts = _found(log, options)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    if options.as_json:
        for doubt in doubts:
            print(json.dumps(doubt.to_json()))
        return 0
    print(f"{len(doubts)} of {num_steps} steps of demonstrations are doubted")
    for doubt in doubts:
        print(f"{doubt.episode_id} step {doubt.index}: {doubt.action}\n    {doubt.kind}: {plain(doubt.reason)}")
    return 0


def _found(log: StepLog, options: DoubtsOptions) -> tuple[int, list[Doubt]]:
    """How many steps were looked at, and what is doubted. Raises ValueError for an unknown world and as
    `_unlikely`."""
    from learner.data.collect import dealt_demonstrations
    from learner.data.doubts import doubts_of
    from learner.data.experts import Corrections, Expert, WorldExpert
    from learner.options import CollectionOptions
    from tools.worlds import load_world

    world: World | None = load_world(options.world) if options.world else None
    everything = CollectionOptions(held_out_share=0.0, max_demonstrations=1_000_000)
    dealt = dealt_demonstrations(log, everything, options.agent)
    demonstrations = [*dealt.demonstrations, *dealt.held_out]
    experts: list[Expert] = [Corrections(log), *([WorldExpert(world)] if world else [])]
    unlikely = _unlikely(demonstrations, dealt.task_of, options) if options.cross_fit else []
    doubts = asyncio.run(doubts_of(demonstrations, experts, world, unlikely))
    return sum(len(each.path) for each in demonstrations), doubts


def _unlikely(demonstrations: list[LoggedEpisode], task_of: dict[str, str], options: DoubtsOptions) -> list[Doubt]:
    """What networks that were trained on the others do not expect, the least expected first. Raises ValueError where
    none can be trained."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # before torch is imported
    from learner.data.doubts import DoubtKind, doubted
    from learner.data.inspection import as_logged
    from learner.objectives.states import NothingToLearn
    from learner.options import TrainingOptions
    from learner.training.cross_fit import surprises
    from learner.training.trainer import TrainingFailed

    trajectories = [as_logged(each) for each in demonstrations]
    try:
        found = surprises(trajectories, task_of, options.model, TrainingOptions(), options.cross_fit)
    except (NothingToLearn, TrainingFailed) as problem:
        raise ValueError(f"the networks cannot be trained: {problem}") from problem
    states = {state.step.id: state for each in demonstrations for state in each.states()}
    return [
        doubted(states[each.step_id], DoubtKind.UNLIKELY, f"{each.nats:.1f} nats, where the others were trained on")
        for each in sorted(found, key=lambda each: -each.nats)
        if each.is_doubted
    ]
