"""Makes the adapters ready that try a candidate's trials: the candidate itself, or two that have not seen a fold.

A fold's two are the acting adapter's twin and an adapter that is trained from it, as the candidate was from the acting
adapter, on all but the fold. Both are in the engine only while they try the fold, and the candidate gives its slot away
meanwhile: slots are few. They are unloaded, not refused: if the candidate passes, they are its twins.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import APIStatusError

from learner.data.collaborators import Collaborators
from learner.evaluation.gate import Contestants, NoContest
from learner.evaluation.twins import Twin, twins_of
from learner.objectives.build import NothingToLearn
from learner.report import CycleRecord
from learner.training.candidates import Candidate
from learner.training.trainer import TrainingFailed
from policies.types import BASE_ADAPTER

TrainWithout = Callable[[int, str, str, Path], set[str]]
"""Trains an objective without a fold: (fold, objective, the adapter to go on from, folder to write) -> the
demonstrations that were trained on. Raises NothingToLearn and TrainingFailed."""


@dataclass(slots=True)
class FoldContest:
    """The contests of one candidate."""

    record: CycleRecord
    who: Collaborators
    candidate: Candidate
    name: str
    """The candidate's, as the server knows it."""
    acting: str
    train: TrainWithout
    twins: dict[int, Twin] = field(default_factory=dict)
    """The candidate's, by fold, as far as they have been made."""
    is_up: bool = True
    """The candidate is in the engine."""

    @asynccontextmanager
    async def contest(self, fold: int | None) -> AsyncIterator[Contestants | NoContest]:
        """See `learner.evaluation.gate.Contest`."""
        await self._make_way(is_up=fold is None)
        if fold is None:
            yield Contestants(self.name, self.acting)
            return
        async with AsyncExitStack() as unloading:
            yield await self._without(fold, unloading)

    async def _make_way(self, is_up: bool) -> None:
        """Take the candidate out of the engine, or bring it up again."""
        if self.is_up and not is_up:
            await self.who.endpoint.unload(self.name)
        elif is_up and not self.is_up:
            await self._serve(self.candidate.folder, self.acting, self.candidate.objective)
        self.is_up = is_up

    async def _without(self, fold: int, unloading: AsyncExitStack) -> Contestants | NoContest:
        """Both contestants, served; or why they cannot be had, which is noted, too."""
        twin, objective = twins_of(self.acting, self.who.learning_log)[fold], self.candidate.objective
        folder = self.candidate.folder.with_name(f"{objective}-without-fold-{fold}")
        acting, title = BASE_ADAPTER, folder.name
        try:
            if twin.adapter != BASE_ADAPTER:
                its_folder = self.who.adapter_folder(twin.adapter)
                acting = await self._serve(its_folder, BASE_ADAPTER, f"twin of {self.acting}")
                unloading.push_async_callback(self.who.endpoint.unload, acting)
            has_seen = self.train(fold, objective, acting, folder)
            name = await self._serve(folder, acting, title)
            unloading.push_async_callback(self.who.endpoint.unload, name)
        except (NothingToLearn, TrainingFailed) as reason:
            self.record.add(not_trained={title: str(reason)})
            return NoContest(f"no candidate could be trained without it: {reason}")
        except APIStatusError as error:
            self.record.add(not_registered={title: error.message})
            return NoContest(f"the server did not take in an adapter that was trained without it: {error.message}")
        self.twins[fold] = Twin(name, twin.has_seen | has_seen)
        return Contestants(name, acting)

    def _serve(self, folder: Path, parent: str, reason: str) -> Awaitable[str]:
        """What is registered already is only brought up again."""
        cycle = self.record.cycle
        return self.who.endpoint.register(folder.absolute(), parent, f"{reason}, {cycle}", cycle)
